"""Real text classification that needs no download: which chapter of the Python library does a docstring belong to?

Texts are the first paragraphs of the docstrings in the running interpreter's own standard library, read from its source
files; labels are six chapters of the library reference. Training and test use different modules (``FAMILIES``), so a
module's name or habits cannot give a test label away, and a text that occurs twice is kept once, or not at all when
its labels differ.

Figures (Python 3.11.7, 600 training and 240 test texts, seeds 0, 1, 2): commonest label 0.167; logistic regression on
the frozen MiniLM embedding 0.542, 0.575, 0.558, mean 0.558. :func:`baselines` computes both.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from omnilora.errors import BadValue, DataError, need

FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "network": (
        ("http", "urllib", "imaplib", "ftplib", "socketserver", "wsgiref"),
        ("smtplib", "xmlrpc", "ssl", "socket", "poplib", "ipaddress"),
    ),
    "concurrency": (
        ("asyncio", "threading", "queue", "selectors"),
        ("multiprocessing", "concurrent", "subprocess", "sched"),
    ),
    "numbers and dates": (
        ("_pydecimal", "statistics", "datetime", "_pydatetime", "numbers", "fractions"),
        ("calendar", "random", "zoneinfo", "_strptime", "colorsys"),
    ),
    "files": (
        ("tarfile", "pathlib", "tempfile", "gzip", "bz2", "posixpath", "genericpath", "os"),
        ("zipfile", "shutil", "lzma", "fileinput", "filecmp", "fnmatch", "glob", "stat", "shelve"),
    ),
    "text formats": (
        ("xml", "email", "configparser", "json", "csv", "quopri"),
        ("difflib", "html", "textwrap", "string", "plistlib", "tomllib", "pprint", "gettext", "_markupbase", "netrc"),
    ),
    "program analysis": (
        ("unittest", "inspect", "ast", "dis", "traceback", "importlib", "pdb"),
        ("doctest", "bdb", "pydoc", "symtable", "trace", "pyclbr", "tokenize", "modulefinder", "pstats", "timeit"),
    ),
}
SHORTEST, LONGEST, PER_MODULE = 6, 60, 60

Row = dict[str, str]


def examples(seed: int = 0, train_per_class: int = 100, test_per_class: int = 40) -> tuple[list[Row], list[Row]]:
    """Training and test rows ``{"text": str, "label": str}``, at most so many a class, in an order that ``seed`` fixes.

    Rows depend on the interpreter's version too, for its standard library is the source.

    Raises:
        BadValue: a size below 1.
        DataError: the standard library's source files are not there.
    """
    if min(train_per_class, test_per_class) < 1:
        raise BadValue(f"Sizes {train_per_class} and {test_per_class} a class.", "Ask for at least one.")
    draw = random.Random(f"topics-{seed}")
    found: dict[str, set[tuple[str, int]]] = {}
    for label, splits in FAMILIES.items():
        for split, modules in enumerate(splits):
            for module in modules:
                texts = sorted(docstrings(module))
                for text in draw.sample(texts, min(PER_MODULE, len(texts))):
                    found.setdefault(text, set()).add((label, split))
    pools: dict[tuple[str, int], list[Row]] = {}
    for text, places in found.items():
        if len(places) == 1:
            (place,) = places
            pools.setdefault(place, []).append({"text": text, "label": place[0]})
    missing = [label for label in FAMILIES for split in (0, 1) if (label, split) not in pools]
    if missing:
        raise DataError(f"No docstrings for {missing}.", "Use a Python whose standard library has its source files.")
    rows: tuple[list[Row], list[Row]] = ([], [])
    for split, size in enumerate((train_per_class, test_per_class)):
        for label in FAMILIES:
            pool = pools[label, split]
            rows[split].extend(draw.sample(pool, min(size, len(pool))))
        draw.shuffle(rows[split])
    return rows


def docstrings(module: str) -> set[str]:
    """First paragraphs, on one line, of the docstrings in a standard-library module or package, tests left out.

    Only those of 6 to 60 words; empty if this Python has no such module.
    """
    return {text for _, text in documented(module) if SHORTEST <= len(text.split()) <= LONGEST}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(module: str) -> Iterator[tuple[Documented, str]]:
    """What can have a docstring in a standard-library module or package, tests left out, with the first paragraph on
    one line ("" where there is none); in the order of its files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / f"{module}.py"] if (root / f"{module}.py").is_file() else sorted((root / module).rglob("*.py"))
    for file in files:
        if {"test", "tests"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, Documented):
                yield node, " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def baselines(train: list[Row], test: list[Row]) -> dict[str, float]:
    """Test accuracies in [0, 1] to beat: the commonest training label, and logistic regression on frozen embeddings.

    Returns:
        ``{"majority": …, "frozen": …}``.

    Raises:
        NeedsExtra: a package of the ``demo`` extra is missing.
    """
    from omnilora.demo.sources import embed, load_minilm

    linear_model = need("sklearn.linear_model", "demo")
    model, tokenizer = load_minilm()
    inputs = [embed(model, tokenizer, [row["text"] for row in rows]).numpy() for rows in (train, test)]
    targets = [[row["label"] for row in rows] for rows in (train, test)]
    (common, _), *_ = Counter(targets[0]).most_common(1)
    probe = linear_model.LogisticRegression(max_iter=1000, C=10.0).fit(inputs[0], targets[0])
    return {
        "majority": sum(label == common for label in targets[1]) / len(test),
        "frozen": float(probe.score(inputs[1], targets[1])),
    }
