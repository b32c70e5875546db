from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import base_state_dict, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.methods.foundations.bitfit import _Net
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="ln_tuning",
    title="Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
    section="foundations",
    kind="parameterization",
    equation=r"\mathrm{LN}'(x) = g' \odot \hat{x} + b',\quad g', b' \text{ learn}",
    purpose="Trains the weights and biases of normalization layers and nothing else.",
    arxiv="2312.11420",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm"}),
    cases=({},),
    agreement=("PEFT 0.21.2: forward and gradients of weight and bias equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=("Norms are found by the name of their class, so that RMSNorm and its kin are among them.",),
    limits=("A norm without parameters has nothing to train.", "Own norms are whole tensors: rows of one batch cannot differ."),
)


def ln_tuning() -> Method:
    """Every normalization layer as an own copy."""
    return Method("ln_tuning", None, targets=Targets(include=(), unfreeze=("norm",)), rate=5.0)


def _moved(broken: bool) -> float:
    """Share of the adapter's numbers that belong to norms, 0 if the base moved (broken: LoRA)."""
    model, x, y = _Net(), torch.randn(64, 8), torch.randn(64, 4)
    before = {k: v.clone() for k, v in base_state_dict(model).items()}
    proofs.train(model, Method("x", LoRA(1)) if broken else ln_tuning(), proofs.full_batch(x, y), 3,
                 targets=("up", "down") if broken else None)  # fmt: skip
    after = base_state_dict(model)
    if any(not torch.equal(before[k], after[k]) for k in before):
        return 0.0
    trained = [(s.site.role, t.numel()) for s in slots(model) for _, t in s.tensors()]
    return sum(n for role, n in trained if role == "norm") / sum(n for _, n in trained)


def _rescaled(broken: bool) -> float:
    """Relative error on a teacher with another norm, 32 numbers (broken: LoRA of rank 1, 44 numbers)."""
    model, teacher, x = _Net(), _Net(), torch.randn(256, 8)
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        teacher.norm.weight.copy_(torch.randn(16))
        teacher.norm.bias.copy_(torch.randn(16))
        base, y = model(x), teacher(x)
    how = Method("x", LoRA(1, 1.0)) if broken else ln_tuning()
    proofs.train(model, how, proofs.full_batch(x, y), 800, lr=2e-2, targets=("up", "down") if broken else None)
    return float((model(x) - y).norm() / (base - y).norm())


def claims() -> list[Claim]:
    return [
        Claim("norms only", "all that trains belongs to a norm, and the base does not move", _moved, lambda f: f == 1, "LoRA"),
        Claim("a target in the norm", "a teacher with another norm is learnt", _rescaled, lambda f: f < 0.1,
              "LoRA of more numbers"),
    ]  # fmt: skip
