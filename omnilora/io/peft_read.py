"""A bare PEFT folder as an adapter state: no model is asked, so kinds follow from names and shapes of tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.fingerprint import Fingerprint, fingerprint
from omnilora.core.full import Full
from omnilora.core.parameterization import Parameterization
from omnilora.core.site import read_site
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import FileRefused, NotExpressible, OmniloraError
from omnilora.io.names import UNSURE
from omnilora.io.peft_facts import STORED
from omnilora.io.peft_fields import check_fields
from omnilora.io.peft_names import PREFIX, SHARED, TOKENS, entries, nested, renamed
from omnilora.io.peft_relatives import RELATIVES
from omnilora.io.peft_starts import from_the_base, shifted
from omnilora.io.peft_values import matched, targeted
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.svd import SVD
from omnilora.parameterizations.vera import VeRA, projections

_SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
             "lora_magnitude_vector"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "LN_TUNING": ("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    **{family: r.suffixes for family, r in RELATIVES.items()},
}  # fmt: skip
_KEYS = {"ADALORA": "adalora", "VERA": "vera", "LN_TUNING": "ln_tuning", "TRAINABLE_TOKENS": "trainable_tokens",
         **{f: f.lower() for f in RELATIVES}}  # fmt: skip
_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT writes their base weights when they are targeted or resized


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], fan_in: int | None = None,
              model: nn.Module | None = None) -> AdapterState:  # fmt: skip
    """An adapter state from PEFT's config and tensors.

    Args:
        fan_in: the largest input width among the adapted layers; needed for VeRA saved without its projections.
        model: the base with its weights; needed for starts that were taken out of it (PiSSA, OLoRA).

    Raises: UnknownName for fields that are not known, NotExpressible for maps that are not covered, FileRefused for
    missing or unexpected tensors.
    """
    try:
        return _state(config, tensors, fan_in, model)
    except OmniloraError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise FileRefused(f"adapter_config.json breaks the format: {type(error).__name__} {error}.") from error


def _state(config: Mapping[str, Any], tensors: Mapping[str, Tensor], fan_in: int | None,
           model: nn.Module | None) -> AdapterState:  # fmt: skip
    check_fields(config, model is not None)
    family = str(config.get("peft_type"))
    if family not in _SUFFIXES:
        raise NotExpressible(f"peft_type {family!r} cannot be read.", f"Readable: {', '.join(_SUFFIXES)}.")
    found = _sort(family, config, plain_names(tensors))
    if family == "VERA" and SHARED["A"] not in found.rest:
        found.rest |= _drawn(config, found, fan_in)
    readers = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}
    sites = readers[family](config, found) if family in readers else _relatives(family, config, found)
    sites |= _own(found)
    native = renamed(entries(sites), found.rest)
    sites = {n: replace(s, tensors={k: native[f"{n}::{k}"] for k in s.roles if k not in s.shared})
             for n, s in sites.items()}  # fmt: skip
    if model is not None and from_the_base(start := config.get("init_lora_weights")):
        sites = shifted(sites, start, model)
    shared = {k.removeprefix("shared::"): t for k, t in native.items() if k.startswith("shared::")}
    for site, shift in found.shifts.items():
        sites[site] = _shifted(sites.get(site), shift * sites[site.rpartition(".")[0]].scale)
    key = _KEYS.get(family, "dora" if config.get("use_dora") else "lora")
    return AdapterState(key, {}, sites, shared, found.base)


# first versions of PEFT, and state dicts that were saved by hand: the adapter's name behind the leaf, wrappers in front
_LEAF = (r"lora_(?:embedding_)?[ABE]|lora_magnitude_vector|ia3_l|hada_\w+|lokr_\w+|vera_lambda_[bd]|oft_R|boft_[RsP]"
         r"|hira_(?:embedding_)?[AB]|fourierft_spectrum|randlora_\w+|modules_to_save")  # fmt: skip
_NAMED = re.compile(rf"(\.(?:{_LEAF}))\.(?!weight$|bias$)[^.]+(?=$|\.)")


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of PEFT's files, whatever version or hand wrote them."""
    names = {k: _NAMED.sub(lambda m: m[1], k.replace("_orig_mod.", "")) for k in tensors}
    bare = not any(k.startswith("base_model.") for k in tensors) and any(map(_leaf_of_any, names.values()))
    out: dict[str, Tensor] = {}
    for key, t in tensors.items():
        if key.endswith(".ranknum") or ".ranknum." in key:  # AdaLoRA's count of ranks, no part of the map
            continue
        name = f"{PREFIX}{names[key]}" if bare else names[key]
        if ".modules_to_save." in name and name != key:
            name = name.replace(".modules_to_save.", ".")
        if name in out and not torch.equal(out[name], t):
            raise FileRefused(f"Unexpected tensor {key!r}: {name!r} is there twice.", "The file is damaged.")
        out[name] = t
    if any(k not in tensors for k in out):  # the copies under the adapter's name stand for the originals
        out = {k: t for k, t in out.items() if ".original_module." not in k}
    return out


def _leaf_of_any(name: str) -> bool:
    return any(name.endswith(f".{leaf}") for leaves in _SUFFIXES.values() for leaf in leaves)


class _Found:
    """A file sorted out: module path → depth of wrapping → leaves; own tensors by path; the rest by PEFT's names."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[int, dict[str, Tensor]]] = {}
        self.own: dict[str, Tensor] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.shifts: dict[str, Tensor] = {}
        self.base: dict[str, Fingerprint] = {}
        self.rest: dict[str, Tensor] = {}


def _sort(family: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Found:
    leaves = "|".join(map(re.escape, _SUFFIXES[family]))
    leaf = re.compile(rf"(?P<module>.+?)(?P<deep>(\.base_layer)*)\.(?P<leaf>{leaves})")
    out, base_keys = _Found(), {}
    for key, t in tensors.items():
        shared = SHARED if family == "VERA" else RELATIVES[family].shared or {} if family in RELATIVES else {}
        if key in shared.values():
            out.rest[key] = t
            continue
        if not key.startswith(PREFIX):
            raise FileRefused(f"Unexpected tensor {key!r}.", f"PEFT's names start with {PREFIX!r}.")
        path = key.removeprefix(PREFIX).removesuffix(".weight") if "lora_magnitude" in key else key.removeprefix(PREFIX)
        m = leaf.fullmatch(path)
        if m is not None and m["leaf"] == "lora_B.bias":
            out.shifts[f"{m['module']}.bias"] = t
        elif m is not None and m["leaf"] in (RELATIVES[family].dropped if family in RELATIVES else ()):
            continue
        elif m is not None and family == "TRAINABLE_TOKENS":
            out.tokens[m["module"]] = tuple(int(i) for i in config.get("token_indices") or ())
            out.rest[f"{PREFIX}{m['module']}.{TOKENS}"] = t
        elif m is not None and family == "LN_TUNING":
            name = f"{m['module']}.{m['leaf'].rpartition('.')[2]}"
            out.own[name] = t
            out.rest[f"{PREFIX}{name}"] = t
        elif m is not None:
            depth = m["deep"].count(".base_layer")
            out.layers.setdefault(m["module"], {}).setdefault(depth, {})[m["leaf"]] = t
            out.rest[f"{PREFIX}{path}"] = t
        elif path.endswith(f".{TOKENS}"):
            module = path.removesuffix(f".{TOKENS}")
            out.tokens[module] = _indices(module, config)
            out.rest[key] = t
        elif ".original_module." in path or ".modules_to_save." in path:
            _second_copy(path, tensors)
        else:
            base_keys[path] = t
    for path, t in base_keys.items():
        _base_tensor(path, t, config, out)
    return out


def _second_copy(path: str, tensors: Mapping[str, Tensor]) -> None:
    """bias="all" beside modules_to_save writes a module's bias three times; the plain name is the one that acts."""
    for word in (".original_module.", ".modules_to_save."):
        if word in path and f"{PREFIX}{path.replace(word, '.')}" not in tensors:
            raise FileRefused(f"Unexpected tensor {path!r}.", "The file is damaged.")


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def _indices(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    given = config.get("trainable_token_indices") or {}
    if isinstance(given, Mapping):
        given = next((v for k, v in given.items() if module.endswith(_bare(k))), None)
    if not given:
        raise FileRefused(f"{module} has trained tokens and the config no indices for it.", "The file is damaged.")
    return tuple(int(i) for i in given)


def _base_tensor(path: str, t: Tensor, config: Mapping[str, Any], out: _Found) -> None:
    module, _, param = path.rpartition(".")
    wrapped = module.removesuffix(".base_layer")
    if not t.is_floating_point():
        raise NotExpressible(f"{path} is no floating-point tensor; a buffer cannot be an own copy.")
    if module != wrapped and param == "weight":
        out.base[wrapped] = _print_of(t)
        return
    saved = [_bare(m) for m in config.get("modules_to_save") or ()]
    owned = any(path == m or re.match(rf"(.*\.)?[^.]*{re.escape(m)}\.", path) for m in saved)
    biased = param == "bias" and config.get("bias", "none") != "none"
    if not (owned or biased or module.rpartition(".")[2] in _EMBEDDINGS):
        raise FileRefused(f"Unexpected tensor {PREFIX + path!r}.", "No field of the config asks for it.")
    out.own[f"{wrapped}.{param}" if wrapped else param] = t
    inside = biased and wrapped in out.layers  # before 0.6 PEFT's layers were the base's, not around them
    out.rest[f"{PREFIX}{wrapped}.base_layer.{param}" if inside else f"{PREFIX}{path}"] = t


def _print_of(t: Tensor) -> Fingerprint:
    shell = nn.Module()
    shell.register_parameter("weight", nn.Parameter(t.contiguous(), requires_grad=False))
    return fingerprint(read_site("weight", shell, "weight"))


def _made(config: Mapping[str, Any], key: str, leaves: Mapping[str, Tensor]) -> tuple[Parameterization, float]:
    r = int(matched(config.get("rank_pattern"), key, config.get("r", 8)))
    alpha = float(matched(config.get("alpha_pattern"), key, config.get("lora_alpha", 8)))
    sqrt = bool(config.get("use_rslora"))
    lora = LoRA(r, alpha, float(config.get("lora_dropout") or 0.0), "alpha/sqrt(r)" if sqrt else "alpha/r")
    how = DoRA(lora) if "lora_magnitude_vector" in leaves else lora
    how.check()
    return how, alpha / (math.sqrt(r) if sqrt else r)


def _lora(config: Mapping[str, Any], found: _Found) -> dict[str, SiteState]:
    sites: dict[str, SiteState] = {}
    for module, levels in found.layers.items():
        params = _params_at(module, config) if config.get("target_parameters") else []
        if params:
            if sorted(levels) != list(range(len(params))):
                raise FileRefused(f"{module}: the file wraps {len(levels)} parameters, the config names {params}.")
            for i, param in enumerate(params):
                how, scale = _made(config, f"{module}.{param}", {})
                sites[f"{module}.{param}"] = SiteState(how, "tensor", scale, {}, {"A": "input", "B": "output"},
                                                       marks={STORED: {"order": i}})  # fmt: skip
            continue
        if set(levels) != {0}:
            raise FileRefused(f"{module} is wrapped {max(levels) + 1} times.", "The file is damaged.")
        sites[module] = _site(module, config, levels[0])
    return sites


def _site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    how, scale = _made(config, module, leaves)
    kind, a, b = "linear", leaves.get("lora_A.weight"), leaves.get("lora_B.weight")
    if "lora_embedding_A" in leaves:
        kind, a, b = "embedding", leaves["lora_embedding_A"], leaves.get("lora_embedding_B")
    dora = type(how) is DoRA
    if dora is not bool(config.get("use_dora")) or a is None or b is None:
        raise FileRefused(f"{module}: the config and the tensors {sorted(leaves)} do not agree.",
                          "The file is damaged.")  # fmt: skip
    r = how.rank()
    if a.shape[0] != r:
        raise FileRefused(f"{module} has rank {a.shape[0]}, the config says {r}.", "The file is damaged.")
    marks: dict[str, Any] = {}
    if a.dim() > 2:
        kind = "conv"
        if b.shape[1] != r:
            raise NotExpressible(f"{module}: PEFT's LoRA of a grouped convolution has no weight difference of its own.")
        ones = [1] * (a.dim() - 2)
        marks = {STORED: {"shape": [b.shape[0], *a.shape[1:]], "groups": 1, "dilation": ones, "padding": "zeros"}}
    inner = {"A": "input", "B": "output"}
    roles = {**{f"inner.{k}": v for k, v in inner.items()}, "m": "magnitude"} if dora else inner
    return SiteState(how, kind, scale, {}, roles, marks=marks)


def _params_at(module: str, config: Mapping[str, Any]) -> list[str]:
    """The targeted parameters of a module, innermost first."""
    if targeted(config.get("target_modules"), module):
        return []
    hits = set()
    for target in config["target_parameters"]:
        owner, _, param = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            hits.add(param)
    probe = {f"{module}.{p}": SiteState(LoRA(), "tensor", 1.0, {}, {}) for p in hits}
    deep = nested(probe)
    return [n.rpartition(".")[2] for n in sorted(deep, key=lambda n: -deep[n][1])]


def _relatives(family: str, config: Mapping[str, Any], found: _Found) -> dict[str, SiteState]:
    if family not in RELATIVES:
        return {}  # own tensors only
    sites = {}
    for module, levels in found.layers.items():
        if set(levels) != {0}:
            raise FileRefused(f"{module} is wrapped {max(levels) + 1} times.", "The file is damaged.")
        s = RELATIVES[family].site(module, config, levels[0])
        s.how.check()
        unsure = s.kind == "linear" and "conv" in RELATIVES[family].kinds
        sites[module] = replace(s, marks={**s.marks, UNSURE: RELATIVES[family].pointwise}) if unsure else s
    return sites


def _adalora(config: Mapping[str, Any], found: _Found) -> dict[str, SiteState]:
    r = int(config.get("init_r", 12))
    alpha = float(config.get("lora_alpha", 8))
    how = SVD(r, alpha if alpha > 0 else float(r), float(config.get("lora_dropout") or 0.0))
    how.check()
    roles = {"P": "output", "lam": "core", "Q": "input"}
    sites = {}
    for module, levels in found.layers.items():
        left = levels[0]["lora_E"].shape[0] if "lora_E" in levels.get(0, {}) else r
        marks = {} if left == r else {"compacted": True}
        sites[module] = SiteState(how, "linear", how.alpha / (r + 1e-5), {}, roles, marks=marks)
    return sites


def _vera(config: Mapping[str, Any], found: _Found) -> dict[str, SiteState]:
    how = VeRA(int(config.get("r", 256)), float(config.get("d_initial", 0.1)), float(config.get("vera_dropout") or 0.0),
               int(config.get("projection_prng_key") or 0), bool(config.get("save_projection", True)))  # fmt: skip
    how.check()
    roles = {"A": "input", "B": "output", "d": "core", "b": "magnitude"}
    return {m: SiteState(how, "linear", 1.0, {}, roles, {"A": "A", "B": "B"}) for m in found.layers}


def _drawn(config: Mapping[str, Any], found: _Found, fan_in: int | None) -> dict[str, Tensor]:
    """PEFT's projections from their seed, at the largest shapes among the layers."""
    if fan_in is None:
        raise NotExpressible(
            "The file holds no VeRA projections; the seed gives them only with the largest input width of the layers.",
            "Call from_peft(config, tensors, fan_in=…), or save with save_projection=True.",
        )
    fan_out = max(levels[0]["vera_lambda_b"].shape[0] for levels in found.layers.values())
    a, b = projections(int(config.get("projection_prng_key") or 0), int(config.get("r", 256)), fan_in, fan_out)
    return {SHARED["A"]: a, SHARED["B"]: b}


def _own(found: _Found) -> dict[str, SiteState]:
    sites = {name: SiteState(Full(), "tensor", 1.0, {}, {"W": "own"}) for name in found.own}
    for module, rows in found.tokens.items():
        sites[module] = SiteState(Full(rows=rows), "embedding", 1.0, {}, {"W": "own"}, marks={STORED: {"tied": False}})
    return sites


def _shifted(own: SiteState | None, shift: Tensor) -> SiteState:
    """lora_bias: y = W x + c + s (B A x + b), so the layer's bias moves by s·b."""
    column = shift.reshape(-1, 1)
    if own is not None:
        return replace(own, tensors={"W": own.tensors["W"] + column})
    return SiteState(Full(delta_form=True), "tensor", 1.0, {"W": torch.clone(column)}, {"W": "own"})
