"""GGUF files, read once and fast: transformers asks for one three times, and gguf cuts its vocabulary into slices of a mapped array."""

from __future__ import annotations

import importlib
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np

_word = struct.Struct("=Q").unpack_from
_patching = threading.RLock()


@lru_cache(maxsize=1)
def _reader() -> Any:
    """gguf's reader, over a plain array and with lists of the file read in one loop."""
    gguf: Any = importlib.import_module("gguf")
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(path, *args, **kwargs)
            except (IndexError, OverflowError, struct.error) as error:
                raise ValueError(f"{path} ends early or is no GGUF file ({error})") from error

        @property
        def data(self) -> np.ndarray:  # type: ignore[type-arg]
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:  # type: ignore[type-arg]
            self._plain = mapped.view(np.ndarray)

        def _get_field_parts(self, at: int, raw_type: int) -> Any:
            if raw_type != kinds.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(at, raw_type)
            kind, count = self._get(at, np.uint32), self._get(at + 4, np.uint64)
            n, of = int(count[0]), kinds(kind[0])
            types = [kinds.ARRAY, of] if n else [kinds.ARRAY]
            if of == kinds.STRING:
                parts, end = _strings(self._plain, at + 12, n)
                return end - at, [kind, count, *parts], list(range(3, 3 + 2 * n, 2)), types
            scalar = self.gguf_scalar_to_np.get(of)
            if scalar is None:
                return super()._get_field_parts(at, raw_type)
            values = self._get(at + 12, scalar, n)
            if len(values) < n:
                raise IndexError(f"a list of {n} numbers")
            return 12 + values.nbytes, [kind, count, *(values[i : i + 1] for i in range(n))], list(range(2, 2 + n)), types

    return Reader


def _strings(data: Any, at: int, n: int) -> tuple[list[Any], int]:
    """[length, bytes, length, bytes …] of ``n`` strings from byte ``at`` on, and where they end."""
    parts, raw, size = [], data.data, len(data)
    for _ in range(n):
        end = at + 8 + _word(raw, at)[0]
        if end > size:
            raise IndexError("a string")
        parts += [data[at : at + 8].view(np.uint64), data[at + 8 : end]]
        at = end
    return parts, at


class _Memory(dict[str, Any]):
    """Readers by path, while it is open."""

    open = True


def _once(made: _Memory) -> Any:
    """The reader as a class that gives one object a path while ``made`` is open."""

    class Once(_reader()):  # type: ignore[misc]
        def __new__(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            return (None if args or kwargs else made.get(os.fspath(path))) or super().__new__(cls)

        def __init__(self, path: Any, *args: Any, **kwargs: Any) -> None:
            if "fields" in vars(self):
                return
            super().__init__(path, *args, **kwargs)
            if made.open and not args and not kwargs:
                made[os.fspath(path)] = self

    return Once


@contextmanager
def gguf_read_fast() -> Iterator[None]:
    """Inside, whoever asks gguf for a reader gets one that is fast, the same for the same file, and tables of names are made once."""
    gguf: Any = importlib.import_module("gguf")
    with _patching, ExitStack() as stack:
        made = _Memory()
        stack.callback(made.clear)
        tables = lru_cache(maxsize=8)(gguf.get_tensor_name_map)
        stack.callback(tables.cache_clear)
        stack.enter_context(mock.patch.object(gguf, "GGUFReader", _once(made)))
        stack.enter_context(mock.patch.object(gguf, "get_tensor_name_map", tables))
        try:
            yield
        finally:
            made.open = False
