"""Adapters for other programs: lowered to what the target can hold, with the error of each site stated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save as encode
from torch import Tensor, nn

from omnilora.core import state as states
from omnilora.core.attach import slots
from omnilora.core.context import Context
from omnilora.core.files import write_folder
from omnilora.core.layer import merged_matrix
from omnilora.core.parameterization import Slot, is_additive
from omnilora.core.run import _the_adapter as the_adapter
from omnilora.core.site import Base, called_site
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import BadValue, NotExpressible, UnknownName, nearest
from omnilora.io.peft import noted, to_peft
from omnilora.io.peft_facts import STORED
from omnilora.io.peft_names import family_of
from omnilora.parameterizations.lora import LoRA

WRITTEN = ("peft", "vllm")
PLANNED = ("llama.cpp", "diffusers")
Factors = tuple[Tensor, Tensor, float]  # B, A, relative error


def export(
    model_or_state: nn.Module | AdapterState,
    path: str | os.PathLike[str],
    for_: str = "peft",
    rank: int | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Write an adapter in another program's format.

    Args:
        for_: "peft", or "vllm": PEFT's layout with one rank, α = r, the scale of each site in B, and nothing but LoRA.
        rank: lower every map to plain LoRA of this rank: the truncated SVD of (adapted − base) at each site.
        adapter: which one, if the model has several.

    Returns: {"path", "for", "rank", "errors": {site: ‖D − B A‖/‖D‖}, "worst"}; errors are 0 where nothing was lowered.
    Raises: NotExpressible, naming the site and the reason.
    """
    if for_ in PLANNED:
        raise NotExpressible(f"Export for {for_!r} is not written yet.", f"Available: {', '.join(WRITTEN)}.")
    if for_ not in WRITTEN:
        raise UnknownName(f"No export for {for_!r}.", nearest(for_, WRITTEN + PLANNED))
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadValue(f"rank = {rank!r} is no rank.", "Give an integer ≥ 1.")
    model = model_or_state if isinstance(model_or_state, nn.Module) else None
    given = states.state(model_or_state, adapter) if isinstance(model_or_state, nn.Module) else model_or_state
    state = noted(model, given) if model is not None else given
    errors = dict.fromkeys(state.sites, 0.0)
    if rank is not None:
        state, errors = _lowered(state, rank, model, adapter)
    if for_ == "vllm":
        state = _folded(state)
    config, tensors = to_peft(state)
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    data = {k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)}
    target = write_folder(path, {"adapter_config.json": text.encode(),
                                 "adapter_model.safetensors": encode(data, {"format": "pt"})})  # fmt: skip
    worst = max(errors.values(), default=0.0)
    return {"path": str(target), "for": for_, "rank": rank, "errors": errors, "worst": worst}


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


def _folded(state: AdapterState) -> AdapterState:
    """Linear LoRA of one rank with scale 1: B takes the scale, shorter factors are filled with zeros."""
    r = 0
    for name, s in state.sites.items():
        if type(s.how) is not LoRA or s.kind != "linear":
            what = "an own copy" if family_of(s.how) == "own" else f"{type(s.how).__name__} on a {s.kind}"
            raise NotExpressible(f"{name}: vLLM serves LoRA of linear layers, not {what}.",
                                 "Give rank= to lower it, or leave it out.")  # fmt: skip
        if s.region is not None:
            raise NotExpressible(f"{name} is a slice of a fused layer.", "Give rank= and the model to lower it.")
        r = max(r, s.tensor("A", state).shape[0])
    sites = {}
    for name, s in state.sites.items():
        a, b = s.tensor("A", state), s.tensor("B", state) * s.scale
        pad = r - a.shape[0]
        tensors = {"A": nn.functional.pad(a, (0, 0, 0, pad)), "B": nn.functional.pad(b, (0, pad))}
        how = LoRA(r=r, alpha=float(r), dropout=s.how.dropout)  # type: ignore[attr-defined]
        sites[name] = replace(s, how=how, scale=1.0, tensors=tensors, shared={})
    return replace(state, sites=sites, shared={})
