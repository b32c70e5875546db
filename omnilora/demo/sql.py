"""Generated task: a question in English -> one SQLite query over one table, judged by running it.

The table is ``orders(id, customer, city, product, quantity, price, year)``. Training and test questions share the
columns and the values but no sentence pattern (:mod:`omnilora.demo.wordings`), and no test query is a training target,
in whatever order its conditions stand. A test reference is kept only when its result differs from every near miss
(another question kind, a condition left out, a comparison turned round), so that a wrong query does not pass by luck.
"""

from __future__ import annotations

import json
import math
import random
import re
import sqlite3
from pathlib import Path

from omnilora.demo.wordings import KINDS, TEST, TRAIN, Wordings
from omnilora.errors import BadValue, DataError

ROWS = 3000
# fmt: off
CUSTOMERS = (
    "Elena", "Omar", "Priya", "Jonas", "Mei", "Lucas", "Aisha", "Hugo", "Nadia", "Felix", "Ingrid", "Tariq",
    "Clara", "Diego", "Yuki", "Samuel", "Leila", "Marco", "Greta", "Arjun", "Sofia", "Pavel", "Amara", "Victor",
    "Hana", "Louis", "Zara", "Emil", "Rosa", "Bruno", "Alice", "Kofi", "Vera", "Ivan", "Dora", "Simon", "Nina",
    "Oscar", "Ruth", "Peter",
)
# fmt: on
CITIES = ("Oslo", "Lima", "Cairo", "Paris", "Delhi", "Boston", "Tokyo", "Madrid")
PRODUCTS = ("lamp", "chair", "desk", "sofa", "mirror", "clock", "shelf", "carpet", "vase", "table")
YEARS = (2019, 2020, 2021, 2022, 2023, 2024)
PRICES = (5.0, 200.0)

PROMPT = "Write one SQLite query on orders(id, customer, city, product, quantity, price, year): "
MAX_STEPS = 2_000_000
MAX_ROWS = 1000
MAX_BYTES = 10_000
MAX_QUESTIONS = 5000

Condition = tuple[str, "str | int"]
Row = dict[str, str]

_CLAUSES = {
    "product": "product = '{}'",
    "city": "city = '{}'",
    "year": "year = {}",
    "above": "price > {}",
    "below": "price < {}",
    "customer": "customer = '{}'",
}
_SENSELESS = {("distinct", "customer"), ("by_city", "city")}
_FENCE = re.compile(r"```(?:sql|sqlite)?\s*(.*?)(?:```|$)", re.DOTALL | re.IGNORECASE)
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def database(seed: int = 0) -> sqlite3.Connection:
    """An in-memory SQLite data base with the 3,000 orders of ``seed``: price in [5, 200], quantity 1 to 9."""
    draw = random.Random(f"orders-{seed}")
    rows = [
        (
            number,
            draw.choice(CUSTOMERS),
            draw.choice(CITIES),
            draw.choice(PRODUCTS),
            draw.randint(1, 9),
            round(draw.uniform(*PRICES), 2),
            draw.choice(YEARS),
        )
        for number in range(1, ROWS + 1)
    ]
    connection = sqlite3.connect(":memory:")
    connection.execute(
        "CREATE TABLE orders(id INTEGER PRIMARY KEY, customer TEXT, city TEXT, product TEXT, quantity INTEGER, "
        "price REAL, year INTEGER)"
    )
    connection.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    return connection


def query(kind: str, conditions: tuple[Condition, ...]) -> str:
    """The SQL text, ending with ``;``, of a question kind of ``KINDS`` under zero or more (condition kind, value)."""
    text = KINDS[kind]
    if conditions:
        text += " WHERE " + " AND ".join(_CLAUSES[name].format(value) for name, value in conditions)
    return text + (" GROUP BY city;" if kind == "by_city" else ";")


def examples(seed: int = 0, train_size: int = 600, test_size: int = 200) -> tuple[list[Row], list[Row]]:
    """Training and test rows ``{"prompt": str, "completion": str}``; the prompt is raw, without a chat template.

    Args:
        seed: fixes table and questions; equal seeds give equal rows.
        train_size: number of training questions, each with a query of its own.
        test_size: number of test questions, each with a query of its own.

    Raises:
        BadValue: a size outside 1 to 5,000, or more different queries asked for than the generator finds.
    """
    draw, connection = random.Random(f"questions-{seed}"), database(seed)
    taken: set[tuple[str, frozenset[Condition]]] = set()
    try:
        test = _split(draw, TEST, test_size, taken, connection, strict=True)
        train = _split(draw, TRAIN, train_size, taken, connection, strict=False)
    finally:
        connection.close()
    return train, test


def write_jsonl(folder: str | Path, seed: int = 0, train_size: int = 600, test_size: int = 200) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl`` (one row of :func:`examples` a line) into ``folder``, made if absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, rows in zip(paths, examples(seed, train_size, test_size)):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


def judge(connection: sqlite3.Connection, predicted_text: str, reference_sql: str) -> bool:
    """True if the model's text, run as one SQLite query, gives the reference's rows, in any order.

    The text may stand in a code fence. It may only read: more than one statement, anything but a SELECT, an error, too
    much work, an empty result and a NULL in the result all count as wrong. Numbers agree within a relative 1e-6.
    A progress handler or an authorizer that the caller had set on ``connection`` is removed.

    Raises:
        DataError: the reference itself fails or gives an empty or NULL result.
    """
    expected = _run(connection, reference_sql)
    if expected is None:
        raise DataError(f"The reference {reference_sql!r} gives no result.", "Use a query that returns rows.")
    fenced = _FENCE.search(predicted_text)
    found = _run(connection, (fenced.group(1) if fenced else predicted_text).strip())
    return found is not None and len(found) == len(expected) and all(map(_same, found, expected))


def three_shot(prompt: str, train: list[Row]) -> str:
    """``prompt`` behind the first three training rows of three different question kinds, as one user turn.

    Raises:
        BadValue: ``train`` has fewer than three question kinds.
    """
    shots: dict[str, Row] = {}
    for row in train:
        shots.setdefault(row["completion"].split(" FROM ")[0], row)
    if len(shots) < 3:
        raise BadValue(f"train has {len(shots)} question kinds, three are needed.", "Pass more training rows.")
    parts = [f"{row['prompt']}\n{row['completion']}" for row in list(shots.values())[:3]]
    return "\n\n".join([*parts, prompt])


def _split(
    draw: random.Random,
    wordings: Wordings,
    size: int,
    taken: set[tuple[str, frozenset[Condition]]],
    connection: sqlite3.Connection,
    strict: bool,
) -> list[Row]:
    if not 1 <= size <= MAX_QUESTIONS:
        raise BadValue(f"{size} questions asked for.", f"Ask for 1 to {MAX_QUESTIONS}.")
    rows: list[Row] = []
    kinds = list(KINDS)
    for _ in range(20 * size + 1000):
        if len(rows) == size:
            break
        kind = kinds[len(rows) % len(kinds)]
        names = draw.sample(list(_CLAUSES), draw.choice((1, 2, 2)))
        conditions = tuple((name, _value(draw, name)) for name in names)
        key = kind, frozenset(conditions)
        if key in taken or {"above", "below"} <= set(names) or any((kind, name) in _SENSELESS for name in names):
            continue
        answer = _run(connection, query(kind, conditions))
        if answer is None or (strict and not _telling(connection, kind, conditions, answer)):
            continue
        taken.add(key)
        question = _question(draw, wordings, kind, conditions)
        rows.append({"prompt": PROMPT + question, "completion": query(kind, conditions)})
    else:
        raise BadValue(f"Only {len(rows)} of {size} different questions found.", "Ask for fewer.")
    draw.shuffle(rows)
    return rows


def _value(draw: random.Random, name: str) -> str | int:
    values = {"product": PRODUCTS, "city": CITIES, "year": YEARS, "customer": CUSTOMERS}
    return draw.choice(values[name]) if name in values else draw.randint(20, 180)


def _question(draw: random.Random, wordings: Wordings, kind: str, conditions: tuple[Condition, ...]) -> str:
    phrases = [draw.choice(wordings.conditions[name]).format(value) for name, value in conditions]
    return draw.choice(wordings.heads[kind]).format(draw.choice(wordings.joins).join(phrases))


def _near_misses(kind: str, conditions: tuple[Condition, ...]) -> list[str]:
    """Wrong queries that a test result must tell from the right one."""
    turned = {"above": "below", "below": "above"}
    missing = [conditions[:i] + conditions[i + 1 :] for i in range(len(conditions))]
    flipped = [
        (*conditions[:i], (turned[name], value), *conditions[i + 1 :])
        for i, (name, value) in enumerate(conditions)
        if name in turned
    ]
    return [query(kind, wrong) for wrong in missing + flipped] + [query(k, conditions) for k in KINDS if k != kind]


def _telling(connection: sqlite3.Connection, kind: str, conditions: tuple[Condition, ...], answer: list[tuple]) -> bool:
    if (kind == "count" and answer[0][0] < 2) or (kind == "by_city" and len(answer) < 2):
        return False
    others = (_run(connection, wrong) for wrong in _near_misses(kind, conditions))
    return not any(other and len(other) == len(answer) and all(map(_same, other, answer)) for other in others)


def _run(connection: sqlite3.Connection, text: str) -> list[tuple] | None:
    """The sorted rows of one read-only query, or None if it fails, is empty, holds a NULL or is too much work."""
    steps = 0

    def tick() -> bool:
        nonlocal steps
        steps += 1000
        return steps > MAX_STEPS

    def authorize(action: int, *_: str | None) -> int:
        return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY

    (query_only,) = connection.execute("PRAGMA query_only").fetchone()
    longest = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    connection.execute("PRAGMA query_only = ON")
    connection.set_progress_handler(tick, 1000)
    connection.set_authorizer(authorize)
    try:
        rows = connection.execute(text).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    finally:
        connection.set_authorizer(None)
        connection.set_progress_handler(None, 0)
        connection.execute(f"PRAGMA query_only = {query_only}")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
    if not rows or len(rows) > MAX_ROWS or any(cell is None for row in rows for cell in row):
        return None
    return sorted(rows, key=lambda row: [_order(cell) for cell in row])


def _order(cell: object) -> tuple[int, object]:
    return (0, cell) if isinstance(cell, int | float) else (1, str(cell))


def _same(left: tuple, right: tuple) -> bool:
    return len(left) == len(right) and all(
        math.isclose(a, b, rel_tol=1e-6) if isinstance(a, int | float) and isinstance(b, int | float) else a == b
        for a, b in zip(left, right)
    )
