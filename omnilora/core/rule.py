"""When: what a paper adds to training. Every method of a rule is optional and named after its moment.

``ol.fit`` drives them; elsewhere ``ol.start`` does. Ticks come from the optimizer's own step, once an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from omnilora.core.run import Run


Evaluate = Callable[[Any], tuple[Tensor, Any]]  # one micro-batch → (loss, outputs)


@dataclass
class Group:
    """Parameters that share a factor of the learning rate and a weight decay (None: the trainer's)."""

    params: list[nn.Parameter] = field(default_factory=list)
    factor: float = 1.0
    weight_decay: float | None = None
    name: str = "adapter"
    lr: float | None = None  # an absolute rate instead of a factor


class Rule:
    """Subclass what you need; hyper-parameters are constructor arguments, progress is ``state_dict``."""

    loss_is_added = False  # whether ``loss`` returns anything: an uncollected one is an error
    reads_outputs = False  # whether ``loss`` or ``update`` looks at the model's outputs
    other_share = 0.0  # share of the training data that the trainer sets apart for ``run.other()``
    one_process = False  # whether the rule's update is meant for a single process
    own_gradients = False  # whether processes keep gradients of their own (no averaging by the trainer)

    def attach(self, run: Run) -> None:
        """Before the first step: probing, data-driven starts."""

    def groups(self, model: nn.Module, adapter: str) -> list[Group] | None:
        """Which tensors learn at which rate; pure. None: one group of all that trains."""
        return None

    def optimizer(
        self, run: Run, params: Iterable[Any], make: Callable[[Iterable[Any]], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer | None:
        """Only for methods that own or wrap an optimizer; ``make`` is the trainer's own."""
        return None

    def before_forward(self, run: Run) -> None:
        """Once an update, in training: draws what this update uses."""

    def loss(self, run: Run, batch: Any, outputs: Any) -> Tensor | float:
        """What the method adds to the training loss."""
        return 0.0

    def update(self, run: Run, batches: Sequence[Any], loss: Evaluate) -> float | None:
        """The gradients of one update, for methods whose loop is not forward and backward over its micro-batches
        (bilevel, two passes, parallel heads). ``loss(batch)`` runs the model: (loss as a share of this update, outputs);
        it adds no rule's loss. Returns the loss to report; None: the trainer does it.
        """
        return None

    def rate(self, run: Run) -> float:
        """A factor on every learning rate of the coming update (a re-warm-up after a restart)."""
        return 1.0

    def before_step(self, run: Run) -> None:
        """Gradients are there, clipped; weights have not moved."""

    def after_step(self, run: Run) -> None:
        """Weights have moved, gradients are still there; no_grad."""

    def finish(self, run: Run) -> None:
        """After the last step."""

    def detach(self, run: Run) -> None:
        """When the run closes, finished or not: takes off hooks and patches that :meth:`attach` put on."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
