"""The next load of a file that was proven on this base: no parsing, no proof, no walk over the model.

What a full load found is kept on the model's hub: the sites, what the slots look like, and where in the file each tensor's bytes
are. It is used again only where nothing can have changed: the folder and its files have the same identity (device, inode, size,
times of modification and of change), the layers stand where they stood, and their weights are the same memory in the same
version. Anything else, and any adapter with nested, shared or foreign tensors, takes the full way.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core import layer as layers
from omnilora.core.attach import activate
from omnilora.core.context import Hub
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
    stamps: tuple[Stamp, ...]
    file: Path
    begin: int
    size: int
    parts: tuple[Part, ...]
    base: tuple[Tensor, ...]
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


def remember(hub: Hub, model: nn.Module, key: tuple[Any, ...], seen: tuple[Stamp, ...] | None, file: Path, row: Row, name: str,
             report: Mapping[str, Any]) -> None:  # fmt: skip
    """Keep what the load of adapter ``name`` found, where it can be done again: where every tensor is still the memory that
    the file was read into. ``seen``: the stamps from before that load; ``row``: that memory."""
    if seen is None or stamps(file.parent) != seen:
        return
    if max(max(s[3], s[4]) for s in seen) > time.time_ns() - RACY:
        return
    places: dict[int, tuple[nn.Module, str]] = {}
    slots: list[Slot] = []
    base: list[Tensor] = []
    for _, layer in base_modules(model):
        places |= {id(child): (layer, at) for at, child in layer._modules.items()}
        base += [p for p in layer._parameters.values() if p is not None]
        if isinstance(layer, Adapted):
            slots += layer.adapters.slots.get(name, ())
    parts = []
    for slot in slots:
        made = _part(slot, places, row)
        if made is None:
            return
        parts.append(made)
    kept: dict[Any, Proven] = hub.kept.setdefault("proven", {})
    while len(kept) >= KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = Proven(seen, file, row.begin, row.size - row.begin, tuple(parts), tuple(base), hub.values["methods"][name],
                       name in hub.needs_run, dict(hub.values.get("extra", {}).get(name, {})), dict(report))  # fmt: skip


def _part(slot: Slot, places: Mapping[int, tuple[nn.Module, str]], row: Row) -> Part | None:
    site = slot.site
    plain = (site.kind == "linear" and site.called and site.host is None and slot.how.placed.__func__ is Parameterization.placed  # type: ignore[attr-defined]
             and not slot._modules and not slot._buffers and not slot.shared and id(site.layer) in places)  # fmt: skip
    store = site.store
    if not plain or not store.dense or store.device.type != "cpu" or store.carried:
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
    return Part(site, parent, child, weight, (weight.data_ptr(), weight._version), pattern, tuple(tensors))


def again(model: nn.Module, hub: Hub, key: tuple[Any, ...], folder: Path, name: str) -> dict[str, Any] | None:
    """Load the file once more as adapter ``name``; None where that needs the full way, with nothing touched."""
    known: Proven | None = hub.kept.get("proven", {}).get(key)
    if known is None or name in hub.names or hub.merged or stamps(folder) != known.stamps or not all(map(_stands, known.parts)):
        return None
    data = _read(known)
    if data is None:
        return None
    for p in known.base:
        if p.requires_grad:
            p.requires_grad_(False)
    home, fresh = path_name(name), False
    with uncollected():
        for part in known.parts:
            layer: Any = part.site.layer
            if not isinstance(layer, Adapted):
                attach_layer(layer, hub)
                fresh = True
            layer.adapters.put(name, home, _slot(part, name, data, layer.training))
    for call in layers.placed if fresh else ():
        call(model, hub)
    hub.add(name)
    hub.values.setdefault("methods", {})[name] = known.method
    hub.values["planned"] = list(dict.fromkeys([*hub.values.get("planned", ()), *(p.site.name for p in known.parts)]))
    if known.extra:
        hub.values.setdefault("extra", {})[name] = dict(known.extra)
    if known.needs_run:
        hub.needs_run[name] = known.method.key
    activate(model, name)
    return dict(known.report)


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


def _stands(part: Part) -> bool:
    w = part.weight
    return (
        part.parent._modules.get(part.child) is part.site.layer
        and part.site.layer._parameters.get(part.site.param) is w
        and (w.data_ptr(), w._version) == part.state
    )


def _read(known: Proven) -> Lease | None:
    """The bytes of the tensors, read into memory of their own."""
    memory = lease(known.size)
    out = memoryview(memory)  # type: ignore[arg-type]
    try:
        with open(known.file, "rb", buffering=0) as f:
            before = _stamp(os.fstat(f.fileno()))
            f.seek(known.begin)
            got = 0
            while got < known.size and (n := f.readinto(out[got:])):  # type: ignore[arg-type]
                got += n
            same = got == known.size and before in known.stamps and _stamp(os.fstat(f.fileno())) == before
    except OSError:
        return None
    return memory if same else None


def _slot(part: Part, name: str, data: Lease, training: bool) -> Slot:
    pattern = part.pattern
    slot = blank(Slot)
    slot.__dict__.update(pattern)
    slot.__dict__.update(adapter=name, roles=dict(pattern["roles"]), shared={}, marks=dict(pattern["marks"]), training=training)
    for tensor, learns, at, count, shape in part.tensors:
        value = torch.frombuffer(data, dtype=torch.float32, count=count, offset=at).view(shape)
        value = value.clone() if at % ALIGNED else value
        slot._parameters[tensor] = Tensor._make_subclass(nn.Parameter, value, learns)
    return slot
