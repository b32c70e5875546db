"""Merging: the one operation that writes to the base, reported with numbers and undone bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import detach, hosts, hub_of
from omnilora.core.context import Context, Hub, RowSpec
from omnilora.core.maps import adapted_tensors, change_of, merged_matrix
from omnilora.core.op import Op
from omnilora.core.site import Base, Site
from omnilora.core.store import Dense, store_of
from omnilora.errors import AttachError, BadValue, MergeRefused, NotMergeable

BOUNDS = {"fp64": 1e-9, "fp32": 1e-3, "16 bit": 1e-2, "requantized": 5e-2}


@dataclass(frozen=True)
class LayerReport:
    """Relative errors of one merged weight: of the stored matrix, and of the layer's action on seeded vectors.

    ``absorbed``: a quantized store folded the update in exactly; no weight was rounded again.
    """

    name: str
    dtype: str
    weight_error: float
    action_error: float
    written: bool
    absorbed: bool = False


@dataclass(frozen=True)
class MergeReport:
    """``largest`` and ``mean``: relative change of outputs, on the probe batch if one was given, else of the layers'
    action on seeded vectors."""

    adapters: tuple[str, ...]
    largest: float
    mean: float
    bound: float
    probed: str
    layers: tuple[LayerReport, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Originals:
    """Stored originals of merged weights, in memory or in a file that lives as long as this object."""

    def __init__(self, keep: str) -> None:
        if keep not in ("ram", "disk", "none"):
            raise BadValue(f"keep = {keep!r}.", "Give 'ram', 'disk' or 'none'.")
        self.keep = keep
        self.items: dict[str, dict[str, Tensor]] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="omnilora-") if keep == "disk" else None

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.keep == "none":
            return
        copies = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
        if self.folder is not None:
            from safetensors.torch import save_file

            save_file(copies, Path(self.folder.name) / f"{len(self.items)}.safetensors")
            copies = {}
        self.items[name] = copies

    def get(self, name: str) -> dict[str, Tensor]:
        if self.folder is None:
            return self.items[name]
        from safetensors.torch import load_file

        at = list(self.items).index(name)
        return load_file(Path(self.folder.name) / f"{at}.safetensors")

    def __deepcopy__(self, memo: Any) -> Originals:
        other = Originals("none" if self.keep == "none" else "ram")
        other.items = {name: {k: t.clone() for k, t in self.get(name).items()} for name in self.items}
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"keep": "none" if self.keep == "none" else "ram", "folder": None,
                "items": {name: self.get(name) for name in self.items}}  # fmt: skip


def merge(
    model: nn.Module,
    adapters: RowSpec = None,
    *,
    keep: str = "ram",
    probe: Callable[[nn.Module], Tensor] | None = None,
    bound: float | None = None,
    requantize: bool = False,
) -> MergeReport:
    """Write the active adapters (or ``adapters``) into the base weights.

    Args:
        keep: where originals wait for :func:`unmerge`: "ram", "disk", or "none" (cannot be undone).
        probe: runs the model on a batch of yours and returns its outputs; they are compared before and after.
        bound: refuse, and leave the model as it was, if the largest relative change of outputs exceeds it.
            Default: 1e-3 in fp32, 1e-2 in 16 bit, 5e-2 where a quantizer is written.
        requantize: write into quantized stores. Default: quantized weights merge into a dense copy beside them.

    Returns: a report with the errors of every layer. Raises :class:`MergeRefused`, :class:`NotMergeable`.
    """
    hub = hub_of(model)
    if hub.merged:
        raise AttachError(f"{', '.join(hub.merged)} is merged already.", "Call ol.unmerge(model) first.")
    active = hub.active if adapters is None else hub.resolve(adapters)
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    originals = Originals(keep)
    done: list[Any] = []
    reports: list[LayerReport] = []
    try:
        before_active = hub.active
        hub.active = active
        with torch.no_grad():
            before = probe(model) if probe is not None else None
            todo = [(n, layer, _new_weights(layer, active, hub.current())) for n, layer in hosts(model)]
            for name, layer, new in todo:
                for site, m, offset, change in new:
                    reports.append(_write(name, layer, site, m, offset, change, originals, done, requantize))
            hub.merged = tuple(n for n, _ in active)
            after = probe(model) if probe is not None else None
        errors = _relative(before, after) if before is not None and after is not None else (
            max((r.action_error for r in reports), default=0.0),
            sum(r.action_error for r in reports) / max(len(reports), 1))  # fmt: skip
        limit = bound if bound is not None else max((BOUNDS[_grade(r, requantize)] for r in reports), default=0.0)
        report = MergeReport(tuple(n for n, _ in active), *errors, limit,
                             "the probe batch" if probe is not None else "seeded vectors", tuple(reports))  # fmt: skip
        if not errors[0] <= limit:
            worst = max(reports, key=lambda r: r.action_error)
            raise MergeRefused(f"Merging changes outputs by {errors[0]:.3g} relative, more than {limit:.3g} "
                               f"(worst layer {worst.name}, {worst.action_error:.3g}).",
                               "Keep the adapter unmerged, merge into fp32, or pass bound= if this is acceptable.")  # fmt: skip
    except BaseException:
        if keep == "none" and done:
            hub.merged = tuple(n for n, _ in active)
            raise
        hub.merged = ()
        _restore(done, originals)
        hub.active = before_active
        raise
    finally:
        for module, mode in training:
            module.training = mode
    hub.values["unmerge"] = (originals, [key for key, *_ in done], before_active)
    hub.changed()
    return report


def _grade(report: LayerReport, requantize: bool) -> str:
    if requantize and report.dtype == "quantized":
        return "requantized"
    return {"float64": "fp64", "float32": "fp32"}.get(report.dtype, "16 bit")


def _relative(before: Tensor, after: Tensor) -> tuple[float, float]:
    a, b = before.float().flatten(0, -2), after.float().flatten(0, -2)
    rows = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-30)
    return float(rows.max()), float(rows.mean())


def _new_weights(layer: Any, active: Any, ctx: Context) -> list[tuple[Site, Tensor, Tensor | None, Op | None]]:
    """(site, stored-layout tensor, offset or None, W' − W as a map or None) of every weight of a layer that changes;
    nothing is written."""
    pairs = [(s, w) for name, w in active if name in layer.adapters.slots for s in layer.adapters.slots[name]
             if s.site.kind != "source"]  # fmt: skip
    out: list[tuple[Site, Tensor, Tensor | None, Op | None]] = []
    called = [p for p in pairs if p[0].site.called]
    if called:
        site = called[0][0].site
        m, offset = merged_matrix(Base(site, layer), called, ctx)
        if offset is not None and site.store.offset is None:
            raise NotMergeable(f"{site.name}: the adapted map has an offset, and the layer has no bias to hold it.",
                               "Keep the adapter unmerged, or leave this layer out of its targets.")  # fmt: skip
        out.append((site, site.layout.stored(m, site.store.shape()), offset, change_of(called, ctx)))
    reads = [p for p in pairs if not p[0].site.called]
    for key, value in adapted_tensors(reads, ctx).items():
        site = next(s.site for s, _ in reads if s.site.key == key)
        out.append((site, value.detach(), None, None))
    return out


def _write(name: str, layer: Any, site: Site, m: Tensor, offset: Tensor | None, change: Op | None, originals: Originals,
           done: list[Any], requantize: bool) -> LayerReport:  # fmt: skip
    store = site.store
    key = f"{name}|{site.key}"
    absorbed = False
    if change is not None and not isinstance(store, Dense):
        before = {k: t.detach().clone() for k, t in store.tensors().items()}
        absorbed = store.absorb(change, site)
    writable = isinstance(store, Dense) or requantize or absorbed
    if absorbed:
        originals.add(key, before)
        kept = store.read()
    elif writable:
        originals.add(key, store.tensors())
        store.write(m)
        kept = store.read()
    else:
        layer.adapters.merged[site.param] = kept = m.to(_compute_dtype(store))
    done.append((key, layer, site, writable))
    if offset is not None and (bias := store.offset) is not None:
        originals.add(f"{key}|offset", {"bias": bias})
        done.append((f"{key}|offset", layer, site, True))
        with torch.no_grad():
            bias.copy_(offset.to(bias.dtype))
    g = torch.Generator().manual_seed(0)
    exact = torch.float64 if kept.dtype == torch.float64 else torch.float32
    wide, stored = m.to(exact), kept.detach().to(exact)
    mat, mat2 = site.layout.matrix(wide), site.layout.matrix(stored)
    x = torch.randn(8, mat.shape[-1], generator=g).to(mat)
    y, z = x @ mat.mT, x @ mat2.mT
    action = float((y - z).norm() / y.norm().clamp_min(1e-30))
    error = float((wide - stored).norm() / wide.norm().clamp_min(1e-30))
    rounded = not isinstance(store, Dense) and writable and not absorbed
    kind = "quantized" if rounded else str(kept.dtype).removeprefix("torch.")
    return LayerReport(site.name, kind, error, action, writable, absorbed)


def _compute_dtype(store: Any) -> torch.dtype:
    return store.dtype if store.dtype.is_floating_point else torch.float32


def _restore(done: list[Any], originals: Originals) -> None:
    with torch.no_grad():
        for key, layer, site, writable in done:
            if not writable:
                layer.adapters.merged.pop(site.param, None)
            elif key.endswith("|offset"):
                site.store.offset.copy_(originals.get(key)["bias"])
            else:
                old = originals.get(key)
                for name, t in site.store.tensors().items():
                    t.copy_(old[name])


def unmerge(model: nn.Module) -> None:
    """Give the base its stored originals back, bit for bit, and the adapters their place."""
    hub: Hub = hub_of(model)
    if not hub.merged:
        raise AttachError("Nothing is merged.", "")
    originals, keys, active = hub.values["unmerge"]
    if originals.keep == "none":
        raise AttachError("Merged with keep='none': the originals are gone.", "Load the base again.")
    table = {f"{n}|{s.site.key}": (layer, s.site) for n, layer in hosts(model)
             for group in layer.adapters.slots.values() for s in group}  # fmt: skip
    for n, layer in hosts(model):
        for group in layer.adapters.slots.values():
            for s in group:
                if s.site.region is not None:
                    table.setdefault(f"{n}|{s.site.key}", (layer, s.site))
    done = []
    for key in keys:
        layer, site = table[key.removesuffix("|offset")]
        done.append((key, layer, site, key in originals.items))
    _restore(done, originals)
    hub.merged = ()
    hub.active = active
    del hub.values["unmerge"]
    hub.changed()


def merge_and_unload(model: nn.Module, adapters: RowSpec = None, **options: Any) -> nn.Module:
    """The plain model with the adapters folded in: no adapter, no trace. Quantized layers become dense ones."""
    merge(model, adapters, keep="none", **options)
    hub = hub_of(model)
    dense = [(n, layer, dict(layer.adapters.merged)) for n, layer in hosts(model) if layer.adapters.merged]
    for _, layer, _ in dense:
        layer.adapters.merged.clear()
    hub.merged = ()
    detach(model)
    for name, layer, tensors in dense:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, last, _dense_copy(layer, tensors["weight"]))
    return model


def _dense_copy(layer: Any, weight: Tensor) -> nn.Linear:
    bias = store_of(layer).offset
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made.train(layer.training)


__all__ = ["MergeReport", "merge", "merge_and_unload", "unmerge"]
