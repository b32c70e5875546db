"""What all commands share: one way to print JSON, tables, sizes and errors, and to read key=value."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from omnilora.errors import BadValue, MergeRefused, OmniloraError, RunError, need

DONE, FAILED, BAD_INPUT = 0, 1, 2

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Sets = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Set any configuration key, dotted for parts: hyper.r=16. Repeatable.",
)]  # fmt: skip


def clean(value: Any) -> Any:
    """JSON data: no NaN or infinity (null instead), no tuples, sets or paths."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(clean(v) for v in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def emit(data: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(clean(data), ensure_ascii=False, indent=1, allow_nan=False))


def warn(text: str) -> None:
    """A line for the reader that is no part of the output."""
    print(text, file=sys.stderr)


@contextmanager
def quiet_stdout(on: bool) -> Iterator[None]:
    """What other libraries print goes to stderr, so that stdout is JSON and nothing else."""
    if not on:
        yield
        return
    old, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = old


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> str:
    """Aligned columns; as wide as they need to be where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made, numbers = Table(box=box.SIMPLE_HEAD, pad_edge=False), set(right)
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = Console(width=100_000)
        console = Console(highlight=False, width=max(wide.measure(made).maximum, 20))
    with console.capture() as lines:
        console.print(made)
    return "\n".join(line.rstrip() for line in lines.get().strip("\n").splitlines())


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def parse(text: str) -> Any:
    """A value as YAML reads it, with ``1e-3`` a number."""
    yaml = need("yaml", "train")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadValue(f"{text!r} is no value: {' '.join(str(error).split())[:120]}.", "Quote it.") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``["lr=1e-3", "hyper.r=16"]`` → ``{"lr": 0.001, "hyper": {"r": 16}}``. Raises BadValue on other shapes.

    ``overrides.mlp.down_proj.r=4``: what stands between is one pattern, dots and all.
    """
    out: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, text = pair.partition("=")
        path = key.strip().split(".")
        if path[0] == "overrides" and len(path) > 3:
            path = [path[0], ".".join(path[1:-1]), path[-1]]
        if not sign or not all(path):
            raise BadValue(f"--set {pair!r} is no KEY=VALUE.", "Write --set lr=1e-3 or --set hyper.r=16.")
        home = out
        for step in path[:-1]:
            home = home.setdefault(step, {})
            if not isinstance(home, dict):
                raise BadValue(f"--set {pair!r}: {step!r} already has a value.", "Set either the whole or its parts.")
        home[path[-1]] = parse(text)
    return out


class Commands(TyperGroup):
    """The group of all commands: errors become one line and an exit code, with --json an object too."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
             standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any) -> Any:  # fmt: skip
        given = list(sys.argv[1:] if args is None else args)
        usage_error: Any = typer.BadParameter.__base__
        try:
            code = super().main(args, prog_name or "omnilora", complete_var, False, windows_expand_args, **extra)
        except OmniloraError as error:
            refuse(error.code, error.message, error.remedy, "--json" in given)
            code = FAILED if isinstance(error, (MergeRefused, RunError)) else BAD_INPUT
        except usage_error as error:
            where = error.ctx.command_path if error.ctx is not None else "omnilora"
            code = refuse("usage", error.format_message(), f"See {where} --help.", "--json" in given)
        except typer.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else DONE)


def refuse(code: str, message: str, remedy: str, as_json: bool) -> int:
    """Say what is wrong; the exit code of bad input."""
    if as_json:
        emit({"error": {"code": code, "message": message, "remedy": remedy}})
    line = f"error [{code}] {message}" + (f" {remedy}" if remedy else "")
    print(" ".join(line.split()), file=sys.stderr)
    return BAD_INPUT
