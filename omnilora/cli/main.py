"""The command ``omnilora``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from omnilora import __version__
from omnilora.cli.common import Commands

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
        module, _, function = COMMANDS[name].partition(".")
        made.command(name)(getattr(import_module(f"omnilora.cli.{module}"), function))
    return made


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

    Exit codes: 0 done, 1 a check or run failed, 2 bad input.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """Entry point."""
    application(*(name for name in sys.argv[1:2] if name in COMMANDS))()


if __name__ == "__main__":
    main()
