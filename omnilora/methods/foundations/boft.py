from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.orthogonal import BOFT

CARD = Card(
    key="boft",
    title="Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
    section="foundations",
    kind="parameterization",
    equation=r"W' = \mathrm{diag}(s)\, W (F_m \cdots F_1)^\top,\quad F_i = P_i\,\mathrm{blockdiag}(R_{i,j})\,P_i^\top",
    purpose="A rotation of all inputs from a few levels of small rotations, arranged as in a fast Fourier transform.",
    arxiv="2311.06243",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"block": 4, "factors": 2},
    cases=({"block": 2, "factors": 2}, {"block": 4, "factors": 1}),
    agreement=(
        "PEFT 0.21.2: at one level forward and gradients equal to 1e-5; at two and three levels the rotation made of PEFT's "
        "own permutations and Cayley transform equals ours to 1e-6 (its CPU path runs one level only) "
        "(tests/test_agreement_relatives.py).",
    ),
    differs=(
        "A skew matrix is stored as its upper triangle: half of PEFT's numbers for the same rotations.",
        "PEFT counts butterfly factors from 1, as here; without its CUDA extension it silently uses one.",
    ),
    limits=(
        "Features must divide into even blocks times 2^{factors − 1}; other layers raise.",
        "A convolution forms W (F_m ⋯ F_1)ᵀ at every forward. Multiplicative dropout is not offered.",
    ),
)


def boft(block: int = 4, factors: int = 2) -> Method:
    """``block``: size of a rotation (the nearest that fits); ``factors``: butterfly levels."""
    return Method("boft", BOFT(block, factors))


def _change(how: Parameterization) -> torch.Tensor:
    """R of W' = W R with W = I, tensors at random (s kept at 1)."""
    model = proofs.Stack(16, 16)
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.eye(16))
    adapt(model, Method("x", how))
    shake(model)
    R = torch.eye(16) + proofs.learned(model)
    return R / R.norm(dim=1, keepdim=True)


def _dense(broken: bool) -> float:
    """Share of nonzero entries of the rotation: blocks of 4, three levels, 16 inputs (broken: one level)."""
    return float((_change(BOFT(4, 1 if broken else 3)).abs() > 1e-6).float().mean())


def _orthogonal(broken: bool) -> float:
    """‖R Rᵀ − I‖ of the product of levels (broken: I + ΔW of LoRA)."""
    R = _change(LoRA(4) if broken else BOFT(4, 3))
    return float((R @ R.mT - torch.eye(16)).norm())


def claims() -> list[Claim]:
    return [
        Claim("levels mix everything", "three levels of 4 × 4 blocks make a dense rotation of 16", _dense,
              lambda f: f == 1, "one level"),
        Claim("orthogonal", "the product of levels is a rotation", _orthogonal, lambda f: f < 1e-5, "LoRA"),
    ]  # fmt: skip
