"""The clock of a training run: it ticks with the optimizer, once an update, and lets no rule be forgotten."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import check, find_hub, hub_of, slots
from omnilora.core.context import Context
from omnilora.core.method import Method
from omnilora.core.parameterization import Slot
from omnilora.core.rule import Evaluate, Group, Rule
from omnilora.errors import AttachError, BadValue, RunError, UnknownName, nearest


class Run:
    """Drives the rules of one adapter. ``step`` counts updates done; ``total_steps`` is what schedules span."""

    def __init__(self, model: nn.Module, adapter: str, method: Method, total_steps: int) -> None:
        if total_steps <= 0:
            raise BadValue(f"total_steps = {total_steps!r}.", "Give the number of optimizer updates of the whole run.")
        self.model, self.adapter, self.method, self.total_steps = model, adapter, method, total_steps
        self.rules: tuple[Rule, ...] = method.rules
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.step = 0
        self._drawn = False
        self._made = False  # the rule that owns updates was asked for this one
        self._owed = False  # a training forward happened whose added loss has not been collected
        self._handles: list[Any] = []
        self._rates: list[Any] = []
        self.rate = 0.0  # learning rate of the optimizer's first group at the last update, all factors in it
        self.seen: dict[str, Any] = {}
        self.others: Callable[[int], Iterator[Any]] | None = None  # position → batches of the data set apart
        self._other: Iterator[Any] | None = None
        self.drawn = 0  # batches taken from it
        hub_of(model).run = self

    # -- wiring ---------------------------------------------------------------------------------------------------

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Tick with this optimizer's steps."""
        self.optimizer = optimizer
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        for rule in self.rules:
            rule.attach(self)

    def slots(self, *roles: str) -> list[Slot]:
        """The adapter's sites in the order of the model; with ``roles`` those that hold a tensor of one of them.

        A new head or an unfrozen layer is a site too, whose only tensor has the role "own".
        """
        found = slots(self.model, self.adapter)
        return [s for s in found if set(s.roles.values()) & set(roles)] if roles else found

    @property
    def emitted(self) -> list[tuple[str, str, Tensor]]:
        """(site, name, tensor) reported by layers in the last forward."""
        return hub_of(self.model).emitted

    def set(self, name: str, value: Any) -> None:
        """Side information for the training forwards to come (a drawn rank)."""
        hub_of(self.model).values.setdefault("side", {})[name] = value

    # -- updates that a rule makes ----------------------------------------------------------------------------------

    @property
    def owner(self) -> Rule | None:
        """The rule that makes the gradients of an update itself, if any."""
        return next((r for r in self.rules if type(r).update is not Rule.update), None)

    def other(self) -> Any:
        """The next batch of the data that was set apart for rules (a second level, a validation loss)."""
        if self.others is None:
            raise RunError(f"{self.method.key!r} learns from a second part of the data, and there is none.",
                           "ol.fit and the command line set it apart; in a loop of your own pass other= to ol.start.")  # fmt: skip
        if self._other is None:
            self._other = self.others(self.drawn)
        self.drawn += 1
        return next(self._other)

    def update(self, batches: Sequence[Any], loss: Evaluate) -> float | None:
        """One update's gradients by the rule that owns them; None where the loop's own forward and backward are meant."""
        owner = self.owner
        if owner is None:
            return None
        value = owner.update(self, batches, loss)
        self._made = True
        if value is not None:
            self._owed = False
        return value

    # -- the clock ------------------------------------------------------------------------------------------------

    def on_forward(self, model: nn.Module) -> None:
        """At the model's entry: draws what this update uses, opens a fresh sink for what layers report."""
        hub = hub_of(self.model)
        ctx: Context = hub.context()
        if ctx.recomputed:
            return
        training = model.training and torch.is_grad_enabled()
        if training and not self._drawn:
            for rule in self.rules:
                rule.before_forward(self)
            self._drawn = True
        side = {**hub.values.get("side", {}), **ctx.side} if training else ctx.side
        sink = ctx.sink
        if training:
            hub.emitted.clear()
            sink = hub.emitted
            self._owed = self._owed or any(rule.loss_is_added for rule in self.rules)
        hub.local.context = dataclasses.replace(ctx, side=side, sink=sink, training=training)

    def loss(self, batch: Any = None, outputs: Any = None) -> Tensor | float:
        """What the rules add to this batch's loss. Call once for every training forward."""
        self._owed = False
        total: Tensor | float = 0.0
        for rule in self.rules:
            total = total + rule.loss(self, batch, outputs)
        return total

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Before the step; where it is given a closure (Lightning), after the closure's forward and backward."""
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._ready(optimizer)
            return None
        done = False

        def wrapped() -> Any:
            nonlocal done
            value = closure()
            if not done:
                self._ready(optimizer)
                done = True
            return value

        return args[:1], {**kwargs, "closure": wrapped}

    def _ready(self, optimizer: Any) -> None:
        """Gradients are there: rules act on them, and factors on the learning rates are applied."""
        if self._owed:
            raise RunError(f"The loss that {self.method.key!r} adds was not collected before the optimizer's step.",
                           "Add run.loss(batch, outputs) to the training loss.")  # fmt: skip
        if self.owner is not None and not self._made:
            raise RunError(f"{self.method.key!r} makes the gradients of an update itself.",
                           "Call run.update(batches, loss) in place of your forward and backward.")  # fmt: skip
        self._made = False
        with torch.no_grad():
            for rule in self.rules:
                rule.before_step(self)
        if self.step == 0 and self.owner is None:
            self._check_gradients()
        factor = 1.0
        for rule in self.rules:
            factor *= rule.rate(self)
        self._rates = [g["lr"] for g in optimizer.param_groups]
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        self.rate = float(optimizer.param_groups[0]["lr"])

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr
        self.step += 1
        self._drawn = False
        hub_of(self.model).epoch += 1
        with torch.no_grad():
            for rule in self.rules:
                rule.after_step(self)

    def _check_gradients(self) -> None:
        """At the first step every trainable tensor of the adapter has received a gradient."""
        dead = [s.site.name for s in self.slots() if not s.marks.get("optional")
                and any(t.requires_grad for _, t in s.tensors())
                and not any(t.grad is not None for _, t in s.tensors() if t.requires_grad)]  # fmt: skip
        if dead:
            raise RunError(f"{len(dead)} adapted site(s) received no gradient: {', '.join(dead[:4])}.",
                           "Their weight is read without calling the layer, or they do not reach the loss. "
                           "Exclude them, or pass optional=[pattern].")  # fmt: skip

    def finish(self) -> None:
        """After the last step: rules finish, hooks go."""
        for rule in self.rules:
            rule.finish(self)
        self.close()

    def close(self) -> None:
        if self._handles:
            for rule in self.rules:
                rule.detach(self)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        hub = find_hub(self.model)
        if hub is not None and hub.run is self:
            hub.run = None
            hub.values.pop("side", None)

    # -- resume ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "drawn": self.drawn, "rules": [rule.state_dict() for rule in self.rules],
                "side": dict(hub_of(self.model).values.get("side", {}))}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["rules"]) != len(self.rules):
            raise RunError(f"The checkpoint has {len(state['rules'])} rules, the method {len(self.rules)}.")
        self.step, self.drawn, self._other = int(state["step"]), int(state.get("drawn", 0)), None
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(saved)
        if state.get("side"):
            hub_of(self.model).values["side"] = dict(state["side"])


def _the_adapter(model: nn.Module, adapter: str | None) -> str:
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is a {type(model).__name__}.", "Pass the nn.Module that ol.adapt was given.")
    hub = hub_of(model)
    if adapter is not None:
        if adapter not in hub.names:
            raise UnknownName(f"No adapter is named {adapter!r}.", nearest(adapter, hub.names))
        return adapter
    active = [n for n, _ in hub.active] or hub.names
    if len(active) != 1:
        raise BadValue(f"{len(active)} adapters are active.", "Pass adapter=NAME: one is trained at a time.")
    return active[0]


def trainable(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """The adapter's tensors that learn, each once."""
    found: dict[int, nn.Parameter] = {}
    for slot in slots(model, _the_adapter(model, adapter)):
        for _, t in slot.tensors():
            if t.requires_grad:
                found.setdefault(id(t), t)
    return list(found.values())


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: the method's own (LoRA+'s rates …), the rest at ``lr``.

    Every trainable tensor of the adapter is in exactly one group. Raises BadValue where ``lr`` is no number.
    """
    for option, value in (("lr", lr), ("weight_decay", weight_decay)):
        number = isinstance(value, (Real, Tensor)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise BadValue(f"{option} = {value!r}.", "Give a finite number ≥ 0.")
    name = _the_adapter(model, adapter)
    method: Method = hub_of(model).values["methods"][name]
    groups: list[Group] = []
    for rule in method.rules:
        groups = rule.groups(model, name) or groups
    placed = {id(p) for g in groups for p in g.params}
    rest = [p for p in trainable(model, name) if id(p) not in placed]
    if rest:
        groups = [*groups, Group(rest)]
    return [{"params": g.params, "lr": g.lr if g.lr is not None else lr * g.factor, "name": g.name,
             "weight_decay": weight_decay if g.weight_decay is None else g.weight_decay} for g in groups if g.params]  # fmt: skip


def start(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, total_steps: int,
          adapter: str | None = None, other: Iterable[Any] | None = None) -> Run:  # fmt: skip
    """Start the clock for a loop of your own.

    Build the optimizer from :func:`param_groups` (:class:`RunError` where it lacks one of the adapter's trainable
    tensors), then add ``run.loss(batch, outputs)`` to every training loss and
    call ``run.finish()`` at the end; the rest happens at the optimizer's own steps. A method whose update is not one
    forward and backward takes ``run.update(batches, loss)`` instead (see :meth:`Rule.update`), and from ``other`` the
    batches of the second part of the data, where it asks for one.
    """
    name = _the_adapter(model, adapter)
    check(model)
    if optimizer is not None:
        _check_optimizer(optimizer, trainable(model, name))
    made = Run(model, name, hub_of(model).values["methods"][name], total_steps)
    if other is not None:
        made.others = lambda at: itertools.islice(itertools.cycle(other), at, None)
    if optimizer is not None:
        made.bind(optimizer)
    return made


def _check_optimizer(optimizer: torch.optim.Optimizer, learning: Sequence[nn.Parameter]) -> None:
    """Raises :class:`RunError` where the optimizer would leave some of these tensors as they are."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(id(p) not in held for p in learning)
    if missing:
        raise RunError(f"The optimizer holds {len(learning) - missing} of the adapter's {len(learning)} trainable tensors.",
                       "Build it after ol.adapt, from ol.param_groups(model, lr).")  # fmt: skip


def wrapped_optimizer(run: Run, params: Iterable[Any], make: Any) -> torch.optim.Optimizer:
    """The optimizer of the first rule that owns one, else ``make(params)``."""
    params = list(params)
    for rule in run.rules:
        own = rule.optimizer(run, params, make)
        if own is not None:
            return own
    return make(params)
