"""Files for a model's first code, on diffusers' own module of it: read through diffusers' converters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from omnilora.core.state import AdapterState
from omnilora.errors import NeedsExtra, NotExpressible, OmniloraError, need
from omnilora.io.names import NAMES

# diffusers' model → the mixin whose lora_state_dict knows the files of its other codes
LOADERS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin", "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoLoraLoaderMixin", "WanTransformer3DModel": "WanLoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin", "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin", "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "HiDreamImageTransformer2DModel": "HiDreamImageLoraLoaderMixin", "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
}  # fmt: skip


def through(state: AdapterState, model: nn.Module) -> AdapterState | None:
    """The state under diffusers' names; None where diffusers has no converter for this model.

    Fused projections come apart there: one layer of the file may become several, with equal maps.
    """
    loader = LOADERS.get(type(model).__name__)
    if loader is None:
        return None
    from omnilora.io import single

    try:
        library: Any = need("diffusers.loaders.lora_pipeline", "diffusers")
    except NeedsExtra as error:
        raise NeedsExtra(f"The file names layers as another code of {type(model).__name__} does; 'diffusers' converts them and "
                         "is not installed.", error.remedy) from error  # fmt: skip
    tensors = single.kohya(state, lora_only=False)
    try:
        made = getattr(library, loader).lora_state_dict(dict(tensors))
    except OmniloraError:
        raise
    except Exception as error:  # its converters raise whatever an unknown name provokes
        raise NotExpressible(f"diffusers cannot convert the file for {type(model).__name__}: {type(error).__name__} "
                             f"{str(error)[:200]}.") from error  # fmt: skip
    made = made[0] if isinstance(made, tuple) else made
    read = single.read({k: t for k, t in made.items()})
    return replace(read, extra={**state.extra, NAMES: "diffusers"})
