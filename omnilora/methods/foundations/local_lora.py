from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import Run
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.chunks import Chunks

CARD = Card(
    key="local_lora",
    title="Local LoRA: Memory-Efficient Fine-Tuning of Large Language Models",
    section="foundations",
    kind="procedure",
    equation=r"h_p = C_p(h_{p-1}; \mathrm{LoRA}_p),\quad \ell_p = \mathrm{CE}(g(h_p), y),\quad \partial \ell_p / \partial h_{p-1} := 0",
    purpose="Blocks learn chunk by chunk, each with the model's own head as its exit: what a step holds is one chunk's.",
    venue="NeurIPS 2023 workshops (OpenReview LHKmzWP7RN)",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"parts": 4, "last": 0.5, "inner_rate": 0.1},
    cases=(),
    differs=(
        "Only the abstract is public: the head of inner chunks is the model's own final norm and head.",
        "Inputs of a chunk are recomputed by the chunks before it, without gradients, and not cached on disk.",
    ),
    limits=(
        "An evaluation during training measures the model up to the chunk under way; the end of the run, all of it.",
        "One process only. The model must keep its blocks in an nn.ModuleList that its forward walks through.",
        "The base stays in memory as a whole; what shrinks is activations, gradients and optimizer states.",
        "A loss through an early exit is a poor guide in the first chunks of a deep model: on SmolLM2-135M, 20 updates in four "
        "equal shares at the full rate raised the whole model's loss by 0.085 ± 0.018. With half of the updates for the last "
        "chunk and a tenth of the rate for the others, the defaults, it fell by 0.201 ± 0.007.",
    ),
)


def local_lora(parts: int = 4, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, overlap: int = 0,
               stack: str | None = None, last: float = 0.5, inner_rate: float = 0.1) -> Method:  # fmt: skip
    """``parts``: chunks; ``last``: share of the updates for the last one, ``inner_rate``: factor of the rate for the
    others; ``overlap``: blocks below a chunk that still learn with it; ``stack``: the path of the list of blocks, where it
    cannot be guessed."""
    return Method("local_lora", LoRA(r, alpha, dropout), (Chunks(parts, overlap, stack, last, inner_rate),))


class _Deep(nn.Module):
    """Eight residual blocks of width 16 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.5 * block(x)
        return self.head(x)


def _data() -> tuple[_Deep, Tensor, Tensor]:
    model, x = _Deep(), torch.randn(128, 16)
    teacher = _Deep()
    teacher.head.load_state_dict(model.head.state_dict())
    return model, x, teacher(x).detach()


def _learns(broken: bool) -> float:
    """Loss after training in four chunks over the loss at the start (broken: only the first chunk ever learns)."""
    model, x, y = _data()
    before = float((model(x) - y).square().mean().detach())
    how = local_lora(parts=4, r=4, alpha=8.0, last=0.25, inner_rate=1.0)
    if broken:
        how.rules[0].before_forward = lambda run: None  # type: ignore[method-assign]
    proofs.train(model, how, proofs.full_batch(x, y), 400, lr=1e-2)
    return float((model(x) - y).square().mean().detach()) / before


def _alone(broken: bool) -> float:
    """Tensors outside the chunk under way that moved, over the whole run (broken: end to end)."""
    model, x, y = _data()
    moved: list[int] = []
    before: dict[str, Tensor] = {}

    def watch(run: Run) -> None:
        at = run.rules[0].at if run.rules else -1  # type: ignore[attr-defined]
        for s in run.slots():
            block = int(s.site.name.split(".")[1]) if s.site.name.startswith("blocks") else None
            now, old = s.B.detach().clone(), before.get(s.site.name)
            if block is not None and block // 2 != at and old is not None and not torch.equal(now, old):
                moved.append(block)
            before[s.site.name] = now

    proofs.train(model, local_lora(parts=4, r=4), proofs.full_batch(x, y), 40, watch=watch, ticks=not broken)
    return float(len(moved))


def _memory(broken: bool) -> float:
    """Numbers saved for the backward pass and of the optimizer's states, at the most, four chunks over one (broken: one)."""
    held = []
    for parts in (1 if broken else 4, 1):
        model, x, y = _data()
        most = [0]

        def watch(run: Run, model: _Deep = model, x: Tensor = x, most: list[int] = most) -> None:
            saved = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
                model(x)
            sizes = sum(t.numel() for t in saved.values() if not isinstance(t, nn.Parameter))
            states = sum(t.numel() for s in run.optimizer.state.values() for t in s.values() if t.dim())  # type: ignore[union-attr]
            most[0] = max(most[0], sizes + states)

        proofs.train(model, local_lora(parts=parts, r=4), proofs.full_batch(x, y), 8, watch=watch)
        assert not any("forward" in vars(b) for b in model.blocks) and len(slots(model)) == 8
        held.append(most[0])
    return held[0] / held[1]


def claims() -> list[Claim]:
    return [
        Claim("chunks learn one after another", "four local losses lower the loss of the whole model", _learns,
              lambda f: f < 0.5, "only the first chunk learns"),
        Claim("nothing else moves", "while a chunk learns no other adapter changes", _alone, lambda f: f == 0, "end to end"),
        Claim("memory", "activations and optimizer states are those of one chunk", _memory, lambda f: f < 0.6,
              "one chunk of all blocks"),
    ]  # fmt: skip
