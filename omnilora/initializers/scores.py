"""Which entries of a fresh adapter matter: scores from a few batches, and masks from scores.

    rand  N(0, 1)         mag  |θ|         snip  |θ ⊙ ∂L/∂θ| = |∂L/∂M| at M = 1
    grasp θ ⊙ (H g), g = ∂L/∂θ held constant         synflow |θ ⊙ ∂R/∂θ|, R the mean of ΔW 1 with |θ| in place of θ
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnilora.core.context import EMPTY
from omnilora.core.op import LINEAR
from omnilora.core.parameterization import Slot
from omnilora.errors import BadValue
from omnilora.parameterizations.masked import Masked

SCORES = ("snip", "grasp", "mag", "synflow", "rand")
Loss = Callable[[nn.Module, Any], Tensor]


def gradients(model: nn.Module, tensors: Sequence[Tensor], batches: Sequence[Any], loss: Loss) -> list[Tensor]:
    """Σ_b ∂L_b/∂θ for each tensor."""
    total = [torch.zeros_like(t) for t in tensors]
    for batch in batches:
        for sum_, g in zip(total, torch.autograd.grad(loss(model, batch), tensors, allow_unused=True)):
            if g is not None:
                sum_.add_(g)
    return total


def curvature(model: nn.Module, tensors: Sequence[Tensor], batches: Sequence[Any], loss: Loss) -> list[Tensor]:
    """H g of the summed loss, from second derivatives batch by batch."""
    constant = gradients(model, tensors, batches, loss)

    def along(model: nn.Module, batch: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            first = torch.autograd.grad(loss(model, batch), tensors, create_graph=True, allow_unused=True)
        return sum((c * g).sum() for c, g in zip(constant, first) if g is not None)  # type: ignore[return-value]

    return gradients(model, tensors, batches, along)


def flow(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> list[Tensor]:
    """∂R/∂θ at |θ|, every adapter fed by itself."""
    signs = [t.detach().sign() for t in tensors]
    with torch.no_grad():
        for t in tensors:
            t.abs_()
    try:
        total = sum(s.how.delta(s, EMPTY).apply(tensors[0].new_ones(1, s.site.fan_in), LINEAR).mean() for s in slots)
        return list(torch.autograd.grad(total, tensors))  # type: ignore[arg-type]
    finally:
        with torch.no_grad():
            for t, sign in zip(tensors, signs):
                t.mul_(sign)


def score(kind: str, model: nn.Module, slots: Sequence[Slot], tensors: Sequence[Tensor], batches: Sequence[Any],
          loss: Loss, generator: torch.Generator) -> list[Tensor]:  # fmt: skip
    """One score an entry; the higher, the more it should stay."""
    if kind == "rand":
        return [torch.randn(t.shape, generator=generator).to(t) for t in tensors]
    if kind == "mag":
        return [t.detach().abs() for t in tensors]
    if kind == "synflow":
        if not all(s.how.additive for s in slots):
            raise BadValue("score = 'synflow' needs an additive adapter.", "Give another score, or adapter = 'lora'.")
        return [(t.detach() * g).abs() for t, g in zip(tensors, flow(slots, tensors))]
    if kind == "snip":
        return [(t.detach() * g).abs() for t, g in zip(tensors, gradients(model, tensors, batches, loss))]
    return [t.detach() * h for t, h in zip(tensors, curvature(model, tensors, batches, loss))]


def keep(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """0/1 masks: the ⌈S·N⌉ lowest scores of all tensors together go, ties by index."""
    flat = torch.cat([s.flatten() for s in scores])
    mask = torch.ones_like(flat)
    mask[torch.argsort(flat, stable=True)[: math.ceil(sparsity * len(flat))]] = 0.0
    return [m.view_as(s) for m, s in zip(mask.split([s.numel() for s in scores]), scores)]


def prune(model: nn.Module, slots: Sequence[Slot], batches: Sequence[Any], loss: Loss, kind: str, sparsity: float,
          scope: str = "global", rounds: int = 1, seed: int = 0) -> None:  # fmt: skip
    """Set the masks of :class:`Masked` slots and zero what they hide.

    Args:
        sparsity: the share that goes. ``rounds`` > 1: density (1 − S)^{j/n} after round j, scored anew each time.
        scope: "global": all tensors compete; "local": each matrix loses the same share.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for s in slots:
        assert isinstance(s.how, Masked)
        pairs += [(s.inner.get_parameter(n), s.mask.get_parameter(n)) for n in s.how.names]
    tensors, masks = [t for t, _ in pairs], [m for _, m in pairs]
    generator = torch.Generator().manual_seed(seed)
    mode = model.training
    model.eval()
    try:
        for j in range(1, rounds + 1):
            found = score(kind, model, slots, tensors, batches, loss, generator)
            if all(float(v.abs().max()) == 0.0 for v in found):
                raise BadValue(f"Every {kind} score is zero: a factor of the adapter starts at zero.", "Give std > 0.")
            hidden = [torch.where(m == 0, -math.inf, v.float()) for m, v in zip(masks, found)]
            share = 1 - (1 - sparsity) ** (j / rounds)
            kept = keep(hidden, share) if scope == "global" else [keep([v], share)[0] for v in hidden]
            with torch.no_grad():
                for (t, m), new in zip(pairs, kept):
                    m.copy_(new)
                    t.mul_(m)
    finally:
        model.train(mode)
