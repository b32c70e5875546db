"""Ways to hold a matrix in few bits: a codebook by block, integers by input group, block floating point.

A codec turns W (out, in) into packed codes and the numbers that scale them, and back. It is a value: fields only store.

    NormalFloat   ŵ = level[code] · scale[block]            QLoRA arXiv:2305.14314, LQ-LoRA arXiv:2311.12023
    IntGroups     ŵ = S[j, g] · (code − Z[j, g])            QA-LoRA arXiv:2309.14717
    MXInt         ŵ = mantissa · 2^(e[block] − k + 1)       LQER arXiv:2402.02446
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.errors import BadValue, UnknownName, nearest
from omnilora.stores import bits as packing
from omnilora.stores.nf4 import DTYPES, normal_float

Held = Mapping[str, Tensor]  # "": codes; other names: what scales them
Layout = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # name → shape and the dtypes it may have
_READ = 1 << 15  # weights decoded at a time on a CPU: stays in cache
_TINY = 1e-38
_LEVELS = {bits: normal_float(bits) for bits in range(2, 9)}
FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Codec(ABC):
    """``bits`` of a code, and how many weights share a scale (``block``; 0: the whole matrix)."""

    known: ClassVar[dict[str, type[Codec]]] = {}

    bits: int = 4
    block: int = 64
    by_row: ClassVar[bool] = False  # blocks run along the inputs of a row, else along the flattened matrix

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Codec.known[cls.__name__] = cls

    def __post_init__(self) -> None:
        _whole(self.bits, "bits", 2, 8)
        if not isinstance(self.block, int) or self.block < 0 or (self.block % 8 and not self.by_row):
            raise BadValue(f"block = {self.block!r}.", "Give a multiple of 8, or 0 for the whole matrix.")

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name: nf3, int4, mxint4."""

    @abstractmethod
    def _scales(self, blocks: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """blocks (n, size) → (codes (n, size) uint8, what scales them)."""

    @abstractmethod
    def _affine(self, held: Held, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(levels (2ᵏ,), scale (count,), zero (count,) or None): ŵ = (level − zero) · scale."""

    @abstractmethod
    def _scale_layout(self, count: int) -> Layout: ...

    # -- what is stored ----------------------------------------------------------------------------------------------

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(how many, of how many weights); the last block of a row, or of the matrix, may be filled up."""
        out, inn = shape
        if self.block == 0:
            return 1, out * inn
        return (out * -(-inn // self.block) if self.by_row else -(-out * inn // self.block)), self.block

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Names, shapes and dtypes of the tensors that hold a matrix of ``shape``."""
        count, width = self.blocks(shape)
        return {"": ((packing.size(count * width, self.bits),), (torch.uint8,)), **self._scale_layout(count)}

    def bits_per_weight(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> float:
        """Exact: 8 · bytes held / weights, the weight being fp32 or narrower."""
        return 8 * sum(prod(s) * d[0].itemsize for s, d in self.layout(shape).values()) / prod(shape)

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        """w (out, in) → tensors by name. Raises :class:`BadValue` on what is no finite matrix."""
        if w.dim() != 2 or not w.numel() or not w.is_floating_point():
            raise BadValue(f"A tensor {tuple(w.shape)} of {w.dtype} cannot be quantized.", "Give a matrix of floats.")
        if w.is_meta:
            return {k: torch.empty(s, dtype=d[0], device="meta") for k, (s, d) in self.layout(tuple(w.shape)).items()}
        wide = w.detach() if w.dtype == torch.float64 else w.detach().float()
        if not wide.isfinite().all():
            raise BadValue(f"A matrix {tuple(w.shape)} with infinite or NaN elements cannot be quantized.", "Clean it.")
        codes, scales = self._scales(self._blocked(wide), wide)
        return {"": packing.pack(codes, self.bits), **{k: v.contiguous() for k, v in scales.items()}}

    def decode(self, held: Held, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ (shape): computed in fp32 (or wider where the scales are), rounded once to ``dtype``."""
        count, width = self.blocks(shape)
        table, scale, zero = self._affine(held, count)
        codes = held[""]
        whole = codes.device.type != "cpu" or torch.compiler.is_compiling() or width % 8 != 0
        step = count if whole else max(_READ // width, 1)
        bytes_each = width * self.bits // 8
        made = torch.empty(count, width, dtype=dtype, device=codes.device)
        for i in range(0, count, step):
            part = codes if whole else codes[i * bytes_each : (i + step) * bytes_each]
            value = packing.levels(part, self.bits, table)[: min(step, count - i) * width].view(-1, width)
            if zero is not None:
                value = value.sub_(zero[i : i + step, None])
            made[i : i + step] = value.mul_(scale[i : i + step, None])
        return self._unblocked(made, shape)

    def round(self, w: Tensor) -> Tensor:
        """ŵ of w, in w's dtype."""
        return self.decode(self.encode(w), tuple(w.shape), w.dtype)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _blocked(self, w: Tensor) -> Tensor:
        """(out, in) → (count, size), filled up with copies of the last weight."""
        if self.block == 0:
            return w.reshape(1, -1)
        rows = w if self.by_row else w.reshape(1, -1)
        short = -rows.shape[-1] % self.block
        if short:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, short)], -1)
        return rows.reshape(-1, self.block)

    def _unblocked(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.by_row and self.block:
            rows = blocks.view(shape[0], -1)
            return rows if rows.shape[1] == shape[1] else rows[:, : shape[1]].contiguous()
        return blocks.view(-1)[: prod(shape)].view(shape)


@dataclass(frozen=True)
class NormalFloat(Codec):
    """Quantiles of the normal distribution over the block's absmax.

    ``scale_bits`` 0: fp32 scales. Else scales are unsigned integers of that many bits over groups of ``scale_block``,
    from the smallest scale of the matrix upwards; the groups' maxima are held in ``top``. Codes are chosen by the
    scale that is held. Bits a weight: k + b₀/B₀ + b₁/(B₀ B₁).
    """

    scale_bits: int = 0
    scale_block: int = 256
    top: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole(self.scale_bits, "scale_bits", 0, 8)
        _whole(self.scale_block, "scale_block", 8, 1 << 20)
        if self.scale_block % 8 or self.scale_bits == 1 or self.top not in DTYPES:
            raise BadValue(f"scale_bits = {self.scale_bits}, scale_block = {self.scale_block}, top = {self.top!r}.",
                           f"scale_bits 0 or 2 … 8, scale_block a multiple of 8, top one of {', '.join(DTYPES)}.")  # fmt: skip

    @property
    def name(self) -> str:
        return f"nf{self.bits}"

    def _scales(self, blocks: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        blocks = blocks.float()
        absmax = blocks.abs().amax(1)
        scales = {"scale": absmax}
        if self.scale_bits:
            offset, most = absmax.min(), 2**self.scale_bits - 1
            above = F.pad(absmax - offset, (0, -len(absmax) % self.scale_block)).view(-1, self.scale_block)
            top = above.amax(1).to(DTYPES[self.top])
            steps = (above * (most / top.float().clamp_min(_TINY))[:, None]).round_().clamp_(0, most).to(torch.uint8)
            scales = {"scale": packing.pack(steps, self.scale_bits), "top": top, "offset": offset}
            absmax = self._held_scale(scales, len(absmax))
        edges = _LEVELS[self.bits].to(w.device)
        edges = (edges[1:] + edges[:-1]) / 2
        codes = torch.bucketize(blocks / absmax.clamp_min(_TINY)[:, None], edges, out_int32=True)
        return codes.to(torch.uint8), scales

    def _held_scale(self, held: Held, count: int) -> Tensor:
        steps = packing.unpack(held["scale"], self.scale_bits).view(-1, self.scale_block)
        scale = steps * (held["top"].float() / (2**self.scale_bits - 1))[:, None] + held["offset"]
        return scale.view(-1)[:count]

    def _affine(self, held: Held, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        table = _LEVELS[self.bits].to(held[""].device)
        return table, held["scale"] if self.scale_bits == 0 else self._held_scale(held, count), None

    def _scale_layout(self, count: int) -> Layout:
        f32 = (torch.float32,)
        if self.scale_bits == 0:
            return {"scale": ((count,), f32)}
        groups = -(-count // self.scale_block)
        return {"scale": ((packing.size(groups * self.scale_block, self.scale_bits),), (torch.uint8,)),
                "top": ((groups,), (DTYPES[self.top],)), "offset": ((), f32)}  # fmt: skip


@dataclass(frozen=True)
class IntGroups(Codec):
    """Min–max integers: S = (max − min)/(2ᵏ − 1), Z = −min/S a real number, by row and group of ``block`` inputs.

    ``clip``: weights beyond mean ± clip · std of the matrix are cut first (LoftQ's uniform quantizer, with block 0).
    """

    block: int = 32
    clip: float = 0.0
    held_in: str = "float32"
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip >= 0 or self.held_in not in DTYPES:
            raise BadValue(f"clip = {self.clip!r}, held_in = {self.held_in!r}.",
                           f"clip ≥ 0; held_in one of {', '.join(DTYPES)}.")  # fmt: skip

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def _scales(self, blocks: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.clip:
            reach = self.clip * w.std()
            blocks = blocks.clamp(w.mean() - reach, w.mean() + reach)
        kept = torch.float64 if w.dtype == torch.float64 else DTYPES[self.held_in]
        low, high = blocks.amin(1), blocks.amax(1)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale > torch.finfo(kept).tiny, scale, 1.0).to(kept)  # a constant group: S = 1, Z = −w
        zero = (-low / scale).to(kept)
        codes = (blocks / scale.to(w.dtype)[:, None] + zero.to(w.dtype)[:, None]).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8), {"scale": scale, "zero": zero}

    def _affine(self, held: Held, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, zero = held["scale"], held["zero"]
        wide = scale.dtype if scale.dtype == torch.float64 else torch.float32
        return torch.arange(2**self.bits, device=scale.device, dtype=wide), scale.to(wide), zero.to(wide)

    def _scale_layout(self, count: int) -> Layout:
        kinds = (DTYPES[self.held_in], torch.float64)
        return {"scale": ((count,), kinds), "zero": ((count,), kinds)}


@dataclass(frozen=True)
class MXInt(Codec):
    """A shared exponent e = ⌈log₂ max|block|⌉ and a sign and k − 1 bits of mantissa for each weight."""

    block: int = 16
    by_row: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"mxint{self.bits}"

    def _scales(self, blocks: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fraction, power = torch.frexp(blocks.abs().amax(1))  # max = fraction · 2^power, fraction in [½, 1)
        e = torch.where(fraction == 0.5, power - 1, power).clamp(-126, 127)
        half = 2 ** (self.bits - 1)
        mantissa = torch.ldexp(blocks.abs(), (self.bits - 1 - e)[:, None]).round_().clamp_(max=half - 1)
        codes = (mantissa * blocks.sign() + half).to(torch.uint8)
        return codes, {"exponent": e.to(torch.int8)}

    def _affine(self, held: Held, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        e = held["exponent"]
        half = 2 ** (self.bits - 1)
        table = torch.arange(-half, half, device=e.device, dtype=torch.float32)
        return table, torch.ldexp(torch.ones(e.shape, device=e.device), e.int() - (self.bits - 1)), None

    def _scale_layout(self, count: int) -> Layout:
        return {"exponent": ((count,), (torch.int8,))}


def _whole(value: Any, name: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadValue(f"{name} = {value!r}.", f"Give an integer in [{low}, {high}].")


def named(name: str, block: int | None = None) -> Codec:
    """The codec of a short name: nf2 … nf8, int2 … int8, mxint2 … mxint8."""
    kinds: dict[str, type[Codec]] = {"nf": NormalFloat, "int": IntGroups, "mxint": MXInt}
    kind, digit = str(name)[:-1], str(name)[-1:]
    if kind not in kinds or not digit.isdigit():
        raise BadValue(f"No quantizer {name!r}.", "Give nf2 … nf8, int2 … int8 or mxint2 … mxint8.")
    given = {} if block is None else {"block": block}
    return kinds[kind](int(digit), **given)


def to_config(codec: Codec) -> dict[str, Any]:
    """A codec as plain JSON data."""
    return {"codec": type(codec).__name__, **{f.name: getattr(codec, f.name) for f in dataclasses.fields(codec)}}


def from_config(data: Mapping[str, Any]) -> Codec:
    """The inverse. Only registered classes; fields are checked."""
    cls = Codec.known.get(str(data.get("codec")))
    if cls is None:
        raise UnknownName(f"No codec {data.get('codec')!r}.", nearest(str(data.get("codec")), Codec.known))
    given = {k: v for k, v in data.items() if k != "codec"}
    fields = {f.name for f in dataclasses.fields(cls)}
    if set(given) != fields:
        raise UnknownName(f"{data['codec']} has the fields {sorted(fields)}, not {sorted(given)}.")
    return cls(**given)
