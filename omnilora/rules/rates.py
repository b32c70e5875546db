"""LoRA+'s learning rates — Hayou et al., ICML 2024, arXiv:2402.12354.   η_B = λ η_A"""

from __future__ import annotations

from torch import nn

from omnilora.core.attach import slots
from omnilora.core.rule import Group, Rule
from omnilora.errors import BadValue


class Rates(Rule):
    """Output sides learn ``ratio`` times faster; factors on embeddings at the absolute rate ``embedding_lr``.

    Biases and norms that train as own copies get the fast rate and no weight decay.
    """

    def __init__(self, ratio: float = 16.0, embedding_lr: float | None = 1e-6) -> None:
        if not ratio >= 1:
            raise BadValue(f"ratio = {ratio!r}.", "λ is at least 1.")
        self.ratio, self.embedding_lr = ratio, embedding_lr

    def groups(self, model: nn.Module, adapter: str) -> list[Group]:
        slow, fast = Group(name="A"), Group(factor=self.ratio, name="B")
        vectors, embedding = Group(factor=self.ratio, weight_decay=0.0, name="B, no decay"), Group(name="embedding")
        embedding.lr = self.embedding_lr
        seen: set[int] = set()
        for slot in slots(model, adapter):
            for name, t in slot.tensors():
                if not t.requires_grad or id(t) in seen:
                    continue
                seen.add(id(t))
                role = slot.roles[name]
                if slot.site.kind == "embedding" and role in ("input", "output"):
                    home = embedding if self.embedding_lr is not None else (fast if role == "output" else slow)
                elif role == "output":
                    home = fast
                elif role == "own" and slot.site.fan_in == 1:
                    home = vectors
                else:
                    home = slow
                home.params.append(t)
        return [g for g in (slow, fast, vectors, embedding) if g.params]
