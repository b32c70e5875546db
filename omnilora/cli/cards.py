"""Cards without importing a method: the literals of ``CARD = Card(...)`` are read from the entry's source.

A module whose card is no literal is imported instead, so that what is shown is always what the library would use.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import omnilora
from omnilora.errors import UnknownName, nearest

EMPTY: dict[str, Any] = {
    "key": "", "title": "", "section": "", "kind": "", "equation": "", "purpose": "", "arxiv": "", "venue": "",
    "tags": [], "defaults": {}, "cases": [{}], "not_with": {}, "differs": [], "agreement": [], "limits": [],
    "command": "",
}  # fmt: skip
_BUILDERS = {"frozenset": frozenset, "set": set, "tuple": tuple, "list": list, "dict": dict}


class _NoLiteral(Exception):
    """The expression needs Python to be run."""


def plain(value: Any) -> Any:
    """JSON's view of a card's field: sets sorted, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)


def read(root: Path | None = None) -> list[dict[str, Any]]:
    """All cards, by section and key, each with every field of :class:`omnilora.Card`."""
    home = root if root is not None else Path(omnilora.__file__).parent / "methods"
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(home.rglob("*.py")):
        if path.name == "__init__.py" and not path.stat().st_size:
            continue
        for card in _cards(path, home):
            found[card["key"]] = card
    return sorted(found.values(), key=lambda c: (c["section"], c["key"]))


def find(key: str) -> tuple[dict[str, Any], Path]:
    """(card, file) of a method. Raises :class:`UnknownName` with the nearest keys."""
    home = Path(omnilora.__file__).parent / "methods"
    paths = sorted(home.rglob("*.py"), key=lambda p: p.stem != key)  # its own file first, where it has one
    known = []
    for path in paths:
        for card in _cards(path, home):
            if card["key"] == key:
                return card, path
            known.append(card["key"])
    raise UnknownName(f"No method {key!r}.", nearest(key, known))


def signature(path: Path, key: str) -> list[dict[str, Any]]:
    """Hyper-parameters of an entry's function: {"name", "type", "default"}; the default as Python writes it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == key:
            args, defaults = [*node.args.args, *node.args.kwonlyargs], [*node.args.defaults, *node.args.kw_defaults]
            missing: list[Any] = [None] * (len(args) - len(defaults))
            return [{"name": a.arg, "type": ast.unparse(a.annotation) if a.annotation else "",
                     "default": None if d is None else ast.unparse(d)}
                    for a, d in zip(args, missing + defaults, strict=True)]  # fmt: skip
    return []


def claims(path: Path) -> list[dict[str, str]]:
    """{"name", "says", "control"} of the claims that the file spells out."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Claim"):
            continue
        given = dict(zip(("name", "says", "measure", "holds", "control"), node.args))
        given |= {k.arg: k.value for k in node.keywords if k.arg}
        try:
            out.append({k: str(_value(given[k], {})) for k in ("name", "says", "control")})
        except (_NoLiteral, KeyError):
            continue
    return out


def _cards(path: Path, home: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if "Card(" not in text:
        return []
    found = _cards_of(*_heads(text)) if _CARD.search(text) else None
    if found is None:
        body = ast.parse(text, str(path)).body
        found = _cards_of(body, {name for node in body for name in _bound(node)})
    return _imported(path, home) if found is None else found


_CARD = re.compile(r"^\w+(?:: \w+)? = Card\(", re.MULTILINE)
_HEAD = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)
_ASSIGNED = re.compile(r"^\w+(?::[^=\n]+)? = ", re.MULTILINE)
_NEXT = re.compile(r"^[^\s)\]}#]", re.MULTILINE)  # where the next statement of a module begins


def _heads(text: str) -> tuple[list[ast.stmt] | None, set[str]]:
    """(the assignments of a module, None where they cannot be cut out; the names that it defines).

    Most of a file are functions, whose bodies need not be parsed.
    """
    body: list[ast.stmt] = []
    for start in _ASSIGNED.finditer(text):
        end = _NEXT.search(text, start.end())
        try:
            body += ast.parse(text[start.start() : end.start() if end else len(text)]).body
        except SyntaxError:
            return None, set()
    return body, {*_HEAD.findall(text), *(name for node in body for name in _bound(node))}


def _cards_of(body: list[ast.stmt] | None, bound: set[str]) -> list[dict[str, Any]] | None:
    """The cards among assignments whose key is ``bound``; None where one is no literal, or the assignments are not known."""
    if body is None:
        return None
    known: dict[str, Any] = {}
    out = []
    for name, value in _assignments(body):
        if isinstance(value, ast.Call) and _called(value.func) == "Card":
            try:
                card = _card(value, known)
            except _NoLiteral:
                return None
            if card["key"] in bound:
                out.append(card)
            continue
        try:
            known[name] = _value(value, known)
        except _NoLiteral:
            continue
    return out


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (a.asname or a.name for a in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        yield from (name for name, _ in _assignments([node]))


def _called(func: ast.expr) -> str:
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def _card(call: ast.Call, known: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: _value(node, known) for name, node in zip(EMPTY, call.args)}
    for word in call.keywords:
        value = _value(word.value, known)
        given |= value if word.arg is None else {word.arg: value}
    return {name: plain(given.get(name, default)) for name, default in EMPTY.items()}


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """A literal, names of literals above it, sums and unions of them, and ``frozenset(…)`` and its like."""
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILDERS:
        words = {k.arg: _value(k.value, known) for k in node.keywords if k.arg}
        return _BUILDERS[node.func.id](*(_value(a, known) for a in node.args), **words)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.BitOr)):
        left, right = _value(node.left, known), _value(node.right, known)
        return left + right if isinstance(node.op, ast.Add) else left | right
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        items = [_value(e, known) for e in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else set(items) if isinstance(node, ast.Set) else items
    if isinstance(node, ast.Dict):
        out: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values):
            out |= _value(value, known) if key is None else {_value(key, known): _value(value, known)}
        return out
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise _NoLiteral from error


def _imported(path: Path, home: Path) -> list[dict[str, Any]]:
    import importlib

    from omnilora.core.method import Card

    dotted = ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(f"omnilora.methods.{dotted}")
    made = [v for v in vars(module).values() if isinstance(v, Card) and v.key in vars(module)]
    return [{name: plain(getattr(card, name)) for name in EMPTY} for card in made]
