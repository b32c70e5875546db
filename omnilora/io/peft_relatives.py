"""PEFT's types besides LoRA, AdaLoRA and VeRA that have a form here: names, shapes and configuration, both ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.parameterization import Parameterization
from omnilora.core.state import SiteState
from omnilora.errors import FileRefused, NotExpressible
from omnilora.io.peft_facts import STORED
from omnilora.io.peft_values import alpha_for, matched, one, patterns, targeted
from omnilora.parameterizations.fourier import FourierFT
from omnilora.parameterizations.hadamard import HiRA, LoHa
from omnilora.parameterizations.kronecker import LoKr, divided
from omnilora.parameterizations.lycoris import Kronecker, TuckerLoHa
from omnilora.parameterizations.neumann import NeumannOFT
from omnilora.parameterizations.orthogonal import BOFT, OFT
from omnilora.parameterizations.randlora import RandLoRA
from omnilora.parameterizations.scaling import IA3

Change = Callable[[Tensor], Tensor]
Leaf = tuple[str, str, Change, Change]  # native name, PEFT's, native → PEFT's shape, and back
Sites = Mapping[str, SiteState]


def _same(t: Tensor) -> Tensor:
    return t


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1)


def _line(t: Tensor) -> Tensor:
    return t.flatten()


def _turn(t: Tensor) -> Tensor:
    return t.mT


@dataclass(frozen=True)
class Relative:
    """One peft_type. ``shape``: of the stored weight of a convolution, () where it is not known (reading asks no shapes).
    ``only``: its word for bias = "only the adapted layers", "" where it has no biases. ``dropped``: leaves that are no part of
    the map."""

    forms: tuple[type[Parameterization], ...]
    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    leaves: Callable[[SiteState, tuple[int, ...]], Iterable[Leaf]]
    config: Callable[[Sites], dict[str, Any]]
    site: Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], SiteState]
    only: str = ""
    shared: Mapping[str, str] | None = None
    dropped: tuple[str, ...] = ()
    pointwise: bool = False  # of convolutions only those of kernel 1: else PEFT's forward is no product with a weight


def _alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    return (int(matched(config.get("rank_pattern"), module, config.get("r", 8))),
            float(matched(config.get("alpha_pattern"), module, config.get("alpha", 8))))  # fmt: skip


def _ranks(sites: Sites) -> dict[str, Any]:
    ranks = {n: s.how.r for n, s in sites.items()}  # type: ignore[attr-defined]
    r, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns({n: alpha_for(s.scale, ranks[n]) for n, s in sites.items()})
    return {"r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "init_weights": True,
            "rank_dropout": 0.0, "module_dropout": 0.0}  # fmt: skip


def _wide(s: SiteState) -> bool:
    """Whether the site is a convolution of a kernel larger than 1."""
    return s.kind == "conv" and any(k != 1 for k in s.marks.get(STORED, {}).get("shape", (0, 0, 2))[2:])


def _no_scale(sites: Sites, family: str) -> None:
    for name, s in sites.items():
        if s.scale != 1.0:
            raise NotExpressible(f"{name} has scale {s.scale!r}; PEFT's {family} has none.")


# -- LoHa --------------------------------------------------------------------------------------------------------------


def _loha_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    turned = type(s.how) is TuckerLoHa
    kernel = shape[2:] or (1, 1)
    for i in "12":
        yield f"B{i}", f"hada_w{i}_a", _turn if turned else _same, _turn if turned else _same
        yield f"A{i}", f"hada_w{i}_b", _same, _same
        if turned:
            yield f"T{i}", f"hada_t{i}", lambda t: t.reshape(*t.shape[:2], *kernel), lambda t: t.flatten(2)


def _loha_config(sites: Sites) -> dict[str, Any]:
    tucker = one(sites, "a core over the kernel", {n: type(s.how) is TuckerLoHa for n, s in sites.items() if _wide(s)})
    return {**_ranks(sites), "use_effective_conv2d": bool(tucker)}


def _loha_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    r, alpha = _alpha(config, module)
    tucker = "hada_t1" in leaves
    how = TuckerLoHa(r, alpha) if tucker else LoHa(r, alpha)
    names = [f"{k}{i}" for i in "12" for k in (("A", "B", "T") if tucker else ("A", "B"))]
    roles = {"A": "input", "B": "output", "T": "core"}
    return SiteState(how, "conv" if tucker else "linear", alpha / r, {}, {n: roles[n[0]] for n in names})


# -- LoKr --------------------------------------------------------------------------------------------------------------


def _lokr_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    kernel = shape[2:]
    tucker = "t2" in s.roles
    for native in s.roles:
        last = native.rpartition(".")[2]
        pack, unpack = _same, _same
        if last == "w2":
            pack = (lambda t: t.reshape(t.shape[0], -1, *kernel)) if kernel else _same
            unpack = _flat
        elif last == "t2":
            pack, unpack = (lambda t: t.reshape(*t.shape[:2], *(kernel or (1, 1)))), (lambda t: t.flatten(2))
        elif last == "w2a" and tucker:
            pack, unpack = _turn, _turn
        yield native, f"lokr_{last.replace('a', '_a').replace('b', '_b')}", pack, unpack


def _lokr_config(sites: Sites) -> dict[str, Any]:
    tucker = one(sites, "a core over the kernel", {n: "t2" in s.roles for n, s in sites.items() if _wide(s) and "w2" not in s.roles})
    factors = {n: _factor(n, s) for n, s in sites.items()}
    common = set.intersection(*map(set, factors.values()))
    if not common:
        raise NotExpressible(f"The sites divide by {sorted(map(sorted, factors.values()))}; PEFT has one decompose_factor.")
    both = any("w1a" in s.roles for s in sites.values())
    for n, s in sites.items():
        l, m = _small(s)
        if both and "w1" in s.roles and s.how.r < max(l, m) / 2:  # type: ignore[attr-defined]
            raise NotExpressible(f"{n} keeps w₁ whole where others factor it; PEFT has one decompose_both.")
    return {**_ranks(sites), "use_effective_conv2d": bool(tucker), "decompose_both": both,
            "decompose_factor": min(common), "rank_dropout_scale": False}  # fmt: skip


def _small(s: SiteState) -> tuple[int, int]:
    t = s.tensors
    return tuple(t["w1"].shape) if "w1" in t else (t["w1a"].shape[0], t["w1b"].shape[1])  # type: ignore[return-value]


def _factor(name: str, s: SiteState) -> list[int]:
    """Values of decompose_factor that divide as this site does, with the same choice of what is factored."""
    t, (l, m) = s.tensors, _small(s)
    r = s.how.r  # type: ignore[attr-defined]
    k = t["w2"].shape[0] if "w2" in t else t["w2a"].shape[0]
    columns = t["w2"].shape[1] if "w2" in t else t["w2b"].shape[1]
    stored = s.marks.get(STORED, {}).get("shape")
    n = columns if s.kind != "conv" or "t2" in t else stored[1] // m if stored else None
    able = []
    for factor in sorted({-1, l, m, max(l, m)}):
        if factor == 0 or divided(l * k, factor) != (l, k) or (n is not None and divided(m * n, factor) != (m, n)):
            continue
        if n is not None and ("w2" in t) != (r >= max(k, n) / 2):
            continue
        able.append(factor)
    if not able:
        raise NotExpressible(f"{name}: PEFT divides {l * k} × {m * (n or 0)} otherwise than {l} · {k} and {m} · {n}.",
                             "Give rank= to lower it.")  # fmt: skip
    return able


def _lokr_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    r, alpha = _alpha(config, module)
    roles = {"w1": "core", "w1a": "output", "w1b": "input", "w2": "core", "w2a": "output", "w2b": "input", "t2": "core"}
    found = {k: v for k, v in roles.items() if f"lokr_{k.replace('a', '_a').replace('b', '_b')}" in leaves}
    w1, w1a, w1b = (leaves.get(f"lokr_w1{x}") for x in ("", "_a", "_b"))
    if not found or (w1 is None and (w1a is None or w1b is None)):
        raise FileRefused(f"{module}: {sorted(leaves)} are no LoKr.", "The file is damaged.")
    l, m = w1.shape if w1 is not None else (w1a.shape[0], w1b.shape[1])  # type: ignore[union-attr]
    second = "whole" if "w2" in found else "tucker" if "t2" in found else "factored"
    how = Kronecker(r, alpha, 0.0, int(l), int(m), "whole" if w1 is not None else "factored", second)
    conv = "t2" in found or leaves.get("lokr_w2", torch.empty(0)).dim() > 2
    return SiteState(how, "conv" if conv else "linear", alpha / r, {}, found)


# -- (IA)³, HiRA -------------------------------------------------------------------------------------------------------


def _ia3_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    if s.kind == "conv":
        yield "l", "ia3_l", lambda t: t.reshape(1, -1, *(1,) * max(len(shape) - 2, 2)), _line
    elif s.how.side == "input":  # type: ignore[attr-defined]
        yield "l", "ia3_l", lambda t: t.reshape(1, -1), _line
    else:
        yield "l", "ia3_l", lambda t: t.reshape(-1, 1), _line


def _ia3_config(sites: Sites) -> dict[str, Any]:
    _no_scale(sites, "(IA)³")
    inward = sorted(n for n, s in sites.items() if s.how.side == "input")  # type: ignore[attr-defined]
    return {"feedforward_modules": inward, "init_ia3_weights": True}


def _ia3_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    l = leaves["ia3_l"]
    forward = config.get("feedforward_modules") or ()
    inward = targeted(forward, module) if isinstance(forward, str) else any(module.endswith(w) for w in forward)
    if l.dim() == 2 and 1 in l.shape and l.shape[0] != l.shape[1]:
        inward = l.shape[0] == 1
    side = "input" if inward else "output"
    return SiteState(IA3(side), "conv" if l.dim() > 2 else "linear", 1.0, {}, {"l": "core" if inward else "magnitude"})


def _hira_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    word = "hira_embedding_" if s.kind == "embedding" else "hira_"
    if s.kind == "conv":
        ones = (1,) * (len(shape) - 2)
        yield "A", f"{word}A", (lambda t: t.reshape(-1, *shape[1:])), _flat
        yield "B", f"{word}B", (lambda t: t.reshape(*t.shape, *ones)), _flat
    else:
        yield "A", f"{word}A", _same, _same
        yield "B", f"{word}B", _same, _same


def _hira_config(sites: Sites) -> dict[str, Any]:
    _no_scale(sites, "HiRA")
    r, pattern = patterns({n: s.how.r for n, s in sites.items()})  # type: ignore[attr-defined]
    return {"r": r, "rank_pattern": pattern, "hira_dropout": 0.0, "init_weights": True}


def _hira_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    a = leaves.get("hira_A", leaves.get("hira_embedding_A"))
    if a is None:
        raise FileRefused(f"{module}: {sorted(leaves)} are no HiRA.", "The file is damaged.")
    kind = "embedding" if "hira_embedding_A" in leaves else "conv" if a.dim() > 2 else "linear"
    return SiteState(HiRA(int(a.shape[0])), kind, 1.0, {}, {"A": "input", "B": "output"})


# -- rotations ---------------------------------------------------------------------------------------------------------


def _oft_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    yield "q", "oft_embedding_R.weight" if s.kind == "embedding" else "oft_R.weight", _same, _same


def _side(count: int) -> int:
    """k of k(k−1)/2."""
    k = round((1 + math.sqrt(1 + 8 * count)) / 2)
    if k * (k - 1) // 2 != count:
        raise FileRefused(f"{count} numbers are no triangle above a diagonal.", "The file is damaged.")
    return k


def _oft_config(sites: Sites) -> dict[str, Any]:
    _no_scale(sites, "OFT")
    block = one(sites, "block", {n: _side(s.tensors["q"].shape[1]) for n, s in sites.items()})
    terms = one(sites, "series", {n: s.how.terms if type(s.how) is NeumannOFT else 0 for n, s in sites.items()})
    return {"r": 0, "oft_block_size": block, "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5,
            "coft": False, "block_share": False, "module_dropout": 0.0, "init_weights": True}  # fmt: skip


def _oft_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    if "oft_r" in leaves:
        raise NotExpressible(f"{module}: OFT of PEFT before 0.16 is another map, which newer PEFT does not read either.")
    for field in ("coft", "block_share"):
        if config.get(field):
            raise NotExpressible(f"adapter_config.json sets {field!r}: that OFT cannot be read.")
    embedded = "oft_embedding_R.weight" in leaves
    q = leaves["oft_embedding_R.weight" if embedded else "oft_R.weight"]
    k, terms = _side(q.shape[1]), int(config.get("num_cayley_neumann_terms", 5))
    how = NeumannOFT(k, terms) if config.get("use_cayley_neumann", True) else OFT(k)
    return SiteState(how, "embedding" if embedded else "linear", 1.0, {}, {"q": "core"})


def _boft_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    yield "q", "boft_R", _skewed, _above
    yield "s", "boft_s", (lambda t: t.unsqueeze(1)) if s.kind == "linear" else (lambda t: t.unsqueeze(0)), _line


def _skewed(q: Tensor) -> Tensor:
    """Above the diagonal → the whole skew matrix."""
    k = _side(q.shape[-1])
    i, j = torch.triu_indices(k, k, 1)
    out = q.new_zeros(*q.shape[:-1], k, k)
    out[..., i, j], out[..., j, i] = q, -q
    return out


def _above(R: Tensor) -> Tensor:
    i, j = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    return (0.5 * (R - R.mT))[..., i, j]


def _boft_config(sites: Sites) -> dict[str, Any]:
    _no_scale(sites, "BOFT")
    block = one(sites, "block", {n: _side(s.tensors["q"].shape[-1]) for n, s in sites.items()})
    levels = one(sites, "factors", {n: s.tensors["q"].shape[0] for n, s in sites.items()})
    return {"boft_block_size": block, "boft_block_num": 0, "boft_n_butterfly_factor": levels, "boft_dropout": 0.0,
            "init_weights": True}  # fmt: skip


def _boft_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    R = leaves["boft_R"]
    return SiteState(BOFT(int(R.shape[-1]), int(R.shape[0])), "linear", 1.0, {}, {"q": "core", "s": "magnitude"})


# -- RandLoRA, FourierFT -----------------------------------------------------------------------------------------------


def _rand_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    yield "A", "", (lambda t: t.unsqueeze(1)), (lambda t: t.squeeze(1))
    yield "B", "", _same, _same
    yield "lam", "randlora_lambda", _same, _same
    yield "gamma", "randlora_gamma", _same, _same


def _rand_config(sites: Sites) -> dict[str, Any]:
    r = one(sites, "r", {n: s.how.r for n, s in sites.items()})  # type: ignore[attr-defined]
    scale = one(sites, "scale", {n: s.scale for n, s in sites.items()})
    seed = one(sites, "seed", {n: s.how.seed for n, s in sites.items()})  # type: ignore[attr-defined]
    return {"r": r, "randlora_alpha": alpha_for(scale, r), "projection_prng_key": seed, "save_projection": True,
            "sparse": False, "very_sparse": False, "randlora_dropout": 0.0, "init_weights": True}  # fmt: skip


def _rand_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    r, alpha = int(config.get("r", 32)), float(config.get("randlora_alpha", 640))
    if config.get("save_projection") is False:
        raise NotExpressible("The file holds no RandLoRA bases, whose shapes follow from all layers of the model.",
                             "Save it with save_projection=True.")  # fmt: skip
    how = RandLoRA(r, alpha, 0.0, int(config.get("projection_prng_key") or 0))
    return SiteState(how, "linear", alpha / r, {}, {"A": "input", "B": "output", "lam": "core", "gamma": "core"},
                     {"A": "A", "B": "B"})  # fmt: skip


def _fourier_leaves(s: SiteState, shape: tuple[int, ...]) -> Iterable[Leaf]:
    yield "c", "fourierft_spectrum", _same, _same


def _fourier_config(sites: Sites) -> dict[str, Any]:
    scale = one(sites, "scale", {n: s.scale for n, s in sites.items()})
    seed = one(sites, "seed", {n: s.how.seed for n, s in sites.items()})  # type: ignore[attr-defined]
    count, pattern = patterns({n: s.how.n for n, s in sites.items()})  # type: ignore[attr-defined]
    return {"n_frequency": count, "n_frequency_pattern": {k.removeprefix("^").replace("\\", ""): v for k, v in pattern.items()},
            "scaling": scale, "random_loc_seed": seed, "init_weights": True}  # fmt: skip


def _fourier_site(module: str, config: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> SiteState:
    scale = float(config.get("scaling", 150.0))
    how = FourierFT(int(leaves["fourierft_spectrum"].numel()), scale, int(config.get("random_loc_seed", 777)))
    return SiteState(how, "linear", scale, {}, {"c": "core"})


RELATIVES: dict[str, Relative] = {
    "LOHA": Relative((LoHa, TuckerLoHa), ("linear", "conv"), tuple(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
                     _loha_leaves, _loha_config, _loha_site),
    "LOKR": Relative((LoKr, Kronecker), ("linear", "conv"), tuple(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
                     _lokr_leaves, _lokr_config, _lokr_site),
    "IA3": Relative((IA3,), ("linear", "conv"), ("ia3_l",), _ia3_leaves, _ia3_config, _ia3_site),
    "HIRA": Relative((HiRA,), ("linear", "conv", "embedding"), ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
                     _hira_leaves, _hira_config, _hira_site),
    "OFT": Relative((OFT, NeumannOFT), ("linear", "conv", "embedding"), ("oft_R.weight", "oft_embedding_R.weight", "oft_r"),
                    _oft_leaves, _oft_config, _oft_site, "oft_only", pointwise=True),
    "BOFT": Relative((BOFT,), ("linear", "conv"), ("boft_R", "boft_s", "boft_P"), _boft_leaves, _boft_config, _boft_site,
                     "boft_only", dropped=("boft_P",)),
    "RANDLORA": Relative((RandLoRA,), ("linear",), ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), _rand_leaves,
                         _rand_config, _rand_site, "randlora_only", {"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
                         ("randlora_A", "randlora_B")),
    "FOURIERFT": Relative((FourierFT,), ("linear",), ("fourierft_spectrum",), _fourier_leaves, _fourier_config, _fourier_site,
                          "fourier_only"),
}  # fmt: skip
FAMILY = {form: family for family, r in RELATIVES.items() for form in r.forms}
