"""apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, Sets, emit, quiet_stdout, table
from omnilora.cli.explaining import Config, MethodKey, Model, Target
from omnilora.cli.training import Length, Rows, Task, fraction
from omnilora.io.places import check_folder


def apply(
    method: MethodKey = None,
    model: Model = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder, or the folder of a run.")] = None,
    data: Annotated[str | None, typer.Option(help=".jsonl, .csv, .parquet, a folder, or a data set's name.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of what is made. Default: runs/METHOD.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="The same, or the fraction of data to hold out.")] = None,
    task: Task = None,
    target: Target = None,
    batch_size: Rows = None,
    max_length: Length = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:
    """Run a method that trains no adapter: post-training quantization, a posterior, a construction, a study.

    `omnilora show KEY` gives the command of each such method; `omnilora list --tag applies` lists them.

    \b
    Examples:
      omnilora apply --method lqer --model package:smollm2 --data calibration.jsonl --output runs/lqer
      omnilora apply --method laplace_lora --adapter runs/first --data train.jsonl --eval-data test.jsonl

    --json: {method, output, …}, the figures that the method reports; the same as OUTPUT/report.json.
    """
    from omnilora.cli.loading import adapter_folder, configuration, for_adapter
    from omnilora.training.applying import apply as run

    given: dict[str, Any] = {
        "model": model, "data": data, "output": output, "eval_data": fraction(eval_data), "task": task, "targets": target,
        "batch_size": batch_size, "max_length": max_length, "dtype": dtype, "seed": seed, "threads": threads}  # fmt: skip
    if adapter is None:
        made = configuration(config, sets, method=method, **given)
    else:
        made = for_adapter(adapter, config, None, **{**given, "data": None, "eval_data": None, "output": None})
        over = {k: v for k, v in given.items() if k in ("data", "eval_data", "output") and v is not None}
        made = configuration(None, sets, **{**made.to_dict(), "hyper": {}, "output": None, "method": method or "", **over})
    check_folder(made.output or f"runs/{made.method}")
    with quiet_stdout(json):
        report = run(made, adapter_folder(adapter))
    if json:
        emit(report)
        return
    print(table(("figure", "value"), [(k, _shown(v)) for k, v in report.items()]))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
