"""What goes with what (docs/products.md), by running: methods against layers, batches, DoRA, merging, PEFT, compilation.

    python docs/products.py KEY        one row
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from omnilora import contract
from omnilora.core import files, state
from omnilora.core.method import Entry, entries
from omnilora.core.parameterization import Parameterization
from omnilora.errors import OmniloraError
from omnilora.parameterizations.dora import DoRA

NONE = "–"


def forms_of(e: Entry) -> list[Parameterization]:
    """The forms of a method's cases; empty where it has no map of its own."""
    if e.card.key in _NEED_ADAPTERS:
        return []
    made = [e.make(**case).parameterization for case in e.card.cases or ({},)]
    return [how for how in made if how is not None]


def place(how: Parameterization) -> str:
    """The layer that the columns after the first four run on: a linear one, or the first that the form takes."""
    return next((kind for kind in contract.KINDS if contract.fits(how, kind)), "linear")


_NEED_ADAPTERS = {"xlora"}  # made of adapters that exist


def _kind(kind: str) -> Callable[[Parameterization], None]:
    def run(how: Parameterization) -> None:
        contract.adapted(how, kind, torch.float32)  # refuses by a typed error
        contract._dense(how, kind, contract.own_tags(how))
        contract._train(how, kind, torch.float32)

    return run


def _mixed(how: Parameterization) -> None:
    contract._rows(how, place(how), torch.float32)


def _under_dora(how: Parameterization) -> None:
    over, at = DoRA(how), place(how)
    contract._dense(over, at, contract.own_tags(over) | ({"mergeable"} if how.mergeable else set()))
    if _starts_at_zero(how, at):
        contract._start(over, at, torch.float32)
    contract._train(over, at, torch.float32)


def _starts_at_zero(how: Parameterization, kind: str) -> bool:
    try:
        contract._start(how, kind, torch.float32)
    except AssertionError:
        return False
    return True


def _merges(how: Parameterization) -> None:
    contract._merge(how, place(how), torch.float64)


def _in_peft(how: Parameterization) -> None:
    import peft

    from omnilora.io.peft import noted, to_peft

    at = place(how)
    model = contract.adapted(how, at, torch.float32)
    x = model.sample()
    to_peft(noted(model, state.state(model)))
    with tempfile.TemporaryDirectory() as folder:
        path = files.save(model, Path(folder) / "a")
        theirs = peft.PeftModel.from_pretrained(contract.world(at, torch.float32), str(path)).eval()
        contract.close(theirs(x), model(x), 1e-5, "PEFT's output")


def _compiles(how: Parameterization) -> None:
    contract._compile(how, place(how))


COLUMNS: dict[str, Callable[[Parameterization], None]] = {
    "linear": _kind("linear"),
    "convolution": _kind("conv"),
    "embedding": _kind("embedding"),
    "4 bits": _kind("nf4"),
    "mixed batch": _mixed,
    "DoRA over it": _under_dora,
    "merges exactly": _merges,
    "PEFT's files": _in_peft,
    "compiles": _compiles,
}


def cell(key: str, column: str) -> str:
    """"yes" if a case of the method's card passes, else "no: " and why the first did not; "–" without a map of its own."""
    found: list[str] = []
    for how in forms_of(entries()[key]):
        found.append(_run(how, column))
        if found[-1] == "yes":
            break
    return NONE if not found else "yes" if "yes" in found else found[0]


def _run(how: Parameterization, column: str) -> str:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            COLUMNS[column](how)
        except OmniloraError as error:
            return f"no: {error.message.removeprefix('layer: ')}"
        except AssertionError as error:
            return f"no: {error}"
    return "yes"


def rows() -> list[str]:
    return [e.card.key for e in sorted(entries().values(), key=lambda e: (e.card.section, e.card.key))]


def page(made: dict[tuple[str, str], str] | None = None) -> str:
    """The whole table; reasons are numbered below it."""
    made = {(k, c): cell(k, c) for k in rows() for c in COLUMNS} if made is None else made
    reasons = list(dict.fromkeys(v.removeprefix("no: ") for v in made.values() if v.startswith("no: ")))
    lines = [
        "# What goes with what", "",
        "Made by `python docs/tables.py`: every cell was run, on the forms of the card's cases until one passes. "
        "*yes*: the map is right, ten "
        "steps of training lower the loss and leave the base alone (kinds of layers); row i of a batch with several adapters "
        "equals row i alone; merged outputs equal to 1e-10 in fp64 and unmerging is exact bit for bit; PEFT loads the files and "
        "gives the same outputs; one graph, and no recompilation when adapters are switched. *no*: it is refused, for the numbered "
        "reason. –: the method has no map of its own. "
        "Convolutions have groups and strides; widths are odd (5 → 7), which forms of even blocks refuse.", "",
        "| method | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|",
    ]  # fmt: skip
    for k in rows():
        row = [made[k, c] for c in COLUMNS]
        shown = [f"no ({reasons.index(v.removeprefix('no: ')) + 1})" if v.startswith("no: ") else v for v in row]
        lines.append(f"| {k} | " + " | ".join(shown) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{i}. {' '.join(r.split())}" for i, r in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[tuple[str, str], str]:
    """The cells of a page."""
    body, _, below = text.partition("\n## Reasons\n")
    reasons = {n: r for n, _, r in (line.partition(". ") for line in below.splitlines() if line)}
    out = {}
    for line in body.splitlines():
        key, *row = [c.strip() for c in line.strip("|").split("|")]
        if line.startswith("| ") and len(row) == len(COLUMNS) and key not in ("method", "---"):
            for column, v in zip(COLUMNS, row):
                out[key, column] = f"no: {reasons[v[4:-1]]}" if v.startswith("no (") else v
    return out


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for c in COLUMNS:
            print(f"{name:12} {c:16} {cell(name, c)}")
