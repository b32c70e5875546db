"""The command ``omnilora``."""

from __future__ import annotations

from typing import Annotated

import typer

from omnilora import __version__
from omnilora.cli import adapters, applying, contest, converting, explaining, generating, methods, training
from omnilora.cli.common import Commands

app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip

app.command("list")(methods.list_methods)
app.command("show")(methods.show)
app.command("verify")(methods.verify)
app.command("explain")(explaining.explain)
app.command("train")(training.train)
app.command("compare")(contest.compare)
app.command("apply")(applying.apply)
app.command("eval")(training.evaluate)
app.command("generate")(generating.generate)
app.command("chat")(generating.chat)
app.command("merge")(adapters.merge)
app.command("export")(converting.export)
app.command("convert")(converting.convert)
app.command("push")(converting.push)
app.command("pull")(converting.pull)
app.command("info")(adapters.info)
app.command("diff")(adapters.diff)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"omnilora {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
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
    app()


if __name__ == "__main__":
    main()
