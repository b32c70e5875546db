"""Runs what of a comparison is missing, chooses each method's learning rate, gathers results, writes the report."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omnilora.comparison.plan import Plan, Trial, base_trial, contestant, first_trials, more_trials, timings
from omnilora.comparison.results import Results, gather, value
from omnilora.errors import BadValue, RunError, need
from omnilora.training.config import TrainConfig

PACE = 12  # updates that measure how many fit into the seconds of the budget
VALIDATION = 0.1


def compare(
    methods: Sequence[Any],
    *,
    output: str | Path,
    config: TrainConfig | None = None,
    test: Any = 0.2,
    problem: str | Callable[[int], Any] | None = None,
    workers: int = 1,
    **options: Any,
) -> Results:
    """Train every method with the same budget, and say what can be told apart.

    Args:
        methods: keys ("lora"), keys with hyper-parameters ("lora r=4 alpha=8"), {"method", "hyper", "label"},
            "frozen" (the head alone) or "full" (every weight).
        output: folder; a comparison that was interrupted, or gets more methods or seeds, goes on there.
        config: the model, task, data and batch size that all share. ``config.eval_data`` is the validation set that
            chooses learning rates (default: a tenth of the data).
        test: rows for the report alone, or the fraction of the data held out for it.
        problem: "file.py:function" or the function, seed → :class:`Problem`, for other models and data.
        workers: trials at the same time; timings always run alone.
        options: fields of :class:`Plan` (rates, lrs, seeds, steps or seconds, metric, baseline, rounds).

    Every method gets the same number of trials: the grid of learning rates with the first seed, and the rate with the
    best validation metric with each other seed. The test set is scored, and looked at once, in the report.

    Returns: :class:`Results`; ``output`` holds plan.yaml, results.json, report.html, report.md and a file a trial.
    """
    from omnilora.comparison.problem import reference

    base = config or TrainConfig()
    made = Plan(methods=tuple(contestant(m) for m in methods), config=base, test=test,
                problem=None if problem is None else reference(problem), **options)  # fmt: skip
    return go(made, Path(output), workers)


def go(plan: Plan, folder: Path, workers: int = 1) -> Results:
    """Run ``plan`` in ``folder``, from where it stands there."""
    if workers < 1:
        raise BadValue(f"workers = {workers}.", "Give at least 1.")
    need("scipy.stats", "compare")
    need("matplotlib", "compare")
    _claim(plan, folder)
    with _Pool(folder, workers) as pool:
        steps = _budget(plan, folder, pool)
        base = base_trial(plan)
        pool.all(plan, [base] if base else [], "base")
        pool.all(plan, first_trials(plan, steps), "learning rates")
        chosen = choose(plan, folder, steps)
        pool.all(plan, more_trials(plan, steps, chosen), "other seeds")
    with _Pool(folder, 1) as pool:
        pool.all(plan, timings(plan, chosen), "timings")
    from omnilora.comparison import report

    results = gather(plan, folder, steps, chosen)
    report.write(results, folder)
    return results


# -- the folder --------------------------------------------------------------------------------------------------------


def _claim(plan: Plan, folder: Path) -> None:
    """Put the rows and the plan into the folder; another comparison that lies there is refused."""
    from omnilora.comparison.trial import files, write_json

    where, shared = files(folder), _shared(plan)
    held = folder / "plan.json"
    if held.is_file():
        old = json.loads(held.read_text(encoding="utf-8"))
        changed = sorted(k for k in shared if shared[k] != _shared(Plan.from_dict(old)).get(k))
        if changed:
            raise RunError(f"{folder} holds another comparison ({', '.join(changed)} differ).",
                           "Name another output folder; methods, seeds, rates and rounds may be added to this one.")  # fmt: skip
    if plan.problem is None:
        rows = _rows(plan)
        text = {k: "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in v) for k, v in rows.items()}
        for name, path in where.items():
            if path.is_file() and path.read_text(encoding="utf-8") != text[name]:
                raise RunError(f"{path} holds other rows.", "Name another output folder for other data.")
        for name, path in where.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text[name], encoding="utf-8")
        if plan.config.task == "classification" and plan.config.labels is None:
            from omnilora.training.data import label_set, read_rows

            plan = replace(plan, config=plan.config.replace(labels=label_set(read_rows(rows["train"]), plan.config)))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(held, plan.to_dict())
    again = {**plan.to_dict(), "config": {**plan.to_dict()["config"], **({} if plan.problem else {
        "data": str(where["train"]), "eval_data": str(where["validation"])})}}  # fmt: skip
    if not plan.problem:
        again["test"] = str(where["test"])
    (folder / "plan.yaml").write_text(need("yaml", "train").safe_dump(again, sort_keys=False, allow_unicode=True),
                                      encoding="utf-8")  # fmt: skip


def _shared(plan: Plan) -> dict[str, Any]:
    """What must be equal for trials to be of one comparison."""
    made = plan.to_dict()
    made["config"].pop("labels", None)
    return {k: made.get(k) for k in ("config", "steps", "seconds", "metric", "problem", "timed")} | {
        "lrs": plan.lrs is not None}  # fmt: skip


def _rows(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Training, validation and test rows."""
    from omnilora.training.data import hold_out, read_rows

    config = plan.config
    if config.data is None:
        raise BadValue("data is not given.", "Give a file, a folder or a Hub name.")
    train = read_rows(config.data)
    if isinstance(plan.test, float):
        train, test = hold_out(train, plan.test, 0)
    else:
        test = read_rows(plan.test, "test")
    kept = VALIDATION if config.eval_data is None else config.eval_data
    if isinstance(kept, float):
        train, validation = hold_out(train, kept, 1)
    else:
        validation = read_rows(kept, "validation")
    return {"train": [dict(r.data) for r in train], "validation": [dict(r.data) for r in validation],
            "test": [dict(r.data) for r in test]}  # fmt: skip


# -- trials ------------------------------------------------------------------------------------------------------------


class _Pool:
    """``size`` workers, started when there is something to do."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.workers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in self.workers:
            worker.wait()

    def all(self, plan: Plan, trials: Iterable[Trial], what: str) -> None:
        """Run those whose result is not there yet."""
        from omnilora.comparison.trial import describe

        missing = [t for t in trials if not t.path(self.folder).is_file()]
        if not missing:
            return
        from concurrent.futures import ThreadPoolExecutor

        while len(self.workers) < min(self.size, len(missing)):
            self.workers.append(self._start())
        idle = list(self.workers)

        def one(trial: Trial) -> Trial:
            worker, answer = idle.pop(), ""
            path = trial.path(self.folder)
            assert worker.stdin is not None and worker.stdout is not None
            with contextlib.suppress(OSError):  # it was killed
                print(json.dumps({"trial": describe(trial), "path": str(path)}), file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
            if not answer:
                self.workers.remove(worker)
                worker = self._start()
                self.workers.append(worker)
            idle.append(worker)
            if not path.is_file():
                code = json.loads(answer)["code"] if answer else "none: the worker died"
                _crashed(trial, path, code)
            return trial

        with ThreadPoolExecutor(len(self.workers)) as threads, _bar(what, len(missing)) as tick:
            for trial in threads.map(one, missing):
                tick(trial.who.label)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "omnilora.comparison.worker", str(self.folder)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=(self.folder / "worker.log").open("a"))  # fmt: skip


def _crashed(trial: Trial, path: Path, code: Any) -> None:
    from omnilora.comparison.trial import write_json

    write_json(path, {"kind": trial.kind, "label": trial.who.label, "rate": trial.rate, "seed": trial.seed,
                      "steps": trial.steps, "ok": False, "code": "crash", "error": f"The process ended with {code}."})  # fmt: skip


class _bar:
    """A bar on a terminal; else a line every twentieth of the work."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0

    def __enter__(self) -> Callable[[str], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.progress: Any = None
        if self.console.is_terminal:
            self.progress = Progress(TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                                     TextColumn("{task.description}"), console=self.console)  # fmt: skip
            self.task = self.progress.add_task("", total=self.total)
            self.progress.start()
        return self.tick

    def tick(self, label: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress.update(self.task, advance=1, description=label)
        elif self.done % max(1, self.total // 20) == 0 or self.done == self.total:
            self.console.print(f"{self.what}: {self.done} of {self.total} trials", highlight=False)

    def __exit__(self, *_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()


# -- budget and choice -------------------------------------------------------------------------------------------------


def _budget(plan: Plan, folder: Path, pool: _Pool) -> dict[str, int]:
    """Updates of each contestant: the same for all, or as many as its measured pace fits into the seconds."""
    if plan.steps is not None:
        return {m.label: plan.steps for m in plan.methods}
    assert plan.seconds is not None
    pool.size, size = 1, pool.size
    paces = {m.label: Trial("pace", m, plan.grid[0], plan.seeds[0], PACE) for m in plan.methods}
    pool.all(plan, paces.values(), "paces")
    pool.size = size
    out = {}
    for label, trial in paces.items():
        found = json.loads(trial.path(folder).read_text(encoding="utf-8"))
        out[label] = max(1, int(plan.seconds / found["step_seconds"])) if found["ok"] else 1
    return out


def choose(plan: Plan, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Of each contestant the rate with the best validation metric on the first seed; without one where all failed."""
    out: dict[str, float] = {}
    best: dict[str, float] = {}
    for trial in first_trials(plan, steps):
        found = json.loads(trial.path(folder).read_text(encoding="utf-8"))
        if not found["ok"]:
            continue
        if plan.metric not in found["validation"]:
            raise BadValue(f"metric = {plan.metric!r}: there are {', '.join(found['validation'])}.", "Name one of them.")
        label, score = trial.who.label, value(found["validation"][plan.metric])
        score = score if plan.lower else -score
        if label not in best or score < best[label]:
            best[label], out[label] = score, trial.rate
    return out
