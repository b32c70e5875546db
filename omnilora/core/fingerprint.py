"""Which base an adapter belongs to: a hash of the bytes of every weight it touches, and a sketch of its values.

The sketch is 32 seeded sign projections over disjoint parts of the elements (a count sketch): a few hundred bytes
that estimate the relative distance between two weights without either of them, so that the same model in another
precision is told from another model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from omnilora.core.site import Site

WIDTH = 32
BLOCK = 1 << 15
SAME_WEIGHTS = 0.2  # NF4 0.092, FP4 0.122; unrelated weights are near 1.4


@dataclass(frozen=True)
class Fingerprint:
    shape: tuple[int, ...]
    digest: str
    sketch: tuple[float, ...]
    norm: float


@dataclass(frozen=True)
class Verdict:
    """``same bytes``, ``same weights`` (another precision or quantization), ``another model``, or ``unproven``."""

    verdict: str
    distance: float
    worst: str


@lru_cache(maxsize=1)
def _signs() -> Tensor:
    g = torch.Generator().manual_seed(20240715)
    return torch.randint(0, 2, (BLOCK,), generator=g).float() * 2 - 1


def _sketch(w: Tensor) -> tuple[tuple[float, ...], float]:
    flat = w.detach().flatten().float().cpu()
    total = torch.zeros(WIDTH, dtype=torch.float64)
    signs = _signs()
    for at, part in enumerate(flat.split(BLOCK)):
        signed = part * signs[: part.numel()].roll(at)
        pad = -part.numel() % WIDTH
        total += torch.nn.functional.pad(signed, (0, pad)).view(-1, WIDTH).sum(0).double()
    return tuple(float(v) for v in total.float()), float(flat.norm())


def raw_bytes(t: Tensor) -> Any:
    """A tensor's bytes in order, as a buffer: its own memory where that can be."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def digest(t: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(t)).hexdigest()


_kept: MutableMapping[Tensor, tuple[tuple[int, bytes], Fingerprint]] = WeakTensorKeyDictionary()


def fingerprint(site: Site) -> Fingerprint:
    """Computed once for each weight, again when its version or a sample of its bytes has changed; of a carried weight,
    that of the original weight behind it."""
    origin: Fingerprint | None = site.store.origin
    if origin is not None:
        return origin
    flat = next(iter(site.store.tensors().values())).detach().flatten()
    sample = flat[:: max(1, flat.numel() // 64)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    mark = (site.store.parameter._version, sample)
    kept = _kept.get(site.store.parameter)
    if kept is not None and kept[0] == mark:
        return kept[1]
    made = _fingerprint(site)
    _kept[site.store.parameter] = (mark, made)
    return made


def _fingerprint(site: Site) -> Fingerprint:
    store = site.store
    w = store.read().detach()
    sketch, norm = _sketch(w)
    h = hashlib.sha256("".join(digest(t) for t in store.tensors().values()).encode()).hexdigest()
    return Fingerprint(tuple(store.shape()), h, sketch, norm)


def compare(saved: Mapping[str, Fingerprint], sites: Mapping[str, Site]) -> Verdict:
    """The verdict over all touched weights, and the relative distance ‖W − W'‖/‖W‖ that the sketches estimate."""
    far, size, worst, where, same = 0.0, 0.0, -1.0, "", True
    for name, site in sites.items():
        old, new = saved[name], fingerprint(site)
        same &= old.digest == new.digest
        if old.digest == new.digest:
            size += old.norm**2
            continue
        gap = sum((a - b) ** 2 for a, b in zip(old.sketch, new.sketch))
        far, size = far + gap, size + old.norm**2
        ratio = math.sqrt(gap / max(old.norm**2, 1e-30))
        if ratio > worst:
            worst, where = ratio, name
    if not sites:
        return Verdict("unproven", 0.0, "")
    distance = math.sqrt(far / max(size, 1e-30))
    verdict = "same bytes" if same else "same weights" if distance < SAME_WEIGHTS else "another model"
    return Verdict(verdict, distance, where)
