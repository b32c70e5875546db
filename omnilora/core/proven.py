"""The next load of a file that was proven on this base: no parsing, no proof, no walk over the model.

What a full load found is kept on the model's hub: the sites, what the slots look like, and where in the file each tensor's bytes
are. It is used again only where nothing can have changed: the folder and its files have the same identity (device, inode, size,
times of modification and of change), the layers stand where they stood, and their weights are the same memory in the same
version. Anything else, and any adapter with nested, shared or foreign tensors, takes the full way.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import activate, announce, freeze
from omnilora.core.context import Hub
from omnilora.core.fingerprint import Watch
from omnilora.core.layer import Adapted, attach_layer, base_modules, blank, path_name
from omnilora.core.method import Method
from omnilora.core.parameterization import Parameterization, Slot, is_still
from omnilora.core.row import ALIGNED, Lease, Row, lease
from omnilora.core.site import Site

KEPT = 1024  # files
RACY = 50_000_000  # ns: a file written so shortly before may be written again within one tick of its clock

Stamp = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """One site: its slot as a pattern, its tensors as (name, learns, first byte, numbers, shape), the layer's parent and name there."""

    site: Site
    parent: nn.Module
    child: str
    weight: Tensor
    state: tuple[int, int]
    pattern: Mapping[str, Any]
    tensors: tuple[tuple[str, bool, int, int, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class Proven:
    model: weakref.ref[nn.Module]
    stamps: tuple[Stamp, ...]
    file: Path
    begin: int
    size: int
    parts: tuple[Part, ...]
    aligned: bool  # whether every tensor stays where it was read
    watch: Watch | None  # of the weights, where the load was proven against them
    method: Method
    needs_run: bool
    extra: Mapping[str, Any]
    report: Mapping[str, Any]


def stamps(folder: Path) -> tuple[Stamp, ...] | None:
    """The identity of a folder and of what lies in it; None where it cannot be read."""
    try:
        inside = sorted(e.path for e in os.scandir(folder))
        return (_stamp(os.stat(folder)), *(_stamp(os.stat(p)) for p in inside))
    except OSError:
        return None


def _stamp(s: os.stat_result) -> Stamp:
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def remember(hub: Hub, model: nn.Module, key: tuple[Any, ...], seen: tuple[Stamp, ...] | None, row: Row, name: str,
             report: Mapping[str, Any]) -> None:  # fmt: skip
    """Keep what the load of adapter ``name`` found, where it can be done again: where every tensor is still the memory that
    the file was read into. ``seen``: the stamps from before that load; ``row``: that memory."""
    if seen is None or stamps(row.path.parent) != seen or torch.is_inference_mode_enabled():
        return
    if max(max(s[3], s[4]) for s in seen) > time.time_ns() - RACY:
        return
    places: dict[int, tuple[nn.Module, str]] = {}
    slots: list[Slot] = []
    for _, layer in base_modules(model):
        places |= {id(child): (layer, at) for at, child in layer._modules.items()}
        if isinstance(layer, Adapted):
            here = layer.adapters.slots.get(name, [])
            if len(here) > 1:
                return
            slots += here
    parts = []
    for slot in slots:
        made = _part(slot, places, row)
        if made is None:
            return
        parts.append(made)
    kept: dict[Any, Proven] = hub.kept.setdefault("proven", {})
    while len(kept) >= KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = Proven(
        weakref.ref(model), seen, row.path, row.begin, row.size - row.begin, tuple(parts),
        aligned=all(at % ALIGNED == 0 for part in parts for _, _, at, _, _ in part.tensors),
        watch=Watch(p.site.store for p in parts) if key[1] else None,
        method=hub.values["methods"][name],
        needs_run=name in hub.needs_run,
        extra=copied(hub.values.get("extra", {}).get(name, {})),
        report=dict(report),
    )  # fmt: skip


def _part(slot: Slot, places: Mapping[int, tuple[nn.Module, str]], row: Row) -> Part | None:
    site = slot.site
    usual = slot.how.placed.__func__ is Parameterization.placed  # type: ignore[attr-defined]
    plain = (site.kind == "linear" and site.called and site.host is None and usual
             and not slot._modules and not slot._buffers and not slot.shared and id(site.layer) in places)  # fmt: skip
    store = site.store
    if not plain or not store.dense or store.device.type != "cpu" or store.carried or store.parameter.is_inference():
        return None
    still = slot.how.frozen()
    tensors = []
    for name, p in slot._parameters.items():
        at = None if p is None else row.offset(p)
        if p is None or at is None or p.dtype != torch.float32 or not p.is_contiguous() or p._version:
            return None
        tensors.append((name, not is_still(name, still), at, p.numel(), tuple(p.shape)))
    parent, child = places[id(site.layer)]
    weight = store.parameter
    pattern = {k: v for k, v in vars(slot).items() if not k.startswith("_") and k not in ("adapter", "training")}
    pattern |= {"roles": dict(slot.roles), "marks": copied(slot.marks)}
    return Part(site, parent, child, weight, (weight.data_ptr(), weight._version), pattern, tuple(tensors))


def again(model: nn.Module, hub: Hub, key: tuple[Any, ...], folder: Path, name: str, quota: int) -> dict[str, Any] | None:
    """Load the file once more as adapter ``name``; None where that needs the full way, with nothing touched."""
    kept: dict[Any, Proven] = hub.kept.get("proven", {})
    found = kept.get(key)
    if found is None or found.model() is not model or name in hub.names or hub.merged or torch.is_inference_mode_enabled():
        return None
    if found.begin + found.size > quota:
        return None
    reading = _Reading(found)
    same = stamps(folder) == found.stamps and all(_stands(p, hub) for p in found.parts) and (found.watch is None or found.watch.same())
    if not same:
        reading.done()
        del kept[key]  # with what it holds of layers that may be gone
        return None
    if not found.aligned and not reading.done():  # copies are made of what is there
        return None
    with uncollected(), hub.changing:
        slots = [_slot(p, name, reading.memory, p.site.layer.training) for p in found.parts]
        if not reading.done():
            return None
        freeze(model)
        home, fresh = path_name(name), False
        for part, slot in zip(found.parts, slots):
            layer = part.site.layer
            fresh = fresh or not isinstance(layer, Adapted)
            attach_layer(layer, hub).put(name, home, slot)
        if fresh:
            announce(model, hub)
        hub.add(name)
        hub.values.setdefault("methods", {})[name] = found.method
        hub.values["planned"] = list(dict.fromkeys([*hub.values.get("planned", ()), *(p.site.name for p in found.parts)]))
        if found.extra:
            hub.values.setdefault("extra", {})[name] = copied(found.extra)
        if found.needs_run:
            hub.needs_run[name] = found.method.key
    activate(model, name)
    return dict(found.report)


@contextmanager
def uncollected() -> Iterator[None]:
    """A thousand new objects that all live on: collections meanwhile would find nothing, in most of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _stands(part: Part, hub: Hub) -> bool:
    """The layer is where it was, nobody else's, and its weight the same memory in the same version."""
    w, layer = part.weight, part.site.layer
    return (
        part.parent._modules.get(part.child) is layer
        and layer._parameters.get(part.site.param) is w
        and (w.data_ptr(), w._version) == part.state
        and (not isinstance(layer, Adapted) or layer.adapters.hub is hub)
    )


class _Reading:
    """The bytes of the tensors, read into memory of their own by a second thread while the first makes what will stand on it: most of
    the time goes into new pages, which the system makes without Python."""

    def __init__(self, known: Proven) -> None:
        self.known, self.memory, self.whole = known, lease(known.size), False
        self.thread: threading.Thread | None = threading.Thread(target=self._read, name="omnilora-read", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # no thread is to be had
            self.thread = None
            self._read()

    def _read(self) -> None:
        known, out = self.known, memoryview(self.memory)  # type: ignore[arg-type]
        with suppress(OSError), open(known.file, "rb", buffering=0) as f:
            before = _stamp(os.fstat(f.fileno()))
            if before not in known.stamps or before[2] != known.begin + known.size:
                return
            f.seek(known.begin)
            got = 0
            while got < known.size and (n := f.readinto(out[got:])):  # type: ignore[arg-type]
                got += n
            self.whole = got == known.size and _stamp(os.fstat(f.fileno())) == before

    def done(self) -> bool:
        """Whether all of the file as it was known is there."""
        if self.thread is not None:
            self.thread.join()
        return self.whole


def copied(value: Any) -> Any:
    """Plain data (what marks and extras are: they go into JSON) that shares no list or mapping with the original."""
    if isinstance(value, dict):
        return {k: copied(v) if isinstance(v, (dict, list)) else v for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value


def _slot(part: Part, name: str, data: Lease, training: bool) -> Slot:
    pattern = part.pattern
    slot = blank(Slot, pattern)
    own = slot.__dict__
    own["adapter"], own["training"], own["shared"] = name, training, {}
    own["roles"], own["marks"] = dict(pattern["roles"]), copied(pattern["marks"])
    for tensor, learns, at, count, shape in part.tensors:
        value = torch.frombuffer(data, dtype=torch.float32, count=count, offset=at).view(shape)
        value = value.clone() if at % ALIGNED else value
        own["_parameters"][tensor] = Tensor._make_subclass(nn.Parameter, value, learns)
    return slot
