"""How PEFT names and shapes the tensors of an adapter: one table, read in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.full import Full
from omnilora.core.parameterization import Parameterization
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import FileRefused, NotExpressible
from omnilora.io.peft_facts import STORED, shape_of
from omnilora.io.peft_relatives import FAMILY, RELATIVES
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.run_lora import RunLoRA
from omnilora.parameterizations.shifted import ShiftedLoRA
from omnilora.parameterizations.svd import SVD
from omnilora.parameterizations.vera import VeRA

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
LEAVES = {
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
    "ADALORA": {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"},
    "VERA": {"d": "vera_lambda_d", "b": "vera_lambda_b"},
}
HALVES = {"A": (0, 0), "B": (1, 0), "A0": (0, 1), "B0": (1, 1)}  # of ShiftedLoRA: (A; A₀), (B, −B₀), rank 2r
_READ_BY_PARENT = re.compile(
    r"(^|\.)(in_proj_weight|[qkv]_proj_weight|out_proj\.weight|weight_(ih|hh|hr)_l\d+(_reverse)?)$"
)
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # transformers' expert stacks


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Entry:
    """One tensor: its native and its PEFT name, and its shape in each. Halves of one foreign tensor come in order."""

    site: str
    name: str
    native: str
    foreign: str
    pack: Callable[[Tensor], Tensor] = _same
    unpack: Callable[[Tensor], Tensor] = _same
    half: tuple[int, int] | None = None  # (dimension, 0 or 1): one half of the foreign tensor, along the rank

    def part(self, whole: Tensor) -> Tensor:
        """What of the foreign tensor is this one's."""
        if self.half is None:
            return whole
        dim, which = self.half
        return whole.narrow(dim, which * (whole.shape[dim] // 2), whole.shape[dim] // 2)


def family_of(how: Parameterization) -> str | None:
    """The PEFT type that has this map; "own" for own copies, None where PEFT has none."""
    kind = type(how)
    if kind in (LoRA, ShiftedLoRA, RunLoRA):
        return "LORA" if how.conv_layout == "peft" else None  # type: ignore[attr-defined]
    if kind is DoRA:
        return family_of(how.inner) if type(how.inner) is LoRA else None  # type: ignore[attr-defined]
    return {SVD: "ADALORA", VeRA: "VERA", Full: "own", **FAMILY}.get(kind)


def lora_of(how: Parameterization) -> LoRA:
    return how.inner if type(how) is DoRA else how  # type: ignore[return-value,attr-defined]


def split(name: str, kind: str) -> tuple[str, str]:
    """(path of the module, parameter) of a site."""
    if kind != "tensor":
        return name, "weight"
    module, _, param = name.rpartition(".")
    return module, param


def nested(sites: Mapping[str, SiteState]) -> dict[str, tuple[str, int]]:
    """Raw parameters under LoRA → (module, depth): PEFT wraps a module once a parameter, the last one outermost."""
    by_module: dict[str, list[str]] = {}
    for name, s in sites.items():
        if s.kind == "tensor" and family_of(s.how) != "own":
            by_module.setdefault(split(name, s.kind)[0], []).append(name)
    out = {}
    for module, names in by_module.items():
        ordered = sorted(names, key=lambda n: _rank_of(n, sites[n], len(names)))
        out |= {n: (module, len(names) - 1 - i) for i, n in enumerate(ordered)}
    return out


def _rank_of(name: str, s: SiteState, count: int) -> int:
    order = s.marks.get(STORED, {}).get("order")
    if order is not None:
        return int(order)
    param = name.rpartition(".")[2]
    if count > 1 and param not in _ORDER:
        raise NotExpressible(f"{name}: PEFT nests the parameters of a module in an order that the state does not know.",
                             "Save from the model.")  # fmt: skip
    return _ORDER.index(param) if param in _ORDER else 0


def entries(sites: Mapping[str, SiteState], state: AdapterState | None = None) -> list[Entry]:
    """Every tensor of the sites, once a site. Raises NotExpressible with the site and the reason.

    ``state`` is given for writing: packing asks for stored shapes, reading does not.
    """
    depth = nested(sites)
    wrapped = {n for n, s in sites.items() if s.kind != "tensor" and family_of(s.how) not in ("own", None)}
    params = {module for module, _ in depth.values()}
    out: list[Entry] = []
    for name, s in sites.items():
        family = family_of(s.how)
        if family is None:
            raise NotExpressible(f"{name}: a {type(s.how).__name__} of this layout is not written in PEFT's format.")
        if s.region is not None:
            raise NotExpressible(f"{name} is a slice of a fused layer; PEFT adapts whole layers.")
        if family == "own":
            out.append(_own(name, s, state, wrapped, params))
        elif s.kind == "tensor":
            out += _stack(name, s, *depth[name], wrapped)
        else:
            out += _layer(name, s, family, state)
    return out


def renamed(table: Sequence[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the file, once; missing and unexpected ones are refused."""
    out: dict[str, Tensor] = {}
    for e in table:
        if e.foreign not in tensors:
            raise FileRefused(f"The tensor {e.foreign!r} is missing.", "The file is damaged.")
        t = e.unpack(e.part(tensors[e.foreign])).contiguous()
        if e.native in out and not torch.equal(out[e.native], t):
            raise FileRefused(f"{e.foreign!r} differs from the other copies of {e.native!r}.", "The file is damaged.")
        out[e.native] = t
    extra = set(tensors) - {e.foreign for e in table}
    if extra:
        raise FileRefused(f"Unexpected tensors: {sorted(extra)[:4]}.", "The file is damaged or newer.")
    return out


def _native(name: str, tensor: str, s: SiteState) -> str:
    return f"shared::{s.shared[tensor]}" if tensor in s.shared else f"{name}::{tensor}"


def _layer(name: str, s: SiteState, family: str, state: AdapterState | None) -> Iterable[Entry]:
    if family in RELATIVES:
        yield from _relative(name, s, family, state)
        return
    allowed = {"LORA": ("linear", "embedding", "conv"), "ADALORA": ("linear", "conv"), "VERA": ("linear",)}[family]
    if s.kind not in allowed:
        raise NotExpressible(f"{name}: PEFT's {family} does not adapt a {s.kind}.")
    shape: tuple[int, ...] | None = None
    if s.kind == "conv" and state is not None:
        shape = _conv_shape(name, s, family, state)
    if s.kind == "embedding" and state is not None:
        _check_padding(name, s, state)
    leaves = LEAVES["embedding" if s.kind == "embedding" else family]
    for tensor in s.roles:
        last = tensor.rpartition(".")[2]
        native = _native(name, tensor, s)
        half = HALVES.get(last) if type(s.how) is ShiftedLoRA else None
        if half is not None:
            last = last[0]
        if family == "VERA" and last in SHARED:
            yield Entry(name, tensor, native, SHARED[last])
            continue
        pack, unpack = _same, _same
        if s.kind == "conv" and family == "LORA":
            pack, unpack = _conv_pack(last, shape), _flat if last != "m" else _line
        elif last == "lam":
            pack, unpack = _column, _line
        if tensor == "B0":
            pack, unpack = _minus(pack), _minus(unpack)
        yield Entry(name, tensor, native, f"{PREFIX}{name}.{leaves[last]}", pack, unpack, half)


def _relative(name: str, s: SiteState, family: str, state: AdapterState | None) -> Iterable[Entry]:
    relative = RELATIVES[family]
    if s.kind not in relative.kinds:
        raise NotExpressible(f"{name}: PEFT's {family} does not adapt a {s.kind}.")
    shape = _conv_shape(name, s, family, state) if s.kind == "conv" and state is not None else ()
    if relative.pointwise and any(k != 1 for k in shape[2:]):
        raise NotExpressible(f"{name}: PEFT's {family} of a convolution with a kernel larger than 1 is no product with a weight.")
    if s.kind == "embedding" and state is not None and "A" in s.roles:
        _check_padding(name, s, state)
    for tensor, leaf, pack, unpack in relative.leaves(s, shape):
        whole = (relative.shared or {}).get(tensor)
        yield Entry(name, tensor, _native(name, tensor, s), whole or f"{PREFIX}{name}.{leaf}", pack, unpack)


def _check_padding(name: str, s: SiteState, state: AdapterState) -> None:
    pad = s.marks.get(STORED, {}).get("pad")
    sides = [k for k in s.roles if k.rpartition(".")[2] in ("A", "A0")]
    if pad is not None and any(s.tensor(a, state)[:, pad].any() for a in sides):
        raise NotExpressible(f"{name}: A is not zero at the padding id {pad}, where PEFT would apply it.")


def _conv_shape(name: str, s: SiteState, family: str, state: AdapterState) -> tuple[int, ...]:
    known = s.marks.get(STORED, {})
    shape = shape_of(name, s, state)
    if shape is None or "groups" not in known:
        raise NotExpressible(f"{name}: kernel, groups and dilation of the convolution are not in the state.",
                             "Save or export from the model.")  # fmt: skip
    if known["groups"] != 1 or known["padding"] != "zeros":
        raise NotExpressible(f"{name}: PEFT's {family} of a convolution with groups = {known['groups']} and padding "
                             f"{known['padding']!r} is another map.")  # fmt: skip
    if family == "LORA" and any(d != 1 for d in known["dilation"]):
        raise NotExpressible(f"{name}: PEFT's LoRA ignores the dilation of a convolution.")
    if family == "ADALORA" and len(shape) != 4:
        raise NotExpressible(f"{name}: PEFT's AdaLoRA adapts 2-D convolutions only.")
    return shape


def _conv_pack(last: str, shape: tuple[int, ...] | None) -> Callable[[Tensor], Tensor]:
    if shape is None:
        return _same
    ones = (1,) * (len(shape) - 2)
    if last == "m":
        return lambda t: t.reshape(1, -1, *ones)
    return (lambda t: t.reshape(-1, *shape[1:])) if last == "A" else (lambda t: t.reshape(*t.shape, *ones))


def _minus(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: -f(t)


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1)


def _line(t: Tensor) -> Tensor:
    return t.flatten()


def _column(t: Tensor) -> Tensor:
    return t.unsqueeze(-1)


def _turn(t: Tensor) -> Tensor:
    return t.mT


def _stack(name: str, s: SiteState, module: str, depth: int, wrapped: set[str]) -> Iterable[Entry]:
    """A raw parameter: A (E·r, in) with the expert first, B (out, r·E) with the expert last."""
    if family_of(s.how) != "LORA" or type(s.how) is not LoRA:
        raise NotExpressible(f"{name}: PEFT's target_parameters takes plain LoRA, no {type(s.how).__name__}.")
    if _READ_BY_PARENT.search(name):
        raise NotExpressible(f"{name} is read by its parent; PEFT cannot adapt it in place.")
    if not module or module in wrapped:
        raise NotExpressible(f"{name}: PEFT cannot wrap this parameter of "
                             f"{'the model itself' if not module else 'a layer that is adapted too'}.")  # fmt: skip
    r, at = s.how.r, f"{PREFIX}{module}{'.base_layer' * depth}."

    def unpack_a(t: Tensor) -> Tensor:
        return t if t.shape[0] == r else t.unflatten(0, (-1, r))

    def unpack_b(t: Tensor) -> Tensor:
        return t if t.shape[1] == r else t.unflatten(1, (r, -1)).permute(2, 0, 1)

    def pack_b(t: Tensor) -> Tensor:
        return t if t.dim() == 2 else t.permute(1, 2, 0).flatten(1)

    yield Entry(name, "A", _native(name, "A", s), f"{at}lora_A.weight",
                lambda t: t.reshape(-1, t.shape[-1]), unpack_a)  # fmt: skip
    yield Entry(name, "B", _native(name, "B", s), f"{at}lora_B.weight", pack_b, unpack_b)


def _own(name: str, s: SiteState, state: AdapterState | None, wrapped: set[str], params: set[str]) -> Entry:
    how: Any = s.how
    module, param = split(name, s.kind)
    if how.delta_form:
        raise NotExpressible(f"{name} accumulates a dense difference; PEFT has no such map.")
    if how.rows is not None:
        if s.kind != "embedding":
            raise NotExpressible(f"{name}: PEFT trains single rows of embeddings only.")
        if state is not None and s.marks.get(STORED, {}).get("tied") is not False:
            raise NotExpressible(f"{name}: PEFT gives trained tokens to a tied output head too, and the weight is tied "
                                 "or not known to be free.", "Save from the model.")  # fmt: skip
        return Entry(name, "W", _native(name, "W", s), f"{PREFIX}{module}.{TOKENS}")
    if (module in wrapped and param != "bias") or module in params:
        raise NotExpressible(f"{name}: PEFT cannot own a tensor of a layer that it also adapts.")
    if any(p.startswith(f"{module}.") for p in wrapped) and param != "bias":
        raise NotExpressible(f"{name}: PEFT copies {module} as a whole, adapted layers inside included.")
    base = ".base_layer" if module in wrapped else ""
    pack, unpack = _own_layout(name, s, state)
    path = f"{module}{base}.{param}" if module else param
    return Entry(name, "W", _native(name, "W", s), f"{PREFIX}{path}", pack, unpack)


def _own_layout(name: str, s: SiteState, state: AdapterState | None) -> tuple[Callable[..., Tensor], ...]:
    shape, turned = shape_of(name, s, state), s.marks.get(STORED, {}).get("turned")
    if s.kind == "embedding" or turned:
        return _turn, _turn
    if s.kind == "linear" and turned is None and state is not None and not _surely_plain(shape, s.tensors["W"]):
        raise NotExpressible(f"{name}: the state does not tell whether the weight is stored (out, in) or (in, out).",
                             "Save from the model.")  # fmt: skip
    if s.kind == "conv" or (s.kind == "tensor" and name.endswith("weight")):
        unpack = _matrix_of
    else:
        unpack = _matrix_or_stack
    if shape is None:
        return (_same if s.kind != "tensor" else _unpadded), unpack
    if state is not None and math.prod(shape) != s.tensors["W"].numel():
        raise NotExpressible(f"{name}: the own copy has not the shape of the tensor, {shape}.")
    return (lambda t: t.reshape(shape)), unpack


def _matrix_of(t: Tensor) -> Tensor:
    return t.flatten(1) if t.dim() > 2 else _matrix_or_stack(t)


def _matrix_or_stack(t: Tensor) -> Tensor:
    return t.reshape(-1, 1) if t.dim() < 2 else t


def _unpadded(t: Tensor) -> Tensor:
    return t.flatten() if t.shape[-1] == 1 else t


def _surely_plain(shape: tuple[int, ...] | None, W: Tensor) -> bool:
    return shape == tuple(W.shape) and W.shape[0] != W.shape[1]
