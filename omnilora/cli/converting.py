"""export, convert, push, pull: adapters for other programs and from them, to the Hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, emit, quiet_stdout, table
from omnilora.errors import BadValue
from omnilora.io.places import check_folder

FORMATS = "peft, vllm, llama.cpp, diffusers, kohya, lycoris or omnilora"
Part = Annotated[str | None, typer.Option(help="Part of a pipeline: unet, te, te2, te3, transformer, prior, lycoris.")]
Rank = Annotated[int | None, typer.Option(help="Lower every map to plain LoRA of this rank (SVD).", min=1)]
For = Annotated[str, typer.Option("--for", help=f"{FORMATS}.")]
SaveDtype = Annotated[str | None, typer.Option("--save-dtype", help="Round what is written: fp16 or bf16.")]
Dtype = Annotated[str | None, typer.Option(help="Of the base where its weights are read: auto, fp32, bf16 or fp16.")]


def export(
    adapter: Annotated[Path, typer.Option(help="The adapter's folder or file, or the folder of a run.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; for formats of one file also that file.")] = None,
    target: For = "peft",
    rank: Rank = None,
    model: Annotated[str | None, typer.Option(help="The base, where the format or lowering asks for it.")] = None,
    part: Part = None,
    formats: Annotated[bool, typer.Option("--formats", help="Say which formats hold the adapter, and why not. Writes nothing.")] = False,
    save_dtype: SaveDtype = None,
    dtype: Dtype = "fp32",
    json: AsJson = False,
) -> None:
    """Write an adapter for another program, with the error of each site stated.

    \b
    Examples:
      omnilora export --adapter runs/first --output out/peft
      omnilora export --adapter runs/first --formats --model package:smollm2
      omnilora export --adapter runs/first --for llama.cpp --model package:smollm2 --output adapter.gguf
      omnilora export --adapter runs/dora --for vllm --rank 16 --model package:smollm2 --output out/vllm

    --json: {path, for, rank, errors: {site: relative error of ΔW}, worst}; with --formats {format: {can, why, sites}}.
    """
    from omnilora.cli.loading import adapter_folder

    found = adapter_folder(adapter)
    assert found is not None
    if formats:
        _list(found, model, part, json)
        return
    if output is None:
        raise BadValue("There is no --output.", "Give a folder or a file, or --formats to write nothing.")
    _write(found, output, target, rank, model, part, save_dtype, dtype, json)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Adapter of any format: a folder, .safetensors or .gguf.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; for formats of one file also that file.")],
    target: For = "peft",
    rank: Rank = None,
    model: Annotated[str | None, typer.Option(
        help="The base: names and shapes of layers, which some formats lose. Also a folder of diffusers.")] = None,
    part: Part = None,
    save_dtype: SaveDtype = None,
    dtype: Dtype = "fp32",
    json: AsJson = False,
) -> None:
    """Read any format, write any other, with the error of each site stated (0: the same map).

    \b
    Examples:
      omnilora convert lora.safetensors out/peft --model ./stable-diffusion/unet --part unet
      omnilora convert adapter out.gguf --for llama.cpp --model package:smollm2
      omnilora convert loha.safetensors plain.safetensors --for kohya --rank 8

    --json: {from, path, for, rank, errors: {site: relative error of ΔW}, worst}.
    """
    _write(source, output, target, rank, model, part, save_dtype, dtype, json)


def push(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder or file, or the folder of a run.")],
    repo: Annotated[str, typer.Argument(help="user/adapter; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Adapter",
    card: Annotated[bool, typer.Option("--card", help="Print the card that would be pushed. Uploads nothing.")] = False,
    json: AsJson = False,
) -> None:
    """Upload an adapter to the Hugging Face Hub, with a card: method, base, settings, data, figures.

    \b
    Examples:
      omnilora push runs/first user/my-adapter --private
      omnilora push runs/first user/my-adapter --card

    --json: {repo, url, files}; with --card {card}.
    """
    from omnilora.io import hub

    if card:
        text = hub.card(adapter, repo)
        emit({"card": text}) if json else print(text)
        return
    with quiet_stdout(json):
        report = hub.push(adapter, repo, private=private or None, message=message)
    if json:
        emit(report)
        return
    print(f"Pushed {', '.join(report['files'])} to {report['url']}.")


def pull(
    repo: Annotated[str, typer.Argument(help="user/adapter.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    json: AsJson = False,
) -> None:
    """Download an adapter from the Hugging Face Hub into a folder, and check that it can be read.

    \b
    Examples:
      omnilora pull user/my-adapter adapters/mine
      omnilora pull user/my-adapter adapters/mine --revision v2 --json

    --json: {repo, path}.
    """
    from omnilora.io import hub

    check_folder(output)
    with quiet_stdout(json):
        path = hub.pull(repo, output, revision=revision)
    if json:
        emit({"repo": repo, "path": str(path)})
        return
    print(f"Wrote {path}.")


def _write(source: Path, output: Path, target: str, rank: int | None, model: str | None, part: str | None,
           save_dtype: str | None, dtype: str | None, json: bool) -> None:  # fmt: skip
    from omnilora.cli.loading import for_adapter, loaded
    from omnilora.io import export as writers
    from omnilora.io.formats import check_place, named

    check_place(output, named(target))
    with quiet_stdout(json):
        if rank is not None and model is not None and (source / "omnilora.json").is_file():
            adapted, _, _ = loaded(for_adapter(source, None, None, model=model, dtype=dtype), source)
            report = writers.export(adapted, output, target, rank, part=part, save_dtype=save_dtype)
        else:
            base: Any = None if model is None else base_of(source, model, dtype, rank is not None)
            report = writers.convert(source, output, target, base, rank, part, save_dtype)
    if json:
        emit(report)
        return
    print(f"Wrote {report['path']} for {report['for']}.")
    if rank is not None or save_dtype is not None:
        print(f"Largest relative error of ΔW at a site: {report['worst']:.3g}.")


def _list(source: Path, model: str | None, part: str | None, json: bool) -> None:
    from omnilora.core.files import load_file
    from omnilora.io import formats, names

    with quiet_stdout(json):
        state = load_file(source)
        base: Any = None if model is None else base_of(source, model, None, False)
        if base is not None:
            state = names.known(base, names.placed(state, base, part))
        found = {}
        for name, form in formats.FORMATS.items():
            why = formats.refusals(state, form, formats.Target(base, part))
            found[name] = {"can": not why, "why": next(iter(why.values()), ""), "sites": {k: v for k, v in why.items() if k}}
    if json:
        emit(found)
        return
    print(table(("format", "", "why not"), [
        (n, "yes" if f["can"] else "no", f["why"] + (f" ({len(f['sites'])} sites)" if len(f["sites"]) > 1 else ""))
        for n, f in found.items()]))  # fmt: skip


def base_of(source: Path, model: str, dtype: str | None, weights: bool) -> Any:
    """The base model: without its weights unless they are asked for. Also folders of diffusers' models and pipelines."""
    from omnilora.cli.loading import for_adapter, skeleton
    from omnilora.core.files import load_file
    from omnilora.io.pipelines import is_diffusers, shapes_of
    from omnilora.training.models import load_model

    if is_diffusers(Path(model)):
        return shapes_of(Path(model), weights)
    config = for_adapter(source if source.is_dir() else None, None, None, model=model, dtype=dtype)
    extra = load_file(source).extra
    if extra.get("labels") is not None:
        config = config.replace(task="classification", labels=extra["labels"], packing=False)
    if extra.get("tokens"):
        config = config.replace(tokens=extra["tokens"]["tokens"])
    bare = None if weights else skeleton(config)
    return load_model(config)[0].eval() if bare is None else bare
