"""Linear layers whose weight is held in 4 bits — QLoRA, Dettmers et al., NeurIPS 2023, arXiv:2305.14314.

    y = x · dq(Ŵ)ᵀ + b

The class is a subclass of nn.Linear, so that targets, adapters and other libraries see a linear layer. Its state dict
has bitsandbytes' names and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.store import Store, register
from omnilora.stores.codecs import Codec, named
from omnilora.stores.coded import quantize_with
from omnilora.stores.nf4 import Packed, from_bnb_state, to_bnb_state
from omnilora.stores.nf4 import quantize as pack
from omnilora.stores.quantized_layer import Quantized, QuantizedLinear, dense_layers


class FourBitLinear(QuantizedLinear):
    """nn.Linear with ``weight`` holding packed codes (n/2, 1) uint8 and ``packed`` the rest of the quantizer's state."""

    packed: Packed

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """dq(Ŵ) (out, in)."""
        return replace(self.packed, codes=self.weight.data).dequantize(dtype or self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitLinear:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.packed.absmax.device))
        self.compute_dtype = probe.dtype
        moved = {f.name: getattr(self.packed, f.name).to(probe.device) for f in fields(self.packed)
                 if isinstance(getattr(self.packed, f.name), Tensor)}  # fmt: skip
        self.packed = replace(self.packed, **moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(to_bnb_state(replace(self.packed, codes=self.weight.data), f"{prefix}weight"))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        mine = {k: state_dict[k] for k in list(state_dict) if k == name or k.startswith(f"{name}.")}
        if len(mine) > 1:
            self.packed = from_bnb_state(mine, name)
            for key in mine:
                if key != name:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packed.quant_type}"


def _holds_four_bits(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, FourBitLinear) and name == "weight"


class FourBit(Store):
    """The weight of a :class:`FourBitLinear`."""

    layer: FourBitLinear
    exact = False

    def read(self) -> Tensor:
        return self.layer.dequantized(torch.float32 if self.dtype != torch.float64 else torch.float64)

    def shape(self) -> tuple[int, ...]:
        return (self.layer.out_features, self.layer.in_features)

    def write(self, value: Tensor) -> None:
        old = self.layer.packed
        new = pack(value.float().contiguous(), old.blocksize, old.quant_type, old.nested_absmax is not None)
        with torch.no_grad():
            self.layer.weight.data.copy_(new.codes)
            for name, tensor in self._state(old).items():
                tensor.copy_(getattr(new, name))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.layer.weight.data, **self._state(self.layer.packed)}

    @staticmethod
    def _state(packed: Packed) -> dict[str, Tensor]:
        return {f.name: getattr(packed, f.name) for f in fields(packed)
                if f.name != "codes" and isinstance(getattr(packed, f.name), Tensor)}  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype

    @property
    def form(self) -> str:
        return self.layer.packed.quant_type


register(_holds_four_bits, FourBit)


def quantize(
    model: nn.Module,
    quant_type: str | Codec = "nf4",
    *,
    blocksize: int | None = None,
    double: bool = True,
    exclude: Sequence[str] = (),
) -> Quantized:
    """Hold every linear weight of ``model`` in few bits, in place, but those of the head, routers and ``exclude``.

    Args:
        quant_type: "nf4" or "fp4" (codebook by block, in bitsandbytes' bytes); another name of
            :func:`omnilora.stores.codecs.named` ("nf3", "int4", "mxint4" …), or a codec.
        blocksize: weights that share a scale; default 64 (integers: 32, mxint: 16).
        double: quantize the block scales too (nf4 and fp4: 4.127 instead of 4.5 bits a weight).
        exclude: patterns as in targets.

    Raises: :class:`AttachError` on an adapted model, :class:`TargetError` where nothing is linear.
    """
    if quant_type not in ("nf4", "fp4"):
        return quantize_with(model, quant_type if isinstance(quant_type, Codec) else named(quant_type, blocksize), exclude)
    assert isinstance(quant_type, str)
    count = before = after = done = 0
    for _, layer in dense_layers(model, exclude):
        weight = layer.weight.data
        packed = pack(weight.contiguous(), blocksize or 64, quant_type, double)
        count, before, done = count + weight.numel(), before + weight.nbytes, done + 1
        made: Any = layer
        made.__class__ = FourBitLinear
        made.compute_dtype, made.packed = weight.dtype, packed
        made.weight = nn.Parameter(packed.codes, requires_grad=False)
        after += sum(t.nbytes for t in FourBit(layer, "weight").tensors().values())
    return Quantized(done, count, before, after)
