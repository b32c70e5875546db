"""What a trial works on: the rows of a configuration, or a model and data of your own."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from omnilora.errors import BadValue

RowScores = dict[str, dict[str, list[float]]]  # metric → {"sum": one a row, "weight": one a row}


@dataclass
class Problem:
    """One problem of your own: any nn.Module, any data, any loss.

    Args:
        model: the base; the same for every method and seed.
        train, validation, test: Datasets or sequences of examples. Validation chooses the learning rate, test is only
            reported.
        loss: (model, batch) → mean loss, or (mean loss, outputs).
        score: (model, data) → {metric: a number for every row}. Without it: {"loss": …}, row by row.
        targets, unfreeze: as for ``ol.adapt``; without targets the method's own.
    """

    model: nn.Module
    train: Any
    validation: Any
    test: Any
    loss: Callable[[nn.Module, Any], Any]
    score: Callable[[nn.Module, Any], dict[str, Any]] | None = None
    targets: Any = None
    unfreeze: Sequence[str] = ()

    @torch.no_grad()
    def scores(self, data: Any) -> RowScores:
        """Every metric on ``data``, in eval mode."""
        self.model.eval()
        if self.score is None:
            made: dict[str, Any] = {"loss": [self._loss(default_collate([data[i]])) for i in range(len(data))]}
        else:
            made = self.score(self.model, data)
        out: RowScores = {}
        for metric, values in made.items():
            each = [float(v) for v in values]
            out[metric] = {"sum": each, "weight": [1.0] * len(each)}
        return out

    def _loss(self, batch: Any) -> float:
        made = self.loss(self.model, batch)
        return float(made[0] if isinstance(made, tuple) else made)


def reference(make: str | Callable[[int], Problem]) -> str:
    """``file.py:name`` of a function seed → :class:`Problem`, which every trial imports in its own process."""
    if isinstance(make, str):
        _split(make)
        return make
    path = inspect.getsourcefile(make)
    if path is None or not Path(path).is_file() or make.__qualname__ != make.__name__:
        raise BadValue(f"problem = {make!r} cannot be imported by another process.",
                       "Write it as a function at the top of a .py file, and pass that or 'file.py:name'.")  # fmt: skip
    return f"{Path(path).resolve()}:{make.__name__}"


def _split(text: str) -> tuple[Path, str]:
    path, _, name = text.rpartition(":")
    if not path or not Path(path).is_file():
        raise BadValue(f"problem = {text!r}: there is no such file.", "Write file.py:name.")
    return Path(path), name


def made(text: str, seed: int) -> Problem:
    """The problem that ``file.py:name`` makes for a seed."""
    path, name = _split(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, name, None)
    if not callable(make):
        raise BadValue(f"{path} has no function {name!r}.", "Write file.py:name.")
    value = make(seed)
    if not isinstance(value, Problem):
        raise BadValue(f"{name}({seed}) gave a {type(value).__name__}.", "Return an omnilora.comparison.Problem.")
    return value
