"""Figures of a comparison from the files of its trials."""

from __future__ import annotations

import json
import platform
import statistics as basic
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnilora.comparison import statistics
from omnilora.comparison.plan import Plan, Trial, base_trial, first_trials, more_trials, timings


def value(scores: Mapping[str, Any]) -> float:
    """A metric over all rows: Σ sums / Σ weights."""
    return float(np.sum(scores["sum"]) / np.sum(scores["weight"]))


@dataclass
class Results:
    """What a comparison found. ``lines``: one a contestant, best first, then those that failed."""

    plan: dict[str, Any]
    metric: str
    lower_is_better: bool
    baseline: str
    trials: int
    base: float | None = None  # the metric of the model before training, where that means something
    lines: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def line(self, label: str) -> dict[str, Any]:
        return next(x for x in self.lines if x["label"] == label)


def _read(trial: Trial, folder: Path) -> dict[str, Any] | None:
    path = trial.path(folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def gather(plan: Plan, folder: Path, steps: Mapping[str, int], chosen: Mapping[str, float]) -> Results:
    """All lines with their intervals against the baseline."""
    grid = [(t, _read(t, folder)) for t in first_trials(plan, steps)]
    later = [(t, _read(t, folder)) for t in more_trials(plan, steps, chosen)]
    timed = [(t, _read(t, folder)) for t in timings(plan, chosen)]
    lines = []
    for who in plan.methods:
        mine = [(t, r) for t, r in grid if t.who == who]
        ran = [r for t, r in mine if r is not None and r["ok"] and t.rate == chosen.get(who.label)]
        ran += [r for t, r in later if t.who == who and r is not None and r["ok"]]
        failed = [r for _, r in [*mine, *((t, r) for t, r in later if t.who == who)] if r is not None and not r["ok"]]
        lines.append(_line(plan, who, mine, ran, failed, steps[who.label],
                           [r for t, r in timed if t.who == who and r is not None and r["ok"]]))  # fmt: skip
    _against(plan, lines)
    lines.sort(key=lambda x: (not x["complete"], (x["test"]["mean"] if plan.lower else -x["test"]["mean"])
                              if x["test"] else 0.0))  # fmt: skip
    for line in lines:
        line.pop("_rows")
    return Results(plan.to_dict(), str(plan.metric), plan.lower, str(plan.baseline), plan.trials,
                   _base(plan, folder), lines, _environment())  # fmt: skip


def _base(plan: Plan, folder: Path) -> float | None:
    trial = base_trial(plan)
    found = None if trial is None else _read(trial, folder)
    return value(found["test"][plan.metric]) if found is not None and found["ok"] else None


def _line(plan: Plan, who: Any, mine: list[Any], ran: list[Any], failed: list[Any], steps: int,
          timed: list[Any]) -> dict[str, Any]:  # fmt: skip
    metric = str(plan.metric)
    values = {r["seed"]: value(r["test"][metric]) for r in ran}
    complete = len(values) == len(plan.seeds)
    rates = {t.rate: value(r["validation"][metric]) if r is not None and r["ok"] else None for t, r in mine}
    best = ran[0]["rate"] if ran else None
    losses = [r["losses"] for r in ran]
    return {
        "label": who.label, "method": who.method, "hyper": dict(who.hyper), "steps": steps,
        "complete": complete, "errors": sorted({f"{r['code']}: {r['error']}" for r in failed}),
        "diverged": sum(r["code"] == "run" for r in failed),
        "parameters": ran[0]["parameters"] if ran else None, "rate": best, "lr": ran[0]["lr"] if ran else None,
        "rates": [[k, v] for k, v in rates.items()],
        "at_edge": best is not None and len(plan.grid) > 1 and best in (min(plan.grid), max(plan.grid)),
        "values": {str(k): v for k, v in values.items()},
        "test": statistics.over_seeds(list(values.values())).to_dict() if values else None,
        "others": {m: basic.mean(value(r["test"][m]) for r in ran) for m in ran[0]["test"]} if ran else {},
        "losses": [basic.fmean(step) for step in zip(*losses, strict=True)] if losses else [],
        "step_seconds": basic.median(r["step_seconds"] for r in (timed or ran)) if ran else None,
        "rounds": [r["step_seconds"] for r in timed],
        "memory": max((r["memory"]["peak"] or 0 for r in (timed or ran)), default=0) or None,
        "grown": max((r["memory"]["grown"] or 0 for r in (timed or ran)), default=0) or None,
        "seconds": sum(r["seconds"] for r in ran), "_rows": _rows(ran, metric) if complete else None,
    }  # fmt: skip


def _rows(ran: list[Any], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums averaged over seeds, weights), (rows,) each."""
    return (np.mean([r["test"][metric]["sum"] for r in ran], axis=0), np.asarray(ran[0]["test"][metric]["weight"]))


def _against(plan: Plan, lines: list[dict[str, Any]]) -> None:
    """Differences to the baseline over seeds and over rows, times as ratios of the same round."""
    base = next(x for x in lines if x["label"] == plan.baseline)
    seeds: list[statistics.Interval | None] = []
    for line in lines:
        other = line is not base and line["complete"] and base["complete"]
        order = [str(s) for s in plan.seeds]
        seeds.append(statistics.paired_seeds([line["values"][s] for s in order], [base["values"][s] for s in order])
                     if other else None)  # fmt: skip
        same = line["rounds"] and len(line["rounds"]) == len(base["rounds"])
        ratios = [a / b for a, b in zip(line["rounds"], base["rounds"], strict=True)] if same else []
        line["time_ratio"] = basic.median(ratios) if ratios else None
        line["time_spread"] = [min(ratios), max(ratios)] if ratios else None
    qs = statistics.adjusted([None if s is None else s.p for s in seeds])
    for line, found, q in zip(lines, seeds, qs, strict=True):
        if found is None:
            line |= {"difference": None, "rows": None, "q": None, "verdict": "baseline" if line is base else "failed"}
            continue
        rows = statistics.paired_rows(line["_rows"][0], base["_rows"][0], base["_rows"][1])
        line |= {"difference": found.to_dict(), "rows": rows.to_dict(), "q": q,
                 "verdict": statistics.verdict(found, q, rows, plan.lower)}  # fmt: skip


def _environment() -> dict[str, Any]:
    import os

    import torch

    from omnilora import __version__

    return {"omnilora": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}  # fmt: skip
