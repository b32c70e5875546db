"""From rows to token ids: chat templates, what is learned and what is masked, labels, pairs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnilora.errors import BadValue, DataError
from omnilora.training.config import TrainConfig
from omnilora.training.data import Row, column, conversation, label_index, text_of

MASKED = -100


@dataclass
class Example:
    """Token ids with, for language models, labels of equal length (−100 = not learned)."""

    ids: list[int]
    labels: list[int] | None = None
    positions: list[int] | None = None  # packed rows: restarts at 0 with every piece
    target: int | float | None = None  # class number, or score of a pair
    other: list[int] | None = None  # the second text of a pair

    def __len__(self) -> int:
        return len(self.ids) if self.other is None else max(len(self.ids), len(self.other))


@dataclass
class Encoded:
    """Examples, and how many rows were cut at ``max_length``."""

    examples: list[Example]
    truncated: int = 0


def set_template(tokenizer: Any, template: str) -> str:
    """Prepare the tokenizer's chat template; returns "chat" or "plain".

    Raises:
        BadValue: chat is asked for and the tokenizer has no template.
    """
    if template == "auto":
        return "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    if template == "plain":
        return "plain"
    if template != "chat":
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        return "chat"
    if not getattr(tokenizer, "chat_template", None):
        raise BadValue("template = 'chat', but the tokenizer has no chat template.", "Give a Jinja file, or 'plain'.")
    return "chat"


def room(model_config: Any, config: TrainConfig) -> int:
    """Tokens a row may have. Raises :class:`BadValue` where ``max_length`` exceeds what the model can take."""
    limit = getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None)
    if config.max_length is None:
        return min(512, limit) if limit else 512
    if limit and config.max_length > limit:
        raise BadValue(f"max_length = {config.max_length}, but the model takes {limit} tokens.", "Lower it.")
    return config.max_length


def encode(rows: Sequence[Row], tokenizer: Any, config: TrainConfig, length: int,
           labels: Sequence[Any] | None = None) -> Encoded:  # fmt: skip
    """Every row as an example of at most ``length`` tokens; rows that were cut are counted in one warning.

    Raises:
        DataError: a row is of no known shape, its prompt fills ``length``, or nothing in it is learned.
        BadValue: a label is outside ``labels``.
    """
    if config.task == "causal-lm":
        template = set_template(tokenizer, config.template)
        made = [_language(r, tokenizer, config, template, length) for r in rows]
    elif config.task == "classification":
        made = [_classified(r, tokenizer, config, length, labels or ()) for r in rows]
    else:
        made = [_pair(r, tokenizer, config, length) for r in rows]
    cut = sum(c for _, c in made)
    if cut:
        warnings.warn(f"{cut} of {len(rows)} rows were cut at {length} tokens; raise max_length to learn all of them.",
                      stacklevel=2)  # fmt: skip
    return Encoded([e for e, _ in made], cut)


def check_rows(rows: Sequence[Row], config: TrainConfig, labels: Sequence[Any] | None = None) -> None:
    """The shapes of all rows, as far as they can be judged without a tokenizer. Raises what :func:`encode` would."""
    for row in rows:
        if config.task == "causal-lm":
            conversation(row, config)
        elif config.task == "classification":
            _text(row, config)
            label_index(row, config, labels or ())
        else:
            _two_texts(row, config)


def _text(row: Row, config: TrainConfig) -> str:
    name = column(row, "text", config.text)
    if name is None:
        raise DataError(f"{row.where}: no text among {sorted(map(str, row.data))}.", "Name its column: text = ….")
    return text_of(row, name)


def _two_texts(row: Row, config: TrainConfig) -> tuple[list[str], float | None]:
    """The two texts of a pair, and its score."""
    names = [column(row, "anchor", config.prompt), column(row, "positive", config.completion)]
    if None in names or names[0] == names[1]:
        raise DataError(f"{row.where}: no pair among {sorted(map(str, row.data))}.", 'Give "anchor" and "positive".')
    texts = [text_of(row, n) for n in names if n]
    score = column(row, "score", config.label)
    value = None if score is None else row.data[score]
    try:
        return texts, None if value is None else float(value)
    except (TypeError, ValueError):
        raise DataError(f"{row.where}: the score is {value!r}.", "Give a number.") from None


def ids_of(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before plain text, if any."""
    first = ids_of(tokenizer, "", special=True)[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def render(tokenizer: Any, messages: Sequence[Any], answer: bool = False, where: str = "messages") -> str:
    """Messages through the chat template; ``answer``: ready for the assistant's turn."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses the messages ({' '.join(str(error).split())[:200]}).",
                        "Check the order of roles.") from error  # fmt: skip


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Any], template: str) -> list[int]:
    """What a model is given before it answers: the same ids that precede the completion in training."""
    if template == "plain" and isinstance(prompt, str):
        return opening(tokenizer) + ids_of(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return ids_of(tokenizer, render(tokenizer, turns, answer=True))


def _pieces(row: Row, tokenizer: Any, config: TrainConfig, template: str) -> list[tuple[str, bool]]:
    """Consecutive pieces of the text with whether each is learned."""
    shape = conversation(row, config)
    end = tokenizer.eos_token or ""
    if isinstance(shape, str):
        return [(shape + end, True)]
    if isinstance(shape, tuple):
        if template == "plain":
            return [(shape[0], False), (shape[1] + end, True)]
        shape = [{"role": "user", "content": shape[0]}, {"role": "assistant", "content": shape[1]}]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{row.where}: chat messages, but the tokenizer has no chat template.", "Give template = FILE.")
    answers = [i for i, turn in enumerate(shape) if turn["role"] == "assistant"]
    if not answers:
        raise DataError(f"{row.where}: no message of the assistant.", "There is nothing to learn.")
    shape = shape[: answers[-1] + 1]
    whole = render(tokenizer, shape, where=row.where)
    if whole.rstrip().endswith(shape[-1]["content"].rstrip()) and end and not whole.rstrip().endswith(end):
        whole += end
    spans = [_span(tokenizer, shape, i, whole, row.where) for i in answers]
    if any(s is None for s in spans[:-1]):
        spans = spans[-1:]
    pieces, at = [], 0
    for begin, stop in (s for s in spans if s is not None):
        pieces += [(whole[at:begin], False), (whole[begin:stop], True)]
        at = stop
    return [*pieces, (whole[at:], False)] if whole[at:] else pieces


def _span(tokenizer: Any, turns: list[Any], i: int, whole: str, where: str) -> tuple[int, int] | None:
    """Characters of the assistant's turn ``i``: from the end of its generation prompt to the end of its turn."""
    before = render(tokenizer, turns[:i], answer=True, where=where) if i else ""
    last = i == len(turns) - 1
    if last:
        begin = len(before) if whole.startswith(before) else _common(before, whole)
        return begin, len(whole)
    upto = render(tokenizer, turns[: i + 1], where=where)
    if not (whole.startswith(upto) and upto.startswith(before)):
        return None
    return len(before), len(upto)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _language(row: Row, tokenizer: Any, config: TrainConfig, template: str, length: int) -> tuple[Example, bool]:
    pieces = _pieces(row, tokenizer, config, template)
    shape_is_plain = template == "plain" or len(pieces) == 1
    ids = opening(tokenizer) if shape_is_plain else []
    labels, text, first = [MASKED] * len(ids), "", list(ids)
    for piece, learned in pieces:
        text += piece
        together = first + ids_of(tokenizer, text)
        added = together[len(ids) :] if together[: len(ids)] == ids else ids_of(tokenizer, piece)
        ids = ids + added
        labels += added if learned or not config.mask_prompt else [MASKED] * len(added)
    begin = next((i for i, y in enumerate(labels) if y != MASKED), None)
    if begin is None or len(ids) < 2:
        raise DataError(f"{row.where}: nothing in this row is learned.", "Its completion is empty.")
    if config.mask_prompt and begin >= length:
        raise DataError(f"{row.where}: the prompt has {begin} tokens, max_length is {length}.",
                        "Shorten the prompt or raise max_length.")  # fmt: skip
    return Example(ids[:length], labels[:length]), len(ids) > length


def _classified(row: Row, tokenizer: Any, config: TrainConfig, length: int,
                labels: Sequence[Any]) -> tuple[Example, bool]:  # fmt: skip
    text = _text(row, config)
    ids = ids_of(tokenizer, text, special=True)
    kept = _cut(tokenizer, text, ids, length)
    if not kept:
        raise DataError(f"{row.where}: the text is empty.", "Give at least one token.")
    return Example(kept, target=label_index(row, config, labels)), len(ids) > length


def _cut(tokenizer: Any, text: str, ids: list[int], length: int) -> list[int]:
    """``ids`` if they fit, else the text cut so that special tokens stay at its ends."""
    return ids if len(ids) <= length else list(tokenizer(text, truncation=True, max_length=length)["input_ids"])


def _pair(row: Row, tokenizer: Any, config: TrainConfig, length: int) -> tuple[Example, bool]:
    texts, target = _two_texts(row, config)
    sides = [ids_of(tokenizer, text, special=True) for text in texts]
    kept = [_cut(tokenizer, text, s, length) for s, text in zip(sides, texts)]
    if not all(kept):
        raise DataError(f"{row.where}: a text of the pair is empty.", "Give at least one token.")
    return Example(kept[0], other=kept[1], target=target), any(len(s) > length for s in sides)
