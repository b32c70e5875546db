"""Names of layers in files that do not have the model's own: found on a model, exactly or not at all.

kohya and LyCORIS write ``lora_unet_mid_block_attentions_0_proj_in`` for ``mid_block.attentions.0.proj_in``: without the
model nobody knows which underscores were dots. A state read without a model keeps the file's names (``extra["names"]``) until
:func:`placed` finds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from omnilora.core.layer import base_modules
from omnilora.core.site import called_site
from omnilora.core.state import AdapterState, SiteState, site_at
from omnilora.errors import BadValue, NeedsExtra, NotExpressible, StateMismatch, nearest, need
from omnilora.io.peft_facts import STORED, facts

NAMES = "names"  # the key of AdapterState.extra that says whose names the sites have
GGUF = "llama.cpp"  # its value for llama.cpp's names, which follow from the architecture
# the mark of a site whose tensors do not show whether its layer is linear or a convolution; True: of kernel 1 only
UNSURE = "kind"
# part of a pipeline: how files begin the names of its layers, and what a module that holds all parts calls it
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unet": (("lora_unet_", "oft_unet_", "unet.", "diffusion_model."), ("unet", "transformer")),
    "transformer": (("lora_transformer_", "transformer."), ("transformer", "unet")),
    "prior": (("lora_prior_unet_", "lora_prior_", "prior."), ("prior",)),
    "te": (("lora_te_", "lora_te1_", "text_encoder."), ("text_encoder",)),
    "te2": (("lora_te2_", "text_encoder_2."), ("text_encoder_2",)),
    "te3": (("lora_te3_", "text_encoder_3."), ("text_encoder_3",)),
    "lycoris": (("lycoris_",), ()),
}
OUTER = ("text_model_", "model_", "base_model_model_")  # wrappers that some versions of a model have and others do not
# the first names of Stable Diffusion's layers
SGM = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_2")


def part_of(name: str) -> tuple[str, str]:
    """(part, rest of the name); the longest beginning wins. ("", name) where no part begins so."""
    found = [(b, part) for part, (begins, _) in PARTS.items() for b in begins if name.startswith(b)]
    if not found:
        return "", name
    begin, part = max(found, key=lambda f: len(f[0]))
    return part, name[len(begin) :]


def is_raw(state: AdapterState) -> bool:
    return NAMES in state.extra


def only(state: AdapterState, part: str | None) -> AdapterState:
    """The sites of one part of a file that covers several models."""
    have = sorted({part_of(n)[0] for n in state.sites})
    if part is None:
        return state
    if part not in have:
        raise BadValue(f"The file has no part {part!r}.", f"It has: {', '.join(have)}.")
    return replace(state, sites={n: s for n, s in state.sites.items() if part_of(n)[0] == part})


def placed(state: AdapterState, model: nn.Module, part: str | None = None) -> AdapterState:
    """``state`` under the model's own names, kinds of layers and facts. States that have them come back as they are.

    Raises: StateMismatch for a name that the model does not have or that fits several layers, BadValue where the file
    covers several models and ``part`` does not say which this one is.
    """
    layers = dict(base_modules(model))
    if not is_raw(state):
        return _sure(state, layers)
    if state.extra[NAMES] == GGUF:
        from omnilora.io import gguf

        return gguf.placed(state, model)
    state = only(state, part)
    try:
        sites = _named(state, model, layers)
    except StateMismatch:
        from omnilora.io.diffusers_names import through

        other = through(state, model) if state.extra[NAMES] != "diffusers" else None
        if other is None:
            raise
        state, sites = other, _named(only(other, _part_like(other, model)), model, layers)
    extra = {k: v for k, v in state.extra.items() if k != NAMES}
    return replace(state, sites={n: sites[n] for n in sites}, extra=extra)


def _named(state: AdapterState, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, SiteState]:
    sites: dict[str, SiteState] = {}
    for begin, group in _groups(state, layers).items():
        for raw, path in _found(group, begin, layers, model).items():
            sites.update(_at(model, layers, raw, path, state))
    return sites


def _part_like(state: AdapterState, model: nn.Module) -> str | None:
    """The part that a denoiser's class is of, where a file has it."""
    have = {part_of(n)[0] for n in state.sites}
    return next((p for p in ("transformer", "unet") if p in have and len(have) > 1), None)


def _sure(state: AdapterState, layers: Mapping[str, nn.Module]) -> AdapterState:
    sites = {}
    for name, s in state.sites.items():
        if UNSURE in s.marks and name in layers and (site := called_site(name, layers[name])) is not None:
            if s.marks[UNSURE] and site.kind == "conv" and any(k != 1 for k in site.store.shape()[2:]):
                raise NotExpressible(f"{name}: this map of a convolution with a kernel larger than 1 is no product with a weight "
                                     "in PEFT.")  # fmt: skip
            s = replace(s, kind=site.kind, marks={k: v for k, v in s.marks.items() if k != UNSURE})
        sites[name] = s
    return replace(state, sites=sites) if any(sites[n] is not state.sites[n] for n in sites) else state


def _groups(state: AdapterState, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Path at which each part sits in the model → {raw name of a layer: the rest of it}."""
    parts: dict[str, dict[str, str]] = {}
    for name, s in state.sites.items():
        part, rest = part_of(name)
        layer = name.rpartition(".")[0] if s.kind == "tensor" else name
        rest = rest.rpartition(".")[0] if s.kind == "tensor" else rest
        parts.setdefault(part, {})[layer] = rest
    homes = {p: next((c for c in PARTS.get(p, ((), ()))[1] if c in layers), "") for p in parts}
    if len(parts) > 1:
        if len(set(homes.values())) < len(parts):
            raise BadValue(f"The file covers {len(parts)} models: {', '.join(sorted(p or '(other)' for p in parts))}.",
                           "Give part= (--part), or a module that holds them as unet, text_encoder, text_encoder_2.")  # fmt: skip
        return {homes[p]: group for p, group in parts.items()}
    (part, group), = parts.items() or [("", {})]
    return {homes[part]: group}


def flat(path: str) -> str:
    return path.replace(".", "_")


def _found(group: Mapping[str, str], begin: str, layers: Mapping[str, nn.Module], model: nn.Module) -> dict[str, str]:
    """Raw name → the one path of the model that is written so."""
    inside = [p for p in layers if p and (not begin or p.startswith(f"{begin}.")) and ".adapters" not in f".{p}"]
    index: dict[str, list[str]] = {}
    for path in inside:
        index.setdefault(flat(path.removeprefix(f"{begin}.") if begin else path), []).append(path)
    wanted = dict(group)
    if any(flat(r).startswith(SGM) for r in wanted.values()) and not any(k.startswith(SGM) for k in index):
        wanted = _renamed(wanted, layers[begin] if begin else model)
    shift = _shift([flat(r) for r in wanted.values()], index)
    out = {}
    for raw, rest in wanted.items():
        paths = index.get(shift(flat(rest)), [])
        if "." in rest and len(paths) > 1:  # a file with dots says which
            paths = [p for p in paths if p.endswith(rest)] or paths
        if not paths:
            raise StateMismatch(f"The model has no layer for {raw!r}.", nearest(flat(rest), index))
        if len(paths) > 1:
            raise StateMismatch(f"{raw!r} fits {len(paths)} layers of the model: {', '.join(paths[:4])}.",
                                "Rename one of them, or give a file whose names have dots.")  # fmt: skip
        out[raw] = paths[0]
    again = [p for p, n in Counter(out.values()).items() if n > 1]
    if again:
        raise StateMismatch(f"Two layers of the file are {again[0]!r}.", "The file mixes ways of writing names.")
    return out


def _shift(rests: list[str], index: Mapping[str, list[str]]) -> Any:
    """What all names lack or have too much at their beginning: a wrapper of OUTER or a prefix of the file's own less, one path of
    the model more."""
    if not rests:
        return str
    first = rests[0].split("_")
    own = ["_".join(first[:n]) + "_" for n in range(1, min(4, len(first)))]
    less = ["", *OUTER, *(o for o in own if all(r.startswith(o) for r in rests))]
    for begin in less:
        if all(r.removeprefix(begin) in index for r in rests):
            return lambda r, b=begin: r.removeprefix(b)
    for begin in less:
        bare = [r.removeprefix(begin) for r in rests]
        more = [k.removesuffix(bare[0]) for k in index if k.endswith(f"_{bare[0]}")]
        able = [m for m in more if all(f"{m}{r}" in index for r in bare)]
        if len(able) > 1:
            raise StateMismatch(f"The file's layers fit under {', '.join(m.rstrip('_') for m in able[:4])}.",
                                "Load it on that part of the model.")  # fmt: skip
        if able:
            return lambda r, b=begin, m=able[0]: f"{m}{r.removeprefix(b)}"
    return str


def _renamed(wanted: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Stable Diffusion's first names under those of diffusers, by diffusers' own converter."""
    config: Any = vars(model).get("_internal_dict", getattr(model, "config", None))
    per = getattr(config, "layers_per_block", None)
    if per is None:
        raise StateMismatch("The file names layers as Stable Diffusion's first code does, and the model has no "
                            "config.layers_per_block to count its blocks.", "Load it on diffusers' UNet2DConditionModel.")  # fmt: skip
    try:
        utils: Any = need("diffusers.loaders.lora_conversion_utils", "diffusers")
    except NeedsExtra as error:
        raise NeedsExtra("The file names layers as Stable Diffusion's first code does; 'diffusers' converts them and is not "
                         "installed.", error.remedy) from error  # fmt: skip
    out = {}
    for raw, rest in wanted.items():
        key = f"lora_unet_{flat(rest)}.lora_down.weight"
        try:
            (old,) = utils._maybe_map_sgm_blocks_to_diffusers({key: raw}, config)
            new = utils._convert_unet_lora_key(old)
        except (ValueError, IndexError, KeyError) as error:
            raise StateMismatch(f"diffusers cannot place {raw!r}: {error}.") from error
        out[raw] = module_of(new.removesuffix(".weight"))
    return out


def module_of(name: str) -> str:
    """diffusers' older names: ``attn1.to_q_lora.down`` and ``attn1.processor.to_q_lora`` are of ``attn1.to_q``; in a text
    encoder of ``q_proj``."""
    name = re.sub(r"\.lora\.(down|up)$|\.(down|up)$", "", name).replace(".processor.", ".")
    text = name.startswith("text_encoder")
    name = re.sub(r"\.to_(q|k|v)_lora$", r".\1_proj" if text else r".to_\1", name)
    return re.sub(r"\.to_out_lora$", ".out_proj" if text else ".to_out.0", name)


def _at(model: nn.Module, layers: Mapping[str, nn.Module], raw: str, path: str, state: AdapterState) -> dict[str, SiteState]:
    """The sites of one layer, with the kind and the facts of the model's layer."""
    out = {}
    for name in (raw, f"{raw}.weight", f"{raw}.bias"):
        s = state.sites.get(name)
        if s is None or (s.kind == "tensor") != (name != raw):
            continue
        if s.kind == "tensor":
            out[path + name[len(raw) :]] = s
            continue
        site = called_site(path, layers[path])
        if site is None:
            raise StateMismatch(f"{raw!r} is at {path!r}, a {type(layers[path]).__name__}, which is no linear layer or "
                                "convolution.")  # fmt: skip
        columns = s.shape
        if columns is not None and columns != (site.fan_out, site.fan_in):
            raise StateMismatch(f"{path}: the file is for {columns[0]} × {columns[1]}, the layer has {site.fan_out} × "
                                f"{site.fan_in}.", "Is this the right base model?")  # fmt: skip
        out[path] = replace(s, kind=site.kind, shape=(site.fan_out, site.fan_in), marks={
            **{k: v for k, v in s.marks.items() if k != STORED}})  # fmt: skip
    return out


def known(model: nn.Module, state: AdapterState) -> AdapterState:
    """``state`` with what writers must know of the model's layers, without an adapter on it. The model may be on the meta
    device."""
    layers = dict(model.named_modules())
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    sites = {}
    for name, s in state.sites.items():
        if s.kind not in ("block", "source"):
            site = site_at(model, name, s, layers)
            tied = uses.get(id(site.layer._parameters.get(site.param)), 1) > 1
            s = replace(s, marks={**s.marks, STORED: facts(site, layers, tied)}, shape=(site.fan_out, site.fan_in))
        sites[name] = s
    return replace(state, sites=sites)


def raw_names(names: Iterable[str], part: str) -> dict[str, str]:
    """Path → kohya's name. A path that begins with the name of a pipeline's part gets that part's beginning."""
    names = list(names)
    children = {c: p for p, (_, homes) in PARTS.items() for c in homes[:1]}
    heads = {n.partition(".")[0] for n in names}
    whole = bool(heads) and heads <= set(children) and all("." in n for n in names)
    out: dict[str, str] = {}
    for name in names:
        head, _, rest = name.partition(".")
        begin = PARTS[children[head] if whole else part][0][0]
        if whole and head == "text_encoder" and "text_encoder_2" in heads:
            begin = "lora_te1_"
        out[name] = begin + flat(rest if whole else name)
    twice = sorted({r for r in out.values() if list(out.values()).count(r) > 1})
    if twice:
        raise NotExpressible(f"Two layers would be named {twice[0]!r}: dots become underscores.", "Leave one of them out.")
    return out
