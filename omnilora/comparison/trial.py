"""One trial in a process of its own: train, measure, write one JSON file whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from omnilora.comparison import problem
from omnilora.comparison.plan import Contestant, Plan, Trial
from omnilora.core.attach import adapt
from omnilora.core.method import method, prepare
from omnilora.errors import BadValue, OmniloraError
from omnilora.training.batches import Collate, Feed
from omnilora.training.data import read_rows
from omnilora.training.encode import encode, room
from omnilora.training.fit import fit, trained
from omnilora.training.loop import learning_rate
from omnilora.training.losses import row_scores, task_of
from omnilora.training.models import load_parts

DATA = ("train", "validation", "test")
CANDIDATES = 256


def files(folder: Path) -> dict[str, Path]:
    """Where a comparison keeps its rows."""
    return {name: folder / "data" / f"{name}.jsonl" for name in DATA}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, ensure_ascii=False, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(part, path)


def run(plan: Plan, trial: Trial, folder: Path, path: Path) -> None:
    """Do it and write ``path``. Errors are results too; what is no error of training or input is raised."""
    out: dict[str, Any] = {"kind": trial.kind, "label": trial.who.label, "rate": trial.rate, "seed": trial.seed,
                           "steps": trial.steps}  # fmt: skip
    try:
        body = _on_problem if plan.problem else _on_rows
        out |= {"ok": True, **body(plan, trial, folder)}
    except OmniloraError as error:
        out |= {"ok": False, "code": error.code, "error": error.message}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        out |= {"ok": False, "code": type(error).__name__, "error": " ".join(str(error).split())[:300]}
    write_json(path, out)


class Memory:
    """Peak resident memory of this process in bytes, and how much of it came after ``Memory()``; None if unknown."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before: int | None = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        except OSError:
            self.before = None

    def read(self) -> dict[str, int | None]:
        if self.cuda:
            peak: int | None = torch.cuda.max_memory_allocated()
        else:
            peak = None if self.before is None else _status("VmHWM")
        return {"peak": peak, "grown": None if peak is None or self.before is None else peak - self.before}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(name)


def _figures(report: Any, memory: Memory) -> dict[str, Any]:
    return {"parameters": report.trainable, "losses": report.losses, "step_seconds": report.step_seconds,
            "seconds": report.seconds, "tokens": report.tokens, "memory": memory.read(),
            "threads": torch.get_num_threads()}  # fmt: skip


# -- rows and a configuration ------------------------------------------------------------------------------------------


def _on_rows(plan: Plan, trial: Trial, folder: Path) -> dict[str, Any]:
    where, who = files(folder), trial.who
    config = plan.config.replace(**{
        "data": str(where["train"]), "method": who.method, "hyper": dict(who.hyper), "seed": trial.seed,
        "steps": trial.steps, "log_every": 10**9, **who.changes})  # fmt: skip
    if plan.lrs is not None:
        config = config.replace(lr=trial.rate)
    if trial.kind == "base":
        parts = load_parts(config)
        return {"test": _scores(parts, config, where["test"])}
    memory = Memory()
    parts, report, config = trained(config, 1.0 if plan.lrs is not None else trial.rate)
    out = {"lr": config.lr, **_figures(report, memory)}
    if trial.kind == "fit":
        out |= {split: _scores(parts, config, where[split]) for split in DATA[1:]}
    return out


def _scores(parts: Any, config: Any, path: Path) -> problem.RowScores:
    """Pairs are judged against up to CANDIDATES others, however small the training batch is."""
    rows = encode(read_rows(str(path)), parts.tokenizer, config, room(parts.model.config, config), parts.labels)
    size = CANDIDATES if config.task == "embedding" else config.batch_size
    feed = Feed(rows.examples, Collate(parts.tokenizer.pad_token_id), size, 0)
    return row_scores(parts.model, feed, task_of(config.task, config.temperature))


# -- a problem of your own ---------------------------------------------------------------------------------------------


def _on_problem(plan: Plan, trial: Trial, folder: Path) -> dict[str, Any]:
    assert plan.problem is not None
    who, made = trial.who, problem.made(plan.problem, trial.seed)
    config = plan.config.replace(seed=trial.seed, steps=trial.steps, log_every=10**9)
    if plan.lrs is not None:
        rate = trial.rate
    else:
        rate = trial.rate * learning_rate(made.model, config, method(who.method, **who.hyper).rate)
    config = config.replace(lr=rate)
    torch.manual_seed(trial.seed)
    _adapt(made, who, config)
    memory = Memory()
    report = fit(made.model, made.train, loss=made.loss, config=config)
    out = {"lr": rate, **_figures(report, memory)}
    if trial.kind == "fit":
        out |= {"validation": made.scores(made.validation), "test": made.scores(made.test)}
    return out


def _adapt(made: problem.Problem, who: Contestant, config: Any) -> None:
    from torch.utils.data import default_collate

    chosen = method(who.method, **who.hyper)
    targets = who.changes.get("targets", made.targets if made.targets is not None else chosen.targets)
    free = [*made.unfreeze, *who.changes.get("unfreeze", ())]
    if targets == [] and not free:
        raise BadValue(f"{who.label}: nothing would learn.", "Name layers to unfreeze in the Problem.")
    if chosen.prepare is not None:
        feed = Feed(made.train, default_collate, config.batch_size, config.seed)
        batches = [batch for _, batch in zip(range(32), feed.epoch(0), strict=False)]

        def loss(model: Any, batch: Any) -> Any:
            value = made.loss(model, batch)
            return value[0] if isinstance(value, tuple) else value

        chosen, found = prepare(made.model, chosen, batches, loss, targets)
        targets = targets if found is None else found
    adapt(made.model, chosen, targets, unfreeze=free)


def describe(trial: Trial) -> dict[str, Any]:
    """A trial as JSON."""
    return asdict(trial)


def restored(data: dict[str, Any]) -> Trial:
    return Trial(**{**data, "who": Contestant(**data["who"])})
