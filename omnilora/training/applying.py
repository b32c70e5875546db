"""What a method that trains no adapter works on: a model, data, a folder for what it makes. Behind ``omnilora apply``."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.method import cards, method
from omnilora.core.targets import Targets, targets_from
from omnilora.errors import BadValue, need
from omnilora.training.batches import Collate, Feed, to_device
from omnilora.training.config import TrainConfig
from omnilora.training.data import Row, hold_out, label_set, read_rows
from omnilora.training.encode import encode, room, set_template
from omnilora.training.losses import Task, task_of
from omnilora.training.models import Loaded, load_parts


@dataclass
class Job:
    """Everything is loaded when it is first asked for; ``adapter`` is the folder of a finished run, where one is given."""

    config: TrainConfig
    adapter: Path | None = None

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row] | None]:
        """(training rows, held-out rows or None)."""
        if self.config.data is None:
            raise BadValue("data is not given.", "Give --data: a file, a folder or a Hub name.")
        rows, held = read_rows(self.config.data), self.config.eval_data
        if isinstance(held, float):
            return hold_out(rows, held, self.config.seed)
        return rows, None if held is None else read_rows(held, "validation")

    @cached_property
    def labels(self) -> list[Any] | None:
        if self.config.task != "classification":
            return None
        return list(self.config.labels) if self.config.labels is not None else label_set(self.rows[0], self.config)

    @cached_property
    def parts(self) -> Loaded:
        """The model and tokenizer, with the adapter on it where there is one."""
        if self.adapter is None:
            parts = load_parts(self.config, self.labels)
            set_template(parts.tokenizer, self.config.template)
            return parts
        from omnilora.core.files import load, load_file

        extra = load_file(self.adapter).extra
        config = self.config.replace(tokens=extra["tokens"]["tokens"]) if extra.get("tokens") else self.config
        parts = load_parts(config, extra.get("labels") or self.labels)
        set_template(parts.tokenizer, config.template)
        load(parts.model, self.adapter)
        parts.model.eval()
        return parts

    @property
    def model(self) -> nn.Module:
        return self.parts.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def targets(self) -> Targets:
        """The layers that the configuration names, by default every linear layer but head and routers."""
        c = self.config
        return targets_from(c.targets, exclude=c.exclude, overrides=c.overrides, bias=c.bias, tied=c.tied)

    @cached_property
    def task(self) -> Task:
        return task_of(self.config.task, self.config.temperature, self.config.padding)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        total, _ = self.task.total(model, batch)
        return total / max(self.task.weight(batch), 1.0)

    def feed(self, held: bool = False, batch_size: int | None = None) -> Feed:
        """Batches of the training rows, or of the held-out ones. Raises :class:`BadValue` where there are none."""
        rows = self.rows[1] if held else self.rows[0]
        if rows is None:
            raise BadValue("There is no held-out data.", "Give --eval-data: a file, or the fraction to hold out.")
        length = room(self.parts.model.config, self.config)
        made = encode(rows, self.parts.tokenizer, self.config, length, self.parts.labels)
        collate = Collate(self.parts.tokenizer.pad_token_id)
        return Feed(made.examples, collate, batch_size or self.config.batch_size, self.config.seed)

    def batches(self, count: int | None = None, held: bool = False, batch_size: int | None = None) -> list[Any]:
        """The first ``count`` batches (None: one pass), on the model's device."""
        feed = self.feed(held, batch_size)
        return [to_device(b, self.device) for b in itertools.islice(feed.epoch(0), count)]

    @property
    def home(self) -> Path:
        """The folder of what is made."""
        return Path(self.config.output or f"runs/{self.config.method}")


def apply(config: TrainConfig, adapter: Path | None = None) -> dict[str, Any]:
    """Let a method that trains no adapter do its work. Writes ``output/report.json`` and what the method makes.

    Returns: the figures that the method reports, and where they lie.
    """
    made = method(config.method, **config.hyper)
    if made.apply is None:
        able = ", ".join(c.key for c in cards() if "applies" in c.tags)
        raise BadValue(f"{made.key!r} is trained, not applied.", f"Use omnilora train. These are applied: {able}.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    need("accelerate.utils", "train").set_seed(config.seed)
    job = Job(config, adapter)
    figures = dict(made.apply(job))
    report = {"method": made.key, **figures, "output": str(job.home)}
    write_json(job.home / "report.json", report)
    return report


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    os.replace(temporary, path)
