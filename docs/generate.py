"""Writes what can be derived from the code: docs/methods/*.md from the cards, docs/errors.md from the error classes.

    python docs/generate.py            write the pages
    python docs/generate.py --check    write nothing; exit 1 and name the pages that are out of date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from omnilora import errors  # noqa: E402
from omnilora.core.method import TAGS, Card, Entry, Method, entries  # noqa: E402
from omnilora.core.parameterization import Parameterization  # noqa: E402

NOTE = "<!-- Written by docs/generate.py. Change the code, not this page. -->\n\n"
TAG_WORDS = {
    "zero_at_init": "the adapted model equals the base at the start",
    "mergeable": "one weight equals the adapted map",
    "low_rank": "ΔW has factors (B, A)",
    "additive": "W + ΔW",
    "scheduled": "has rules that tick with the optimizer",
    "trains_lm": "trains a language model from the command line",
    "rows": "takes part in mixed batches",
    "routed": "the map depends on the token",
    "shared": "tensors are shared between sites",
    "quantized": "chooses how the base is stored",
    "combines": "works on saved adapters",
    "applies": "`omnilora apply` does its work: no training run of an adapter",
}


def pages() -> dict[str, str]:
    """Path below docs → text, of every generated page."""
    found = sorted(entries().values(), key=lambda e: (e.card.section, e.card.key))
    out = {f"methods/{e.card.key}.md": NOTE + method_page(e) for e in found}
    return out | {"methods/index.md": NOTE + index_page(found), "errors.md": NOTE + errors_page()}


def markdown(text: str | None) -> str:
    """A docstring as Markdown: one paragraph a line, single backticks, roles of Sphinx taken off."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":(?:class|func|mod|meth):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return "\n\n".join(" ".join(block.split()) for block in text.split("\n\n") if block.strip())


def row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join([row(header), row("---" for _ in header), *(row(r) for r in rows)])


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def method_page(e: Entry) -> str:
    card = e.card
    source = [card.venue, f"[arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""]
    parts = [
        f"# {card.key}",
        f"**{card.title}**  \n" + ", ".join(filter(None, source)),
        card.purpose,
        f"$$\n{card.equation}\n$$",
        f"Section: {card.section}. Kind: {card.kind}.",
        "## Use",
        "```text\n" + "\n".join(filter(None, (
            f'ol.method("{card.key}")', card.command or trains(card), f"omnilora show {card.key}",
            f"omnilora verify {card.key} --controls"))) + "\n```",
        "## Hyper-parameters",
        markdown(e.make.__doc__),
        table(("name", "type", "default"), hyper(e)),
        *section("The paper's defaults", [f"`{k}` = {v!r}" for k, v in card.defaults.items()]),
        *section("Pieces", pieces(e)),
        *section("Tags", [f"`{tag}`: {TAG_WORDS[tag]}" for tag in sorted(card.tags)]),
        "## Claims",
        "Each claim is measured with the method intact, where it must hold, and on a control, where it must fail.",
        table(("claim", "what it says", "control"), [(c.name, c.says, c.control) for c in e.claims()]),
        *section("Where the official code and the paper differ, and what is followed here", card.differs),
        *section("Agreement with other implementations", card.agreement),
        *section("Limits", card.limits),
        *section("Not with", [f"{k}: {v}" for k, v in card.not_with.items()]),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def trains(card: Card) -> str:
    """The command line that trains with a method."""
    return f"omnilora train --model package:smollm2 --method {card.key} --data train.jsonl" if "trains_lm" in card.tags else ""


def section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", bullets(lines)] if lines else []


def hyper(e: Entry) -> Iterator[tuple[str, str, str]]:
    for p in inspect.signature(e.make).parameters.values():
        default = "required" if p.default is p.empty else f"`{p.default!r}`"
        kind = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        yield f"`{p.name}`", f"`{kind}`", default


def pieces(e: Entry) -> list[str]:
    """What the entry is made of, with each piece's own description."""
    made = e.make()
    lines = [described("parameterization", how) for how in forms(made.parameterization)]
    lines += [described("rule", rule) for rule in made.rules]
    lines += [described("source of context", how) for how in forms(made.source)]
    if made.store is not None:
        lines.append("store: the method decides how the base is held before sites are made")
    if made.targets is not None:
        lines.append(f"targets: `{made.targets.include!r}`, unless others are given")
    return lines + [f"{field}: {word}" for field, word in HOOKS.items() if getattr(made, field) is not None]


HOOKS = {
    "fill": "fresh tensors are filled from data that the method was given",
    "arrange": "each site gets its own hyper-parameters from its place among all sites",
    "apply": "does its work by `omnilora apply`",
    "prepare": "the method looks at data and decides sites and ranks before any tensor is made",
}
assert set(HOOKS) <= {f.name for f in dataclasses.fields(Method)} and set(TAG_WORDS) == TAGS


def forms(how: Parameterization | None) -> Iterator[Parameterization]:
    """A parameterization and what it wraps."""
    if how is not None:
        yield how
        for field in dataclasses.fields(how):
            inner = getattr(how, field.name)
            if isinstance(inner, Parameterization):
                yield from forms(inner)


def described(role: str, piece: Any) -> str:
    cls = type(piece)
    own = cls.__doc__ if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else ""
    text, _, args = inspect.cleandoc(own).partition("\nArgs:\n")
    head = f"{role} `{cls.__name__}` (`{cls.__module__}`)"
    head += f": {markdown(text).replace(chr(10) * 2, ' ')}" if text else ""
    return "\n".join([head, *(f"  - {line}" for line in arguments(args))])


def arguments(text: str) -> Iterator[str]:
    """``name: words`` of an Args section, continuation lines joined; what follows the section is left out."""
    joined = re.sub(r"\n {5,}", " ", text.partition("\n\n")[0])
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, words = line.partition(": ")
        yield f"{', '.join(f'`{n.strip()}`' for n in name.split(','))}: {markdown(words)}"


def index_page(found: Sequence[Entry]) -> str:
    blocks = [
        "# Methods",
        f"{len(found)} entries. `omnilora list` prints this table; `omnilora show KEY` prints a card.",
    ]
    for name in sorted({e.card.section for e in found}):
        rows = [(f"[{e.card.key}]({e.card.key}.md)", e.card.kind, e.card.purpose, len(e.claims()))
                for e in found if e.card.section == name]  # fmt: skip
        blocks += [f"## {name}", table(("key", "kind", "purpose", "claims"), rows)]
    return "\n\n".join(blocks) + "\n"


def errors_page() -> str:
    kinds = [c for c in vars(errors).values()
             if isinstance(c, type) and issubclass(c, errors.OmniloraError) and c is not errors.OmniloraError]  # fmt: skip
    rows = [(f"`{c.code}`", f"`{c.__name__}`", also(c), markdown(c.__doc__)) for c in kinds]
    return "\n\n".join((
        "# Errors",
        "Everything that omnilora raises on purpose is an `omnilora.errors.OmniloraError`. `error.code` is stable and never "
        "renamed; `error.message` says what is wrong, with the name and the value; `error.remedy` says what to do. "
        "`str(error)` is `[code] message remedy`.",
        table(("code", "class", "is also a", "raised when"), rows),
        "On the command line such an error is one line on stderr and exit code 2. With `--json`, stdout holds "
        '`{"error": {"code", "message", "remedy"}}`. Wrong options of a command have the code `usage`. '
        "Exit codes: 0 done, 1 a check or run failed, 2 bad input, 130 interrupted. What is not raised on purpose is one line "
        "too, with the code `os` (the operating system refuses: exit code 2) or `unexpected` (exit code 1); "
        "OMNILORA_DEBUG=1 shows the traceback.",
    )) + "\n"  # fmt: skip


def also(c: type) -> str:
    return ", ".join(f"`{b.__name__}`" for b in c.__bases__ if not issubclass(b, errors.OmniloraError))


def stale() -> list[str]:
    """Generated pages that are missing, differ, or belong to no method any more."""
    made = pages()
    wrong = [name for name, text in made.items()
             if not (HERE / name).is_file() or (HERE / name).read_text(encoding="utf-8") != text]  # fmt: skip
    return wrong + [f"methods/{p.name}" for p in (HERE / "methods").glob("*.md") if f"methods/{p.name}" not in made]


def main() -> int:
    if "--check" in sys.argv[1:]:
        wrong = stale()
        print("\n".join(wrong) or "All pages are up to date.")
        return 1 if wrong else 0
    made = pages()
    (HERE / "methods").mkdir(exist_ok=True)
    for name in stale():
        if name in made:
            (HERE / name).write_text(made[name], encoding="utf-8")
        else:
            (HERE / name).unlink()
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
