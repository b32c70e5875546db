"""Gradient checkpointing in one line: for models of transformers, and for what has the same two methods."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from omnilora.core.attach import checkpoint_context
from omnilora.errors import BadValue


def gradient_checkpointing(model: nn.Module, on: bool = True) -> nn.Module:
    """Recompute activations of ``model`` in the backward pass, or stop to.

    Nothing else is needed: frozen embeddings do no harm (``use_reentrant`` is False), and recomputed layers see the
    rows and drawn values of their first run. For blocks that you checkpoint yourself pass
    ``context_fn=ol.checkpoint_context(model)`` to torch.utils.checkpoint.
    """
    if not on:
        if hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        return model
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise BadValue(f"{type(model).__name__} has no gradient_checkpointing_enable.",
                       "Use torch.utils.checkpoint with context_fn = ol.checkpoint_context(model).")  # fmt: skip
    with recomputed_contexts(model):
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


@contextmanager
def recomputed_contexts(model: Any) -> Iterator[None]:
    """Inside, whoever calls ``model.gradient_checkpointing_enable`` gets the right arguments."""
    original = getattr(model, "gradient_checkpointing_enable", None)
    if original is None:
        yield
        return

    def enable(gradient_checkpointing_kwargs: Any = None, **options: Any) -> Any:
        given = dict(gradient_checkpointing_kwargs or {})
        if given.get("use_reentrant"):
            warnings.warn("use_reentrant = True cannot train adapters on frozen inputs; False is used.", stacklevel=2)
        return original(gradient_checkpointing_kwargs={**given, "use_reentrant": False,
                                                       "context_fn": checkpoint_context(model)}, **options)  # fmt: skip

    model.gradient_checkpointing_enable = enable
    try:
        yield
    finally:
        vars(model).pop("gradient_checkpointing_enable", None)
