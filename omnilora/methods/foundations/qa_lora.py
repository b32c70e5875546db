from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt, find_hub
from omnilora.core.merge import merge
from omnilora.core.method import Card, Claim, Method
from omnilora.core.site import Site
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.pooled import PooledLoRA
from omnilora.stores.codecs import IntGroups
from omnilora.stores.coded import quantize_with
from omnilora.stores.quantized_layer import QuantizedLinear

CARD = Card(
    key="qa_lora",
    title="QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
    section="foundations",
    kind="store",
    equation=r"y = x\,\mathrm{dq}(\hat W)^\top + b + s\,\mathrm{pool}_L(x) A^\top B^\top;\quad "
    r"Z_{jg} \leftarrow Z_{jg} - \tfrac{s}{L}\,(BA)_{jg} / S_{jg}",
    purpose="Inputs are pooled by quantization group, so that the update folds exactly into the zero points of an integer "
    "base: the merged model keeps its integers.",
    arxiv="2309.14717",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "quantized", "trains_lm", "rows"}),
    defaults={"r": 64, "alpha": 16.0, "dropout": 0.0, "bits": 4, "group": 32, "pool": "mean"},
    cases=({"r": 3, "alpha": 5.0, "group": 2}, {"r": 2, "alpha": 3.0, "group": 4, "pool": "sum", "dropout": 0.1}),
    agreement=(
        "PEFT 0.21.2 (use_qalora): outputs and gradients equal to 1e-5 with A = i/L times PEFT's, which multiplies the mean by "
        "the number of groups (tests/test_agreement_quantized.py). PEFT refuses to merge.",
    ),
    differs=(
        "The base is quantized by min and max of each group; the paper uses GPTQ.",
        "Zero points stay real numbers, as in the official merge; the scale and the group are the method's, where the "
        "official merge has 16/64 and 32 written in.",
        "A last group may be shorter than L; the paper wants L to divide the inputs.",
    ),
    limits=(
        "merge folds into the base that ol.adapt quantized. A dense base merges as for any method.",
        "The paper's learning rates (2e-5 and 1e-5) could not be checked; the official code's default is 2e-4.",
        "Measured on SmolLM2-135M as for qlora (r = 8): 79,626,240 bytes with fp32 scales and zero points, loss 0.812 to 0.163 "
        "where LoRA on the dense base ends at 0.0750. Pooling leaves A with in/32 columns. Published accuracies were not "
        "reproduced.",
    ),
    not_with={"requantizing merges": "The merge is exact as it is; requantizing rounds again."},
)


def qa_lora(r: int = 64, alpha: float = 16.0, dropout: float = 0.0, bits: int = 4, group: int = 32,
            pool: str = "mean") -> Method:  # fmt: skip
    """Group-pooled LoRA over an integer base. ``ol.adapt`` quantizes the linear layers of a dense model first, in place."""
    how = PooledLoRA(r, alpha, dropout, group, pool)
    how.check()
    codec = IntGroups(bits, group)

    def hold(model: nn.Module, sites: Sequence[Site]) -> None:
        if find_hub(model) is None and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
            quantize_with(model, codec)

    return Method("qa_lora", how, store=hold)


def _merged(broken: bool) -> float:
    """Largest gap of outputs after merging in fp64 (broken: plain LoRA on the same base, written into its codes)."""
    model = proofs.Stack(64, 48).double()
    made = qa_lora(r=3, alpha=5.0)
    adapt(model, Method("x", LoRA(3, 5.0), store=made.store) if broken else made)
    shake(model)
    x = torch.randn(16, 64, dtype=torch.float64)
    y = model(x)
    merge(model, requantize=broken, bound=10.0)
    return proofs.relative(model(x), y)


def _codes(broken: bool) -> float:
    """Share of codes that merging changes (broken: plain LoRA, requantized)."""
    model = proofs.Stack(64, 48)
    made = qa_lora(r=3, alpha=5.0, pool="sum")
    adapt(model, Method("x", LoRA(3, 5.0), store=made.store) if broken else made)
    shake(model, size=0.1)
    before = model.layers[0].weight.clone()
    report = merge(model, requantize=broken, bound=10.0)
    assert broken or all(r.absorbed for r in report.layers)
    return float((before != model.layers[0].weight).float().mean())


def _two_bits(broken: bool) -> float:
    """Excess loss of the merged 2-bit model over the trained one, relative (broken: plain LoRA, requantized)."""
    model, made = proofs.Stack(64, 32), qa_lora(r=8, alpha=8.0, bits=2, group=8)
    x = torch.randn(512, 64)
    target = model.layers[0].weight.detach() + proofs.planted(32, 64, 4, 0.3)
    y = x @ target.mT
    how = Method("x", LoRA(8, 8.0), store=made.store) if broken else made
    proofs.train(model, how, proofs.full_batch(x, y), 200, lr=2e-2)

    def loss() -> Tensor:
        return (model(x) - y).square().mean().detach()

    before = loss()
    merge(model, requantize=broken, bound=10.0)
    return float((loss() - before).abs() / before)


def claims() -> list[Claim]:
    return [
        Claim("merges exactly", "the merged integer base gives the unmerged outputs in fp64", _merged, lambda f: f < 1e-10,
              "plain LoRA of equal rank on the same base"),
        Claim("codes stay", "no integer changes when the update is folded into the zero points", _codes, lambda f: f == 0,
              "plain LoRA of equal rank on the same base"),
        Claim("2 bits after merging", "a trained 2-bit model loses nothing by merging", _two_bits, lambda f: f < 1e-3,
              "plain LoRA of equal rank on the same base"),
    ]  # fmt: skip
