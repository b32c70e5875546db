"""Judging and using a model: loss, perplexity, accuracy, macro-F1; generation in batches and token by token."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from omnilora.errors import BadValue, DataError, need
from omnilora.training.batches import Collate, Feed
from omnilora.training.config import TrainConfig
from omnilora.training.data import read_rows
from omnilora.training.encode import encode, prompt_ids, room, set_template
from omnilora.training.losses import Custom, OwnLoss, evaluate_feed, mean_pooled, task_of

Prompt = str | Sequence[dict[str, Any]]


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    config: TrainConfig | None = None,
    **options: Any,
) -> dict[str, float]:
    """Metrics of ``model`` on ``data``.

    Args:
        data: as for :func:`omnilora.training.fit.fit`.
        tokenizer: of the model, for text.
        loss: (model, batch) → mean loss, for other models.
        config: a :class:`TrainConfig`; ``options`` are its fields and win.

    Returns: {"loss"} and, by task, "perplexity" (causal-lm), "accuracy" and "macro_f1" (classification),
        "accuracy" (embedding: how often the pair is the nearest in its batch).
    """
    config = (config or TrainConfig()).replace(**options) if options or config is None else config
    if tokenizer is None:
        task: Any = Custom(loss) if loss is not None else OwnLoss()
        return evaluate_feed(model, Feed(data, default_collate, config.batch_size, config.seed), task)
    task = Custom(loss) if loss is not None else task_of(config.task, config.temperature, config.padding)
    rows = read_rows(data, "test")
    labels = _labels(model, config) if config.task == "classification" else None
    _padding(tokenizer)
    made = encode(rows, tokenizer, config, room(model.config, config), labels)
    collate = Collate(tokenizer.pad_token_id)
    return evaluate_feed(model, Feed(made.examples, collate, config.batch_size, config.seed), task)


def _labels(model: Any, config: TrainConfig) -> list[Any]:
    if config.labels is not None:
        return list(config.labels)
    names = getattr(model.config, "id2label", None) or {}
    return [names[i] for i in sorted(names)]


def _padding(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 32,
          max_length: int = 512) -> torch.Tensor:  # fmt: skip
    """Sentence embeddings of length 1, (len(texts), dim) in fp32 on the CPU: the mean over a text's tokens."""
    was = model.training
    model.eval()
    parts = []
    try:
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            tokens = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            tokens = tokens.to(next(model.parameters()).device)
            parts.append(mean_pooled(model(**tokens).last_hidden_state, tokens["attention_mask"]).cpu())
    finally:
        model.train(was)
    return torch.cat(parts)


def _prepared(model: Any, tokenizer: Any, prompts: Sequence[Prompt], template: str, new: int) -> list[list[int]]:
    if not prompts:
        raise BadValue("prompts is empty.", "Give at least one.")
    if new < 1:
        raise BadValue(f"max_new_tokens = {new}.", "Give at least 1.")
    _padding(tokenizer)
    kind = set_template(tokenizer, template)
    made = [prompt_ids(tokenizer, p, kind) for p in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    for i, ids in enumerate(made, 1):
        if not ids:
            raise DataError(f"Prompt {i} is empty.", "Give at least one token.")
        if limit and len(ids) >= limit:
            raise DataError(f"Prompt {i} has {len(ids)} tokens, the model takes {limit}.", "Shorten it.")
    return made


def _options(tokenizer: Any, new: int, temperature: float, top_p: float, more: dict[str, Any]) -> dict[str, Any]:
    if temperature < 0 or not 0 < top_p <= 1:
        raise BadValue(f"temperature = {temperature}, top_p = {top_p}.", "temperature ≥ 0, 0 < top_p ≤ 1.")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # fmt: skip
    return {"max_new_tokens": new, "pad_token_id": tokenizer.pad_token_id, **drawn, **more}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str = "auto",
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """What the model answers to each prompt, in order.

    Args:
        prompts: texts (put into the chat template as the user's turn, if there is one) or lists of messages.
        temperature: 0 takes the likeliest token.
        template: "auto", "chat", "plain" or a Jinja file.
        options: further arguments of ``model.generate``.

    Prompts are padded on the left and sorted by length, so that batches waste little; answers end before the
    end-of-turn token.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    made = _prepared(model, tokenizer, prompts, template, max_new_tokens)
    given = _options(tokenizer, max_new_tokens, temperature, top_p, options)
    device, was = next(model.parameters()).device, model.training
    answers = [""] * len(made)
    order = sorted(range(len(made)), key=lambda i: len(made[i]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(made[i]) for i in chosen)
            gaps = [width - len(made[i]) for i in chosen]
            ids = [[tokenizer.pad_token_id] * gap + made[i] for i, gap in zip(chosen, gaps, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            out = model.generate(input_ids=torch.tensor(ids, device=device),
                                 attention_mask=torch.tensor(mask, device=device), **given)  # fmt: skip
            for i, row in zip(chosen, out[:, width:], strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    finally:
        model.train(was)
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str = "auto",
    **options: Any,
) -> Iterator[str]:
    """The answer piece by piece, as it is generated. Contexts (``ol.context``, ``ol.disabled``) of the caller hold."""
    transformers = need("transformers", "train")
    ids = _prepared(model, tokenizer, [prompt], template, max_new_tokens)[0]
    given = _options(tokenizer, max_new_tokens, temperature, top_p, options)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tensor = torch.tensor([ids], device=next(model.parameters()).device)
    failed: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            with torch.no_grad():
                model.generate(input_ids=tensor, attention_mask=torch.ones_like(tensor), streamer=streamer,
                               stopping_criteria=transformers.StoppingCriteriaList([_Stopped(stop)]), **given)  # fmt: skip
        except BaseException as error:
            failed.append(error)
            streamer.end()

    was = model.training
    model.eval()
    worker = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    worker.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
        if failed:
            raise failed[0]
    finally:
        stop.set()
        worker.join()
        model.train(was)


class _Stopped:
    """Ends a generation whose reader has gone."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), self.stop.is_set(), dtype=torch.bool, device=ids.device)
