"""HiddenKey — Wang et al., "LoRA Meets Dropout under a Unified Framework", ACL 2024, arXiv:2403.00812.

    L = ½ (CE₁ + CE₂) + β · ½ [KL(P₁‖P₂) + KL(P₂‖P₁)]

over two passes that drop keys of attention and entries of the feed-forward output independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.attention.dropout import PATTERNS, draw, without_keys
from omnilora.attention.hook import Call, hook, is_attention, unhook
from omnilora.core.parameterization import finite, one_of
from omnilora.core.rule import Evaluate, Rule
from omnilora.core.run import Run
from omnilora.core.targets import matches
from omnilora.errors import RunError, TargetError

MASKED = -100


class HiddenKey(Rule):
    """Training only: nothing of it is left in the adapter.

    Args:
        p_key, key_pattern: share of keys dropped before the softmax; "column", "element" or "span".
        p_hidden, hidden_pattern: share of the layers' output that ``hidden_at`` names; rescaled by 1/(1−p).
        beta: weight of the two-sided KL between two passes; 0: one pass.
    """

    def __init__(self, p_key: float = 0.1, p_hidden: float = 0.1, beta: float = 0.1, key_pattern: str = "column",
                 hidden_pattern: str = "element", hidden_at: str = "mlp-output") -> None:  # fmt: skip
        finite(p_key, "p_key", 0.0, 0.9)
        finite(p_hidden, "p_hidden", 0.0, 0.9)
        finite(beta, "beta", 0.0)
        one_of(key_pattern, "key_pattern", *PATTERNS)
        one_of(hidden_pattern, "hidden_pattern", *PATTERNS)
        self.p_key, self.p_hidden, self.beta = p_key, p_hidden, beta
        self.key_pattern, self.hidden_pattern, self.hidden_at = key_pattern, hidden_pattern, hidden_at
        self.one_process = self.reads_outputs = beta > 0
        self._handles: list[Any] = []
        self._layers: list[nn.Module] = []

    def attach(self, run: Run) -> None:
        if self.p_key:
            self._layers = [m for m in run.model.modules() if is_attention(m)]
            if not self._layers:
                raise TargetError("The model has no attention layer of transformers to drop keys in.", "Set p_key = 0.")
            for layer in self._layers:
                hook(layer, self._keys)
        if self.p_hidden:
            found = [m for n, m in run.model.named_modules() if matches(self.hidden_at, n, m)]
            if not found:
                raise TargetError(f"hidden_at = {self.hidden_at!r} matches no layer.", "Name the layers, or set p_hidden = 0.")
            self._handles = [m.register_forward_hook(self._hidden) for m in found]

    def detach(self, run: Run) -> None:
        for layer in self._layers:
            unhook(layer, self._keys, run.model)
        for handle in self._handles:
            handle.remove()
        self._layers, self._handles = [], []

    def _keys(self, call: Call) -> Call:
        return without_keys(call, self.p_key, self.key_pattern) if call.layer.training else call

    def _hidden(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not layer.training:
            return y
        flat = y.reshape(y.shape[0], -1, y.shape[-1])  # (batch, tokens, features)
        if self.hidden_pattern == "span":
            drop = draw(len(flat), flat.shape[1], self.p_hidden, "span", y.device).mT
        else:
            drop = draw(len(flat), flat.shape[2], self.p_hidden, self.hidden_pattern, y.device, flat.shape[1])
        return (flat.masked_fill(drop, 0.0) / (1 - self.p_hidden)).view(y.shape)

    def update(self, run: Run, batches: Sequence[Any], loss: Evaluate) -> float | None:
        if not self.beta:
            return None
        value = 0.0
        for batch in batches:
            (first, out1), (second, out2) = loss(batch), loss(batch)
            apart = two_sided_kl(learned_logits(batch, out1), learned_logits(batch, out2))
            total = (first + second) / 2 + self.beta * apart / len(batches)
            total.backward()
            value += float((first + second).detach()) / 2
        return value


def two_sided_kl(a: Tensor, b: Tensor) -> Tensor:
    """½ [KL(P‖Q) + KL(Q‖P)] of softmax(a) and softmax(b), the mean over rows; ≥ 0, and 0 where they agree."""
    p, q = torch.log_softmax(a.float(), -1), torch.log_softmax(b.float(), -1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def learned_logits(batch: Any, outputs: Any) -> Tensor:
    """Logits (rows, classes) that the loss looks at: class logits, or those of the tokens that are learned."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise RunError(f"The trainer gives no logits ({type(outputs).__name__}), which the two passes are compared by.",
                       "Use ol.fit or transformers.Trainer, or set beta = 0.")  # fmt: skip
    if logits.dim() < 3:
        return logits
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if labels is None or labels.dim() != 2:
        return logits.flatten(0, -2)
    target = labels[:, 1:]
    where = (target != MASKED).any(0).nonzero().flatten()
    few = logits if logits.shape[1] == len(where) else logits[:, where]
    return few[target[:, where] != MASKED]
