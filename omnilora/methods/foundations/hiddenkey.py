from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.attention.dropout import drop_attention, drop_key
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.structured_dropout import HiddenKey

CARD = Card(
    key="hiddenkey",
    title="LoRA Meets Dropout under a Unified Framework",
    section="foundations",
    kind="regularizer",
    equation=r"w = \mathrm{softmax}(g + M),\; M \in \{0, -\infty\};\quad h \leftarrow m \odot h / (1-p);\quad "
    r"L = \tfrac12 (\mathrm{CE}_1 + \mathrm{CE}_2) + \tfrac{\beta}{2} [\mathrm{KL}(P_1 \| P_2) + \mathrm{KL}(P_2 \| P_1)]",
    purpose="LoRA against overfitting: whole keys dropped before the softmax, hidden entries dropped, two passes kept alike.",
    arxiv="2403.00812",
    venue="ACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 16, "p_key": 0.1, "p_hidden": 0.1, "beta": 0.1, "key_pattern": "column", "hidden_pattern": "element"},
    cases=({"r": 3, "alpha": 5.0, "p_key": 0.0, "p_hidden": 0.2, "hidden_at": "layer"},),
    differs=("There is no official code. A query always keeps its own position, so that no row of attention is empty.",),
    limits=(
        "Rates, β, r and the place of the hidden dropout are not in the abstract; defaults lie inside the swept ranges, and "
        "the hidden dropout acts on the output of the feed-forward's last layer.",
        "Keys can be dropped in attention layers of transformers (sdpa or eager); elsewhere set p_key = 0.",
        "With β > 0 every update runs two forwards, in one process. β = 0 is HiddenKey⁻.",
    ),
)


def hiddenkey(r: int = 16, alpha: float = 16.0, dropout: float = 0.0, p_key: float = 0.1, p_hidden: float = 0.1,
              beta: float = 0.1, key_pattern: str = "column", hidden_pattern: str = "element",
              hidden_at: str = "mlp-output") -> Method:  # fmt: skip
    """Plain LoRA trained under structured dropout. Patterns: "column", "element", "span"; ``hidden_at``: target pattern."""
    rule = HiddenKey(p_key, p_hidden, beta, key_pattern, hidden_pattern, hidden_at)
    return Method("hiddenkey", LoRA(r, alpha, dropout), (rule,))


def _leak(broken: bool) -> float:
    """Largest gradient that a dropped logit receives (broken: dropped after the softmax)."""
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    drop = torch.zeros(6, 9, dtype=torch.bool)
    drop[:, 2] = drop[:, 5] = True
    one, other = drop_key(logits, drop), drop_attention(logits, drop)
    assert proofs.relative(one, other) < 1e-12
    (g,) = torch.autograd.grad(((other if broken else one) * torch.randn(6, 9, dtype=torch.float64)).sum(), logits)
    return float(g[drop].abs().max())


class _Reader(nn.Module):
    """Attention over 12 tokens of width 16 in transformers' own layer, a feed-forward, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
        config._attn_implementation = "sdpa"
        self.turn, self.block = LlamaRotaryEmbedding(config), LlamaDecoderLayer(config, 0)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x, position_embeddings=self.turn(x, torch.arange(x.shape[1])[None]))
        return self.head(h.mean(1))


def _loss_on_new(broken: bool) -> float:
    """Cross-entropy on new rows after 120 updates on 32 rows of which a fifth have a wrong label, the mean of two models
    (broken: no dropout)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(544, 12, 16, generator=g)
    y = (x[:, :, 0].mean(1) > 0).long()
    y[:32] = torch.where(torch.rand(32, generator=g) < 0.2, 1 - y[:32], y[:32])
    p = {"p_key": 0.0, "p_hidden": 0.0, "beta": 0.0} if broken else {"p_key": 0.3, "p_hidden": 0.3, "beta": 2.0}
    found = []
    for _ in range(2):
        model = _Reader()
        proofs.train(model, hiddenkey(r=8, alpha=16.0, **p), proofs.full_batch(x[:32], y[:32]), 120, lr=2e-3,
                     loss=nn.functional.cross_entropy)  # fmt: skip
        assert all(s.how == LoRA(8, 16.0) for s in slots(model))
        with torch.no_grad():
            found.append(float(nn.functional.cross_entropy(model(x[32:]), y[32:])))
    return sum(found) / len(found)


def claims() -> list[Claim]:
    return [
        Claim("no gradient to dropped keys", "dropping before and after the softmax agree in the forward pass, and only the "
              "first sends nothing back", _leak, lambda f: f == 0, "weights dropped after the softmax"),
        Claim("less overfitting", "the loss on new rows stays bounded where plain LoRA's runs away", _loss_on_new,
              lambda f: f < 2.5, "no dropout and no second pass"),
    ]  # fmt: skip
