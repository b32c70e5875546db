from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.rotation import RotatedLoRA

CARD = Card(
    key="prolora",
    title="PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA",
    section="foundations",
    kind="parameterization",
    equation=r"A = [A_0 \mid \mathrm{roll}(A_0, \sigma) \mid \dots],\ B^\top \text{ likewise},\quad "
    r"W' = W + \tfrac{\alpha}{r}\,[B\ B_u]\,[A;\,A_u]",
    purpose="One chunk of A and of B serves the whole width, rotated along the rank; u ranks stay unshared.",
    arxiv="2402.16902",
    venue="ACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "u": 1, "m": 4, "n": 4, "alpha": 16.0},
    cases=({"r": 4, "u": 1, "m": 2, "n": 3, "alpha": 5.0}, {"r": 3, "u": 0, "m": 2, "n": 2, "alpha": 2.0}),
    agreement=(
        "Official forward and its expansion of chunks (in the autocast branch, the only one that runs), five settings of r, u, m, n, "
        "widths that m and n do not divide, fp64: outputs and all gradients within 1e-14.",
    ),
    differs=(
        "Chunks are cut to the real widths; the official saver hard-codes 4096 and 11008.",
        "Outside autocast the official forward reads `.weight` of a tensor and stops.",
        "Rotation is along the rank, as in the official code; a third-party port rolls along the width.",
    ),
)


def prolora(r: int = 8, u: int = 1, m: int = 4, n: int = 4, alpha: float = 16.0, dropout: float = 0.0) -> Method:
    """``m`` chunks of A, ``n`` of B, ``u`` unshared ranks of ``r``."""
    return Method("prolora", RotatedLoRA(r, alpha, dropout, u, m, n))


def _random(how: Method) -> proofs.Stack:
    model = proofs.Stack(16, 16)
    adapt(model, how)
    with torch.no_grad():
        for s in slots(model):
            for _, t in s.tensors():
                t.normal_()
    return model


def _rank(broken: bool) -> float:
    """Rank of ΔW with 64 parameters (broken: LoRA of rank 2, also 64)."""
    model = _random(Method("x", LoRA(2)) if broken else prolora(r=8, u=0, m=4, n=4))
    assert sum(t.numel() for t in trainable(model)) == 64
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def _blocks(broken: bool) -> float:
    """Relative gap between blocks (0, 0) and (0, 1) of the shared part (broken: repetition without rotation)."""
    model = _random(Method("x", RotatedLoRA(r=8, u=0, rotate=not broken)))
    change = proofs.learned(model)
    return proofs.relative(change[:4, :4], change[:4, 4:8])


def claims() -> list[Claim]:
    return [
        Claim("rank at equal size", "rank 8 with the numbers of a rank-2 LoRA", _rank, lambda f: f == 8, "LoRA of equal size"),
        Claim("rotation", "chunks differ by their rotation", _blocks, lambda f: f > 0.1, "repetition without rotation"),
    ]  # fmt: skip
