"""train and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, Sets, emit, quiet_stdout, settings, table
from omnilora.cli.explaining import Config, MethodKey, Model, Target
from omnilora.errors import BadValue

IN_REPORT = ("method", "steps", "total_steps", "seconds", "tokens", "trainable", "truncated", "stopped", "evaluations",
             "best", "best_value", "checkpoint", "output")  # fmt: skip
Task = Annotated[str | None, typer.Option(help="causal-lm, classification or embedding.")]
Rows = Annotated[int | None, typer.Option(help="Rows a forward.")]
Length = Annotated[int | None, typer.Option(help="Tokens a row.")]


def train(
    model: Model = None,
    method: MethodKey = None,
    data: Annotated[str | None, typer.Option(help=".jsonl, .csv, .parquet, a folder, or a data set's name.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run. Default: runs/METHOD.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="The same, or the fraction of data to hold out.")] = None,
    task: Task = None,
    target: Target = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern taken out of the targets. Repeatable.")] = None,
    unfreeze: Annotated[list[str] | None, typer.Option(help="Layers that train as own copies. Repeatable.")] = None,
    bias: Annotated[str | None, typer.Option(help="none, all or lora_only.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; --steps wins.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer updates of the whole run.")] = None,
    batch_size: Rows = None,
    accumulate: Annotated[int | None, typer.Option(help="Forwards an update.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.")] = None,
    max_length: Length = None,
    packing: Annotated[bool | None, typer.Option("--packing", help="Several rows in one sequence.")] = None,
    padding: Annotated[bool | None, typer.Option("--padding", help="Pad rows even where they can be joined.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit", help="Hold the base in NF4.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(
        "--gradient-checkpointing", help="Recompute activations in the backward pass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialization, order of the data and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --output holds.")] = False,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Fine-tune a model: load, adapt, train, evaluate, save. Writes OUTPUT/{adapter, config.yaml, report.json}.

    OUTPUT must be new or empty, or hold the run to --resume or to --overwrite. Any configuration key can be set in a
    YAML file (--config) or by --set: stop_at ends this session early (the next --resume goes on),
    overrides.PATTERN.KEY changes a hyper-parameter for some layers. All keys:
    python -c "import omnilora as ol; print(ol.TrainConfig().to_yaml())"

    \b
    Examples:
      omnilora train --model package:smollm2 --method lora --data train.jsonl --output runs/first
      omnilora train --config run.yaml --set hyper.r=16 --set lr=5e-4
      omnilora train --output runs/first --resume
      omnilora train --config run.yaml --output runs/first --overwrite

    --json: {method, steps, total_steps, seconds, tokens, trainable, truncated, stopped, first_loss, last_loss,
    metrics, evaluations, best, best_value, checkpoint, output, adapter}.
    """
    from omnilora.cli.loading import configuration
    from omnilora.training.fit import train as run

    going_on = resume and config is None
    if going_on:
        config = _resumed(output, settings(sets).get("method", method))
    made = configuration(
        config, sets, model=model, method=method, data=data, output=output, eval_data=fraction(eval_data), task=task,
        targets=target, exclude=exclude, unfreeze=unfreeze, bias=bias, epochs=epochs, steps=steps,
        batch_size=batch_size, accumulate=accumulate, lr=lr, schedule=schedule, max_length=max_length,
        packing=packing, padding=padding, dtype=dtype, load_in_4bit=load_in_4bit, gradient_checkpointing=gradient_checkpointing,
        seed=seed, threads=threads, resume=resume or None, overwrite=overwrite or None)  # fmt: skip
    if going_on and "stop_at" not in settings(sets):
        made = made.replace(stop_at=None)
    with quiet_stdout(json):
        report = run(made)
    figures = {name: getattr(report, name) for name in IN_REPORT}
    losses = report.losses
    figures |= {"first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
                "metrics": report.metrics, "adapter": str(Path(report.output or ".") / "adapter")}  # fmt: skip
    if json:
        emit(figures)
        return
    print(f"{report.method}: {report.steps} of {report.total_steps} updates in {report.seconds:.1f} s "
          f"({report.stopped}), {report.trainable:,} trainable.")  # fmt: skip
    if losses:
        print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    if report.metrics:
        print("evaluation: " + "  ".join(f"{k} {v:.4g}" for k, v in report.metrics.items()))
    print(f"adapter in {figures['adapter']}")
    if report.stopped == "stop_at":
        from omnilora.training.folder import command

        print(f"go on: {command(report.output or '.')}")


def _resumed(output: str | None, method: str | None) -> Path:
    """The configuration of the run to go on with. Raises BadValue where there is none, or one of another method."""
    from omnilora.training import folder
    from omnilora.training.config import TrainConfig

    home = Path(output or f"runs/{method or TrainConfig.method}")
    if not (home / folder.CONFIG).is_file():
        raise folder.nothing_to_resume(home)
    theirs = TrainConfig.from_yaml(home / folder.CONFIG).method
    if method not in (None, theirs):
        raise BadValue(f"--method {method}, but that run's method is {theirs}.", "Leave --method out, or name another --output.")
    return home / folder.CONFIG


def fraction(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def evaluate(
    data: Annotated[str, typer.Option(help=".jsonl, .csv, .parquet, a folder, or a data set's name.")],
    model: Model = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder, or the folder of a run.")] = None,
    task: Task = None,
    batch_size: Rows = None,
    max_length: Length = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit", help="Hold the base in NF4.")] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also measure without the adapter.")] = True,
    any_base: Annotated[bool, typer.Option("--any-base", help="Do not check that the base is the adapter's.")] = False,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:
    """Measure a model on data, without and with an adapter.

    With the folder of a run, its own configuration is used; --model is then not needed.

    \b
    Examples:
      omnilora eval --adapter runs/first --data test.jsonl
      omnilora eval --model package:smollm2 --data test.jsonl --json

    --json: {data, model, task, base: {loss, …}, adapter: {loss, …} or null, change: {loss, …} or null}; the metrics
    are loss and perplexity (causal-lm), accuracy and macro_f1 (classification), accuracy (embedding).
    """
    from omnilora.cli.loading import for_adapter, loaded
    from omnilora.core.attach import disabled
    from omnilora.training.evaluate import evaluate as measure

    made = for_adapter(adapter, config, sets, model=model, task=task, batch_size=batch_size, max_length=max_length,
                       dtype=dtype, load_in_4bit=load_in_4bit)  # fmt: skip
    if adapter is None and not base:
        raise BadValue("--no-base without --adapter leaves nothing to measure.", "Give --adapter.")
    with quiet_stdout(json):
        net, tokenizer, made = loaded(made, adapter, check_base=not any_base)
        found: dict[str, Any] = {"base": None, "adapter": None}
        if adapter is None:
            found["base"] = measure(net, data, tokenizer=tokenizer, config=made)
        else:
            if base:
                with disabled(net):
                    found["base"] = measure(net, data, tokenizer=tokenizer, config=made)
            found["adapter"] = measure(net, data, tokenizer=tokenizer, config=made)
    both = found["base"] is not None and found["adapter"] is not None
    change = {k: v - found["base"][k] for k, v in found["adapter"].items()} if both else None
    if json:
        emit({"data": data, "model": made.model, "task": made.task, **found, "change": change})
        return
    shown = [(name, figures) for name, figures in found.items() if figures is not None]
    metrics = list(shown[0][1])
    print(table(("", *metrics), [(name, *(f"{f[m]:.4f}" for m in metrics)) for name, f in shown],
                right=range(1, len(metrics) + 1)))  # fmt: skip
