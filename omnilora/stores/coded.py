"""Linear layers whose weight a codec holds, and their store.

The state dict of a layer: ``weight`` (packed codes, uint8), ``weight.<name>`` for what scales them, ``weight.codec``
(the codec, the shape and the dtype the layer computes in, as JSON in uint8).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.op import Op
from omnilora.core.site import Site
from omnilora.core.store import Store, register
from omnilora.errors import AttachError, FileRefused, OmniloraError, StateMismatch
from omnilora.stores.codecs import Codec, IntGroups, from_config, named, to_config
from omnilora.stores.quantized_layer import Quantized, QuantizedLinear, dense_layers

COMPUTE = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class CodedLinear(QuantizedLinear):
    """nn.Linear with ``weight`` holding a codec's packed codes and ``scales`` what scales them.

    ``carried``: the dense weight does not give these codes again, so they are saved with an adapter.
    ``origin``: the fingerprint of the dense weight they came from, where it is known.
    """

    codec: Codec
    scales: dict[str, Tensor]
    carried: bool
    origin: Any

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        held = {"": self.weight.data, **self.scales}
        return self.codec.decode(held, self.matrix_shape, dtype or self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=next(iter(self.scales.values())).device))
        self.compute_dtype = probe.dtype
        self.scales = {k: t.to(probe.device) for k, t in self.scales.items()}
        return self

    def describe(self) -> dict[str, Any]:
        return {**to_config(self.codec), "shape": list(self.matrix_shape),
                "dtype": str(self.compute_dtype).removeprefix("torch.")}  # fmt: skip

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}weight.{k}": t for k, t in self.scales.items()})
        text = json.dumps(self.describe(), sort_keys=True).encode()
        destination[f"{prefix}weight.codec"] = torch.tensor(list(text), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        mine = {k.removeprefix(f"{name}."): state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{name}.")}
        if mine:
            try:
                said = json.loads(bytes(mine.pop("codec").tolist()))
            except (KeyError, ValueError) as error:
                raise FileRefused(f"The quantizer description of {name!r} is malformed: {error!r}.") from error
            put = restoring(self, said, {"": state_dict[name], **mine})
            put()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.codec.name}"


class Coded(Store):
    """The weight of a :class:`CodedLinear`."""

    layer: CodedLinear
    exact = False

    def read(self) -> Tensor:
        return self.layer.dequantized(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def shape(self) -> tuple[int, ...]:
        return self.layer.matrix_shape

    def write(self, value: Tensor) -> None:
        made = self.layer.codec.encode(value)
        with torch.no_grad():
            for name, t in self._held().items():
                t.copy_(made[name])

    def tensors(self) -> dict[str, Tensor]:
        return {f"weight.{k}".removesuffix("."): t for k, t in self._held().items()}

    def _held(self) -> dict[str, Tensor]:
        return {"": self.layer.weight.data, **self.layer.scales}

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype

    @property
    def form(self) -> str:
        return self.layer.codec.name

    @property
    def carried(self) -> bool:
        return self.layer.carried

    @property
    def origin(self) -> Any:
        return self.layer.origin

    def describe(self) -> dict[str, Any]:
        return self.layer.describe()

    @classmethod
    def restored(cls, layer: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
                 origin: Any = None) -> Callable[[], None]:  # fmt: skip
        held = {k.removeprefix("weight").removeprefix("."): t for k, t in tensors.items()}
        return restoring(layer, said, held, carried=True, origin=origin)

    def absorb(self, change: Op, site: Site) -> bool:
        """Z ← Z − ΔW_group / S where ΔW = B A and A is constant inside every group of inputs: no code changes."""
        codec = self.layer.codec
        ba = change.factors()
        if not isinstance(codec, IntGroups) or codec.block == 0 or ba is None:
            return False
        b, a = ba[0].detach(), ba[1].detach()
        starts = a[:, :: codec.block]  # (r, groups)
        if not torch.equal(starts.repeat_interleave(codec.block, -1)[:, : a.shape[-1]], a):
            return False
        zero, scale = self.layer.scales["zero"], self.layer.scales["scale"]
        step = (b.double() @ starts.double()).reshape(-1) / scale.double()
        zero.copy_(zero.double() - step)
        return True


def _is_coded(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, CodedLinear) and name == "weight"


register(_is_coded, Coded)


def put(layer: nn.Module, codec: Codec, held: Mapping[str, Tensor], *, carried: bool = False, origin: Any = None) -> None:
    """Make a plain linear layer hold its weight as ``held``; nothing else of it changes."""
    if type(layer) is not nn.Linear:
        raise AttachError(f"{type(layer).__name__} is no plain linear layer.", "Quantize before adapting.")
    made: Any = layer
    made.compute_dtype = layer.weight.dtype
    made.__class__ = CodedLinear
    made.codec, made.carried, made.origin = codec, carried, origin
    made.scales = {k: t for k, t in held.items() if k}
    made.weight = nn.Parameter(held[""], requires_grad=False)


def restoring(layer: nn.Module, said: Mapping[str, Any], held: Mapping[str, Tensor], *, carried: bool | None = None,
              origin: Any = None) -> Callable[[], None]:  # fmt: skip
    """Check saved codes against the layer; what comes back puts them on it and cannot fail.

    Raises: :class:`FileRefused` for a malformed description, :class:`StateMismatch` where tensors or the layer differ.
    """
    try:
        shape = tuple(int(n) for n in said["shape"])
        compute = COMPUTE[said["dtype"]]
        codec = from_config({k: v for k, v in said.items() if k not in ("shape", "dtype")})
        layout = codec.layout(shape)
    except (OmniloraError, KeyError, TypeError, ValueError) as error:
        raise FileRefused(f"The description of a quantized weight is malformed: {error!r}.") from error
    if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != shape:
        raise StateMismatch(f"A {type(layer).__name__} cannot hold quantized codes of shape {shape}.",
                            "Is this the right base model?")  # fmt: skip
    if wrong := [k for k, (s, kinds) in layout.items()
                 if k not in held or tuple(held[k].shape) != s or held[k].dtype not in kinds]:  # fmt: skip
        raise StateMismatch(f"{['weight.' + k for k in wrong]} are missing or do not fit {codec.name} of {shape}.",
                            "The file is damaged.")  # fmt: skip
    if extra := set(held) - set(layout):
        raise StateMismatch(f"Unexpected tensors of a quantized weight: {sorted(extra)}.", "The file is damaged.")
    if any(t.is_floating_point() and not t.isfinite().all() for t in held.values()):
        raise StateMismatch("A quantized weight's scales hold NaN or infinite numbers.", "The file is damaged.")
    if not isinstance(layer, CodedLinear) and type(layer) is not nn.Linear:
        raise StateMismatch(f"A {type(layer).__name__} holds its weight in another way.",
                            "Load onto the dense base, without adapters.")  # fmt: skip
    device = layer.weight.device

    def put_it() -> None:
        copies = {k: held[k].detach().to(device, copy=True).contiguous() for k in layout}
        if isinstance(layer, CodedLinear):
            layer.codec, layer.scales = codec, {k: t for k, t in copies.items() if k}
            layer.weight = nn.Parameter(copies[""], requires_grad=False)
        else:
            put(layer, codec, copies)
        made: Any = layer
        made.compute_dtype = compute if carried is None else made.compute_dtype
        made.origin = origin
        made.carried = made.carried if carried is None else carried

    return put_it


def make_dense(model: nn.Module) -> int:
    """Plain linear layers in place of a model's coded ones, in their compute dtype; returns how many."""
    found = [m for m in model.modules() if type(m) is CodedLinear]
    for layer in found:
        weight = layer.dequantized()
        for name in ("codec", "scales", "carried", "origin", "compute_dtype"):
            del layer.__dict__[name]
        made: Any = layer
        made.__class__ = nn.Linear
        made.weight = nn.Parameter(weight, requires_grad=False)
    return len(found)


def quantize_with(model: nn.Module, codec: Codec | str, exclude: Sequence[str] = (),
                  layers: Sequence[tuple[str, nn.Linear]] | None = None) -> Quantized:  # fmt: skip
    """Hold linear weights of ``model`` by a codec, in place: ``layers``, by default all but head, routers and ``exclude``."""
    codec = named(codec) if isinstance(codec, str) else codec
    chosen = dense_layers(model, exclude) if layers is None else list(layers)
    count = before = after = 0
    encoded = [codec.encode(layer.weight.data) for _, layer in chosen]
    for (_, layer), held in zip(chosen, encoded, strict=True):
        count, before = count + layer.weight.numel(), before + layer.weight.nbytes
        put(layer, codec, held)
        after += sum(t.nbytes for t in held.values())
    return Quantized(len(chosen), count, before, after)
