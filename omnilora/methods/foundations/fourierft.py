from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.fourier import FourierFT
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="fourierft",
    title="Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + s\,\mathrm{Re}\,\mathcal{F}^{-1}(S),\quad S\ \text{zero but for } n \text{ learnt coefficients}",
    purpose="Learns a few coefficients of the spectrum of ΔW at random places.",
    arxiv="2405.03003",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "trains_lm", "rows"}),
    defaults={"n": 1000, "alpha": 150.0, "seed": 777},
    cases=({"n": 9, "alpha": 5.0},),
    agreement=("PEFT 0.21.2: the same places, forward and gradients equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=("Coefficients start at zero; the paper draws them from N(0, 1), PEFT offers both.",),
    limits=(
        "ΔW is formed, by one inverse transform, at every forward.",
        "Places are drawn from the shape and the seed by torch's CPU generator, once for each shape; sites of one shape "
        "share them, as in PEFT.",
        "The paper's frequency bias (places near a chosen frequency) is not offered.",
    ),
)


def fourierft(n: int = 1000, alpha: float = 150.0, seed: int = 777) -> Method:
    """``n``: coefficients a site; ``alpha``: the scale s; ``seed``: of their places."""
    return Method("fourierft", FourierFT(n, alpha, seed), rate=10.0)


def _spectrum(broken: bool) -> float:
    """Share of ΔW's spectral energy at the learnt places and their mirror images (broken: LoRA of equal size)."""
    model = proofs.Stack(20, 16)
    adapt(model, Method("x", LoRA(1)) if broken else fourierft(n=36, alpha=1.0))
    with torch.no_grad():
        for t in trainable(model):
            t.normal_()
    power = torch.fft.fft2(proofs.learned(model)).abs().square()
    flat = torch.randperm(320, generator=torch.Generator().manual_seed(777))[:36]
    mask = torch.zeros(16, 20)
    mask[flat // 20, flat % 20] = 1
    mask[-(flat // 20) % 16, -(flat % 20) % 20] = 1
    return float((power * mask).sum() / power.sum())


def _reached(broken: bool) -> float:
    """Relative error on a full-rank target of the same 36 places (broken: places of another seed)."""
    teacher, model = proofs.Stack(20, 16), proofs.Stack(20, 16)
    adapt(teacher, fourierft(n=36, alpha=1.0))
    with torch.no_grad():
        slots(teacher)[0].c.normal_()
    target = proofs.learned(teacher)
    target = 3 * target / target.norm()
    x = torch.linalg.qr(torch.randn(64, 20)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, fourierft(n=36, alpha=20.0, seed=1 if broken else 777), proofs.full_batch(x, y), 500, lr=0.1)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("a sparse spectrum", "all energy of ΔW is at the drawn places", _spectrum, lambda f: f > 0.999,
              "LoRA of equal size"),
        Claim("its own family", "a full-rank target is reached with 36 numbers", _reached, lambda f: f < 0.01,
              "places of another seed"),
    ]  # fmt: skip
