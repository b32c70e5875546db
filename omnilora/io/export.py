"""Adapters for other programs: lowered to what the target can hold, with the error of each site stated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core import state as states
from omnilora.core.attach import detach, slots
from omnilora.core.context import Context
from omnilora.core.files import QUOTA, load_file
from omnilora.core.maps import merged_matrix
from omnilora.core.parameterization import Slot, is_additive
from omnilora.core.run import _the_adapter as the_adapter
from omnilora.core.site import Base, called_site
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import BadValue, NotExpressible
from omnilora.io import formats, names
from omnilora.io.peft import noted
from omnilora.io.peft_facts import STORED
from omnilora.io.peft_names import family_of
from omnilora.parameterizations.lora import LoRA

Factors = tuple[Tensor, Tensor, float]  # B, A, relative error


def export(
    model_or_state: nn.Module | AdapterState,
    path: str | os.PathLike[str],
    for_: str = "peft",
    rank: int | None = None,
    adapter: str | None = None,
    part: str | None = None,
    save_dtype: str | None = None,
) -> dict[str, Any]:
    """Write an adapter in another program's format.

    Args:
        path: a folder; for formats of one file also that file's name.
        for_: a name of :data:`omnilora.io.formats.FORMATS`: peft, vllm, llama.cpp, diffusers, kohya, lycoris, omnilora.
        rank: lower every map to plain LoRA of this rank: the truncated SVD of (adapted − base) at each site.
        adapter: which one, if the model has several.
        part: for kohya and diffusers, which part of a pipeline the layers belong to: "unet", "te", "te2" ….
        save_dtype: "fp16" or "bf16": round the tensors; the error of a site is then at least the largest of its tensors'.

    Returns: {"path", "for", "rank", "errors": {site: ‖D − B A‖/‖D‖}, "worst"}; errors are 0 where nothing was lowered or
    rounded.
    Raises: NotExpressible, naming the site and the reason.
    """
    form = formats.named(for_)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadValue(f"rank = {rank!r} is no rank.", "Give an integer ≥ 1.")
    model = model_or_state if isinstance(model_or_state, nn.Module) else None
    given = states.state(model_or_state, adapter) if isinstance(model_or_state, nn.Module) else model_or_state
    state = noted(model, given) if model is not None else given
    return written(state, path, form, rank, formats.Target(model, part, dtype_of(save_dtype)), model, adapter)


def written(state: AdapterState, path: str | os.PathLike[str], form: formats.Format, rank: int | None,
            to: formats.Target, adapted: nn.Module | None = None, adapter: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Lower where a rank is given, write, and state the error of each site. ``adapted``: a model with the adapter on it."""
    errors = dict.fromkeys(state.sites, 0.0)
    if rank is not None:
        state, errors = _lowered(state, rank, adapted, adapter)
    if to.dtype is not None:
        if form.name == "omnilora":
            raise BadValue("omnilora's own folder keeps the tensors as they are.", "Leave save_dtype out.")
        errors = {n: max(e, _rounding(state.sites[n], state, to.dtype)) if n in state.sites else e for n, e in errors.items()}
    target = formats.write(state, path, form, to)
    worst = max(errors.values(), default=0.0)
    return {"path": str(target), "for": form.name, "rank": rank, "errors": errors, "worst": worst}


def dtype_of(name: str | None) -> torch.dtype | None:
    if name not in (None, "fp16", "bf16"):
        raise BadValue(f"save_dtype = {name!r}.", "Give fp16 or bf16, or leave it out.")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(name))


def _rounding(s: SiteState, state: AdapterState, dtype: torch.dtype) -> float:
    """The largest ‖t − rounded t‖/‖t‖ of a site's tensors."""
    gaps = [(t - formats.rounded(t, dtype).to(t.dtype)).norm() / t.norm().clamp_min(1e-30)
            for t in (s.tensor(k, state).detach().float() for k in s.roles)]  # fmt: skip
    return float(max(gaps, default=torch.zeros(())))


def convert(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    for_: str = "peft",
    model: nn.Module | None = None,
    rank: int | None = None,
    part: str | None = None,
    save_dtype: str | None = None,
) -> dict[str, Any]:
    """Any readable adapter in any writable format.

    Args:
        source: what ``ol.load_file`` reads.
        model: the base, to find the layers of files whose names have lost their dots, and what a layer is; it may be on
            the meta device. Where lowering reads base weights it needs them.
        rank, part, save_dtype: as in :func:`export`; ``part`` also chooses among the models that a source covers.

    Returns: what :func:`export` returns, and "from", what was read.
    """
    form = formats.named(for_)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadValue(f"rank = {rank!r} is no rank.", "Give an integer ≥ 1.")
    origin = Path(source)
    kind = formats.recognised(origin, QUOTA) if origin.exists() else None
    state = load_file(origin, QUOTA, model)
    adapted = None
    if model is not None:
        state = names.known(model, names.placed(state, model, part))
        if rank is not None and any(not is_additive(s.how) or s.region for s in state.sites.values()):
            states.load_state(model, state, "convert", check_base=False)
            adapted = model
    elif part is not None and names.is_raw(state):
        state = names.only(state, part)
    try:
        report = written(state, path, form, rank, formats.Target(model, part, dtype_of(save_dtype)), adapted, "convert")
    finally:
        if adapted is not None:
            detach(adapted, "convert")
    return {"from": kind, **report}


def _lowered(state: AdapterState, rank: int, model: nn.Module | None,
             adapter: str | None) -> tuple[AdapterState, dict[str, float]]:  # fmt: skip
    """Every site that is no own copy becomes LoRA of ``rank``, slices of one layer together."""
    made = _from_state(state, rank) if model is None else _from_model(model, state, rank, adapter)
    sites = {n: s for n, s in state.sites.items() if family_of(s.how) == "own"}
    for name, (kind, marks, (b, a, _)) in made.items():
        r = a.shape[-2]
        kept = {STORED: {k: v for k, v in marks.get(STORED, {}).items() if k != "pad"}}
        roles = {"A": "input", "B": "output"}
        sites[name] = SiteState(LoRA(r=r, alpha=float(r)), kind, 1.0, {"A": a, "B": b}, roles, marks=kept)
    lowered = replace(state, method="lora", hyper={}, sites=sites, shared={})
    return lowered, {n: 0.0 for n in sites} | {n: f[2] for n, (_, _, f) in made.items()}


Made = dict[str, tuple[str, Mapping[str, Any], Factors]]


def _from_state(state: AdapterState, rank: int) -> Made:
    out: Made = {}
    for name, s in state.sites.items():
        if family_of(s.how) == "own":
            continue
        if s.region is not None or not is_additive(s.how):
            raise NotExpressible(f"{name}: lowering a {type(s.how).__name__} needs the base weight.", "Give the model.")
        try:
            op = states.delta(s, state)
            ba = op.factors()
            d = ba if ba is not None else op.dense()
        except AttributeError as error:
            raise NotExpressible(f"{name}: a {type(s.how).__name__} reads its layer.", "Give the model.") from error
        out[name] = (s.kind, s.marks, truncated(d, rank))
    return out


def _from_model(model: nn.Module, state: AdapterState, rank: int, adapter: str | None) -> Made:
    name = the_adapter(model, adapter)
    groups: dict[str, list[Slot]] = {}
    for slot in slots(model, name):
        if family_of(slot.how) != "own":
            groups.setdefault(slot.site.name.partition("[")[0] if slot.site.region else slot.site.name, []).append(slot)
    out: Made = {}
    for path, group in groups.items():
        first = group[0]
        if not first.site.param:
            raise NotExpressible(f"{path or 'The model'}: {type(first.how).__name__} is no change of a weight.")
        whole = first.site if first.site.region is None else called_site(path, first.site.layer)
        assert whole is not None
        with torch.no_grad():
            d: Tensor | tuple[Tensor, Tensor] | None = None
            if len(group) == 1 and first.site.region is None and is_additive(first.how):
                d = first.how.delta(first, Context()).factors()
            if d is not None:
                d = (d[0], whole.geometry.visible(d[1]))
            else:
                m, offset = merged_matrix(Base(whole, whole.layer), [(slot, 1.0) for slot in group], Context())
                if offset is not None and not torch.equal(offset, whole.layer._parameters["bias"]):
                    raise NotExpressible(f"{path}: the map also moves the bias, which LoRA cannot hold.")
                d = m - whole.read().to(m.dtype)
            factors = truncated(d, rank)
        out[path] = (whole.kind, state.sites[first.site.name].marks, factors)
    return out


def truncated(d: Tensor | tuple[Tensor, Tensor], rank: int) -> Factors:
    """The best B (…, out, r), A (…, r, in) in the Frobenius norm, for D or for D = B₀ A₀; and the relative error."""
    left: Tensor | None = None
    right: Tensor | None = None
    if isinstance(d, tuple):
        left, rb = torch.linalg.qr(d[0].double())
        right, ra = torch.linalg.qr(d[1].double().mT)
        d = rb @ ra.mT
    u, sig, v = torch.linalg.svd(d.double(), full_matrices=False)
    r = min(rank, sig.shape[-1])
    root = sig[..., :r].sqrt()
    b, a = u[..., :r] * root.unsqueeze(-2), root.unsqueeze(-1) * v[..., :r, :]
    b, a = b if left is None else left @ b, a if right is None else a @ right.mT
    pad = rank - r
    if pad:
        b, a = nn.functional.pad(b, (0, pad)), nn.functional.pad(a, (0, 0, 0, pad))
    lost = float(sig[..., r:].square().sum().sqrt() / sig.square().sum().sqrt().clamp_min(1e-300))
    return b.float().cpu().contiguous(), a.float().cpu().contiguous(), lost
