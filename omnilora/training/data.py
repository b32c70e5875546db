"""Rows from JSONL, CSV, Parquet, a data set's folder or name, or a list: read whole, checked, each with its place."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnilora.errors import BadValue, DataError, UnknownName, nearest, need
from omnilora.io.reach import asked
from omnilora.training.config import TrainConfig

SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "completion": ("completion", "response", "answer", "output"),
    "text": ("text", "sentence", "content", "document"),
    "label": ("label", "labels", "class", "category", "target"),
    "anchor": ("anchor", "query", "question", "sentence1", "text1"),
    "positive": ("positive", "answer", "sentence2", "text2"),
    "score": ("score", "similarity", "label"),
}
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Row:
    """One record and where it came from (``train.jsonl, line 12``)."""

    data: Mapping[str, Any]
    where: str


def read_rows(source: Any, split: str = "train") -> list[Row]:
    """All rows of ``source``.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a folder of such files or of ``datasets``, a Hub name (with
            ``:split`` or ``:config:split``), a list of dicts, or anything iterable that gives dicts.
        split: taken where the source has several and names none.

    Raises:
        DataError: a line is malformed (file and line are named), or there is no row.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _from_path(str(source), split)
        name = str(source)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        name = "the data"
        rows = [r if isinstance(r, Row) else _row(r, f"row {i}") for i, r in enumerate(source, 1)]
    else:
        raise DataError(f"data is a {type(source).__name__}.", "Give a file, a folder, a Hub name or a list of dicts.")
    if not rows:
        raise DataError(f"{name} holds no rows.", "Give at least one.")
    return rows


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: a {type(data).__name__}, not an object.", "Each row is an object with named fields.")
    return Row(data, where)


def _from_path(source: str, split: str) -> list[Row]:
    path = Path(source)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"{source} does not exist.", "Give an existing file.")
        return readers[path.suffix](path)
    if path.is_file():
        raise DataError(f"{source} has an unknown ending.", f"Give one of {', '.join(readers)}.")
    if path.is_dir():
        return _folder(path, split, readers)
    return _hub(source, split)


def _folder(path: Path, split: str, readers: Mapping[str, Any]) -> list[Row]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        found = need("datasets", "train").load_from_disk(str(path))
        if isinstance(found, Mapping):
            if split not in found:
                raise UnknownName(f"{path} has no split {split!r}.", nearest(split, found))
            found = found[split]
        return [Row(r, f"{path.name}, row {i}") for i, r in enumerate(found, 1)]
    files = sorted(f for f in path.iterdir() if f.suffix in readers and f.is_file())
    chosen = [f for f in files if f.stem.startswith(split)] or files
    if not chosen:
        raise DataError(f"{path} holds no data file.", f"Expected one of {', '.join(readers)}.")
    return [row for f in chosen for row in readers[f.suffix](f)]


def _hub(source: str, split: str) -> list[Row]:
    datasets = need("datasets", "train")
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise DataError(f"{source!r} is no data set.", "Write name, name:split or name:config:split.")
    reached = True
    try:
        with asked(name, "dataset") as reached:
            found = datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else split)
    except Exception as error:
        why = ("loading it as a data set failed: " + " ".join(str(error).split())[:200] if reached
               else "the Hugging Face Hub cannot be reached")  # fmt: skip
        raise DataError(f"{source!r} is neither a file nor a folder, and {why}.", "Check the path or the name.") from error
    return [Row(r, f"{source}, row {i}") for i, r in enumerate(found, 1)]


def _jsonl(path: Path) -> list[Row]:
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: no JSON ({error}).", "Each line is one JSON object.") from error
            rows.append(_row(data, where))
    return rows


def _json(path: Path) -> list[Row]:
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name}{line}: no JSON ({error}).", "Give a list of objects.") from error
    if not isinstance(data, list):
        raise DataError(f"{path.name}: a {type(data).__name__}, not a list.", "Give a list of objects, or .jsonl.")
    return [_row(r, f"{path.name}, row {i}") for i, r in enumerate(data, 1)]


def _csv(path: Path) -> list[Row]:
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(reader, None)
            if not header or len(set(header)) != len(header):
                raise DataError(f"{path.name}, line 1: the header is {header}.", "Name each column once.")
            start = reader.line_num + 1
            for cells in reader:
                where, start = f"{path.name}, line {start}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} fields, the header has {len(header)}.", "Quote commas.")
                rows.append(Row(dict(zip(header, cells, strict=True)), where))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}, line {reader.line_num}: {error}.", "Give UTF-8 CSV.") from error
    return rows


def _parquet(path: Path) -> list[Row]:
    parquet = need("pyarrow.parquet", "train")
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise DataError(f"{path.name} is no Parquet file: {' '.join(str(error).split())[:200]}.") from error
    return [Row(r, f"{path.name}, row {i}") for i, r in enumerate(table.to_pylist(), 1)]


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): a random fraction of at least one row, the same for the same seed."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(f"{len(rows)} rows cannot be split at {fraction}.", "Give eval_data of its own.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


# -- shapes ------------------------------------------------------------------------------------------------------------


def column(row: Row, role: str, given: str | None = None) -> str | None:
    """The column that plays ``role``: the given one, which must exist, else the first known synonym present."""
    if given is not None:
        if given not in row.data:
            raise DataError(f"{row.where}: no field {given!r}.", nearest(given, map(str, row.data)))
        return given
    return next((n for n in SYNONYMS[role] if row.data.get(n) is not None), None)


def text_of(row: Row, name: str) -> str:
    """A field that must be text. Raises :class:`DataError` with the row's place."""
    value = row.data.get(name)
    if not isinstance(value, str):
        kind = f"a {type(value).__name__}" if value is not None else "null" if name in row.data else "missing"
        raise DataError(f"{row.where}: {name!r} is {kind}.", "Give text.")
    return value


def conversation(row: Row, config: TrainConfig) -> list[dict[str, Any]] | tuple[str, str] | str:
    """A language model's row in one of three shapes: chat messages, (prompt, completion), or plain text."""
    chat = column(row, "messages", config.messages)
    if chat is not None:
        return messages_of(row.data[chat], row.where)
    explicit = config.text is not None and config.prompt is None
    prompt = None if explicit else column(row, "prompt", config.prompt)
    completion = None if explicit else column(row, "completion", config.completion)
    if prompt is not None and completion is not None and prompt != completion:
        asked, answer = row.data[prompt], row.data[completion]
        if isinstance(asked, list) or isinstance(answer, list):
            head = messages_of(asked, row.where) if isinstance(asked, list) else [_turn("user", text_of(row, prompt))]
            tail = messages_of(answer, row.where) if isinstance(answer, list) else [
                _turn("assistant", text_of(row, completion))]  # fmt: skip
            return [*head, *tail]
        question = text_of(row, prompt)
        if prompt == "instruction" and config.prompt is None and row.data.get("input"):
            question = f"{question}\n\n{text_of(row, 'input')}"
        return question, text_of(row, completion)
    text = column(row, "text", config.text)
    if text is not None:
        return text_of(row, text)
    empty = [n for role in ("messages", "prompt", "completion", "text") for n in SYNONYMS[role] if n in row.data and row.data[n] is None]
    if empty:
        raise DataError(f"{row.where}: {empty[0]!r} is null.", "Give text, or drop the row.")
    raise DataError(f"{row.where}: fields {sorted(map(str, row.data))} are no known shape.",
                    "Give messages, prompt and completion, or text; or name the columns.")  # fmt: skip


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Checked chat messages: a non-empty list of {"role", "content"}."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: the messages are text but no JSON ({error}).") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages are no list of turns.", 'Give [{"role": …, "content": …}, …].')
    for i, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(f"{where}: message {i} has no text in 'content'.", 'Give {"role": …, "content": …}.')
        if turn.get("role") not in ROLES:
            raise DataError(f"{where}: message {i} has the role {turn.get('role')!r}.", f"Roles: {', '.join(ROLES)}.")
    return [dict(t) for t in value]


def label_set(rows: Sequence[Row], config: TrainConfig) -> list[Any]:
    """The labels in order: the configured ones, else those of the rows, numbers by size, text by alphabet."""
    if config.labels is not None:
        return list(config.labels)
    seen = {label_of(r, config) for r in rows}
    if len(seen) < 2:
        raise DataError(f"The data holds one label, {seen.pop()!r}.", "Classification needs at least two.")
    return sorted(seen, key=lambda v: (isinstance(v, str), v))


def label_of(row: Row, config: TrainConfig) -> Any:
    name = column(row, "label", config.label)
    value = None if name is None else row.data[name]
    if not isinstance(value, (str, int)):
        raise DataError(f"{row.where}: the label is {value!r}.", "Give text or a whole number.")
    return value


def label_index(row: Row, config: TrainConfig, labels: Sequence[Any]) -> int:
    """The label's number. Raises :class:`BadValue` for a label outside the set."""
    value = label_of(row, config)
    known = [str(x) for x in labels]
    if str(value) not in known:
        raise BadValue(f"{row.where}: label {value!r} is outside the set {labels!r}.", nearest(str(value), known))
    return known.index(str(value))
