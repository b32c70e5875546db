"""PEFT's names and layout: what it can express is written and read here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from omnilora.core.state import AdapterState
from omnilora.errors import NotExpressible


def to_peft(state: AdapterState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config, tensors) as PEFT writes them; raises NotExpressible with the reason."""
    raise NotExpressible(f"PEFT cannot express {state.method!r}.")


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState:
    raise NotExpressible("not yet")


def to_native(sites: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raise NotExpressible("not yet")
