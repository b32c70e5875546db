"""Which base an adapter belongs to: a hash of the bytes of every weight it touches, and a sketch of its values.

The sketch is 32 seeded sign projections over disjoint parts of the elements (a count sketch): a few hundred bytes
that estimate the relative distance between two weights without either of them, so that the same model in another
precision is told from another model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from omnilora.core.site import Site
from omnilora.core.store import Store

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
    return torch.randint(0, 2, (BLOCK,), generator=g, device="cpu").float() * 2 - 1


def _sketch(w: Tensor) -> tuple[tuple[float, ...], float]:
    flat = w.detach().flatten().float().cpu()
    total = torch.zeros(WIDTH, dtype=torch.float64, device="cpu")
    signs = _signs()
    twice, signed = torch.cat((signs, signs)), torch.empty(BLOCK, device="cpu")
    for at, part in enumerate(flat.split(BLOCK)):
        if part.numel() == BLOCK:
            back = BLOCK - at % BLOCK
            total += torch.mul(part, twice[back : back + BLOCK], out=signed).view(-1, WIDTH).sum(0).double()
            continue
        rest = part * signs[: part.numel()].roll(at)
        total += torch.nn.functional.pad(rest, (0, -part.numel() % WIDTH)).view(-1, WIDTH).sum(0).double()
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
    found, mark = _known(site.store)
    if found is None:
        found = _fingerprint(site.store, [digest(t) for t in site.store.tensors().values()])
        _kept[site.store.parameter] = (mark, found)
    return found


def _known(store: Store) -> tuple[Fingerprint | None, tuple[int, bytes]]:
    """The fingerprint that is kept, if it still holds, and the mark by which that is told."""
    weight = store.parameter
    version = -1 if weight.is_inference() else weight._version
    mark = (version, _sample(store).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    kept = _kept.get(weight)
    return (kept[1] if kept is not None and kept[0] == mark else None), mark


def _sample(store: Store) -> Tensor:
    """About 64 numbers of the weight."""
    flat = next(iter(store.tensors().values())).detach().flatten()
    return flat[:: max(1, flat.numel() // 64)]


class Watch:
    """Whether dense weights, whose fingerprints are known, are still the same as far as a sample of their numbers tells; versions
    are for the caller to look at. Holds the parameters, not their memory."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self.weights = [(s.parameter, max(1, s.parameter.numel() // 64)) for s in stores if s.origin is None]
        self.first = self._read()

    def _read(self) -> bytes:
        with torch.no_grad():
            samples = [p.flatten()[::step] for p, step in self.weights]
            if len({t.dtype for t in samples}) == 1:  # in one step
                return torch.cat(samples).cpu().view(torch.uint8).numpy().tobytes()  # type: ignore[no-any-return]
            return b"".join(t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in samples)

    def same(self) -> bool:
        return self._read() == self.first


def _fingerprint(store: Store, digests: Iterable[str]) -> Fingerprint:
    sketch, norm = _sketch(store.read().detach())
    h = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Fingerprint(tuple(store.shape()), h, sketch, norm)


def fingerprints(sites: Mapping[str, Site]) -> dict[str, Fingerprint]:
    """:func:`fingerprint` of each; of new weights a second thread hashes the bytes while this one makes the sketches."""
    out = {n: s.store.origin or _known(s.store)[0] for n, s in sites.items()}
    new = [n for n, f in out.items() if f is None]
    if len(new) > 1:
        with ThreadPoolExecutor(1, "fingerprint") as pool:
            hashed = {n: [pool.submit(digest, t) for t in sites[n].store.tensors().values()] for n in new}
            for n in new:
                store = sites[n].store
                mark = _known(store)[1]
                made = _fingerprint(store, (job.result() for job in hashed[n]))
                _kept[store.parameter], out[n] = (mark, made), made
    return {n: f if f is not None else fingerprint(sites[n]) for n, f in out.items()}


def compare(saved: Mapping[str, Fingerprint], sites: Mapping[str, Site]) -> Verdict:
    """The verdict over all touched weights, and the relative distance ‖W − W'‖/‖W‖ that the sketches estimate."""
    far, size, worst, where, same = 0.0, 0.0, -1.0, "", True
    for name, new in fingerprints(sites).items():
        old = saved[name]
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
