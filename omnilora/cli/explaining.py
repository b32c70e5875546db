"""explain: a method on a model in figures, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, Sets, emit, quiet_stdout, size, table

Model = Annotated[str | None, typer.Option(help="Hub name, folder, .gguf file, package:smollm2 or package:minilm.")]
MethodKey = Annotated[str | None, typer.Option(help="Key of a method; see omnilora list.")]
Target = Annotated[list[str] | None, typer.Option("--target", help="Pattern of layers to adapt. Repeatable.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file; options and --set win over it.")]


def explain(
    model: Model = None,
    method: MethodKey = None,
    target: Target = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern taken out of the targets. Repeatable.")] = None,
    unfreeze: Annotated[list[str] | None, typer.Option(help="Layers that train as own copies. Repeatable.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm, classification or embedding.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward, for activations.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a row, for activations. Default: 512.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Default: the method's own, else adamw.")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit", help="Hold the base in NF4.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")] = None,
    target_format: Annotated[str | None, typer.Option(
        "--for", help="Which sites this format refuses: peft, vllm, llama.cpp …")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="Every site, not only groups of equal ones.")] = False,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:
    """Say what a method would be on a model: layers, parameters, bytes, FLOPs, formats. Reads no weights.

    \b
    Examples:
      omnilora explain --model package:smollm2 --method lora --set hyper.r=16
      omnilora explain --model package:smollm2 --method dora --target attention --length 1024
      omnilora explain --model package:smollm2 --method dora --for llama.cpp
      omnilora explain --config run.yaml --json

    --json: an object with method, hyper, model, parameters, trainable, share, frozen, weights (bytes by dtype),
    adapter, gradients, optimizer, activations, total (bytes), flop_ratio, plans,
    formats (each can, why, and the sites refused), assumed, notes, sites.
    """
    from omnilora.cli.loading import configuration, skeleton
    from omnilora.core.method import method as by_name

    made = configuration(
        config, sets, model=model, method=method, targets=target, exclude=exclude, unfreeze=unfreeze, task=task,
        batch_size=batch_size, max_length=length, load_in_4bit=load_in_4bit, dtype=dtype)  # fmt: skip
    how = by_name(made.method, **made.hyper)
    form = None if target_format is None else _form(target_format)
    with quiet_stdout(json):
        base = skeleton(made)
        found = _explained(made, how, base, optimizer)
    if json:
        emit(found.as_dict())
        return
    print(render(found, sites) if form is None else refused(found, form))


def _explained(config: Any, how: Any, base: Any, optimizer: str | None) -> Any:
    from omnilora import explain as of
    from omnilora.training.models import load_parts, targets_for

    targets, overrides, unfreeze = config.targets, config.overrides, config.unfreeze
    if base is None:
        parts = load_parts(config)
        base = parts.model
        targets, overrides, unfreeze = targets_for(parts, targets, overrides, unfreeze)
    elif config.task == "classification" and not _has_head(base):
        unfreeze = [*(unfreeze or []), "head"]
    return of(base, how, targets, batch_size=config.batch_size, length=config.max_length or 512, optimizer=optimizer,
              store={"quant_type": "nf4"} if config.load_in_4bit else None, exclude=config.exclude,
              overrides=overrides or None, unfreeze=unfreeze, bias=config.bias, tied=config.tied)  # fmt: skip


def _form(name: str) -> str:
    from omnilora.io.formats import named

    return named(name).name


def refused(found: Any, form: str) -> str:
    """What a format refuses of an Explanation, as text: sites that differ in a number only on one line."""
    answer = found.formats[form]
    if answer["can"]:
        return f"{form} takes {found.method} on all {len(found.sites)} sites."
    if not answer.get("sites"):
        return f"{form} refuses {found.method}: {answer['why']}"
    groups: dict[tuple[str, str], list[str]] = {}
    for site, why in answer["sites"].items():
        groups.setdefault((re.sub(r"\d+", "*", site), why.replace(f"{site}: ", "").replace(site, "it")), []).append(site)
    lines = [f"  {site if len(names) > 1 else names[0]} ({len(names)}): {why}" for (site, why), names in groups.items()]
    return f"{form} refuses {len(answer['sites'])} of {len(found.sites)} sites:\n" + "\n".join(lines)


def _has_head(model: Any) -> bool:
    """Whether the checkpoint was made for this task, so that its head is no fresh one."""
    return type(model).__name__ in (model.config.architectures or ())


def render(found: Any, every: bool = False) -> str:
    """An Explanation as text."""
    rows = [(s.name, 1, s, s.trainable, s.frozen) for s in found.sites] if every else grouped(found.sites)
    layers = table(
        ("layers", "sites", "kind", "out × in", "how", "rank", "trainable", "frozen", "plan"),
        [(name, n, s.kind, f"{s.shape[0]} × {s.shape[1]}", s.how, s.rank or "", f"{t:,}", f"{f:,}" if f else "", s.plan)
         for name, n, s, t, f in rows], right=(1, 5, 6, 7))  # fmt: skip
    hyper = ", ".join(f"{k}={v}" for k, v in found.hyper.items())
    figures = [
        ("method", f"{found.method}({hyper})"),
        ("model", f"{found.model}, {found.parameters:,} parameters"),
        ("trainable", f"{found.trainable:,} ({100 * found.share:.3f} %)"
                      + (f", frozen besides: {found.frozen:,}" if found.frozen else "")),
        ("weights", ", ".join(f"{size(b)} {dtype}" for dtype, b in found.weights.items())),
        ("adapter", size(found.adapter)),
        ("gradients", size(found.gradients)),
        ("optimizer", f"{size(found.optimizer)} ({found.assumed['optimizer']})"),
        ("activations", f"about {size(found.activations)} for {found.assumed['batch_size']} × "
                        f"{found.assumed['length']} tokens, kept by the adapter's backward pass alone"),
        ("total", f"about {size(found.total)}"),
        ("FLOPs", f"{found.flop_ratio:.4f} × the base's, a token, forward"),
        *((f"for {name}", "yes" if answer["can"] else f"no: {answer['why']}")
          for name, answer in found.formats.items()),
        *(("note", note) for note in found.notes),
    ]  # fmt: skip
    return layers + "\n\n" + "\n".join(f"{name:<14}{value}" for name, value in figures)


def grouped(sites: Sequence[Any]) -> list[tuple[str, int, Any, int, int]]:
    """(name with * for numbers, count, the first, trainable, frozen) of sites that differ in a number only."""
    out: dict[tuple[Any, ...], list[Any]] = {}
    for s in sites:
        out.setdefault((re.sub(r"\d+", "*", s.name), s.kind, s.how, s.shape, s.rank), []).append(s)
    return [(key[0] if len(found) > 1 else found[0].name, len(found), found[0], sum(s.trainable for s in found),
             sum(s.frozen for s in found)) for key, found in out.items()]  # fmt: skip
