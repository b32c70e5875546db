"""What all commands share: one way to print JSON, tables, sizes and errors, and to read key=value."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import sys
import textwrap
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from omnilora.errors import BadValue, MergeRefused, OmniloraError, RunError
from omnilora.io.yaml import parse_yaml

DONE, FAILED, BAD_INPUT, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141
DEBUG = "OMNILORA_DEBUG=1 shows the traceback."

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
    """Aligned columns; folded to the width of a terminal, as wide as they need to be elsewhere."""
    cells = [[str(c).split("\n") for c in row] for row in (header, *rows)]
    widths = [max(width(line) for row in cells for line in row[i]) for i in range(len(header))]
    if sys.stdout.isatty():
        _narrow(widths, shutil.get_terminal_size().columns - GAP * (len(header) - 1))
        cells = [[[part for line in cell for part in _folded(line, widths[i])] for i, cell in enumerate(row)] for row in cells]
    numbers, out = set(right), []
    for row in cells:
        for at in range(max(map(len, row))):
            line = [cell[at] if at < len(cell) else "" for cell in row]
            spaces = [" " * (w - width(part)) for w, part in zip(widths, line, strict=True)]
            out.append((" " * GAP).join(s + p if i in numbers else p + s
                                        for i, (p, s) in enumerate(zip(line, spaces, strict=True))).rstrip())  # fmt: skip
    height = max(map(len, cells[0]))
    out.insert(height, "─" * (sum(widths) + GAP * (len(header) - 1)))
    return "\n".join(out)


GAP = 2  # spaces between columns


def width(text: str) -> int:
    """Columns that a line takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = unicodedata.east_asian_width
    return sum(0 if unicodedata.combining(c) else 2 if wide(c) in "WF" else 1 for c in text)


def _narrow(widths: list[int], room: int) -> None:
    """Take from the widest columns what is too much."""
    while sum(widths) > room and max(widths) > 8:
        at = widths.index(max(widths))
        widths[at] -= 1


def _folded(line: str, room: int) -> list[str]:
    """Lines of at most ``room`` columns, broken at spaces where there are any."""
    if width(line) <= room:
        return [line]
    return textwrap.wrap(line, max(room // (2 if width(line) > len(line) else 1), 1)) or [""]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def parse(text: str) -> Any:
    """A value as YAML reads it, with ``1e-3`` a number."""
    value = parse_yaml(text, repr(text))
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
        parent = super().main
        sys.exit(guarded(lambda: parent(args, prog_name or "omnilora", complete_var, False, windows_expand_args, **extra),
                         "--json" in given))  # fmt: skip

    def invoke(self, ctx: Any) -> Any:
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise typer.Exit(interrupted(stop)) from stop
        except BrokenPipeError as error:
            raise _Closed() from error


class _Closed(Exception):
    """A pipe was closed: what the parser of commands does not end the program for."""


def guarded(command: Callable[[], Any], as_json: bool) -> int:
    """Run a command; the exit code. Whatever it raises becomes one line, with ``as_json`` an object too."""
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = command()
        sys.stdout.flush()
    except OmniloraError as error:
        return answer(error, as_json)
    except usage_error as error:
        where = error.ctx.command_path if error.ctx is not None else "omnilora"
        return refuse("usage", error.format_message(), f"See {where} --help.", as_json)
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt as stop:
        return interrupted(stop)
    except (BrokenPipeError, _Closed) as error:
        if nobody_reads():
            return CLOSED
        return unexpected(error.__cause__ if isinstance(error, _Closed) else error, as_json)
    except OSError as error:
        _debug()
        name = f": {error.filename}" if error.filename is not None else ""
        return refuse("os", f"{error.strerror or ' '.join(str(error).split())[:300]}{name}.", DEBUG, as_json)
    except Exception as error:
        return unexpected(error, as_json)
    return code if isinstance(code, int) else DONE


def interrupted(stop: KeyboardInterrupt) -> int:
    """Say what an interruption left behind; the exit code."""
    for line in getattr(stop, "__notes__", ["Interrupted."]):
        warn(line)
    return INTERRUPTED


def nobody_reads() -> bool:
    """Whether standard output is a closed pipe (``omnilora list | head``); it is then silenced for good."""
    try:
        end = sys.stdout.fileno()
    except (OSError, AttributeError):
        return False
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(end, 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), end)
    return True


def unexpected(error: BaseException | None, as_json: bool) -> int:
    """Say that the library failed; the exit code."""
    _debug()
    refuse("unexpected", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", DEBUG, as_json)
    return FAILED


def _debug() -> None:
    if os.environ.get("OMNILORA_DEBUG", "0") != "0":
        traceback.print_exc(file=sys.stderr)


def answer(error: OmniloraError, as_json: bool) -> int:
    """Say what went wrong; the exit code."""
    refuse(error.code, error.message, error.remedy, as_json)
    return FAILED if isinstance(error, (MergeRefused, RunError)) else BAD_INPUT


def refuse(code: str, message: str, remedy: str, as_json: bool) -> int:
    """Say what is wrong; the exit code of bad input."""
    if as_json:
        emit({"error": {"code": code, "message": message, "remedy": remedy}})
    line = f"error [{code}] {message}" + (f" {remedy}" if remedy else "")
    print(" ".join(line.split()), file=sys.stderr)
    return BAD_INPUT
