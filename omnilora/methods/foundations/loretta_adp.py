from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.families import ATTENTION_OUT, FFN_DOWN, layers
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.parameterizations.bottleneck import Bottleneck
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.tensor_train import contract, train_of

CARD = Card(
    key="loretta_adp",
    title="LoRETTA: Low-Rank Economic Tensor-Train Adaptation (LoRETTA-adp)",
    section="foundations",
    kind="parameterization",
    equation=r"h \leftarrow h + c\,(U\,\phi(D h + b_D) + b_U),\quad D^\top = \mathrm{TT}(d \times m),\ U^\top = \mathrm{TT}(m \times d)",
    purpose="A bottleneck adapter after attention and feed-forward whose two projections are tensor trains; norms train too.",
    arxiv="2402.11417",
    venue="NAACL 2024",
    tags=frozenset({"zero_at_init", "trains_lm", "rows"}),
    defaults={"m": 64, "tensor_rank": 5, "phi": "relu", "scale": 1.0, "start": "zero", "norms": True},
    cases=({"m": 4, "tensor_rank": 2, "phi": "tanh", "scale": 0.7},),
    agreement=(
        "Official code (LoRETTA-adp's Linear, output adapter, d = 768, m = 64, rank 5) on the same cores and biases: "
        "forward and gradients of every core equal to 1e-6 in fp32.",
    ),
    differs=(
        "The official code starts both trains at random, so that the model is perturbed at step 0; here the last core of U "
        "and its bias are zero. start='normal' gives the code's start.",
        "The official loop that should unfreeze norms tests a stale variable; here every norm trains, as the paper says.",
        "Modes separate input from output and are factored from any size; the official table is keyed on one width and is "
        "wrong for m = 32 at 1024 to 8192, among others. 768 × 64 gives the table's shape.",
        "The released mapping for LLaMA adapts gate_proj and up_proj before and down_proj after the layer; the default here "
        "is the paper's placement, after attention's and the feed-forward's output projection.",
        "Without the table's 16·16·16·4·4·4 a 4096 × 64 train of rank 5 has 880 numbers here, 1,100 there.",
    ),
    limits=(
        "Not mergeable: a nonlinearity stands between the trains (phi='identity' merges where the layer has a bias).",
        "The tensor-train classifier of the paper is not offered; a fresh head trains whole.",
        "The trains are contracted to matrices once a forward.",
    ),
)


def loretta_adp(m: int = 64, tensor_rank: int = 5, phi: str = "relu", scale: float = 1.0, dropout: float = 0.0,
                start: str = "zero", norms: bool = True) -> Method:  # fmt: skip
    """``m``: width of the bottleneck; ``tensor_rank``: inner ranks of its trains; ``norms``: norms train as own copies."""
    how = Bottleneck(m, "series-out", phi, scale, dropout, start=start, tensor_rank=tensor_rank, bias=True)
    targets = Targets((layers(ATTENTION_OUT, FFN_DOWN),), unfreeze=("norm",) if norms else ())
    return Method("loretta_adp", how, targets=targets)


def _deviation(broken: bool) -> float:
    """Standard deviation of D's entries at 768 × 64 times √(768 + 64) (broken: cores of deviation 1)."""
    model = proofs.Stack(32, 768)
    adapt(model, loretta_adp(norms=False, start="normal"), ["layers.0"])
    cores = train_of(slots(model)[0], "D")
    if broken:
        cores = [torch.randn_like(c) for c in cores]
    return float(contract(cores).std().detach()) * (768 + 64) ** 0.5


def _formula(broken: bool) -> float:
    """Gap of a layer's output to z + c (U relu(D z + b_D) + b_U), z = W x, trains spelled out (broken: without biases)."""
    model, x = proofs.Stack(16, 24, bias=True), torch.randn(32, 16)
    z = model(x).detach()
    adapt(model, loretta_adp(m=8, tensor_rank=3, scale=0.7, start="normal", norms=False), ["layers.0"])
    (s,) = slots(model)
    on = 0.0 if broken else 1.0
    with torch.no_grad():
        D, U = contract(train_of(s, "D")).reshape(24, 8), contract(train_of(s, "U")).reshape(8, 24)
        want = z + 0.7 * (torch.relu(z @ D + on * s.bD) @ U + on * s.bU)
        return proofs.relative(model(x), want)


def _family(broken: bool) -> float:
    """Relative error on a teacher with an adapter of the same trains, 24 → m = 8 (broken: LoRA of equal size)."""
    teacher, model = proofs.Stack(24, 24), proofs.Stack(24, 24)
    model.load_state_dict(teacher.state_dict())
    how = loretta_adp(m=8, tensor_rank=2, phi="tanh", start="normal", norms=False)
    adapt(teacher, how, ["layers.0"])
    with torch.no_grad():
        for name, t in slots(teacher)[0].tensors():
            t.mul_(1.0 if name.startswith("b") else 1.6)
    x = 2 * torch.randn(256, 24)
    base, y = model(x).detach(), teacher(x).detach()
    method = Method("x", LoRA(3, 3.0)) if broken else loretta_adp(m=8, tensor_rank=2, phi="tanh", norms=False)
    proofs.train(model, method, proofs.full_batch(x, y), 800, lr=2e-2, targets=("layers.0",))
    return float((model(x) - y).norm() / (base - y).norm())


def claims() -> list[Claim]:
    return [
        Claim("entry deviation", "entries of a fresh train have the deviation 1/√(d + m)", _deviation,
              lambda f: 0.6 < f < 1.5, "cores of deviation 1"),
        Claim("a bottleneck after the layer", "z + c (U φ(D z + b_D) + b_U) on what the layer makes, bias included", _formula,
              lambda f: f < 1e-5, "a bottleneck without biases"),
        Claim("its own family", "an adapter of the same trains is learnt", _family, lambda f: f < 0.1,
              "LoRA of equal size"),
    ]  # fmt: skip
