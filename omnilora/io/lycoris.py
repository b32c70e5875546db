"""The layers of a kohya or LyCORIS file: which tensors make which map. One table of leaves, read and written.

A file names a layer once and hangs leaves on it: ``lora_unet_mid_block_conv1.lora_down.weight``. Scales are α/r with α in the
file (missing: r); LyCORIS folds its rsLoRA scale into that α. Halves are stored as float16 or float32 and read as float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core import state as states
from omnilora.core.full import Full
from omnilora.core.parameterization import Parameterization, is_additive
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import FileRefused, NotExpressible, OmniloraError
from omnilora.io.names import module_of
from omnilora.io.peft_facts import STORED, shape_of
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.hadamard import LoHa
from omnilora.parameterizations.kronecker import LoKr
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.lycoris import InputDoRA, Kronecker, OutputOFT, TuckerLoHa, TuckerLoRA, WeightScale
from omnilora.parameterizations.lycoris_products import ButterflyOFT, ProductLoRA

ALIASES = {  # other programs' words for a leaf
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight", "lora_B.default.weight": "lora_up.weight",
    "lora_A": "lora_down.weight", "lora_B": "lora_up.weight",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
}  # fmt: skip
LEAVES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "scalar", "dora_scale", "magnitude",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "diff", "diff_b", "w_norm", "b_norm", "on_input", "weight", "oft_blocks", "rescale",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight",
)  # fmt: skip
UNREAD = {
    "bundle_emb": "an embedding that trained with the adapter (pivotal tuning)",
    "bm.weight": "GLoRA with a core over the kernel",
    "q_layer.weight": "T-LoRA", "p_layer.weight": "T-LoRA", "lambda_layer": "T-LoRA",
    "bias_indices": "a sparse difference", "bias_values": "a sparse difference", "bias_size": "a sparse difference",
    "set_weight": "a replaced weight", "lora_up.bias": "a bias of the upper half", "lora_B.bias": "a bias of B",
}  # fmt: skip
ROLES = {
    "A": "input", "B": "output", "T": "core", "A1": "input", "B1": "output", "T1": "core", "A2": "input", "B2": "output",
    "T2": "core", "w1": "core", "w1a": "output", "w1b": "input", "w2": "core", "w2a": "output", "w2b": "input",
    "t2": "core", "X": "core", "s": "magnitude", "W": "own", "a1": "core", "a2": "input", "C": "input",
}  # fmt: skip
_PROCESSOR = re.compile(r"(.*\.to_(?:q|k|v|out)_lora)\.(down|up)\.weight")  # diffusers' attention processors
Leaves = dict[str, Tensor]


def leaf_of(key: str) -> tuple[str, str] | None:
    """(layer, leaf in this file's words) of a tensor's name; None where it is no leaf of this kind."""
    if key.startswith("bundle_emb."):
        return key, "bundle_emb"
    if (old := _PROCESSOR.fullmatch(key)) is not None:
        return module_of(old[1]), f"lora_{old[2]}.weight"
    found = [w for w in (*LEAVES, *ALIASES, *UNREAD) if key.endswith(f".{w}")]
    if not found:
        return None
    word = max(found, key=len)
    return key[: -len(word) - 1], ALIASES.get(word, word)


@dataclass(frozen=True)
class Read:
    """What the leaves of one layer say: form, scale, tensors, and the stored shape of the weight where they show it."""

    how: Parameterization
    scale: float
    tensors: Leaves
    shape: tuple[int, ...] | None = None
    conv: bool = False


# -- reading -----------------------------------------------------------------------------------------------------------


def sites_of(layer: str, leaves: Mapping[str, Tensor]) -> dict[str, SiteState]:
    """The sites of one layer. Raises FileRefused for leaves that do not fit together, NotExpressible for unread maps."""
    for leaf in leaves:
        if leaf in UNREAD:
            raise NotExpressible(f"{layer}.{leaf} is {UNREAD[leaf]}, which is not read.", "Leave it out of the file.")
    left = {k: t.detach().float() for k, t in leaves.items()}
    try:
        made = _sites(layer, left)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise FileRefused(f"{layer}: {sorted(leaves)} do not fit together ({type(error).__name__} {error}).",
                          "The file is damaged.") from error  # fmt: skip
    if left:
        raise FileRefused(f"{layer}: unexpected {sorted(left)} beside {sorted(set(leaves) - set(left))}.",
                          "The file is damaged or newer.")  # fmt: skip
    for name, s in made.items():
        for key, t in s.tensors.items():
            if not torch.isfinite(t).all():
                raise FileRefused(f"{name}: {key} holds NaN or infinite numbers.", "The file is damaged.")
    return made


def _sites(layer: str, left: Leaves) -> dict[str, SiteState]:
    if "w_norm" in left or "b_norm" in left:
        return {f"{layer}.{p}": _vector(left.pop(k)) for k, p in (("w_norm", "weight"), ("b_norm", "bias")) if k in left}
    out: dict[str, SiteState] = {}
    if "diff_b" in left:
        out[f"{layer}.bias"] = _vector(left.pop("diff_b"))
    if not left:
        return out
    read = _reader(left)(left)
    how, tensors = read.how, read.tensors
    roles = {k: ROLES[k] for k in tensors if k != "l"}
    if type(how) is WeightScale:
        roles["l"] = "magnitude" if how.side == "output" else "core"
    if "dora_scale" in left or "magnitude" in left:
        peft = "magnitude" in left  # PEFT's is for each output, (out,) or (1, out, 1, 1)
        m = left.pop("magnitude" if peft else "dora_scale")
        # LyCORIS': (out, 1, …) or (out,) a magnitude for each output; (1, in, …) for each input channel
        by_input = not peft and m.dim() > 1 and m.shape[0] == 1 and read.shape is not None and read.shape[0] != 1
        how = InputDoRA(how) if by_input else DoRA(how)
        tensors = {f"inner.{k}": t for k, t in tensors.items()} | {"m": m.flatten()}
        roles = {f"inner.{k}": r for k, r in roles.items()} | {"m": "core" if by_input else "magnitude"}
    how.check()
    marks = {} if read.shape is None or not read.conv else {STORED: {"shape": list(read.shape)}}
    size = None if read.shape is None else (read.shape[0], math.prod(read.shape[1:]))
    out[layer] = SiteState(how, "conv" if read.conv else "linear", read.scale,
                           {k: t.contiguous() for k, t in tensors.items()}, roles, marks=marks, shape=size)  # fmt: skip
    return out


def _vector(t: Tensor) -> SiteState:
    return SiteState(Full(delta_form=True), "tensor", 1.0, {"W": t.reshape(-1, 1).contiguous()}, {"W": "own"})


def _reader(left: Leaves) -> Any:
    readers = {"lora_down.weight": _read_lora, "hada_w1_a": _read_loha, "lokr_w1": _read_lokr, "lokr_w1_a": _read_lokr,
               "diff": _read_diff, "on_input": _read_scale, "oft_blocks": _read_oft, "a1.weight": _read_glora}  # fmt: skip
    found = [f for leaf, f in readers.items() if leaf in left]
    if not found:
        raise ValueError("no known map")
    return found[0]


def _scale(left: Leaves, r: int) -> tuple[float, float, float]:
    """(α, α/r, the trained scalar that older LyCORIS files keep beside the factors)."""
    alpha = float(left.pop("alpha")) if "alpha" in left else float(r)
    return alpha, alpha / r, float(left.pop("scalar", torch.tensor(1.0)))


def _read_lora(left: Leaves) -> Read:
    down, up = left.pop("lora_down.weight"), left.pop("lora_up.weight")
    mid = left.pop("lora_mid.weight", None)
    r = down.shape[0]
    if up.shape[1] != r:
        raise ValueError(f"ranks {up.shape[1]} and {r}")
    alpha, scale, more = _scale(left, r)
    up = up.flatten(1) * more
    if mid is not None:
        shape = (up.shape[0], down.shape[1], *mid.shape[2:])
        return Read(TuckerLoRA(r, alpha), scale, {"A": down.flatten(1), "T": mid.flatten(2), "B": up}, shape, True)
    shape = (up.shape[0], *down.shape[1:])
    return Read(LoRA(r, alpha), scale, {"A": down.flatten(1), "B": up}, shape, down.dim() > 2)


def _read_loha(left: Leaves) -> Read:
    a1, b1, a2, b2 = (left.pop(f"hada_w{i}_{x}") for i in "12" for x in "ab")
    if "hada_t1" in left:
        t1, t2 = left.pop("hada_t1"), left.pop("hada_t2")
        r = t1.shape[0]
        alpha, scale, more = _scale(left, r)
        tensors = {"A1": b1.flatten(1), "T1": t1.flatten(2), "B1": a1.flatten(1).mT * more,
                   "A2": b2.flatten(1), "T2": t2.flatten(2), "B2": a2.flatten(1).mT}  # fmt: skip
        return Read(TuckerLoHa(r, alpha), scale, tensors, (a1.shape[1], b1.shape[1], *t1.shape[2:]), True)
    r = b1.shape[0]
    alpha, scale, more = _scale(left, r)
    conv = b1.dim() > 2
    return Read(LoHa(r, alpha), scale, {"A1": b1.flatten(1), "B1": a1.flatten(1) * more, "A2": b2.flatten(1),
                                        "B2": a2.flatten(1)}, (a1.shape[0], *b1.shape[1:]), conv)  # fmt: skip


def _read_lokr(left: Leaves) -> Read:
    tensors: Leaves = {}
    first, second, r, kernel = "whole", "whole", 0, ()
    if "lokr_w1" in left:
        tensors["w1"] = left.pop("lokr_w1")
        l, m = tensors["w1"].shape
    else:
        first = "factored"
        tensors |= {"w1a": left.pop("lokr_w1_a"), "w1b": left.pop("lokr_w1_b")}
        l, m, r = tensors["w1a"].shape[0], tensors["w1b"].shape[1], tensors["w1b"].shape[0]
    if "lokr_w2" in left:
        w2 = left.pop("lokr_w2")
        k, n, kernel = w2.shape[0], w2.shape[1], tuple(w2.shape[2:])
        tensors["w2"] = w2.flatten(1)
    else:
        w2a, w2b = left.pop("lokr_w2_a"), left.pop("lokr_w2_b")
        second, r = "factored", w2b.shape[0]
        if "lokr_t2" in left:
            t2 = left.pop("lokr_t2")
            second, kernel, w2a = "tucker", tuple(t2.shape[2:]), w2a.mT  # stored (r, k)
            tensors["t2"] = t2.flatten(2)
        k, n = w2a.shape[0], w2b.shape[1]
        tensors |= {"w2a": w2a, "w2b": w2b.flatten(1)}
    whole = first == second == "whole"
    alpha, scale, more = _scale(left, max(r, 1))
    key = "w1" if first == "whole" else "w1a"
    tensors[key] = tensors[key] * more
    r = max(r, 1)
    how = Kronecker(r, float(r) if whole else alpha, 0.0, l, m, first, second)
    return Read(how, 1.0 if whole else scale, tensors, (l * k, m * n, *kernel), bool(kernel))


def _read_diff(left: Leaves) -> Read:
    diff = left.pop("diff")
    left.pop("alpha", None)
    if diff.dim() < 2:
        raise ValueError("a difference of a vector beside no norm")
    return Read(Full(delta_form=True), 1.0, {"W": diff.flatten(1)}, tuple(diff.shape), diff.dim() > 2)


def _read_scale(left: Leaves) -> Read:
    side = "input" if bool(left.pop("on_input")) else "output"
    return Read(WeightScale(side), 1.0, {"l": left.pop("weight").flatten() + 1.0})


def _read_oft(left: Leaves) -> Read:
    blocks, alpha = left.pop("oft_blocks"), left.pop("alpha", torch.tensor(0.0))
    tensors: Leaves = {"X": blocks}
    if "rescale" in left:
        tensors["s"] = left.pop("rescale").flatten()
    if blocks.dim() == 4:
        how = ButterflyOFT(blocks.shape[2], blocks.shape[0], max(float(alpha), 0.0), "s" in tensors)
        return Read(how, 1.0, tensors)
    if blocks.dim() != 3:
        raise ValueError(f"oft_blocks of {blocks.dim()} dimensions")
    return Read(OutputOFT(blocks.shape[1], max(float(alpha), 0.0), "s" in tensors), 1.0, tensors)


def _read_glora(left: Leaves) -> Read:
    a1, a2, b1, b2 = (left.pop(f"{x}.weight") for x in ("a1", "a2", "b1", "b2"))
    alpha, scale, more = _scale(left, a2.shape[0])
    tensors = {"a1": a1.flatten(1), "a2": a2.flatten(1) * more, "B": b1.flatten(1), "C": b2.flatten(1) * more}
    return Read(ProductLoRA(a2.shape[0], alpha), scale, tensors, (b1.shape[0], *b2.shape[1:]), b2.dim() > 2)


# -- writing -----------------------------------------------------------------------------------------------------------


def plain(name: str, s: SiteState, state: AdapterState) -> tuple[Tensor, Tensor, float] | None:
    """(B, A, scale) of a site that is a product of two thin matrices, exactly; None where it is not."""
    if s.kind not in ("linear", "conv", "embedding") or not is_additive(s.how) or s.region is not None:
        return None
    if type(s.how) is LoRA:
        lora = s.how.conv_layout == "peft"
        return (s.tensor("B", state), s.tensor("A", state), s.scale) if lora else None
    if s.how.rank() == 0:
        return None
    try:
        found = states.delta(s, state).factors()
    except (AttributeError, NotImplementedError, TypeError, OmniloraError):  # the form reads its layer, or its input
        return None
    if found is None or found[1].shape[0] > 2 * min(found[0].shape[0], found[1].shape[1]):  # thick: more numbers than ΔW
        return None
    return *found, 1.0


def kernel_of(name: str, s: SiteState, state: AdapterState) -> tuple[int, ...]:
    """(channels, *kernel) of the stored weight; (in,) of a linear layer."""
    if s.kind == "linear":
        return ()
    shape = shape_of(name, s, state)
    if shape is None:
        raise NotExpressible(f"{name}: the kernel of the convolution is not in the state.", "Give the model.")
    return tuple(shape[1:])


def leaves_of(name: str, s: SiteState, state: AdapterState, lora_only: bool = False) -> Leaves:
    """The leaves of one site in LyCORIS' words. Raises NotExpressible with the reason."""
    if s.region is not None:
        raise NotExpressible(f"{name} is a slice of a fused layer; these files adapt whole layers.", "Give rank= and the model.")
    if s.kind not in ("linear", "conv"):
        raise NotExpressible(f"{name}: these files adapt linear layers and convolutions, no {s.kind}.", "Leave it out.")
    inner = s.how.inner if type(s.how) in (DoRA, InputDoRA) else s.how  # type: ignore[attr-defined]
    if inner is not s.how:
        cut = {k.removeprefix("inner."): k for k in s.roles if k.startswith("inner.")}
        part = SiteState(inner, s.kind, s.scale, {k: s.tensor(full, state) for k, full in cut.items()},
                         {k: s.roles[full] for k, full in cut.items()}, marks=s.marks, shape=s.shape)  # fmt: skip
        shape = kernel_of(name, s, state)
        m, ones = s.tensor("m", state), (1,) * max(len(shape) - 1, 0)
        scale = m.reshape(-1, 1, *ones) if type(s.how) is DoRA else m.reshape(1, -1, *ones)
        return {**leaves_of(name, part, state, lora_only), "dora_scale": scale}
    ba = plain(name, s, state) if type(inner) not in (LoHa, TuckerLoHa, TuckerLoRA) or lora_only else None
    if ba is not None:
        return _write_lora(*ba, kernel_of(name, s, state))
    writer = _WRITERS.get(type(inner))
    if writer is None or (lora_only and type(inner) is not TuckerLoRA):
        raise NotExpressible(f"{name}: a {type(inner).__name__} is no map of this format.", "Give rank= to lower it.")
    if type(inner) is Full and not is_difference(inner):
        raise NotExpressible(f"{name}: an own copy is no difference, which these files hold.", "Give the model with its weights.")
    t = {k: s.tensor(k, state) for k in s.roles}
    return writer(inner, t, s.scale, kernel_of(name, s, state))


def is_difference(how: Any) -> bool:
    return type(how) is Full and how.delta_form and how.rows is None


def alpha_of(scale: float, r: int) -> Tensor:
    return torch.tensor(scale * r, dtype=torch.float32)


def _write_lora(B: Tensor, A: Tensor, scale: float, shape: tuple[int, ...]) -> Leaves:
    r, ones = A.shape[0], (1,) * max(len(shape) - 1, 0)
    return {"lora_down.weight": A.reshape(r, *shape) if shape else A, "lora_up.weight": B.reshape(-1, r, *ones),
            "alpha": alpha_of(scale, r)}  # fmt: skip


def _write_tucker(how: TuckerLoRA, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    kernel = shape[1:] or (1,)
    ones = (1,) * len(kernel)
    return {"lora_down.weight": t["A"].reshape(*t["A"].shape, *ones), "lora_up.weight": t["B"].reshape(*t["B"].shape, *ones),
            "lora_mid.weight": t["T"].reshape(how.r, how.r, *kernel), "alpha": alpha_of(scale, how.r)}  # fmt: skip


def _write_loha(how: LoHa, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    return {"hada_w1_a": t["B1"], "hada_w1_b": t["A1"], "hada_w2_a": t["B2"], "hada_w2_b": t["A2"],
            "alpha": alpha_of(scale, how.r)}  # fmt: skip


def _write_tucker_loha(how: TuckerLoHa, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    kernel = shape[1:] or (1,)
    return {"hada_w1_a": t["B1"].mT, "hada_w1_b": t["A1"], "hada_w2_a": t["B2"].mT, "hada_w2_b": t["A2"],
            "hada_t1": t["T1"].reshape(how.r, how.r, *kernel), "hada_t2": t["T2"].reshape(how.r, how.r, *kernel),
            "alpha": alpha_of(scale, how.r)}  # fmt: skip


def _write_kron(how: Any, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    words = {"w1": "lokr_w1", "w1a": "lokr_w1_a", "w1b": "lokr_w1_b", "w2": "lokr_w2", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"}
    out = {word: t[k] for k, word in words.items() if k in t}
    kernel = shape[1:]
    whole = "w1" in t and "w2" in t
    if "w2" in t and kernel:
        out["lokr_w2"] = t["w2"].reshape(t["w2"].shape[0], -1, *kernel)
    if "t2" in t:
        out |= {"lokr_t2": t["t2"].reshape(how.r, how.r, *(kernel or (1,))), "lokr_w2_a": t["w2a"].mT}
    if whole and scale != 1.0:  # no α acts on two whole matrices
        out["lokr_w1"] = out["lokr_w1"] * scale
    return {**out, "alpha": alpha_of(1.0 if whole else scale, how.r)}


def _write_full(how: Full, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    return {"diff": t["W"].reshape(t["W"].shape[0], *shape) if shape else t["W"]}


def _write_scale(how: WeightScale, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    w = t["l"] - 1.0
    return {"weight": w.reshape(1, -1, *(1,) * (len(shape) - 1)) if shape else w,
            "on_input": torch.tensor(int(how.side == "input"))}  # fmt: skip


def _write_glora(how: ProductLoRA, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    ones = (1,) * max(len(shape) - 1, 0)
    c = t["C"].reshape(how.r, *shape) if shape else t["C"]
    return {"a1.weight": t["a1"].reshape(*t["a1"].shape, *ones), "a2.weight": t["a2"].reshape(*t["a2"].shape, *ones),
            "b1.weight": t["B"].reshape(*t["B"].shape, *ones), "b2.weight": c, "alpha": alpha_of(scale, how.r)}  # fmt: skip


def _write_oft(how: OutputOFT | ButterflyOFT, t: Leaves, scale: float, shape: tuple[int, ...]) -> Leaves:
    out = {"oft_blocks": t["X"], "alpha": torch.tensor(how.constraint)}
    return out | ({"rescale": t["s"].reshape(-1, 1, *(1,) * max(len(shape) - 1, 0))} if "s" in t else {})


_WRITERS: dict[type, Any] = {
    TuckerLoRA: _write_tucker, LoHa: _write_loha, TuckerLoHa: _write_tucker_loha, Kronecker: _write_kron, LoKr: _write_kron,
    Full: _write_full, WeightScale: _write_scale, OutputOFT: _write_oft,
    ButterflyOFT: _write_oft, ProductLoRA: _write_glora,
}  # fmt: skip
