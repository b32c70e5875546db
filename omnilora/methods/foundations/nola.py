from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.core.state import state
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.nola import NOLA, bases

CARD = Card(
    key="nola",
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \tfrac{\alpha}{r}\Big(\sum_j \beta_j B_j\Big)\Big(A_0 + \sum_i \alpha_i A_i\Big)",
    purpose="A and B are mixtures of seeded random matrices: a site trains and stores its coefficients only.",
    arxiv="2310.02556",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 8.0, "k_A": 512, "k_B": 512, "seed": 0},
    cases=({"r": 3, "alpha": 5.0, "k_A": 6, "k_B": 7, "seed": 1},),
    agreement=(
        "Official code (gpt/src/model_nola.py, GenerateParams) given the same bases: factor and gradient of the "
        "coefficients equal to 1e-6 in fp32.",
    ),
    differs=(
        "Three official copies differ; this follows the GPT-2 and LLaMA ones (1/√k and A₀), not the vision copy, whose "
        "coefficients start at 1/k without A₀, so that ΔW ≠ 0.",
        "The official functions reseed the global generator; here every basis has a private generator on the CPU, keyed by "
        "(seed, site, side, index), so that a site's bases follow from its name and the seed.",
        "Entries lie on a grid of 2¹⁶ values, four to a 64-bit draw.",
        "The official chunked function uses undefined names; here chunks bound the memory and change no number.",
    ),
    limits=(
        "Every forward and every backward draws k·r·(in + out) numbers a site: about 5 ms for 2.4 million on one core. "
        "An update of a 135 M model with all 210 linear layers and 512 + 512 bases each takes about 9 s there.",
        "The file is tied to torch's CPU generator (mt19937) and to the names of the sites.",
        "No forward-mode derivatives through the coefficients (torch.func.jvp). Coefficients are stored in fp32, not in 4 bits.",
        "Works on any site; the paper adapts linear layers only.",
    ),
)


def nola(r: int = 8, alpha: float = 8.0, k_A: int = 512, k_B: int = 512, seed: int = 0, dropout: float = 0.0) -> Method:
    """``k_A``, ``k_B``: bases of A and B, the trainable numbers of a site, whatever r and the layer's size."""
    return Method("nola", NOLA(r, alpha, dropout, k_A, k_B, seed), rate=10.0)


def _family(broken: bool) -> float:
    """Error of 16 + 16 coefficients on a 64 × 64 target of rank 8 from the same bases (broken: from another seed's)."""
    teacher, model = proofs.Stack(64, 64), proofs.Stack(64, 64)
    adapt(teacher, nola(r=8, k_A=16, k_B=16, seed=1 if broken else 0))
    with torch.no_grad():
        for t in trainable(teacher):
            t.normal_()
    target = proofs.learned(teacher)
    target = target / target.norm() * 4
    x = torch.linalg.qr(torch.randn(128, 64)).Q * 11
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, nola(r=8, k_A=16, k_B=16), proofs.full_batch(x, y), 800, lr=5e-2)
    return proofs.relative(proofs.learned(model), target)


def _gradient(broken: bool) -> float:
    """Gap of ∂L/∂α to ⟨∂L/∂A, A_i⟩ with the bases spelled out (broken: bases of another site)."""
    model = proofs.Stack(24, 20)
    adapt(model, nola(r=3, k_A=5, k_B=4))
    (s,) = slots(model)
    with torch.no_grad():
        s.alpha.normal_()
        s.beta.normal_()
    name = "layers.1" if broken else "layers.0"
    (_, a), (_, b) = next(bases(f"0/{name}/A", 6, 72)), next(bases(f"0/{name}/B", 4, 60))
    alpha, beta = s.alpha.detach().requires_grad_(), s.beta.detach().requires_grad_()
    A = (torch.cat((torch.tensor([24**-0.5]), alpha / 5**0.5)) @ a).view(3, 24)
    B = (beta / 4**0.5 @ b).view(20, 3)
    x = torch.randn(9, 24)
    (x @ model.layers[0].weight.mT + s.scale * x @ A.mT @ B.mT).square().sum().backward()
    model(x).square().sum().backward()
    return max(proofs.relative(s.alpha.grad, alpha.grad), proofs.relative(s.beta.grad, beta.grad))


def _stored(broken: bool) -> float:
    """Numbers in the file of two sites of 256 × 256 and 256 × 64 (broken: LoRA of rank 1)."""
    model = proofs.Stack(256, 256, 64)
    adapt(model, Method("x", LoRA(1)) if broken else nola(k_A=40, k_B=24))
    return float(state(model).numel())


def claims() -> list[Claim]:
    return [
        Claim("target inside the family", "a rank-8 target of the same bases is reached with 32 numbers", _family,
              lambda f: f < 0.03, "a target from the bases of another seed"),
        Claim("bases made anew", "the gradient of a coefficient is the product with its basis", _gradient,
              lambda f: f < 1e-5, "the bases of another site"),
        Claim("only coefficients are stored", "k_A + k_B numbers a site, whatever its size", _stored,
              lambda f: f == 128, "LoRA of rank 1"),
    ]  # fmt: skip
