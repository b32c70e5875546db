"""A reference model that is a view of the trained one: the same weights, the adapter off, or another adapter on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import base_state_dict, context, disabled


class Reference(nn.Module):
    """``model`` as it is without its adapter (``adapter`` None), or with another one; it holds no tensor of its own.

    Every call runs in eval mode and without gradients; the model's own mode is put back. Everything that is not
    defined here is the model's.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        super().__init__()
        self.__dict__["_of"] = (model, adapter)  # no child: eval(), to() and parameters() must not reach the model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][0], name)

    @contextmanager
    def _view(self) -> Iterator[nn.Module]:
        model, adapter = self.__dict__["_of"]
        learning = [m for m in model.modules() if m.training]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(disabled(model) if adapter is None else context(model, adapters=adapter))
            for module in learning:
                module.training = False
            try:
                yield model
            finally:
                for module in learning:
                    module.training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._view():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_of"][0](*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generation, seen through the view."""
        with self._view() as model:
            return model.generate(*args, **kwargs)  # type: ignore[operator]

    def state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:  # type: ignore[override]
        """The base's tensors, for those who compare or hash; saving belongs to the model."""
        return base_state_dict(self.__dict__["_of"][0])
