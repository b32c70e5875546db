from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.context import Context
from omnilora.core.maps import build
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import one_of
from omnilora.core.site import Site
from omnilora.errors import BadValue
from omnilora.initializers.split import Split, split
from omnilora.initializers.splitting import Pair, fill_pair, split_layers
from omnilora.parameterizations.lora import LoRA
from omnilora.stores.codecs import Codec, IntGroups, NormalFloat
from omnilora.stores.coded import quantize_with

CARD = Card(
    key="loftq",
    title="LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
    section="foundations",
    kind="initialization",
    equation=r"\min_{Q,A,B} \lVert W - Q - s B A \rVert_F:\quad Q_t = q(W - s B A),\; s B A = \mathrm{SVD}_r(W - Q_t)",
    purpose="Quantized base and adapter are chosen together, so that the model with its fresh adapter is near the original "
    "one: few-bit bases become trainable.",
    arxiv="2310.08659",
    venue="ICLR 2024",
    tags=frozenset({"mergeable", "low_rank", "additive", "quantized", "trains_lm", "rows"}),
    defaults={"r": 16, "alpha": 16.0, "bits": 4, "quantizer": "normal", "iterations": 5, "block": 64},
    cases=({"r": 3, "alpha": 5.0},),
    agreement=(
        "PEFT 0.21.2 (loftq_init, NF4, 1, 2 and 5 iterations, s = 1): Q, B A and their sum equal to 1e-5, 1e-4 and 1e-5 "
        "(tests/test_agreement_quantized.py).",
        "Official quantizers on a 256 × 256 matrix: NF2, NF3, NF4 and uniform 2 and 3 bits equal to 2e-7; uniform 4 bits in all "
        "but one weight, a tie.",
    ),
    differs=(
        "PEFT and the official script run the SVD without the LoRA scaling: with α ≠ r their model starts at Q + s B A, "
        "not at W. Here 1/√s is folded into A and B; compat_scaling=True gives their start.",
        "The error need not fall with every iteration, and in 2 bits the last of five can be worse than the first; "
        "best=True keeps the best iterate, the default keeps the last as they do.",
    ),
    limits=(
        "Measured on SmolLM2-135M as for qlora, NF4 with fp32 scales (59,719,680 bytes): loss 1.096 to 0.0432. The split took "
        "136 s on one busy core. The start is no better than NF4's (1.084): a smaller weight error is not a smaller loss.",
        "Which layers the paper's mixed bits keep at 4 bits is unverified; `bits_of` takes a pattern → bits.",
        "The official script skips embeddings, as here; whether the paper quantizes them is unverified.",
        "The saved adapter carries the quantized base. PEFT cannot hold it.",
    ),
    not_with={"load_in_4bit": "The split needs the dense weight; it quantizes itself."},
)


def loftq(r: int = 16, alpha: float = 16.0, dropout: float = 0.0, bits: int = 4, quantizer: str = "normal",
          iterations: int = 5, block: int = 64, best: bool = False, compat_scaling: bool = False,
          bits_of: Mapping[str, int] | None = None) -> Method:  # fmt: skip
    """LoRA started from the split of W.

    Args:
        quantizer: "normal" (NF by ``block``) or "uniform" (the whole matrix, cut at mean ± 2 std).
        bits_of: pattern of layers → bits, where they differ from ``bits``; the first match wins.
        compat_scaling: B and A as released checkpoints have them, not divided by √s.
    """
    one_of(quantizer, "quantizer", "normal", "uniform")
    if not isinstance(iterations, int) or iterations < 1:
        raise BadValue(f"iterations = {iterations!r}.", "Give an integer ≥ 1; qlora is the start without a split.")
    codecs = {b: _codec(quantizer, b, block) for b in {bits, *(bits_of or {}).values()}}

    def codec_of(site: Site) -> Codec:
        from omnilora.core.targets import matches

        return codecs[next((b for p, b in (bits_of or {}).items() if matches(p, site.name, site.layer)), bits)]

    def work(site: Site, codec: Codec) -> Split:
        assert site.how is not None
        s = 1.0 if compat_scaling else site.how.first_scale(site)
        return split(site.read(), codec, site.how.rank(), iterations, s=s, best=best)

    def hold(model: nn.Module, sites: Sequence[Site]) -> dict[str, Pair]:
        return split_layers(model, sites, codec_of, work)

    return Method("loftq", LoRA(r, alpha, dropout), store=hold, fill=fill_pair)


def _codec(quantizer: str, bits: int, block: int) -> Codec:
    return NormalFloat(bits, block) if quantizer == "normal" else IntGroups(bits, 0, clip=2.0)


def _matrix() -> torch.Tensor:
    """256 × 256 with singular values 1/√k."""
    u, v = (torch.linalg.qr(torch.randn(256, 256)).Q for _ in range(2))
    return u * torch.arange(1, 257).rsqrt() @ v.mT


def _start(broken: bool) -> float:
    """‖W − effective weight‖ at the start over ‖W − q(W)‖, 2 bits, α = 4 r (broken: SVD without the LoRA scaling)."""
    model = proofs.Stack(256, 256)
    W = _matrix()
    with torch.no_grad():
        model.layers[0].weight.copy_(W)
    adapt(model, loftq(r=16, alpha=64.0, bits=2, compat_scaling=broken))
    (slot,) = slots(model)
    with torch.no_grad():
        now = build(slot.site.W, [(slot, 1.0)], Context()).dense()
    return float((W - now).norm() / (W - NormalFloat(2).round(W)).norm())


def _iterating(broken: bool) -> float:
    """Error after 5 iterations over that of quantizing, 4 bits (broken: one iteration)."""
    W = _matrix()
    return split(W, NormalFloat(4), 16, 1 if broken else 5).errors[-1] / float((W - NormalFloat(4).round(W)).norm())


def _two_bits(broken: bool) -> float:
    """Loss of a tanh network in 2 bits after 20 steps towards itself, in the variance of its outputs (broken: QLoRA)."""
    model = proofs.Stack(64, 64, 64, act=torch.tanh)
    with torch.no_grad():
        for layer in model.layers:
            u, v = (torch.linalg.qr(torch.randn(64, 64)).Q for _ in range(2))
            layer.weight.copy_(3 * u / torch.arange(1, 65) @ v.mT)
    x = torch.randn(512, 64)
    y = model(x).detach()
    how = loftq(r=8, alpha=16.0, bits=2, best=True)
    if broken:
        quantize_with(model, NormalFloat(2))
        how = Method("x", LoRA(8, 16.0))
    proofs.train(model, how, proofs.full_batch(x, y), 20, lr=3e-3)
    return float(((model(x) - y).square().mean() / y.var()).detach())


def claims() -> list[Claim]:
    return [
        Claim("starts near W for α ≠ r", "the effective weight is nearer to W than the quantized one", _start,
              lambda f: f < 0.95, "an SVD without the LoRA scaling"),
        Claim("iterations pay", "five alternations leave less than 0.82 of the rounding error in 4 bits", _iterating,
              lambda f: f < 0.82, "one iteration"),
        Claim("2 bits train", "the split start ends lower than plain 2 bits at equal steps", _two_bits,
              lambda f: f < 0.11, "QLoRA in 2 bits"),
    ]  # fmt: skip
