"""merge, info, diff: adapters in folders."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, emit, quiet_stdout, size, table
from omnilora.errors import BadValue

ModelName = Annotated[str | None, typer.Option(
    help="Hub name, folder, .gguf file or package:…; not needed with the folder of a run.")]  # fmt: skip
Folder = Annotated[Path, typer.Option(help="The adapter's folder, or the folder of a run.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Dtype = Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Do not check that the base is the adapter's own.")]
PROBE = "The quick brown fox jumps over the lazy dog. In 1912, 3 of 7 ships reached the harbour before noon."


def info(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter or of a run, or an adapter's file.")], json: AsJson = False
) -> None:
    """Say what a folder holds: method, sites, ranks, parameters, content hash, bases, file sizes. Needs no model.

    \b
    Examples:
      omnilora info runs/first/adapter
      omnilora info runs/first --json

    --json: for an adapter {path, what: "adapter", format, method, hyper, library, sites, parameters, ranks, content,
    bytes, files, peft, bases, extra, layers}; for a run {path, what: "run", finished, step, resume, config, report,
    checkpoints, adapter}. resume: the command that goes on, for a run that has not finished.
    """
    from omnilora.cli.comparing import about

    found = about(path)
    if json:
        emit(found)
        return
    if found["what"] == "run":
        _show_run(found)
        found = found["adapter"]
        if found is None:
            return
        print()
    _show_adapter(found)


def _show_run(run: dict[str, Any]) -> None:
    config, report = run["config"], run["report"]
    at = f"{'stopped' if report is not None else 'interrupted'} at step {run['step']}"
    print(f"run           {run['path']}, {'finished' if run['finished'] else at}")
    if run["resume"] is not None:
        print(f"go on         {run['resume']}")
    elif not run["finished"]:
        print("go on         no checkpoint: start it again with --overwrite")
    print(f"model         {config['model']}\ndata          {config['data']}")
    if report is not None:
        print(f"steps         {report['steps']} of {report['total_steps']} in {report['seconds']:.0f} s "
              f"({report['stopped']})")  # fmt: skip
        if report["last_loss"] is not None:
            print(f"loss          {report['first_loss']:.4f} → {report['last_loss']:.4f}")
        if report["evaluations"]:
            last = report["evaluations"][-1]
            print("evaluation    " + "  ".join(f"{k} {v:.4g}" for k, v in last.items()))
    print(f"checkpoints   {', '.join(run['checkpoints']) or 'none'}")


def _show_adapter(found: dict[str, Any]) -> None:
    hyper = ", ".join(f"{k}={v}" for k, v in found["hyper"].items())
    ranks = ", ".join(f"{r} at {n} site{'s' if n > 1 else ''}" for r, n in found["ranks"].items())
    foreign = {"peft": "a bare PEFT folder", "single file": "a single file under its own names", "llama.cpp": "a GGUF adapter"}
    opened = f"written by omnilora {found['library']}" if found["library"] else foreign[found["format"]]
    print("\n".join((
        f"adapter       {found['path']}, {opened}",
        f"method        {found['method']}({hyper})",
        f"sites         {found['sites']}",
        f"ranks         {ranks}",
        f"parameters    {found['parameters']:,}",
        f"content       {found['content']}",
        f"bases         {len(found['bases'])} weights fingerprinted" if found["bases"] else "bases         unproven",
        f"for PEFT      {'yes' if found['peft'] else 'no'}",
        "files         " + ", ".join(f"{n} {size(b)}" for n, b in found["files"].items()),
    )))  # fmt: skip
    for key, value in found["extra"].items():
        print(f"{key:<13} {json_text.dumps(value, ensure_ascii=False)[:200]}")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of an adapter or of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
    top: Annotated[int, typer.Option(help="How many sites to show; JSON has all.", min=1)] = 20,
    json: AsJson = False,
) -> None:
    """Compare two adapters: settings, and the relative difference of ΔW at every site, largest first.

    \b
    Examples:
      omnilora diff runs/first runs/second
      omnilora diff runs/first/adapter runs/second/adapter --json

    --json: {same, settings: [{name, a, b, sites}], only_a, only_b, bases, largest, sites: [{site, of, relative,
    norm_a, difference}]}. Exit code 0 also where they differ.
    """
    from omnilora.cli.comparing import difference
    from omnilora.cli.loading import adapter_folder
    from omnilora.core.files import load_file

    found = difference(load_file(adapter_folder(a)), load_file(adapter_folder(b)))  # type: ignore[arg-type]
    if json:
        emit(found)
        return
    print("The adapters are the same." if found["same"] else "The adapters differ.")
    for row in found["settings"]:
        where = "" if row["sites"] is None else f"  ({len(row['sites'])} sites)"
        print(f"  {row['name']}: {row['a']!r} → {row['b']!r}{where}")
    lists = {"only in A": found["only_a"], "only in B": found["only_b"], "other base at": found["bases"]}
    for word, names in lists.items():
        if names:
            print(f"  {word}: {len(names)}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}")
    rows = found["sites"][:top]
    if rows and not found["same"]:
        cells = [(r["site"], r["of"], "—" if r["relative"] is None else f"{r['relative']:.4g}") for r in rows]
        print(table(("site", "of", "‖ΔA − ΔB‖ / ‖ΔA‖"), cells, right=(2,)))
        if len(found["sites"]) > len(rows):
            print(f"{len(found['sites']) - len(rows)} more sites; --top shows more.")


def merge(
    adapter: Folder,
    output: Output,
    model: ModelName = None,
    keep_quantized: Annotated[bool, typer.Option("--keep-quantized", help="Write into the quantized weights.")] = False,
    bound: Annotated[float | None, typer.Option(help="Largest relative change of outputs allowed.", min=0)] = None,
    probe: Annotated[str, typer.Option(help="Text whose outputs are compared before and after.")] = PROBE,
    dtype: Dtype = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Hold the base in NF4 before merging.")] = False,
    any_base: AnyBase = False,
    json: AsJson = False,
) -> None:
    """Fold an adapter into its base and save the plain model. Refuses if outputs change by more than the bound.

    The bound is 1e-3 in fp32, 1e-2 in 16 bit and 5e-2 into quantized weights, unless --bound says otherwise.

    \b
    Examples:
      omnilora merge --model package:smollm2 --adapter runs/first --output merged
      omnilora merge --model ./base --adapter ./adapter --output merged --dtype fp32 --bound 1e-4 --json

    --json: {adapters, largest, mean, bound, probed, layers: [{name, dtype, weight_error, action_error, written}],
    output, bytes}.
    """
    from omnilora.cli.loading import for_adapter, loaded
    from omnilora.cli.merging import check_empty, merged_folder

    check_empty(output)
    if not probe.strip():
        raise BadValue("--probe is empty.", "Give a sentence.")
    config = for_adapter(adapter, None, None, model=model, dtype=dtype, load_in_4bit=load_in_4bit or None)
    with quiet_stdout(json):
        base, tokenizer, _ = loaded(config, adapter, check_base=not any_base)
        report = merged_folder(base, tokenizer, output, probe, bound, keep_quantized)
    if json:
        emit(report)
        return
    worst = max(report["layers"], key=lambda r: r["action_error"], default=None)
    print(f"Wrote {report['output']}, {size(report['bytes'])}.")
    print(f"Outputs on {report['probed']}: largest relative change {report['largest']:.3g}, mean {report['mean']:.3g} "
          f"(bound {report['bound']:.3g}).")  # fmt: skip
    if worst is not None:
        print(f"{len(report['layers'])} weights; worst layer {worst['name']} in {worst['dtype']}: "
              f"{worst['action_error']:.3g}.")  # fmt: skip
