from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import finite, positive_rank
from omnilora.parameterizations.svd import SVD
from omnilora.procedures.meta import Learner, by_roles, check_episodes, meta_train

CARD = Card(
    key="amal",
    title="AMAL: Meta Knowledge-Driven Few-Shot Adapter Learning",
    section="foundations",
    kind="procedure",
    equation=r"\Delta W_l = U_l \operatorname{diag}(\lambda_l) V_l^\top,\quad \phi = \{\lambda, \text{head}\}:\; "
    r"\phi \leftarrow \phi - \alpha \nabla_\phi L_{\text{support}},\quad \theta = \{U, V, \lambda_0, \alpha\} \text{ by } L_{\text{query}}",
    purpose="A meta-learned pool of rank-1 pieces: a new task of few examples only sets how they are mixed.",
    venue="EMNLP 2022",
    tags=frozenset({"applies", "zero_at_init", "mergeable", "low_rank", "additive", "rows"}),
    defaults={"pool": 8, "inner_steps": 5, "ways": 5, "shots": 5},
    cases=({"pool": 3},),
    command="omnilora apply --method amal --model package:minilm --task classification --data train.jsonl "
    "--eval-data new-classes.jsonl --target 're:encoder\\.layer\\.5\\..*' --max-length 24 --output runs/amal",
    differs=("There is no official code, and only the abstract was read: pool, inner and outer loop are a reconstruction "
             "(unverified), as are inner_steps and the prototype head.",),
    limits=(
        "Fused attention has no second derivative: the outer loop uses plain attention, which is slow on a CPU. Adapt the last "
        "layers only (--target 're:encoder\\.layer\\.5\\..*'), shorten texts, or set hyper.second_order=false.",
        "MiniLM, last layer, 31 modules of the Python library to train on and 21 unseen ones, 5-way 5-shot, 24 tokens, "
        "inner_steps=3, lr=3e-3, 40 updates of one episode, 30 test episodes, one seed: prototypes of the base 0.825 ± 0.026, "
        "after meta-training 0.835 ± 0.029; the gain 0.009 ± 0.010 is within its interval, and the inner loop changed nothing.",
        "Trained by `omnilora train` it is an ordinary adapter of the SVD-like form, without episodes.",
    ),
)  # fmt: skip


def amal(pool: int = 8, std: float = 0.05, fast: Sequence[str] = ("core",), ways: int = 5, shots: int = 5, queries: int = 5,
         inner_steps: int = 5, inner_rate: float = 0.1, second_order: bool = True, updates: int = 40, tasks: int = 1,
         test_episodes: int = 30, lr: float = 1e-3) -> Method:  # fmt: skip
    """``pool``: pieces u vᵀ a layer, ``std``: of their numbers at the start; ``fast``: roles that a task learns ("core": λ);
    episodes of ``ways`` classes with ``shots`` and ``queries`` texts; ``updates`` of ``tasks`` episodes each."""
    check_episodes(ways, shots, queries)
    for name, count in (("updates", updates), ("tasks", tasks), ("test_episodes", test_episodes)):
        positive_rank(count, name)
    finite(lr, "lr", 1e-12)
    finite(std, "std", 1e-12)
    form = SVD(pool, float(pool), std=std)

    def work(job: Any) -> Mapping[str, Any]:
        from omnilora.procedures.episodes import few_shot

        return few_shot(job, form, tuple(fast), ways, shots, queries, inner_steps, inner_rate, second_order, updates, tasks,
                        test_episodes, lr)  # fmt: skip

    return Method("amal", form, apply=work)


# -- claims --------------------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]


def learner_on(model: nn.Module, roles: Sequence[str] = ("core",), **how: Any) -> Learner:
    def loss(values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return (functional_call(model, dict(values), (batch[0],)) - batch[1]).square().mean()

    return Learner(model, by_roles(model, *roles), loss, **how)


def _second(broken: bool) -> float:
    """Relative gap of the outer gradient with respect to U to finite differences, two layers (broken: first order)."""
    model = proofs.Stack(5, 6, 4, act=torch.tanh)
    adapt(model, amal(pool=2, std=0.5))
    shake(model)
    model.double()
    learner = learner_on(model, rate=0.5, steps=3, second_order=not broken)
    task = [tuple((torch.randn(n, 5).double(), torch.randn(n, 4).double()) for n in (6, 8))]
    (U, *_) = [p for n, p in model.named_parameters() if n.endswith(".P")]
    (got,) = torch.autograd.grad(learner.outer(task), U)  # type: ignore[arg-type]
    want, h = torch.zeros_like(U), 1e-5
    for i in range(U.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                U.view(-1)[i] += sign * h
            ends.append(float(learner.outer(task).detach()))  # type: ignore[arg-type]
            with torch.no_grad():
                U.view(-1)[i] -= sign * h
        want.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return proofs.relative(got, want)


def _moves(broken: bool) -> float:
    """Numbers that a task changes, of 3 pieces in each of two layers (broken: MAML over every tensor of the adapter)."""
    model = proofs.Stack(7, 9, 5, act=torch.tanh)
    adapt(model, amal(pool=3, std=0.5))
    shake(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    roles = ("core", "input", "output") if broken else ("core",)
    phi = learner_on(model, roles, steps=3).adapt((torch.randn(5, 7), torch.randn(5, 5)))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    return float(sum((v != before[k]).sum() for k, v in phi.items()))


def _tasks(g: torch.Generator) -> Iterator[list[tuple[Batch, Batch]]]:
    """y = x (W + Σ_k c_k u_k v_kᵀ)ᵀ with u, v for all tasks and c for one; 5 support and 20 query points."""
    u, v = (torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(s))).Q for s in (1, 2))
    while True:
        group = []
        for _ in range(2):
            x, c = torch.randn(25, 12, generator=g), 2 * torch.randn(3, generator=g)
            y = x @ ((u * c) @ v.mT).mT
            group.append(((x[:5], y[:5]), (x[5:], y[5:])))
        yield group


def _adapts(broken: bool) -> float:
    """Query error after 5 points over that before, on new tasks (broken: a pool that was not meta-trained)."""
    model = proofs.Stack(12, 12)
    torch.nn.init.zeros_(model.layers[0].weight)  # type: ignore[arg-type]
    adapt(model, amal(pool=3, std=0.3))
    learner = learner_on(model, rate=0.5, steps=3)
    if not broken:
        draw = _tasks(torch.Generator().manual_seed(0))
        meta_train(learner, (next(draw) for _ in range(60)), lr=5e-2)
    tests = _tasks(torch.Generator().manual_seed(9))
    pairs = [t for _ in range(20) for t in next(tests)]
    with torch.no_grad():
        start = sum(float(learner.loss({}, q)) for _, q in pairs)
    return sum(float(learner.loss(learner.adapt(s), q).detach()) for s, q in pairs) / start


def claims() -> list[Claim]:
    return [
        Claim("second order", "the outer gradient passes through the inner loop", _second, lambda f: f < 1e-5, "first order"),
        Claim("a task is K numbers a layer", "3 pieces in 2 layers: 6, at any width; U and V stay", _moves, lambda f: f == 6,
              "MAML over all tensors"),
        Claim("adapts from 5 points", "a meta-trained pool finds a new mixture", _adapts, lambda f: f < 0.3,
              "a pool that was not meta-trained"),
    ]  # fmt: skip
