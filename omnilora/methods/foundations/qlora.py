from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from omnilora import proofs
from omnilora.core.attach import find_hub
from omnilora.core.method import Card, Claim, Method
from omnilora.core.site import Site
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA
from omnilora.stores.nf4_layer import quantize
from omnilora.stores.quantized_layer import QuantizedLinear

CARD = Card(
    key="qlora",
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    section="foundations",
    kind="store",
    equation=r"y = x\,\mathrm{dq}(\hat W)^\top + b + \tfrac{\alpha}{r}\,(x A^\top) B^\top",
    purpose="The frozen base is held in 4 bits (NF4, double quantized) and dequantized on the fly; LoRA on every linear.",
    arxiv="2305.14314",
    venue="NeurIPS 2023",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "quantized", "trains_lm", "rows"}),
    defaults={"r": 64, "alpha": 16.0, "dropout": 0.0, "quant_type": "nf4", "double": True, "paged": False},
    cases=({"r": 3, "alpha": 5.0},),
    agreement=("bitsandbytes 0.50.2: codes, scales, maps and JSON bit for bit (tests/test_nf4.py).",),
    differs=(
        "The codebook follows the code's quantiles, not the paper's formula, which does not give the shipped table.",
        "Second-level scales use the signed 8-bit dynamic map, as the code; the paper says FP8.",
        "At the start the model equals the quantized base, not the original one.",
    ),
    limits=(
        "Measured on SmolLM2-135M: its 210 matrices take 212,336,640 bytes in bf16 and 54,985,080 in NF4 (79,626,240 as integers "
        "in groups of 32). LoRA r = 8 for 60 updates of 4 questions (demo, seed 0), loss on 16 held-out ones: dense 0.814 to "
        "0.0750, NF4 1.084 to 0.0747.",
        "On a CPU every forward dequantizes the weight: less memory, more time.",
        "Paging is by the system's page cache: with paged=True the optimizer's moments lie in a mapped file.",
        "Merging gives a dense copy of each layer; merge(requantize=True) writes 4 bits and reports the loss.",
    ),
)


def qlora(r: int = 64, alpha: float = 16.0, dropout: float = 0.0, quant_type: str = "nf4", double: bool = True,
          blocksize: int = 64, paged: bool = False) -> Method:  # fmt: skip
    """LoRA over a 4-bit base. ``ol.adapt`` quantizes the linear layers of a dense model first, in place.

    ``paged``: the optimizer's moments lie in a mapped file and are streamed, a parameter at a time.
    """
    if not isinstance(paged, bool):
        raise BadValue(f"paged = {paged!r}.", "Give True or False.")

    def hold(model: nn.Module, sites: Sequence[Site]) -> None:
        if find_hub(model) is None and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
            quantize(model, quant_type, blocksize=blocksize, double=double)

    return Method("qlora", LoRA(r, alpha, dropout), store=hold, optimizer={"name": "paged_adamw"} if paged else {})


def _error(broken: bool) -> float:
    """Relative error on N(0, 1) weights (broken: FP4 in place of NF4)."""
    layer = nn.Sequential(nn.Linear(512, 512, bias=False))
    with torch.no_grad():
        layer[0].weight.normal_()
    before = layer[0].weight.detach().clone()
    quantize(layer, "fp4" if broken else "nf4")
    return proofs.relative(layer[0].dequantized(), before)


def _bytes(broken: bool) -> float:
    """Bytes a weight takes (broken: block scales in fp32)."""
    done = quantize(nn.Sequential(nn.Linear(1024, 1024)), double=not broken)
    return done.after / done.parameters


def _recovers(broken: bool) -> float:
    """Error of the adapted 4-bit layer towards W + planted; rounding alone is 0.092 ‖W‖ ∕ ‖target‖ = 0.077 (broken: one step)."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = torch.randn(512, 64)
    target = model[0].weight.detach() + proofs.planted(64, 64, 4)
    y = x @ target.mT
    proofs.train(model, qlora(r=8, alpha=8.0), proofs.full_batch(x, y), 1 if broken else 600, lr=1e-2)
    return proofs.relative(model(x), y)


def claims() -> list[Claim]:
    return [
        Claim("NF4 error", "relative error 0.092 on normal weights", _error, lambda f: abs(f - 0.092) < 0.003, "FP4"),
        Claim("storage", "at most 0.53 bytes for each weight", _bytes, lambda f: f <= 0.53, "no double quantization"),
        Claim("learns through 4 bits", "gradients pass the quantized base: a planted change is learnt up to its rounding",
              _recovers, lambda f: f < 0.077, "one step only"),
    ]  # fmt: skip
