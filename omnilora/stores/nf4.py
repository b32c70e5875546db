"""Four-bit codebooks by block, scales quantized once more, in bitsandbytes' bytes.

QLoRA, Dettmers et al., NeurIPS 2023, arXiv:2305.14314. The paper's quantile formula and its FP8 scales are not what its
code stores; the code is followed: NF levels from offset 0.9677083, scales in the signed 8-bit dynamic map.

    ŵ = map[code] · absmax[block],   absmax = nested_map[code₂] · absmax₂[block₂] + offset

What is stored equals bitsandbytes 0.50 on x86 CPUs bit for bit. Its dequantized values are equal too, except where its
AVX-512 kernel departs from the definition: rows whose length is a multiple of 16 but not of the block take another
block's scale, and bf16 results below 1.2e-38 become zero. An odd number of elements is padded by one zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.errors import BadValue, FileRefused, NotExpressible, StateMismatch, nearest
from omnilora.plans import native

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CPU32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_TINY = 1e-38  # the smallest scale that is divided by
_CELLS = 65536  # the 8-bit code is that of the nearest of 65536 even points of [−1, 1], not of the value itself
_WRITE = 1 << 24  # elements quantized at a time
_READ = 1 << 15  # elements dequantized at a time on a CPU: stays in cache and below torch's threading grain


def normal_float(bits: int) -> Tensor:
    """NF-k (2ᵏ,) fp32 ascending: quantiles Φ⁻¹ of n/2 steps above zero and n/2 − 1 below, over their maximum."""
    half = 2 ** (bits - 1)
    up, down = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, steps, **_CPU32)[:-1].double()).float()
        for steps in (half + 1, half)
    )
    levels = torch.cat([up, up.new_zeros(1), -down]).sort().values
    return levels / levels.max()


def float4() -> Tensor:
    """FP4 (16,) fp32 by bit pattern: sign, two exponent bits, one mantissa bit, over 12."""
    levels = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], **_CPU32) / 12
    return torch.cat([levels, 0 - levels])


def dynamic_map() -> Tensor:
    """Signed 8-bit dynamic map (256,) fp32 ascending: midpoints of linspace(0.1, 1, 2ᵉ + 1) · 10^(e−6), e = 0…6."""
    parts = [torch.tensor([0.0, 1.0], **_CPU32)]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, **_CPU32)
        level = (edges[:-1] + edges[1:]) / 2 * 10 ** (e - 6)
        parts += [level, -level]
    return torch.cat(parts).sort().values


_LEVELS = {"nf4": normal_float(4), "fp4": float4(), "nf3": normal_float(3), "nf2": normal_float(2)}


def codebook(quant_type: str) -> Tensor:
    """The value of every code, fp32: (16,) "nf4" "fp4", (8,) "nf3", (4,) "nf2"."""
    if quant_type not in _LEVELS:
        raise BadValue(f"quant_type {quant_type!r} is unknown.", nearest(str(quant_type), _LEVELS))
    return _LEVELS[quant_type].clone()


def _pairs(table: Tensor) -> Tensor:
    """(256,) int64: for every byte the fp32 values of its high and low nibble in one word."""
    byte = torch.arange(256, device="cpu")
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).view(torch.int64).view(-1)


_TABLES = {name: F.pad(levels, (0, 16 - len(levels))) for name, levels in _LEVELS.items()}  # (16,): a nibble's value
_PAIRS = {name: _pairs(table) for name, table in _TABLES.items()}


def _native(codes: Tensor, levels: Tensor, scale: Tensor, n: int, size: int, dtype: torch.dtype) -> Tensor | None:
    """The values (n,) by a kernel, the same bit for bit; None where there is none for these tensors."""
    if torch.compiler.is_compiling() or native.watched() or dtype not in native.DTYPES or native.library() is None:
        return None
    plain = type(codes) is Tensor and codes.is_cpu and codes.dtype == torch.uint8 and codes.is_contiguous() and codes.numel() * 2 >= n
    if not plain or type(scale) is not Tensor or scale.dtype != torch.float32 or not scale.is_contiguous() or scale.numel() * size < n:
        return None
    out = torch.empty(n, dtype=dtype, device=codes.device)
    native.call("dequantize", dtype, codes, levels, scale, out, n, size)
    return out


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in four bits.

    codes (⌈n/2⌉, 1) uint8, first element in the high nibble; absmax (blocks,) fp32, or uint8 with nested_absmax
    (⌈blocks/256⌉,) fp32, nested_map (256,) fp32 and offset () fp32; shape and dtype of what was quantized. Codes of
    "nf3" and "nf2" take a nibble too.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str = "nf4"
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = NESTED

    def scales(self) -> Tensor:
        """absmax (blocks,) fp32, dequantized where it is quantized itself."""
        if self.nested_absmax is None or self.nested_map is None or self.offset is None:
            return self.absmax
        spread = self.nested_absmax[:, None].expand(-1, self.nested_blocksize).reshape(-1)[: self.absmax.numel()]
        return self.nested_map.index_select(0, self.absmax.int()) * spread + self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """ŵ (shape): the product in fp32, rounded once to ``dtype`` (default: that of the quantized tensor)."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise BadValue(f"{dtype} holds no fractions.", "Give a floating dtype.")
        size, codes, scale = self.blocksize, self.codes.reshape(-1), self.scales()
        if (made := _native(codes, _TABLES[self.quant_type], scale, prod(self.shape), size, dtype)) is not None:
            return made.view(self.shape)
        table, n = _PAIRS[self.quant_type].to(codes.device), prod(self.shape)
        whole = codes.device.type != "cpu" or torch.compiler.is_compiling()
        step = -(-n // size) if whole else max(_READ // size, 1)
        flat = torch.empty(n, dtype=dtype, device=codes.device)
        for i in range(0, scale.numel(), step):
            into = flat[i * size : (i + step) * size]
            code = codes[i * size // 2 : (i + step) * size // 2].int()
            value = table.index_select(0, code).view(torch.float32)
            if short := -value.numel() % size:
                value = F.pad(value, (0, short))
            into.copy_(value.view(-1, size).mul_(scale[i : i + step, None]).view(-1)[: into.numel()])
        return flat.view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held, tables included."""
        held = (self.codes, self.absmax, self.nested_absmax, self.nested_map, self.offset)
        return sum(t.nbytes for t in held if t is not None)

    @property
    def bits(self) -> float:
        """Bits per element of codes and scales: 4 + 8/64 + 32/(64·256) = 4.127 when doubly quantized, else 4.5."""
        held = (self.codes, self.absmax, self.nested_absmax)
        return 8 * sum(t.nbytes for t in held if t is not None) / max(prod(self.shape), 1)


def quantize(w: Tensor, blocksize: int = 64, quant_type: str = "nf4", double: bool = True) -> Packed:
    """w (any shape) in four bits, row-major blocks of ``blocksize``; a shorter last block is allowed.

    float64 is rounded to fp32 first. ``double`` quantizes the scales as well.

    Raises: :class:`BadValue` on an empty, non-floating or non-finite tensor, an unknown type or block size.
    """
    if blocksize not in BLOCKSIZES:
        raise BadValue(f"blocksize {blocksize} is not supported.", f"Use one of {BLOCKSIZES}.")
    if w.dtype not in (*DTYPES.values(), torch.float64) or not w.numel():
        raise BadValue(f"A tensor {tuple(w.shape)} of {w.dtype} cannot be quantized.", "Give floats, at least one.")
    levels = codebook(quant_type).to(w.device)
    if w.is_meta:
        return _unfilled(w, blocksize, quant_type, double)
    ascending, order = levels.sort(stable=True)
    edges, order = (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)
    codes, tops = [], []
    for part in w.detach().reshape(-1).split(_WRITE):
        scaled, top = _scaled(part.float(), blocksize)
        code = order[torch.bucketize(scaled, edges, out_int32=True)]
        codes.append((code[::2] << 4) | code[1::2])
        tops.append(top)
    absmax = torch.cat(tops)
    if not absmax.isfinite().all():
        raise BadValue(f"A tensor {tuple(w.shape)} with infinite or NaN elements cannot be quantized.", "Clean it.")
    dtype = torch.float32 if w.dtype == torch.float64 else w.dtype
    packed = Packed(torch.cat(codes)[:, None], absmax, tuple(w.shape), dtype, quant_type, blocksize)
    return _doubled(packed) if double else packed


def _unfilled(w: Tensor, blocksize: int, quant_type: str, double: bool) -> Packed:
    """What :func:`quantize` gives, by shapes alone, on the meta device."""
    blocks = -(-w.numel() // blocksize)
    codes = w.new_empty((-(-w.numel() // 2), 1), dtype=torch.uint8)
    dtype = torch.float32 if w.dtype == torch.float64 else w.dtype
    scale = w.new_empty(blocks, dtype=torch.uint8 if double else torch.float32)
    packed = Packed(codes, scale, tuple(w.shape), dtype, quant_type, blocksize)
    f32 = [w.new_empty(n, dtype=torch.float32) for n in ((-(-blocks // NESTED),), (256,), ())]
    return replace(packed, nested_absmax=f32[0], nested_map=f32[1], offset=f32[2]) if double else packed


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(w/absmax in [−1, 1], an even number of elements; absmax (blocks,)).

    A full block is multiplied by 1/absmax, a short last one divided by absmax: the last bits differ. A short block of
    zeros has absmax 1e-38, a full one 0.
    """
    rest = flat.numel() % size
    blocks, tail = flat[: flat.numel() - rest].view(-1, size), flat[flat.numel() - rest :]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).view(-1)
    if rest:
        top = tail.abs().amax().clamp(min=_TINY)
        scaled, absmax = torch.cat([scaled, tail / top]), torch.cat([absmax, top[None]])
    return F.pad(scaled.clamp(-1, 1), (0, rest % 2)), absmax


@cache
def _cells() -> Tensor:
    """(65536,) uint8: the dynamic code of −1 + 2i/65535."""
    levels, grid = dynamic_map(), torch.arange(_CELLS, **_CPU32)
    return torch.bucketize(-1 + 2 * grid / (_CELLS - 1), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _doubled(packed: Packed) -> Packed:
    """The same with scales (blocks,) as 8-bit codes of absmax − mean, blocks of 256; a constant block has code 0."""
    offset = packed.absmax.mean()
    if not offset.isfinite():
        raise BadValue("The sum of the block scales overflows fp32.", "Quantize with double=False.")
    centred, count = packed.absmax - offset, packed.absmax.numel()
    blocks = F.pad(centred, (0, -count % NESTED)).view(-1, NESTED)
    top = blocks.abs().amax(1)
    unit = (blocks * (1.0 / top)[:, None]).clamp(-1, 1)
    cell = ((unit + 1) * 0.5 * (_CELLS - 1) + 0.5).nan_to_num(0).long()
    codes = torch.where(top[:, None] == 0, 0, _cells().to(cell.device)[cell]).view(-1)[:count]
    return Packed(packed.codes, codes.clone(), packed.shape, packed.dtype, packed.quant_type, packed.blocksize,
                  top, dynamic_map().to(codes.device), offset)  # fmt: skip


def to_bnb_state(packed: Packed, prefix: str = "weight") -> dict[str, Tensor]:
    """The entries a bitsandbytes Linear4bit writes for its parameter ``prefix``, tensors shared but the code maps."""
    if packed.quant_type not in ("nf4", "fp4"):
        raise NotExpressible(f"bitsandbytes has no {packed.quant_type!r}.", "Use nf4 or fp4.")
    names = {dtype: name for name, dtype in DTYPES.items()}
    small: dict[str, Any] = {"quant_type": packed.quant_type, "blocksize": packed.blocksize,
                             "dtype": names[packed.dtype], "shape": list(packed.shape)}  # fmt: skip
    state = {"": packed.codes, ".absmax": packed.absmax,
             ".quant_map": codebook(packed.quant_type).to(packed.codes.device)}  # fmt: skip
    if packed.nested_absmax is not None and packed.nested_map is not None and packed.offset is not None:
        state |= {".nested_absmax": packed.nested_absmax, ".nested_quant_map": packed.nested_map.clone()}
        small |= {"nested_blocksize": packed.nested_blocksize, "nested_dtype": "float32",
                  "nested_offset": packed.offset.item()}  # fmt: skip
    state[f".quant_state.bitsandbytes__{packed.quant_type}"] = torch.tensor(
        list(json.dumps(small).encode()), dtype=torch.uint8, device="cpu"
    )
    return {prefix + name: tensor for name, tensor in state.items()}


def from_bnb_state(state: Mapping[str, Tensor], prefix: str = "weight") -> Packed:
    """What :func:`to_bnb_state` or a Linear4bit wrote for ``prefix``, in whatever storage dtype the codes were viewed.

    Raises: :class:`StateMismatch` where tensors are missing or misshapen, :class:`FileRefused` where the description is
    malformed, names an unknown type, or the code map is not the type's own.
    """
    mine = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    found = [k for k in ("nf4", "fp4") if f".quant_state.bitsandbytes__{k}" in mine]
    if len(found) != 1:
        raise StateMismatch(f"{prefix!r} has {len(found)} quantizer descriptions.", "Exactly one is needed.")
    try:
        small = json.loads(bytes(mine[f".quant_state.bitsandbytes__{found[0]}"].tolist()))
        kind, size, dtype = small["quant_type"], int(small["blocksize"]), DTYPES[small["dtype"]]
        shape = tuple(int(d) for d in small["shape"])
        nested = ".nested_absmax" in mine
        chunk, offset = int(small["nested_blocksize"]) if nested else NESTED, float(small.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FileRefused(f"The quantizer description of {prefix!r} is malformed: {error!r}.") from error
    if kind != found[0] or size not in BLOCKSIZES or chunk < 1 or min(shape, default=1) < 1:
        raise FileRefused(f"The quantizer description of {prefix!r} is impossible: {small}.")
    n = prod(shape)
    blocks = -(-n // size)
    want = {"": -(-n // 2), ".absmax": blocks, ".quant_map": 16}
    want |= {".nested_absmax": -(-blocks // chunk), ".nested_quant_map": 256} if nested else {}
    mine = {k: v.contiguous().view(torch.uint8) if k == "" else v for k, v in mine.items()}
    if wrong := [k for k, count in want.items() if k not in mine or mine[k].numel() != count]:
        raise StateMismatch(f"{[prefix + k for k in wrong]} are missing or do not fit a shape of {shape}.")
    if mine[".absmax"].dtype != (torch.uint8 if nested else torch.float32):
        raise StateMismatch(f"{prefix}.absmax is {mine['.absmax'].dtype}.")
    if (mine[".quant_map"].cpu().float() - codebook(kind)).abs().max() > 1e-6:
        raise FileRefused(f"{prefix}.quant_map is not the codebook of {kind}.")
    codes, absmax = mine[""].view(-1, 1), mine[".absmax"].view(-1)
    if not nested:
        return Packed(codes, absmax, shape, dtype, kind, size)
    return Packed(codes, absmax, shape, dtype, kind, size, mine[".nested_absmax"].float().view(-1),
                  mine[".nested_quant_map"].float().view(-1),
                  torch.tensor(offset, dtype=torch.float32, device=codes.device), chunk)  # fmt: skip
