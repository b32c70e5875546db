"""Adapters in one safetensors file: kohya's, LyCORIS' and diffusers', read and written by the table of lycoris.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnilora.core.parameterization import Parameterization
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import BadValue, FileRefused, NotExpressible
from omnilora.io.lycoris import is_difference, leaf_of, leaves_of, sites_of
from omnilora.io.names import NAMES, PARTS, is_raw, part_of, raw_names
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.hadamard import LoHa
from omnilora.parameterizations.lora import LoRA

KEYS: dict[type[Parameterization], str] = {LoRA: "lora", DoRA: "dora", LoHa: "loha"}
DETECT = {"lora_down.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "w_norm", "on_input", "oft_blocks",
          "a1.weight", "lambda_layer", "bundle_emb"}  # fmt: skip
METADATA = "lora_adapter_metadata"  # diffusers' word for the configuration in a file's header


def reads(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are an adapter of one of the three."""
    found = [leaf_of(n) for n in names]
    return any(f is not None and f[1] in DETECT for f in found)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> AdapterState:
    """The state under the file's own names.

    Raises: FileRefused for tensors of no known leaf and for leaves that do not fit together, NotExpressible for maps that
    are not read.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        found = leaf_of(key)
        if found is None:
            raise FileRefused(f"Unexpected tensor {key!r}.", "It is no leaf of a kohya, LyCORIS or diffusers adapter.")
        layer, leaf = found
        if leaf in layers.setdefault(layer, {}):
            raise FileRefused(f"{layer} has two tensors for {leaf!r}.", "The file is damaged.")
        layers[layer][leaf] = t
    scales = _configured(metadata or {}, layers)
    sites: dict[str, SiteState] = {}
    for layer in sorted(layers):
        if layer in scales and "alpha" not in layers[layer]:
            layers[layer]["alpha"] = torch.tensor(scales[layer])
        sites |= sites_of(layer, layers[layer])
    kinds = {type(s.how) for s in sites.values()}
    key = KEYS.get(next(iter(kinds)), "lycoris") if len(kinds) == 1 else "lycoris"
    extra: dict[str, Any] = {NAMES: "foreign"}
    if metadata:
        extra["metadata"] = {str(k): str(v) for k, v in sorted(metadata.items()) if k != "format"}
    return AdapterState(key, {}, sites, {}, {}, extra)


def _configured(metadata: Mapping[str, str], layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Layer → α by the LoraConfig that diffusers puts into the header, one for each part."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        data = json.loads(text)
        out = {}
        for layer, leaves in layers.items():
            part = next((p for p in ("unet", "transformer", "text_encoder_2", "text_encoder", "prior")
                         if layer.startswith(f"{p}.")), "")  # fmt: skip
            own = {k.removeprefix(f"{part}."): v for k, v in data.items() if not part or k.startswith(f"{part}.")}
            if "lora_alpha" not in own or "lora_down.weight" not in leaves:
                continue
            path, r = layer.removeprefix(f"{part}."), leaves["lora_down.weight"].shape[0]
            alpha = float(_matched(own.get("alpha_pattern") or {}, path, own["lora_alpha"]))
            out[layer] = alpha * r**0.5 if own.get("use_rslora") else alpha
        return out
    except (ValueError, TypeError, AttributeError) as error:
        raise FileRefused(f"The header's {METADATA} cannot be read: {error}.", "The file is damaged.") from error


def _matched(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), default)


def kohya(state: AdapterState, part: str | None = None, lora_only: bool = True) -> dict[str, Tensor]:
    """Tensors by kohya's names: LoRA and DoRA of linear layers and convolutions; ``lora_only`` False: all of LyCORIS."""
    _nothing_carried(state)
    part = part or ("unet" if lora_only else "lycoris")
    if part not in PARTS:
        raise BadValue(f"part = {part!r}.", f"Give one of {', '.join(PARTS)}.")
    vectors = {n for n, s in state.sites.items() if s.kind == "tensor"}
    layers = [n for n in state.sites if n not in vectors]
    names = {n: n for n in layers} if is_raw(state) else raw_names(layers, part)
    out: dict[str, Tensor] = {}
    for name in layers:
        for leaf, t in leaves_of(name, state.sites[name], state, lora_only).items():
            out[f"{names[name]}.{leaf}"] = t
    owners = sorted({n.rpartition(".")[0] for n in vectors})
    rest = {n: n for n in owners} if is_raw(state) else raw_names([*layers, *(o for o in owners if o not in layers)], part)
    for name in sorted(vectors):
        if lora_only:
            raise NotExpressible(f"{name}: kohya's files adapt linear layers and convolutions.", "Write for lycoris, or leave it out.")
        out |= _vector(name, rest, state)
    return out


def _vector(name: str, names: Mapping[str, str], state: AdapterState) -> dict[str, Tensor]:
    """A trained difference of a norm (``w_norm``, ``b_norm``), or of the bias beside a layer's own (``diff_b``)."""
    s, (owner, _, param) = state.sites[name], name.rpartition(".")
    how: Any = s.how
    if not is_difference(how) or param not in ("weight", "bias"):
        raise NotExpressible(f"{name}: LyCORIS holds differences of weights and biases, no {type(how).__name__}.")
    if param == "bias" and owner in state.sites:
        if not is_difference(state.sites[owner].how):
            raise NotExpressible(f"{name}: LyCORIS reads a bias only beside the difference of its weight.")
        leaf = "diff_b"
    elif f"{owner}.weight" in state.sites:
        leaf = "w_norm" if param == "weight" else "b_norm"
    elif param == "weight":
        leaf = "w_norm"
    else:
        raise NotExpressible(f"{name}: LyCORIS reads a bias only beside the difference of its weight.")
    return {f"{names[owner]}.{leaf}": s.tensor("W", state).flatten()}


def _nothing_carried(state: AdapterState) -> None:
    if state.carried:
        raise NotExpressible(f"The adapter carries the weights of {len(state.carried)} base layers: without them it is wrong.",
                             "Use omnilora's own format.")  # fmt: skip


def diffusers(state: AdapterState, part: str | None = None) -> dict[str, Tensor]:
    """``pytorch_lora_weights.safetensors`` as diffusers reads it: ``unet.….lora_A.weight``; the scale is in B (α = r)."""
    _nothing_carried(state)
    heads = {"unet": "unet.", "transformer": "transformer.", "te": "text_encoder.", "te2": "text_encoder_2.",
             "te3": "text_encoder_3.", "prior": "prior."}  # fmt: skip
    if part is not None and part not in heads:
        raise BadValue(f"part = {part!r}.", f"Give one of {', '.join(heads)}.")
    if is_raw(state) and any("." not in n for n in state.sites):
        raise NotExpressible("The names of the layers are kohya's, where dots are lost.", "Give the model.")
    named = all(part_of(n)[0] in heads and n.startswith(heads[part_of(n)[0]]) for n in state.sites)
    out: dict[str, Tensor] = {}
    for name, s in state.sites.items():
        path = name if named else heads[part or "unet"] + name
        if s.kind not in ("linear", "conv"):
            raise NotExpressible(f"{name}: diffusers' adapters are LoRA of linear layers and convolutions, no {s.kind}.",
                                 "Leave it out.")  # fmt: skip
        leaves = leaves_of(name, s, state, lora_only=True)
        scale = float(leaves.pop("alpha")) / leaves["lora_down.weight"].shape[0]
        out[f"{path}.lora_A.weight"] = leaves.pop("lora_down.weight")
        out[f"{path}.lora_B.weight"] = leaves.pop("lora_up.weight") * scale
        if "dora_scale" in leaves:
            if type(s.how) is not DoRA:
                raise NotExpressible(f"{name}: diffusers' DoRA has a magnitude for each output.")
            m = leaves.pop("dora_scale")
            out[f"{path}.lora_magnitude_vector"] = m.reshape(1, -1, 1, 1) if s.kind == "conv" else m.flatten()
    return out


def inside(path: Path, quota: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(names and shapes of the tensors, metadata) of a safetensors file, from its checked header."""
    from omnilora.core.files import read_header

    header = read_header(path, quota)
    metadata = header.pop("__metadata__", None) or {}
    return header, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, Mapping) else {}
