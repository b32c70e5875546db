"""The command ``omnilora``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, get_args, get_type_hints

import typer

from omnilora import __version__
from omnilora.cli.common import Commands, guarded

COMMANDS = {
    "list": "methods.list_methods", "show": "methods.show", "verify": "methods.verify", "explain": "explaining.explain",
    "train": "training.train", "compare": "contest.compare", "apply": "applying.apply", "eval": "training.evaluate",
    "generate": "generating.generate", "chat": "generating.chat", "merge": "adapters.merge", "export": "converting.export",
    "convert": "converting.convert", "push": "converting.push", "pull": "converting.pull", "info": "adapters.info",
    "diff": "adapters.diff",
}  # fmt: skip


def application(*names: str) -> typer.Typer:
    """The command line with these commands, all by default. One command alone starts in half the time."""
    made = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                       context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip
    made.callback(invoke_without_command=True)(_top)
    for name in names or COMMANDS:
        made.command(name)(command(name))
    return made


def command(name: str) -> Callable[..., None]:
    module, _, function = COMMANDS[name].partition(".")
    return getattr(import_module(f"omnilora.cli.{module}"), function)  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"omnilora {__version__}")
        raise typer.Exit()


def _top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option(
        "--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:  # fmt: skip
    """Low-rank adaptation: choose a method, train, measure, merge, export.

    \b
    Examples:
      omnilora list
      omnilora explain --model package:smollm2 --method dora --set hyper.r=16
      omnilora train --model package:smollm2 --method lora --data train.jsonl --output runs/first
      omnilora compare lora dora --model package:smollm2 --data train.jsonl
      omnilora generate --model package:smollm2 --adapter runs/first/adapter --prompt "Hello"
      omnilora verify --controls

    Exit codes: 0 done, 1 a check or run failed, 2 bad input, 130 interrupted. OMNILORA_DEBUG=1 shows tracebacks.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def plain_arguments(function: Callable[..., None], args: Sequence[str]) -> dict[str, Any] | None:
    """Arguments of a command from words like ``KEY --section X --tag Y --json``; None for anything else.

    The parser of the other commands takes a tenth of a second to load.
    """
    hints, given = get_type_hints(function), dict[str, Any]()
    parameters = inspect.signature(function).parameters.values()
    free = [p.name for p in parameters if p.default is p.empty]
    options = {f"--{p.name}": p.name for p in parameters if p.default is not p.empty}
    words = iter(args)
    for word in words:
        name = options.get(word)
        if name is None:
            if word.startswith("-") or not free:
                return None
            given[free.pop(0)] = word
        elif hints[name] is bool:
            given[name] = True
        else:
            value = next(words, "-")
            if value.startswith("-") or isinstance(given.get(name), str):
                return None
            given[name] = [*given.get(name, []), value] if list[str] in get_args(hints[name]) else value
    return None if free else given


def main() -> None:
    """Entry point."""
    name, *args = sys.argv[1:] or [""]
    if name in ("list", "show"):
        function = command(name)
        given = plain_arguments(function, args)
        if given is not None:
            sys.exit(guarded(lambda: function(**given), "--json" in args))
    application(*(n for n in (name,) if n in COMMANDS))()


if __name__ == "__main__":
    main()
