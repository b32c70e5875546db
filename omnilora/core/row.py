"""The tensors of a safetensors file in one piece of memory, read once: no copy for each of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


ALIGNED = 64  # bytes; products round otherwise on numbers that begin elsewhere, so these are copied out
SPARE = 64 << 20  # bytes of memory that are kept for the next file: pages that were used before need not be made
_spare: list[Any] = []
_lending = threading.RLock()  # a collection inside may give memory back in the same thread


class Lease(np.ndarray):  # type: ignore[type-arg]
    """Bytes for one file, never sliced. When the last tensor on them is gone they wait for the next file of that size."""

    whole: Any = None

    def __del__(self, lending: Any = _lending, spare: list[Any] = _spare, most: int = SPARE) -> None:
        whole = self.whole  # defaults: a module's names are gone at the interpreter's end
        if whole is None:
            return
        with lending:
            if sum(m.nbytes for m in spare) + whole.nbytes <= most:
                spare.append(whole)


def lease(size: int) -> Lease:
    """``size`` bytes of unknown content that nothing else refers to, aligned as torch aligns."""
    with _lending:
        at = next((i for i, m in enumerate(_spare) if size <= m.nbytes <= size + size // 8), None)
        whole: Any = None if at is None else _spare.pop(at)
    whole = torch.empty(size, dtype=torch.uint8, device="cpu").numpy() if whole is None else whole
    made = whole[:size].view(Lease)
    made.whole = whole
    return made


@dataclass(frozen=True, eq=False)
class Row:
    """A whole file in memory. ``begin``: where the tensors' bytes begin."""

    path: Path
    memory: Lease  # tensors hold it too
    address: int
    size: int
    begin: int
    copies: Mapping[int, int]  # address of a tensor that was copied out → where its bytes are, counted from ``begin``

    def offset(self, t: Tensor) -> int | None:
        """Where the bytes of ``t`` are, counted from ``begin``; None where they are not of this file."""
        if t.data_ptr() in self.copies:
            return self.copies[t.data_ptr()]
        at = t.data_ptr() - self.address - self.begin
        return at if 0 <= at <= self.size - self.begin - t.numel() * t.itemsize else None


def read(path: Path, header: Mapping[str, Any], head: bytes) -> tuple[dict[str, Tensor], Row] | None:
    """Every tensor as a view with a storage of its own, where the file is as writers make them; None for any other.

    Args:
        header: the checked header.
        head: the bytes of it and of its length, with which the file has to begin when it is read.
    """
    begin, at = len(head), 0
    spans = sorted((info["data_offsets"], name) for name, info in header.items() if name != "__metadata__")
    for (first, last), name in spans:
        if first != at or last == first or (begin + first) % DTYPES[header[name]["dtype"]].itemsize:
            return None
        at = last
    texts = header.get("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()) or head[8:9] != b"{":
        return None
    pad = -begin % ALIGNED
    memory = lease(pad + begin + at)
    view = memoryview(memory)[pad:]  # type: ignore[arg-type]
    with open(path, "rb", buffering=0) as f:
        if os.fstat(f.fileno()).st_size != begin + at:
            return None
        got = 0
        while got < begin + at and (n := f.readinto(view[got:])):  # type: ignore[arg-type]
            got += n
    if got != begin + at or view[:begin] != head:
        return None
    out, copies = {}, {}
    for (first, last), name in spans:
        dtype = DTYPES[header[name]["dtype"]]
        count = (last - first) // dtype.itemsize
        t = torch.frombuffer(memory, dtype=dtype, count=count, offset=pad + begin + first).view(header[name]["shape"])
        if first % ALIGNED:
            t = t.clone()
            copies[t.data_ptr()] = first
        out[name] = t
    return out, Row(path, memory, memory.ctypes.data + pad, begin + at, begin, copies)
