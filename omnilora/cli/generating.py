"""generate and chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from omnilora.cli.common import AsJson, Sets, emit, quiet_stdout, warn
from omnilora.cli.explaining import Config, Model
from omnilora.errors import BadValue, DataError

Adapter = Annotated[Path | None, typer.Option(help="The adapter's folder, or the folder of a run.")]
Dtype = Annotated[str | None, typer.Option(help="Of the base: auto, fp32, bf16 or fp16.")]
FourBit = Annotated[bool | None, typer.Option("--load-in-4bit", help="Hold the base in NF4.")]
Prompts = Annotated[Path | None, typer.Option(help=".txt (one a line), or .jsonl, .csv, .parquet with prompts.")]
New = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Heat = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")]
System = Annotated[str | None, typer.Option(help="A system message before the prompt.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Do not check that the base is the adapter's own.")]


def generate(
    model: Model = None,
    adapter: Adapter = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; - reads one from stdin. Repeatable.")] = None,
    prompts: Prompts = None,
    max_new_tokens: New = 128,
    temperature: Heat = 0.0,
    top_p: TopP = 1.0,
    system: System = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print pieces as they come.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts a batch.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of drawn tokens.")] = 0,
    dtype: Dtype = None,
    load_in_4bit: FourBit = None,
    any_base: AnyBase = False,
    config: Config = None,
    sets: Sets = None,
    json: AsJson = False,
) -> None:
    """Answer prompts, with or without an adapter.

    \b
    Examples:
      omnilora generate --model package:smollm2 --prompt "Name three rivers."
      omnilora generate --adapter runs/first --prompt "Count the orders." --stream
      omnilora generate --adapter runs/first --prompts questions.jsonl --json

    --json: {model, adapter, answers: [{prompt, answer}], seconds}.
    """
    from omnilora.cli.loading import for_adapter, loaded

    if stream and json:
        raise BadValue("--stream and --json exclude each other.", "Drop one.")
    asked = _prompts(prompt, prompts, system)
    made = for_adapter(adapter, config, sets, model=model, dtype=dtype, load_in_4bit=load_in_4bit)
    with quiet_stdout(json):
        net, tokenizer, made = loaded(made, adapter, check_base=not any_base, task="causal-lm")
    import torch

    from omnilora.training import evaluate as use

    torch.manual_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "template": made.template}
    if stream:
        for one in asked:
            for piece in use.stream(net, tokenizer, one, **options):
                print(piece, end="", flush=True)
            print()
        return
    began = time.perf_counter()
    with quiet_stdout(json):
        answers = use.generate(net, tokenizer, asked, batch_size=batch_size, **options)
    spent = time.perf_counter() - began
    if json:
        emit({"model": made.model, "adapter": None if adapter is None else str(adapter), "seconds": spent,
              "answers": [{"prompt": p, "answer": a} for p, a in zip(asked, answers, strict=True)]})  # fmt: skip
        return
    for one, answer in zip(asked, answers, strict=True):
        if len(asked) > 1:
            print(f"> {one if isinstance(one, str) else one[-1]['content']}")
        print(answer)
        if len(asked) > 1:
            print()


def _prompts(given: list[str] | None, file: Path | None, system: str | None) -> list[Any]:
    """Texts or messages, of options and of a file."""
    found: list[Any] = [sys.stdin.read() if p == "-" else p for p in given or ()]
    if file is not None:
        found += _from_file(file)
    if not found:
        raise BadValue("There is no prompt.", "Give --prompt or --prompts.")
    if system is None:
        return found
    head = {"role": "system", "content": system}
    return [[head, {"role": "user", "content": p}] if isinstance(p, str) else [head, *p] for p in found]


def _from_file(file: Path) -> list[Any]:
    if file.suffix in (".txt", ""):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}.", "Give a UTF-8 text file.") from error
        return [line for line in lines if line.strip()]
    from omnilora.training.data import column, messages_of, read_rows, text_of

    out: list[Any] = []
    for row in read_rows(str(file)):
        chat, name = column(row, "messages"), column(row, "prompt") or column(row, "text")
        if chat is not None:
            turns = messages_of(row.data[chat], row.where)
            out.append(turns[:-1] if turns[-1]["role"] == "assistant" and len(turns) > 1 else turns)
        elif name is not None:
            out.append(text_of(row, name))
        else:
            raise DataError(f"{row.where}: fields {sorted(map(str, row.data))} hold no prompt.", "Name it 'prompt'.")
    return out


def chat(
    model: Model = None,
    adapter: Adapter = None,
    max_new_tokens: New = 512,
    temperature: Heat = 0.0,
    top_p: TopP = 1.0,
    system: System = None,
    dtype: Dtype = None,
    load_in_4bit: FourBit = None,
    any_base: AnyBase = False,
    config: Config = None,
    sets: Sets = None,
) -> None:
    """Talk to a model; answers stream. /reset forgets what was said, /quit (or the end of input) leaves.

    \b
    Examples:
      omnilora chat --model package:smollm2
      omnilora chat --adapter runs/first --temperature 0.7 --top-p 0.9
    """
    from omnilora.cli.loading import for_adapter, loaded

    made = for_adapter(adapter, config, sets, model=model, dtype=dtype, load_in_4bit=load_in_4bit)
    net, tokenizer, made = loaded(made, adapter, check_base=not any_base, task="causal-lm")
    from omnilora.training.encode import set_template
    from omnilora.training.evaluate import stream

    talks = set_template(tokenizer, made.template) == "chat"
    if not talks:
        warn("The model has no chat template: each line is continued as plain text, without memory.")
    start = [{"role": "system", "content": system}] if system is not None else []
    turns = list(start)
    while True:
        line = _ask()
        if line is None or line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            turns = list(start)
            continue
        if not line.strip():
            continue
        asked = [*turns, {"role": "user", "content": line.strip()}]
        pieces = []
        try:
            for piece in stream(net, tokenizer, asked if talks else line, max_new_tokens=max_new_tokens,
                                temperature=temperature, top_p=top_p, template=made.template):  # fmt: skip
                pieces.append(piece)
                print(piece, end="", flush=True)
        except DataError as error:
            warn(f"{error.message} /reset forgets what was said.")
            continue
        except KeyboardInterrupt:
            pass
        print()
        turns = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]


def _ask() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
