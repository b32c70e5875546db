"""compare: methods under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, Sets, emit, table
from omnilora.cli.explaining import Config, Model
from omnilora.cli.training import Length, Rows, Task, fraction
from omnilora.errors import BadValue
from omnilora.io.places import check_folder
from omnilora.io.yaml import read_yaml


def _numbers(text: str | None, kind: type) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise BadValue(f"{text!r} is no list of numbers.", "Separate them by commas.") from error


def compare(
    methods: Annotated[list[str] | None, typer.Argument(
        help="Keys, with hyper-parameters in quotes: lora 'dora r=4'. Also: frozen (the head alone), full.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/compare"),
    model: Model = None,
    data: Annotated[str | None, typer.Option(help=".jsonl, .csv, .parquet, a folder, or a data set's name.")] = None,
    eval_data: Annotated[str | None, typer.Option(
        help="Chooses learning rates: the same, or a fraction. Default: a tenth of the data.")] = None,
    test: Annotated[str | None, typer.Option(help="Is only reported: the same, or a fraction. Default: 0.2.")] = None,
    task: Task = None,
    problem: Annotated[str | None, typer.Option(
        help="FILE.py:FUNCTION, seed → omnilora.comparison.Problem: images, or any model and data of your own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: updates of a trial. Default: 100.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget instead: seconds of training of a trial.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Default: 0,1,2.")] = None,
    rates: Annotated[str | None, typer.Option(
        help="Grid of factors on each method's default learning rate. Default: 1/3, 1, 3.")] = None,
    lrs: Annotated[str | None, typer.Option(help="Grid of absolute learning rates instead, the same for all.")] = None,
    metric: Annotated[str | None, typer.Option(help="Default: accuracy where there is one, else loss.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Method all are compared with. Default: lora.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the timing; 0: none. Default: 3.")] = None,
    workers: Annotated[int, typer.Option(help="Trials at the same time.", min=1)] = 1,
    batch_size: Rows = None,
    max_length: Length = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a trial.")] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.yaml of another comparison; options win.")] = None,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Compare methods fairly: the same data, budget, seeds and number of trials, with intervals.

    Each method gets a grid of learning rates with the first seed; the best on validation data runs with the other
    seeds; test data is only reported. What was interrupted goes on when the command is given again; more methods and
    seeds may be added. Writes OUTPUT/{report.html, report.md, results.json, plan.yaml, trials}.

    \b
    Examples:
      omnilora compare lora dora "vera r=64" frozen --model package:minilm --task classification --data train.jsonl
      omnilora compare lora rslora pissa --data train.jsonl --test test.jsonl --seconds 120 --output runs/starts
      omnilora compare lora loha --problem digits.py:make --steps 200 --set batch_size=32
      omnilora compare --plan runs/starts/plan.yaml --seeds 0,1,2,3,4 --output runs/again

    --json: {plan, metric, lower_is_better, baseline, trials, lines: [{label, method, hyper, test, difference, rows, q,
    verdict, parameters, rate, lr, step_seconds, time_ratio, memory, …}], environment}.
    """
    from omnilora.cli.loading import configuration
    from omnilora.comparison import report
    from omnilora.comparison.plan import Plan
    from omnilora.comparison.runner import go

    options: dict[str, Any] = {} if plan is None else read_yaml(plan)
    if seconds is not None and steps is None:
        options.pop("steps", None)
    given = {"methods": methods or None, "test": fraction(test), "problem": problem, "steps": steps, "seconds": seconds,
             "seeds": _numbers(seeds, int), "rates": _numbers(rates, float), "lrs": _numbers(lrs, float),
             "metric": metric, "baseline": baseline, "rounds": rounds}  # fmt: skip
    options |= {k: v for k, v in given.items() if v is not None}
    if not options.get("methods"):
        raise BadValue("No method is given.", "Name at least two: omnilora compare lora dora …")
    made = configuration(config, sets, model=model, data=data, eval_data=fraction(eval_data), task=task,
                         batch_size=batch_size, max_length=max_length, threads=threads)  # fmt: skip
    base = options.pop("config", None) or {}
    changed = {k: v for k, v in made.to_dict().items() if v != type(made)().to_dict()[k]}
    if problem is not None:
        from omnilora.comparison.problem import reference

        options["problem"] = reference(problem)
    check_folder(output)
    results = go(Plan.from_dict({**options, "config": {**base, **changed}}), output, workers)
    if json:
        emit(results.to_dict())
        return
    print(table(report.HEADER, [report.cells(x) for x in results.lines], right=report.RIGHT))
    for note in report.notes(results):
        print(f"- {note}")
    print(f"report: {output / 'report.html'}")
