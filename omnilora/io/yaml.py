"""YAML that people write, read in bounded time: no nesting bombs, no aliases, no key given twice."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from omnilora.errors import BadValue, need

LARGEST = 1 << 20  # characters of one file
DEEPEST = 32  # levels of lists and mappings


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value a YAML file holds. Raises :class:`~omnilora.errors.BadValue` on everything else."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise BadValue(f"{path} cannot be read: {error.strerror}.", "Give an existing YAML file.") from error
    except UnicodeDecodeError as error:
        raise BadValue(f"{path} is no YAML: it is not UTF-8 at byte {error.start}.", "Give a text file.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value ``text`` holds; ``name`` says in errors what was read.

    The events are counted before anything is built, so that a refusal costs little whatever the text.
    """
    yaml = need("yaml", "train")
    if len(text) > LARGEST:
        raise BadValue(f"{name} has more than {LARGEST} characters.", "A configuration is a short text.")
    try:
        depth, loader = 0, _loader()
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise BadValue(f"{name} has the alias *{event.anchor[:40]}.", "Write the value out.")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise BadValue(f"{name} nests deeper than {DEEPEST} levels.", "Write flat lists and mappings.")
        return yaml.load(text, Loader=loader)
    except BadValue:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        why = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())[:300]
        raise BadValue(f"{name} is no YAML: {why}.", _remedy(text, error)) from error


def _remedy(text: str, error: Exception) -> str:
    """What to do about a text that is no YAML."""
    if "given twice" in str(error):
        return "Keep one of the two."
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "YAML takes no tabs at the beginning of a line: indent by spaces."
    return "Quote texts with special characters."


@cache
def _loader() -> Any:
    yaml = need("yaml", "train")
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in seen:
                if seen.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key[:80]!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
