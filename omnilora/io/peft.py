"""PEFT's adapter_config.json and adapter_model.safetensors, written as PEFT 0.21 reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omnilora.core.state import AdapterState, SiteState, site_from_config
from omnilora.errors import NotExpressible
from omnilora.io.names import is_raw
from omnilora.io.peft_facts import STORED, check_facts, noted
from omnilora.io.peft_names import PREFIX, Entry, entries, family_of, lora_of, renamed, split
from omnilora.io.peft_read import from_peft
from omnilora.io.peft_relatives import RELATIVES
from omnilora.io.peft_values import alpha_for, one, patterns
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.shifted import ShiftedLoRA

__all__ = ["alpha_for", "check_facts", "from_peft", "noted", "to_native", "to_peft"]

WITH_TOKENS = ("LORA", "ADALORA")  # the types that train single tokens and bare parameters
NO_MODULES = "dummy-target-modules"  # PEFT's word for an adapter of own copies only


def to_peft(state: AdapterState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config, tensors) as PEFT writes them.

    Raises: NotExpressible, naming the site and the reason. What a state from :func:`noted` knows of the model
    (kernel and groups of a convolution, transposed storage, tied embeddings) decides the doubtful cases.
    """
    if is_raw(state):
        raise NotExpressible("The layers have the names of a file, not the model's.", "Give the model.")
    if state.carried:
        raise NotExpressible(f"The adapter carries the weights of {len(state.carried)} base layers: without them it is wrong.",
                             "Use omnilora's own format.")  # fmt: skip
    families = {f for s in state.sites.values() if (f := family_of(s.how)) != "own"} or {"LORA"}
    table = entries(state.sites, state)
    if len(families) > 1:
        raise NotExpressible(f"One PEFT adapter cannot mix {', '.join(sorted(map(str, families)))}.")
    family = str(next(iter(families)))
    adapted = {n: s for n, s in state.sites.items() if family_of(s.how) == family}
    config: dict[str, Any] = {"peft_type": family, "task_type": None, "base_model_name_or_path": None,
                              "inference_mode": True, "fan_in_fan_out": _turned(state)}  # fmt: skip
    writers = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera, **{f: r.config for f, r in RELATIVES.items()}}
    config |= writers[family](adapted)
    config |= _targets(adapted, family) | _own(state, adapted, family)
    return config, _tensors(table, state)


def to_native(sites: Mapping[str, Any], tensors: Mapping[str, Tensor], hows: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """PEFT-named tensors under their native names; ``sites`` are the site configs of omnilora.json."""
    return renamed(entries({n: site_from_config(c, {}, hows) for n, c in sites.items()}), tensors)


def _tensors(table: Sequence[Entry], state: AdapterState) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for e in table:
        t = state.sites[e.site].tensor(e.name, state)
        packed = e.pack(t).contiguous()
        if not torch.equal(e.unpack(packed).contiguous(), t):
            raise NotExpressible(f"{e.site}: {e.name} of shape {tuple(t.shape)} does not fit PEFT's layout.")
        if e.half is not None and e.half[1] == 1:
            out[e.foreign] = torch.cat((out[e.foreign], packed), e.half[0])
            continue
        if e.foreign in out and not torch.equal(out[e.foreign], packed):
            raise NotExpressible(f"{e.site}: PEFT keeps one {e.foreign!r} for all layers.")
        out[e.foreign] = packed
    return out


def _turned(state: AdapterState) -> bool:
    """Whether the adapted linear layers store (in, out)."""
    known = [s.marks.get(STORED, {}).get("turned", False) for s in state.sites.values()
             if s.kind == "linear" and family_of(s.how) != "own"]  # fmt: skip
    return bool(known) and all(known)


def _path(name: str, s: SiteState) -> str:
    return name if s.kind != "tensor" else ".".join(split(name, s.kind))


def _lora(adapted: Mapping[str, SiteState]) -> dict[str, Any]:
    if not adapted:
        return {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
                "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}  # fmt: skip
    dora = one(adapted, "DoRA", {n: type(s.how) is DoRA for n, s in adapted.items()})
    sqrt = all(lora_of(s.how).scaling == "alpha/sqrt(r)" for s in adapted.values())
    dropout = one(adapted, "dropout", {n: lora_of(s.how).dropout for n, s in adapted.items() if s.kind != "embedding"})
    raw = [n for n, s in adapted.items() if s.kind == "tensor"]
    if raw and dropout:
        raise NotExpressible(f"{raw[0]}: PEFT refuses dropout with target_parameters.", "Set dropout=0.")
    ranks, alphas = {}, {}
    for name, s in adapted.items():
        a = s.tensors.get("inner.A" if dora else "A")
        r = lora_of(s.how).r if a is None or s.kind == "tensor" else int(a.shape[0])
        r *= 2 if type(s.how) is ShiftedLoRA else 1  # (A; A₀) and (B, −B₀)
        ranks[_path(name, s)] = r
        alphas[_path(name, s)] = alpha_for(s.scale, math.sqrt(r) if sqrt else r)
    r, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    return {"r": r, "lora_alpha": alpha, "lora_dropout": dropout or 0.0, "use_rslora": sqrt, "use_dora": dora,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "init_lora_weights": True}  # fmt: skip


def _adalora(adapted: Mapping[str, SiteState]) -> dict[str, Any]:
    """PEFT scales every site by α / (initial rank + 1e-5), whatever rank is left."""
    r = one(adapted, "r", {n: s.how.r for n, s in adapted.items()})  # type: ignore[attr-defined]
    scale = one(adapted, "scale", {n: s.scale for n, s in adapted.items()})
    dropout = one(adapted, "dropout", {n: s.how.dropout for n, s in adapted.items()})  # type: ignore[attr-defined]
    if scale <= 0:
        raise NotExpressible(f"PEFT's AdaLoRA takes no scale of {scale!r}.")
    left = {n: int(s.tensors["lam"].shape[0]) for n, s in adapted.items()}
    pattern = {f"{n}.lora_E": [True] * k + [False] * (r - k) for n, k in left.items() if k < r}
    if any(k > r for k in left.values()):
        raise NotExpressible("A site has a larger rank than the initial one; PEFT's AdaLoRA only prunes.")
    return {"init_r": r, "target_r": min(8, r), "lora_alpha": alpha_for(scale, r + 1e-5), "lora_dropout": dropout,
            "rank_pattern": pattern or None, "tinit": 0, "tfinal": 0, "total_step": 1,
            "init_lora_weights": True}  # fmt: skip


def _vera(adapted: Mapping[str, SiteState]) -> dict[str, Any]:
    """The projections are always written: their shape follows from all targeted layers, not from the seed alone."""
    for name, s in adapted.items():
        if s.scale != 1.0:
            raise NotExpressible(f"{name} has scale {s.scale!r}; PEFT's VeRA has none.")
    how: Any = one(adapted, "hyper-parameters", {n: s.how for n, s in adapted.items()})
    return {"r": how.r, "vera_dropout": how.dropout, "d_initial": how.d_init, "projection_prng_key": how.seed,
            "save_projection": True, "init_weights": True}  # fmt: skip


def _targets(adapted: Mapping[str, SiteState], family: str) -> dict[str, Any]:
    """Full paths. PEFT also matches a path that ends in one of them; where the model has such a layer besides, an
    expression that matches whole paths takes their place."""
    modules = sorted(n for n, s in adapted.items() if s.kind != "tensor")
    raw = sorted(_path(n, s) for n, s in adapted.items() if s.kind == "tensor")
    stray = any(p.endswith(f".{n}") and p not in adapted for n in modules for p in _alike(adapted[n]))
    targets: Any = modules if modules or raw else NO_MODULES
    out = {"target_modules": "|".join(map(re.escape, modules)) if stray else targets}
    return out | {"target_parameters": raw or None} if family in WITH_TOKENS else out


def _alike(s: SiteState) -> list[str]:
    return s.marks.get(STORED, {}).get("alike", [])


def anchored(module: str, s: SiteState) -> str:
    """PEFT takes every module whose path ends in these letters; where there is another one, its own prefix helps."""
    return f"{PREFIX}{module}" if _alike(s) else module


def _own(state: AdapterState, adapted: Mapping[str, SiteState], family: str) -> dict[str, Any]:
    """modules_to_save, bias and trainable_token_indices."""
    by_module: dict[str, dict[str, SiteState]] = {}
    tokens: dict[str, list[int]] = {}
    for name, s in state.sites.items():
        if family_of(s.how) != "own":
            continue
        module, param = split(name, s.kind)
        if s.how.rows is not None:  # type: ignore[attr-defined]
            tokens[anchored(module, s)] = list(s.how.rows)  # type: ignore[attr-defined]
        else:
            by_module.setdefault(module, {})[param] = s
    biases = {m for m, params in by_module.items() if set(params) == {"bias"}}
    whole = sorted(set(by_module) - biases)
    for module in whole:
        _check_whole(module, by_module[module])
    if tokens and family not in WITH_TOKENS:
        raise NotExpressible(f"PEFT's {family} trains no single tokens.")
    only = RELATIVES[family].only if family in RELATIVES else "vera_only" if family == "VERA" else "lora_only"
    if biases and not only:
        raise NotExpressible(f"{min(biases)}.bias: PEFT's {family} trains no biases.", "Leave them out.")
    bias = "none" if not biases else only if all(m in adapted for m in biases) else "all"
    saved = [anchored(m, next(iter(by_module[m].values()))) for m in whole]
    out: dict[str, Any] = {"modules_to_save": saved or None} | ({"bias": bias} if only else {})
    return out | {"trainable_token_indices": tokens or None} if family in WITH_TOKENS else out


def _check_whole(module: str, params: Mapping[str, SiteState]) -> None:
    if not module:
        raise NotExpressible("PEFT cannot copy parameters of the model itself.", "Unfreeze layers inside it.")
    for param, s in params.items():
        holds = s.marks.get(STORED, {}).get("holds")
        if holds is not None and set(holds) != set(params):
            raise NotExpressible(f"{module}.{param}: PEFT copies a module as a whole; {module} also holds "
                                 f"{', '.join(sorted(set(holds) - set(params))[:3])}.")  # fmt: skip
