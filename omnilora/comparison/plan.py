"""What is compared, on what, with which budget: one value, checked before anything runs, written as plan.yaml."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnilora.core.method import method
from omnilora.errors import BadValue, UnknownName, nearest
from omnilora.io.yaml import parse_yaml
from omnilora.training.config import LOWER_IS_BETTER, METRICS, TrainConfig

BASELINES: dict[str, dict[str, Any]] = {
    "frozen": {"targets": [], "lr": 1e-2},  # the new head alone learns, no layer is adapted
    "full": {"targets": [], "unfreeze": ["re:.*"], "lr": 1e-4},  # every weight learns
}
OWN = ("output", "resume", "overwrite", "seed", "data", "eval_data", "method", "hyper", "steps", "stop_at", "best", "patience",
       "eval_every", "save_every", "log_every", "trackers")  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison: a method with hyper-parameters, under a name of its own."""

    label: str
    method: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the configuration: targets, unfreeze, load_in_4bit …


def contestant(value: Any) -> Contestant:
    """From ``"lora"``, ``"lora r=4 alpha=8"``, {"method": …, "hyper": …, "label": …}, or "frozen" and "full"."""
    if isinstance(value, Contestant):
        return value
    if isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(Contestant)]
        for key in value:
            if key not in known:
                raise UnknownName(f"No key {key!r} of a method to compare.", nearest(str(key), known))
        if "method" not in value:
            raise BadValue(f"{dict(value)!r} names no method.", "Give {'method': …, 'hyper': {…}}.")
        return _checked(Contestant(**{"label": value.get("label") or value["method"], **value}))
    if not isinstance(value, str):
        raise BadValue(f"A method to compare is a {type(value).__name__}.", "Give a key, or {'method': …, 'hyper': …}.")
    key, *pairs = value.split()
    if key in BASELINES and not pairs:
        return Contestant(key, "lora", {}, BASELINES[key])
    hyper = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise BadValue(f"{pair!r} in {value!r} is no NAME=VALUE.", "Write 'lora r=4 alpha=8'.")
        hyper[name] = parse_yaml(text, repr(pair))
    return _checked(Contestant(value, key, hyper))


def _checked(made: Contestant) -> Contestant:
    method(made.method, **made.hyper)
    return made


@dataclass(frozen=True)
class Plan:
    """A comparison. Every contestant gets ``len(rates) + len(seeds) − 1`` trials of equal budget."""

    methods: tuple[Contestant, ...]
    config: TrainConfig = field(default_factory=TrainConfig)  # what is the same for all
    test: Any = 0.2  # rows that are only reported: as config.data, or the fraction of it held out
    rates: tuple[float, ...] = (1 / 3, 1.0, 3.0)  # grid: factors on each method's own default learning rate
    lrs: tuple[float, ...] | None = None  # or: the same absolute learning rates for all
    seeds: tuple[int, ...] = (0, 1, 2)  # the first chooses the learning rate; all are reported
    steps: int | None = 100  # budget: updates of each trial
    seconds: float | None = None  # or: seconds of training, as updates that each method's measured step allows
    metric: str | None = None  # what is compared; None: accuracy where there is one, else the loss
    baseline: str | None = None  # label that all are compared with; None: lora, or the first
    rounds: int = 3  # rounds of the timing, interleaved over methods; 0: not timed
    timed: int = 8  # updates of a timing
    problem: str | None = None  # file.py:function, for models and data of your own

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "methods", tuple(contestant(m) for m in self.methods))
        put(self, "seeds", tuple(self.seeds))
        put(self, "rates", tuple(float(r) for r in self.rates))
        put(self, "lrs", None if self.lrs is None else tuple(float(r) for r in self.lrs))
        self._check()
        metrics = None if self.problem else METRICS[self.config.task]
        if self.metric is None:
            put(self, "metric", "accuracy" if metrics and "accuracy" in metrics else "loss")
        elif metrics and self.metric not in (allowed := [m for m in metrics if m in ("loss", "accuracy")]):
            raise UnknownName(f"metric = {self.metric!r}.", nearest(self.metric, allowed))
        labels = [m.label for m in self.methods]
        if self.baseline is None:
            put(self, "baseline", "lora" if "lora" in labels else labels[0])
        elif self.baseline not in labels:
            raise UnknownName(f"baseline = {self.baseline!r} is not compared.", nearest(self.baseline, labels))

    def _check(self) -> None:
        if not self.methods:
            raise BadValue("No method is given.", "Give at least two, such as lora and dora.")
        labels = [m.label for m in self.methods]
        if twice := sorted({x for x in labels if labels.count(x) > 1}):
            raise BadValue(f"{twice[0]!r} is given twice.", "Give each a label of its own.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise BadValue(f"seeds = {self.seeds}.", "Give different whole numbers, at least one.")
        for name, values in (("rates", self.rates), ("lrs", self.lrs)):
            if values is not None and (not values or not all(math.isfinite(v) and v > 0 for v in values)):
                raise BadValue(f"{name} = {values}.", "Give finite numbers above 0.")
        if (self.steps is None) == (self.seconds is None):
            raise BadValue(f"steps = {self.steps}, seconds = {self.seconds}.", "Give one of them as the budget.")
        for name in ("steps", "seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadValue(f"{name} = {value}.", "Give a number above 0.")
        if self.rounds < 0 or self.timed < 3:
            raise BadValue(f"rounds = {self.rounds}, timed = {self.timed}.", "rounds ≥ 0, timed ≥ 3.")
        default = TrainConfig()
        for name in OWN:
            if name not in ("data", "eval_data") and getattr(self.config, name) != getattr(default, name):
                raise BadValue(f"config.{name} is set.", "The comparison decides it: see the fields of the plan.")

    @property
    def grid(self) -> tuple[float, ...]:
        return self.rates if self.lrs is None else self.lrs

    @property
    def trials(self) -> int:
        """Trials of each contestant."""
        return len(self.grid) + len(self.seeds) - 1

    @property
    def lower(self) -> bool:
        """Whether a lower metric is better."""
        return self.metric in LOWER_IS_BETTER

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of the configuration only what departs from the defaults."""
        base = TrainConfig().to_dict()
        config = {k: v for k, v in self.config.to_dict().items() if v != base[k] and k not in ("data", "eval_data")}
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out |= {"config": config, "methods": [dataclasses.asdict(m) for m in self.methods]}
        for name in ("seeds", "rates", "lrs"):
            out[name] = None if out[name] is None else list(out[name])
        return {k: v for k, v in out.items() if v is not None and k != "test"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise UnknownName(f"No key {key!r} of a comparison.", nearest(str(key), known))
        config = data.get("config") or {}
        made = config if isinstance(config, TrainConfig) else TrainConfig.from_dict(config)
        return cls(**{"steps": None if data.get("seconds") else 100, **data, "config": made})


@dataclass(frozen=True)
class Trial:
    """One training run. ``kind``: "pace" (how long is an update?), "fit", "time" or "base" (no training)."""

    kind: str
    who: Contestant
    rate: float  # factor, or absolute where the plan has ``lrs``
    seed: int
    steps: int
    round: int = 0

    def path(self, folder: Path) -> Path:
        """Where its result lies: readable, and different for different contestants of the same label."""
        asked = json.dumps(dataclasses.asdict(self.who), sort_keys=True, default=str)
        slug = re.sub(r"[^A-Za-z0-9.=-]+", "_", self.who.label)[:60]
        part = f"{slug}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"
        if self.kind == "base":
            return folder / "trials" / "base.json"
        name = {"pace": "pace", "time": f"time-{self.round}", "fit": f"rate{self.rate:.4g}-seed{self.seed}"}[self.kind]
        return folder / "trials" / part / f"{name}.json"


def first_trials(plan: Plan, steps: Mapping[str, int]) -> Iterator[Trial]:
    """The grid, with the first seed."""
    for rate in plan.grid:
        for who in plan.methods:
            yield Trial("fit", who, rate, plan.seeds[0], steps[who.label])


def more_trials(plan: Plan, steps: Mapping[str, int], chosen: Mapping[str, float]) -> Iterator[Trial]:
    """The other seeds at the chosen rate."""
    for seed in plan.seeds[1:]:
        for who in plan.methods:
            if who.label in chosen:
                yield Trial("fit", who, chosen[who.label], seed, steps[who.label])


def timings(plan: Plan, chosen: Mapping[str, float]) -> Iterator[Trial]:
    """Timing rounds, each over all methods in turn."""
    for number in range(plan.rounds):
        for who in plan.methods:
            if who.label in chosen:
                yield Trial("time", who, chosen[who.label], plan.seeds[0], plan.timed, number)


def base_trial(plan: Plan) -> Trial | None:
    """The model before training, where that means something: without a fresh head."""
    if plan.problem or plan.config.task == "classification":
        return None
    return Trial("base", plan.methods[0], plan.grid[0], plan.seeds[0], 1)
