"""Rows joined to one sequence without padding: attention of each piece by itself, no mask, no cross-talk.

transformers looks attention up by the name in the model's configuration. Inside :func:`joined_attention` the name is ours,
which is that of "sdpa" except in calls that carry the pieces' bounds (``cu_seq_lens_q``, as for flash attention).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnilora.errors import need
from omnilora.training.encode import MASKED

NAME = "pieces_sdpa"
_call = threading.local()  # whether the forward under way has joined rows: then no mask is made


def join(batch: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor] | None:
    """(inputs of the model, labels (1, N) at the position that predicts them) of a padded batch with N real tokens.

    Pieces begin where ``position_ids`` restart, else with each row. None where the padding is not on the right.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    if ids.dim() != 2 or mask.shape != ids.shape or not _right(mask):
        return None
    given = batch.get("position_ids")
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if given is None else given
    positions = positions[mask]
    first = positions == 0
    bounds = torch.cat((first.nonzero().flatten(), first.new_full((1,), len(positions), dtype=torch.long)))
    truth = labels[mask].masked_fill(first, MASKED)
    shifted = torch.cat((truth[1:], truth.new_full((1,), MASKED)))
    bounds = bounds.to("cpu", torch.int32)
    longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
    inputs = {"input_ids": ids[mask][None], "position_ids": positions[None], "attention_mask": None,
              "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}  # fmt: skip
    return inputs, shifted[None]


def _right(mask: Tensor) -> bool:
    return bool(mask[:, 0].all()) and not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def refusal(model: nn.Module) -> str:
    """Why the rows of this model's batches cannot be joined; "" where they can, as far as its structure tells."""
    configs = _configs(model)
    if not configs:
        return f"{type(model).__name__} is no model of transformers"
    names = {c._attn_implementation for c in configs}
    if names != {"sdpa"}:
        return f"its attention is {', '.join(map(repr, sorted(map(str, names))))}"
    if not known(model):
        return f"{getattr(model.config, 'model_type', type(model).__name__)!r} is no family known to read position ids"
    return ""


def known(model: nn.Module) -> bool:
    """Whether models of this family tell joined rows apart by their positions and pass bounds on to attention."""
    return getattr(vars(model).get("config"), "model_type", None) in FAMILIES


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "smollm3",
                      "phi", "phi3", "granite", "cohere", "olmo", "olmo2", "starcoder2", "stablelm"})  # fmt: skip


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that layers look their attention up in, each once."""
    found = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None
             and getattr(c, "_attn_implementation", None) is not None}  # fmt: skip
    return list(found.values())


@contextmanager
def joined_attention(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of ``model`` and their recomputations take joined rows too."""
    _register()
    configs = _configs(model)
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            if config._attn_implementation == NAME:
                config._attn_implementation = name


@contextmanager
def joined_call() -> Iterator[None]:
    """The forward inside gets joined rows: its model makes no mask."""
    before = getattr(_call, "on", False)
    _call.on = True
    try:
        yield
    finally:
        _call.on = before


def _register() -> None:
    masks, functions = need("transformers.masking_utils", "train"), need("transformers.modeling_utils", "train")
    functions.ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def _mask(*args: Any, **options: Any) -> Any:
    if getattr(_call, "on", False):
        return None
    return need("transformers.masking_utils", "train").sdpa_mask(*args, **options)


def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           **options: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of each piece; without bounds that of "sdpa".

    Shapes: query (1, heads, N, d), key and value (1, kv heads, N, d) → (1, N, heads, d).
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or attention_mask is not None or query.shape[0] != 1:
        inner = need("transformers.integrations.sdpa_attention", "train").sdpa_attention_forward
        return inner(layer, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    y = attend_pieces(query, key, value, bounds.diff().tolist(), scale=options.get("scaling"),
                      dropout=options.get("dropout") or 0.0, window=options.get("sliding_window"))  # fmt: skip
    return y.transpose(1, 2), None


def attend_pieces(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None = None,
                  dropout: float = 0.0, window: int | None = None) -> Tensor:  # fmt: skip
    """softmax(q kᵀ) v within each piece, causal: (1, heads, N, d) from (1, heads, N, d) and (1, kv heads, N, d).

    Args:
        lengths: of the pieces; their sum is N.
        window: keys that a query sees at most, itself among them.
    """
    shared = query.shape[1] != key.shape[1]
    parts = zip(*(t.split(lengths, 2) for t in (query, key, value)), lengths, strict=True)
    out = []
    for q, k, v, n in parts:
        mask = None if window is None or n <= window else _band(n, window, q.device)
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                                  scale=scale, enable_gqa=shared))  # fmt: skip
    return torch.cat(out, 2)


def _band(n: int, window: int, device: torch.device) -> Tensor:
    lower = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return lower & ~lower.tril(-window)
