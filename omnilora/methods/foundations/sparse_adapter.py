from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import adapt, detach, slots
from omnilora.core.method import Card, Claim, Method, prepare
from omnilora.core.parameterization import Slot, finite, one_of, positive_rank
from omnilora.core.targets import Targets
from omnilora.errors import BadValue
from omnilora.initializers.scores import SCORES, prune
from omnilora.parameterizations.bottleneck import Bottleneck
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.masked import Masked

CARD = Card(
    key="sparse_adapter",
    title="SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters",
    section="foundations",
    kind="procedure",
    equation=r"\Delta W = \tfrac{\alpha}{r}(B \odot M_B)(A \odot M_A),\quad M = [\,|\theta \odot \partial L/\partial\theta| > \tau\,]",
    purpose="Prunes the adapter's own entries before training, by a score from a few batches, and trains what is left.",
    arxiv="2210.04284",
    venue="Findings of EMNLP 2022",
    tags=frozenset({"mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"adapter": "lora", "r": 8, "alpha": 16.0, "sparsity": 0.4, "score": "snip", "scope": "global", "std": 0.02},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "score": "rand", "std": 0.0, "dropout": 0.1}),
    agreement=(
        "Official code (pruners.SNIP and the global mask) on a two-layer LoRA with the same tensors and two batches: scores "
        "equal to 1e-6 after its normalization, masks equal entry by entry.",
    ),
    differs=(
        "`sparsity` is the share that is removed; the official code's argument of that name is the share kept.",
        "Scores by gradient or magnitude are zero for LoRA's B = 0: as in the code both factors start at N(0, 0.02²), so "
        "that ΔW ≠ 0 at the start. std=0 with such a score is refused.",
        "Exactly ⌈S·N⌉ entries go, ties by index; the official threshold may remove more.",
        "The official code pairs masks and parameters by equal shape, which is wrong for square adapters; here by name.",
        "GraSP keeps the largest θ ⊙ Hg, as the official code does.",
    ),
    limits=(
        "Masks are stored as fp32 tensors beside the factors: nothing is saved on disk; the kept count is in the slot's marks.",
        "A matrix can lose all of its B under the global scope and then cannot learn.",
        "synflow needs an additive adapter.",
    ),
    not_with={"adalora": "Its triplets are pruned during training; masks before it would fight them."},
)

ADAPTERS: dict[str, Callable[[int, float, float], Masked]] = {
    "lora": lambda r, alpha, dropout: Masked(LoRA(r, alpha, dropout)),
    "series": lambda r, alpha, dropout: Masked(Bottleneck(r, "series-out", "relu", dropout=dropout), ("D", "U")),
    "parallel": lambda r, alpha, dropout: Masked(Bottleneck(r, "parallel", "relu", dropout=dropout), ("D", "U")),
}


def sparse_adapter(adapter: str = "lora", r: int = 8, alpha: float = 16.0, dropout: float = 0.0, sparsity: float = 0.4,
                   score: str = "snip", scope: str = "global", rounds: int = 1, std: float = 0.02,
                   seed: int = 0) -> Method:  # fmt: skip
    """Prune an adapter at its start.

    ``adapter``: "lora", or a bottleneck "series" or "parallel" of width ``r``. ``sparsity``: share of entries removed;
    "Large-Sparse" is k times the ``r`` at sparsity 1 − 1/k. ``score``: snip, grasp, mag, synflow or rand. ``scope``:
    "global" or "local" (each matrix). ``rounds``: prune in so many steps. ``std``: deviation of both factors at the start.
    """
    one_of(adapter, "adapter", *ADAPTERS)
    one_of(score, "score", *SCORES)
    one_of(scope, "scope", "global", "local")
    finite(sparsity, "sparsity", 0.0, 0.999)
    positive_rank(rounds, "rounds")
    if std == 0 and score != "rand":
        raise BadValue(f"std = 0 with score = {score!r}: a factor that starts at zero makes every score zero.", "Give std > 0.")
    how = replace(ADAPTERS[adapter](r, alpha, dropout), std=std)

    def decide(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
               targets: Targets | None) -> tuple[Method, Targets | None]:  # fmt: skip
        adapt(model, Method("probe", how), targets if targets is not None else made.targets, name="probe")
        try:
            mine = [s for s in slots(model, "probe") if isinstance(s.how, Masked)]
            prune(model, mine, batches, loss, score, sparsity, scope, rounds, seed)
            seen = {s.site.name: {n: t.detach().clone() for n, t in s.tensors()} for s in mine}
        finally:
            detach(model, "probe")
        return Method("sparse_adapter", how, targets=targets, seen=seen, fill=start), targets

    return Method("sparse_adapter", how, prepare=decide)


def start(slot: Slot, seen: dict[str, Tensor] | None) -> None:
    """The tensors that were scored, with their masks."""
    if seen is not None:
        for name, t in slot.tensors():
            t.copy_(seen[name])
        slot.marks["kept"] = int(sum(t.sum() for n, t in seen.items() if n.startswith("mask.")))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _task() -> tuple[proofs.Stack, Tensor, Tensor]:
    """32 → 16, the target changes the first four input columns only."""
    model, x = proofs.Stack(32, 16), torch.randn(512, 32)
    change = torch.zeros(16, 32)
    change[:, :4] = torch.randn(16, 4)
    return model, x, (model(x) + x @ change.mT).detach()


def _relevant(broken: bool) -> float:
    """Share of A's surviving entries on the four columns that matter, at S = 0.8 (broken: random scores)."""
    model, x, y = _task()
    how = sparse_adapter(r=8, alpha=8.0, sparsity=0.8, score="rand" if broken else "snip")
    adapt(model, prepare(model, how, [(x, y)], _loss)[0])
    mask = slots(model)[0].mask.A
    return float(mask[:, :4].sum() / mask.sum())


def _better(broken: bool) -> float:
    """Loss at the end, at S = 0.8 (broken: random scores)."""
    model, x, y = _task()
    how = sparse_adapter(r=8, alpha=8.0, sparsity=0.8, score="rand" if broken else "snip")
    made, _ = prepare(model, how, [(x, y)], _loss)
    proofs.train(model, made, proofs.full_batch(x, y), 800, lr=1e-2)
    return float(_loss(model, (x, y)).detach())


def _stays(broken: bool) -> float:
    """Entries that are zero after AdamW with weight decay, over ⌈S·N⌉ (broken: the same start without masks)."""
    model, x, y = _task()
    made, _ = prepare(model, sparse_adapter(r=8, alpha=8.0, sparsity=0.3), [(x, y)], _loss)
    if broken:
        given = {n: {k: v for k, v in t.items() if k.startswith("inner.")} for n, t in made.seen.items()}
        made = Method("x", LoRA(8, 8.0), seen=given, fill=lambda s, seen: [s.get_parameter(k[6:]).copy_(v) for k, v in seen.items()])

    def adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)

    proofs.train(model, made, proofs.full_batch(x, y), 50, optimizer=adamw)  # type: ignore[arg-type]
    zeros = sum(int((t == 0).sum()) for n, t in slots(model)[0].tensors() if not n.startswith("mask."))
    return zeros / math.ceil(0.3 * (8 * 32 + 16 * 8))


def claims() -> list[Claim]:
    return [
        Claim("scores find what matters", "entries on the columns of the target survive", _relevant, lambda f: f > 0.5,
              "random scores"),
        Claim("pruned by score, trained further", "the pruned adapter learns the target", _better, lambda f: f < 0.6,
              "random scores"),
        Claim("the mask holds", "exactly ⌈S·N⌉ entries are zero, and stay so", _stays, lambda f: f == 1,
              "the same start without masks"),
    ]  # fmt: skip
