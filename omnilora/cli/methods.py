"""list, show, verify: the methods, their cards and their claims."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from omnilora.cli import cards
from omnilora.cli.common import DONE, FAILED, AsJson, emit, quiet_stdout, table, warn
from omnilora.errors import UnknownName, nearest

IN_LIST = ("key", "title", "section", "kind", "tags", "purpose", "arxiv", "venue")
Section = Annotated[str | None, typer.Option(help="Only methods of this section.")]


def list_methods(
    section: Section = None,
    kind: Annotated[str | None, typer.Option(help="Only methods of this kind.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only methods with this tag. Repeatable.")] = None,
    json: AsJson = False,
) -> None:
    """List the methods.

    \b
    Examples:
      omnilora list
      omnilora list --section foundations --tag trains_lm
      omnilora list --json

    --json: an array of {key, title, section, kind, tags, purpose, arxiv, venue}.
    """
    every = found = cards.read()
    for word, value in (("section", section), ("kind", kind)):
        known = {c[word] for c in found}
        if value is not None and value not in known:
            raise UnknownName(f"No {word} {value!r}.", f"There are: {', '.join(sorted(known))}.")
        found = [c for c in found if value in (None, c[word])]
    known = {t for c in every for t in c["tags"]}
    for name in tag or ():
        if name not in known:
            raise UnknownName(f"No tag {name!r}.", nearest(name, known))
        found = [c for c in found if name in c["tags"]]
    if json:
        emit([{name: c[name] for name in IN_LIST} for c in found])
        return
    columns = ("key", "section", "kind", "purpose")
    print(table(columns, [[c[name] for name in columns] for c in found]))
    print(f"\n{len(found)} methods. Card of one: omnilora show KEY")


def show(key: Annotated[str, typer.Argument(metavar="KEY", help="Of a method; see omnilora list.")],
         json: AsJson = False) -> None:  # fmt: skip
    """Show the card of a method: equation, hyper-parameters, claims, what differs from the official code.

    \b
    Examples:
      omnilora show dora
      omnilora show adalora --json

    --json: an object with the card's fields, "hyper" (name, type, default) and "claims" (name, says, control).
    """
    card, path = cards.find(key)
    made = {**card, "hyper": cards.signature(path, key), "claims": cards.claims(path)}
    if json:
        emit(made)
        return
    print(f"{card['key']} — {card['title']}")
    source = ", ".join(filter(None, (card["venue"], card["arxiv"] and f"arXiv:{card['arxiv']}")))
    print("".join(f"{name:<12}{value}\n" for name, value in (
        ("source", source), ("section", card["section"]), ("kind", card["kind"]), ("tags", ", ".join(card["tags"])),
        ("equation", card["equation"]), ("purpose", card["purpose"]), ("command", card["command"])) if value), end="")  # fmt: skip
    _part("hyper-parameters", [f"{h['name']}: {h['type']}" + (f" = {h['default']}" if h["default"] else "")
                               for h in made["hyper"]])  # fmt: skip
    _part("the paper's defaults", [f"{k} = {v}" for k, v in card["defaults"].items()])
    _part("claims", [f"{c['name']}: {c['says']} (control: {c['control']})" for c in made["claims"]])
    _part("differs", card["differs"])
    _part("agreement", card["agreement"])
    _part("not with", [f"{k}: {v}" for k, v in card["not_with"].items()])
    _part("limits", card["limits"])


def _part(title: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{title}")
        print("\n".join(f"  {line}" for line in lines))


def verify(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Of methods. Default: all.")] = None,
    section: Section = None,
    controls: Annotated[bool, typer.Option("--controls", help="Also run the controls, which must fail.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="Also run the slow claims.")] = False,
    json: AsJson = False,
) -> None:
    """Run the claims of methods. Exit code 1 if a claim fails or a control does not.

    \b
    Examples:
      omnilora verify dora adalora
      omnilora verify --controls
      omnilora verify --section foundations --slow --json

    --json: an array of {key, check, passed, figure, seconds, says, message, threads}. A control is named
    "control: …" and has passed when it fails the claim.
    """
    from omnilora import verify as checks

    with quiet_stdout(json):
        results = checks.verify(keys, section, controls, slow, None if json else _line)
    bad = [r for r in results if not r.passed]
    if json:
        emit([r.as_dict() for r in results])
    else:
        spent = sum(r.seconds for r in results)
        print(f"\n{len(results) - len(bad)} of {len(results)} passed in {spent:.1f} s.")
        left = 0 if slow else checks.slow_claims(keys, section)
        if left:
            warn(f"{left} slow claims did not run; --slow runs them.")
    raise typer.Exit(FAILED if bad else DONE)


def _line(r: Any) -> None:
    figure = "" if r.figure is None else f"{r.figure:.4g}"
    tail = f"  {r.message}" if r.message else ""
    print(f"{'pass' if r.passed else 'FAIL'}  {r.key:<16} {r.check:<48} {figure:>12} {r.seconds:7.2f} s{tail}")
    sys.stdout.flush()
