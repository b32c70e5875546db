from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.orthogonal import OFT, cayley

CARD = Card(
    key="oft",
    title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W R^\top,\quad R = \mathrm{blockdiag}(R_i),\ R_i = (I - Q_i)(I + Q_i)^{-1},\ Q_i^\top = -Q_i",
    purpose="Rotates what a layer reads, block by block: angles between its neurons stay as they were.",
    arxiv="2306.07280",
    venue="NeurIPS 2023",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"block": 32},
    cases=({"block": 4}, {"block": 3}),
    agreement=(
        "PEFT 0.21.2 with use_cayley_neumann=False, linear and embedding: forward and gradients equal to 1e-5 "
        "(tests/test_agreement_relatives.py).",
    ),
    differs=(
        "The Cayley transform is exact; PEFT's default truncates its series after five terms and is no rotation for larger Q.",
        "Convolutions rotate the columns of the stored (out, in·kernel) matrix, so that unmerged and merged outputs agree; "
        "PEFT unfolds, rotates and folds back the image, which adds overlapping patches.",
        "The original code rotates outputs; PEFT and this rotate inputs (outputs of an embedding).",
    ),
    limits=(
        "The block is the divisor of the features nearest to the one asked for.",
        "A convolution forms W Rᵀ at every forward. Constrained OFT, shared blocks and multiplicative dropout are not offered.",
    ),
)


def oft(block: int = 32) -> Method:
    """``block``: size of a rotation. y = W (Rᵀ x) + b; R is the identity at the start."""
    return Method("oft", OFT(block))


def _angles(broken: bool) -> float:
    """Largest change of W Wᵀ, relative (broken: LoRA)."""
    model = proofs.Stack(24, 16)
    W = model.layers[0].weight.detach().clone()
    adapt(model, Method("x", LoRA(2)) if broken else oft(block=6))
    shake(model)
    V = W + proofs.learned(model)
    return float((V @ V.mT - W @ W.mT).abs().max() / (W @ W.mT).abs().max())


def _reached(broken: bool) -> float:
    """Relative error on a target W Rᵀ of rotated blocks of 6 (broken: LoRA of equal size, rank 2)."""
    model = proofs.Stack(24, 24)
    W, R = model.layers[0].weight.detach(), cayley(0.5 * torch.randn(4, 15), 6)
    target = W @ torch.block_diag(*R).mT - W
    x = torch.linalg.qr(torch.randn(64, 24)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how: Parameterization = LoRA(2, 2.0) if broken else OFT(6)
    proofs.train(model, Method("x", how), proofs.full_batch(x, y), 500, lr=2e-2)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("angles stay", "W'W'ᵀ = W Wᵀ whatever is learnt", _angles, lambda f: f < 1e-5, "LoRA"),
        Claim("its own family", "rotated blocks are learnt with 60 numbers", _reached, lambda f: f < 0.01,
              "LoRA of more numbers"),
    ]  # fmt: skip
