"""The public contract: what every parameterization, rule, combination and method must keep, as checks you can run.

    ol.check_parameterization(MyForm(r=3, alpha=5.0))      # raises AssertionError with what broke
    for check in contract.checks_for(method): check.run()

Checks are chosen by the tags on a card, never by names. Random tensors replace the initial ones, α ≠ r, out ≠ in.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core import attach, files, merge, run, state
from omnilora.core.fingerprint import digest
from omnilora.core.maps import build
from omnilora.core.method import Entry, Method
from omnilora.core.op import Op
from omnilora.core.parameterization import Parameterization, from_config, is_additive, to_config
from omnilora.core.site import Base
from omnilora.core.state import AdapterState, Combine
from omnilora.errors import NotExpressible, NotMergeable
from omnilora.parameterizations.lora import LoRA
from omnilora.plans.executor import off

KINDS = ("linear", "conv", "embedding", "transposed", "slice", "nf4")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Transposed(nn.Module):
    """A linear layer that stores (in, out), as GPT-2's; recognised by its class name."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D = type("Conv1D", (Transposed,), {"__module__": __name__})


class World(nn.Module):
    """One layer of the kind under test between fixed neighbours; ``sample`` gives a batch of four rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        layer: nn.Module
        if kind == "conv":
            layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
        elif kind == "embedding":
            layer = nn.Embedding(11, 6, padding_idx=0)
        elif kind == "transposed":
            layer = Conv1D(7, 5)
        else:
            layer = nn.Linear(64 if kind == "nf4" else 5, 12 if kind == "slice" else 7)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def sample(self, rows: int = 4) -> Tensor:
        if self.kind == "embedding":
            return torch.randint(0, 11, (rows, 5))
        if self.kind == "conv":
            return torch.randn(rows, 4, 7, 6, dtype=next(self.layer.parameters()).dtype)
        width = {"nf4": 64}.get(self.kind, 5)
        layer: Any = self.layer
        dtype = layer.bias.dtype if self.kind == "nf4" else layer.weight.dtype
        return torch.randn(rows, 3, width, dtype=dtype)

    @property
    def target(self) -> str:
        return "layer[1/3]" if self.kind == "slice" else "layer"


def world(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> World:
    torch.manual_seed(seed)
    made = World(kind).to(dtype)
    if kind == "nf4":
        from omnilora.stores.nf4_layer import quantize

        quantize(made)
    return made.eval()


def adapted(how: Parameterization, kind: str, dtype: torch.dtype = torch.float64, name: str = "default") -> World:
    """A world with the adapter on it, every tensor moved away from its start."""
    model = world(kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks are large for layers this small
        attach.adapt(model, Method("contract", how), [model.target], name=name)
    shake(model, name)
    return model


def shake(model: nn.Module, name: str | None = None, size: float = 0.3) -> None:
    """Move every tensor of an adapter, reproducibly; shared ones once."""
    g = torch.Generator().manual_seed(7)
    done: set[int] = set()
    with torch.no_grad():
        for slot in attach.slots(model, name):
            for _, t in slot.tensors():
                if id(t) not in done:
                    done.add(id(t))
                    t.add_(size * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Relative to the larger norm."""
    a, b = a.detach().double(), b.detach().double()
    gap = float((a - b).norm() / b.norm().clamp_min(1e-30))
    if not gap <= tolerance:
        raise AssertionError(f"{what}: relative difference {gap:.3g} > {tolerance:.1g}")


@dataclass(frozen=True)
class Check:
    """One check of one case."""

    name: str
    run: Callable[[], Any]


# -- parameterizations -----------------------------------------------------------------------------------------------------


def check_parameterization(how: Parameterization, tags: frozenset[str] | None = None,
                           kinds: Sequence[str] = ("linear", "conv", "embedding", "transposed", "slice")) -> int:  # fmt: skip
    """Run every check that applies; returns how many ran. ``tags`` as on a card; default: from the form itself."""
    done = 0
    for check in parameterization_checks(how, tags, kinds):
        check.run()
        done += 1
    return done


def own_tags(how: Parameterization) -> frozenset[str]:
    tags = {"rows"}
    if how.mergeable:
        tags.add("mergeable")
    if is_additive(how):
        tags.add("additive")
    return frozenset(tags)


def parameterization_checks(how: Parameterization, tags: frozenset[str] | None, kinds: Sequence[str],
                            dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
                            compile: bool = True) -> Iterator[Check]:  # fmt: skip
    tags = own_tags(how) if tags is None else tags
    for kind in kinds:
        if not fits(how, kind):
            continue
        at = f"{type(how).__name__}-{kind}"
        yield Check(f"{at}-gradcheck", lambda k=kind: _gradients(how, k))  # type: ignore[misc]
        yield Check(f"{at}-dense", lambda k=kind: _dense(how, k, tags))  # type: ignore[misc]
        yield Check(f"{at}-plan", lambda k=kind: _plan(how, k))  # type: ignore[misc]
        for dtype in dtypes:
            if kind == "nf4" and dtype == torch.float64:
                continue
            on = f"{at}-{str(dtype).removeprefix('torch.')}"
            if "zero_at_init" in tags:
                yield Check(f"{on}-start", lambda k=kind, d=dtype: _start(how, k, d))  # type: ignore[misc]
            if "mergeable" in tags:
                yield Check(f"{on}-merge", lambda k=kind, d=dtype: _merge(how, k, d))  # type: ignore[misc]
            if "rows" in tags:
                yield Check(f"{on}-rows", lambda k=kind, d=dtype: _rows(how, k, d))  # type: ignore[misc]
            yield Check(f"{on}-train", lambda k=kind, d=dtype: _train(how, k, d))  # type: ignore[misc]
            yield Check(f"{on}-save", lambda k=kind, d=dtype: _save(how, k, d))  # type: ignore[misc]
        yield Check(f"{at}-copies", lambda k=kind: _copies(how, k))  # type: ignore[misc]
        if compile:
            yield Check(f"{at}-compile", lambda k=kind: _compile(how, k))  # type: ignore[misc]
    yield Check(f"{type(how).__name__}-config", lambda: _config(how))


def fits(how: Parameterization, kind: str) -> bool:
    """Whether the form takes this kind of layer; a refusal must be a typed error."""
    try:
        adapted(how, kind, torch.float32 if kind == "nf4" else torch.float64)
    except NotExpressible:
        return False
    return True


def _tree(model: World) -> tuple[Op, Any]:
    (slot,) = attach.slots(model)
    base: Op = Base(slot.site, slot.site.layer)
    return build(base, [(slot, 1.0)], attach.hub_of(model).current()), slot


def _gradients(how: Parameterization, kind: str) -> None:
    dtype = torch.float32 if kind == "nf4" else torch.float64
    model = adapted(how, kind, dtype)
    if kind == "nf4":
        return  # fp64 differences of a quantized layer test the quantizer's dtype, not the form; _train covers nf4
    x = model.sample(2)
    tensors = run.trainable(model) if how.exact_gradient else []
    inputs = ([x.requires_grad_()] if x.is_floating_point() else []) + tensors

    if not inputs:
        return

    def f(*_: Tensor) -> Tensor:
        return model(x)

    if not torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True):
        raise AssertionError("gradcheck failed")


def _dense(how: Parameterization, kind: str, tags: frozenset[str]) -> None:
    """matrix, factors and sq_norm of one tree agree; routed maps refuse with a typed error."""
    model = adapted(how, kind, torch.float32 if kind == "nf4" else torch.float64)
    tree, slot = _tree(model)
    if "mergeable" not in tags:
        try:
            tree.dense()
        except NotMergeable:
            return
        raise AssertionError("dense() of a map that is not mergeable must raise NotMergeable")
    tolerance = 1e-5 if kind == "nf4" else 1e-10
    m = tree.dense()
    close(tree.sq_norm(), m.square().sum(-1), tolerance, "sq_norm")
    if "low_rank" in tags:
        change = slot.how.delta(slot, attach.hub_of(model).current())
        ba = change.factors()
        if ba is None:
            raise AssertionError("a low_rank form has factors")
        close(ba[0] @ ba[1], change.dense(), tolerance, "B A")
        x = torch.randn(3, ba[1].shape[-1], dtype=m.dtype)
        close(change.transpose()(x @ change.dense().mT), x @ change.dense().mT @ change.dense(), tolerance, "transpose")


def _plan(how: Parameterization, kind: str) -> None:
    """However the map is run, it gives its tree's values, gradients and second derivatives."""
    model = adapted(how, kind, torch.float32 if kind == "nf4" else torch.float64)
    x = model.sample(3)
    inputs = ([x.requires_grad_()] if x.is_floating_point() else []) + run.trainable(model)
    tolerance = 1e-5 if kind == "nf4" else 1e-12
    twice = 2e-5 if kind == "nf4" else 1e-12  # second derivatives in fp32: either way is up to 6e-6 from those in fp64

    def found() -> list[tuple[Tensor, float]]:
        y = model(x)
        if not y.requires_grad:
            return [(y, tolerance)]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        bent = [g for g in first if g.requires_grad]
        second = torch.autograd.grad(sum(g.square().sum() for g in bent), inputs, allow_unused=True) if bent else []  # type: ignore[arg-type]
        again = torch.autograd.grad(model(x).sin().sum(), inputs)
        bent = [t.new_zeros(()) if g is None else g for g, t in zip(second, inputs)]
        return [*((t, tolerance) for t in (y, *first, *again)), *((t, twice) for t in bent)]

    with off():
        want = found()
    for (a, bound), (b, _) in zip(found(), want, strict=True):
        close(a, b, bound, "fused plan against its tree")


def _start(how: Parameterization, kind: str, dtype: torch.dtype) -> None:
    model = world(kind, dtype)
    x = model.sample()
    before = model(x)
    attach.adapt(model, Method("contract", how), [model.target])
    gap = float((model(x) - before).abs().max())
    if gap > (0 if is_additive(how) else TOLERANCE[dtype]):
        raise AssertionError(f"the adapted model differs from the base by {gap:.3g} at the start")


def _merge(how: Parameterization, kind: str, dtype: torch.dtype) -> None:
    model = adapted(how, kind, dtype)
    hashes, x = _hashes(model), model.sample()
    y = model(x)
    for _ in range(2):
        merge.merge(model, bound=1.0 if kind == "nf4" else None)
        close(model(x), y, TOLERANCE[dtype], "merged output")
        merge.unmerge(model)
        if _hashes(model) != hashes:
            raise AssertionError("unmerge did not restore the base bit for bit")
    close(model(x), y, 0.0, "output after unmerge")
    attach.detach(model)
    if type(model.layer) is not type(world(kind, dtype).layer) or _hashes(model) != hashes:
        raise AssertionError("detach did not restore the layer")


def _rows(how: Parameterization, kind: str, dtype: torch.dtype) -> None:
    """Row i of a mixed batch equals row i alone, outputs and gradients; two adapters and bare rows."""
    model = adapted(how, kind, dtype, "a")
    attach.adapt(model, Method("contract", how), [model.target], name="b.2")
    shake(model, "b.2", 0.2)
    x, rows = model.sample(5), ["a", None, "b.2", {"a": 0.5, "b.2": 2.0}, "a"]
    with attach.context(model, rows=rows):  # type: ignore[arg-type]
        mixed = model(x)
    mixed.square().sum().backward()
    got = [t.grad.clone() for s in attach.slots(model) for _, t in s.tensors() if t.grad is not None]
    model.zero_grad()
    alone = []
    for i, row in enumerate(rows):
        with attach.context(model, adapters={} if row is None else row):  # type: ignore[arg-type]
            alone.append(model(x[i : i + 1]))
    y = torch.cat(alone)
    y.square().sum().backward()
    want = [t.grad for s in attach.slots(model) for _, t in s.tensors() if t.grad is not None]
    close(mixed, y, TOLERANCE[dtype], "mixed batch")
    for a, b in zip(got, want, strict=True):
        close(a, b, 3 * TOLERANCE[dtype], "gradient of a mixed batch")


def _train(how: Parameterization, kind: str, dtype: torch.dtype) -> None:
    """Ten steps lower the loss, move what learns, and leave base and frozen tensors alone, bit for bit."""
    model = world(kind, dtype)
    attach.adapt(model, Method("contract", how), [model.target])
    hashes, x = _hashes(model), model.sample(16)
    still = {n: digest(t) for s in attach.slots(model) for n, t in s.tensors() if not t.requires_grad}
    goal = torch.roll(model(x).detach(), 1, -1)
    model.train()
    opt = torch.optim.Adam(run.trainable(model), lr=1e-2)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = (model(x) - goal).float().square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        opt.step()
    if not losses[-1] < losses[0]:
        raise AssertionError(f"ten steps did not lower the loss: {losses[0]:.4g} → {losses[-1]:.4g}")
    if _hashes(model) != hashes:
        raise AssertionError("training changed a base tensor")
    if still != {n: digest(t) for s in attach.slots(model) for n, t in s.tensors() if not t.requires_grad}:
        raise AssertionError("training changed a frozen tensor")


def _save(how: Parameterization, kind: str, dtype: torch.dtype) -> None:
    model = adapted(how, kind, dtype)
    x = model.sample()
    y = model(x)
    with tempfile.TemporaryDirectory() as folder:
        first = files.save(model, Path(folder) / "a")
        other = world(kind, dtype)
        files.load(other, first)
        close(other(x), y, 0.0, "output after loading")
        second = files.save(other, Path(folder) / "b")
        if {p.name: p.read_bytes() for p in first.iterdir()} != {p.name: p.read_bytes() for p in second.iterdir()}:
            raise AssertionError("save → load → save is not byte-identical")


def _copies(how: Parameterization, kind: str) -> None:
    model = adapted(how, kind, torch.float32)
    x = model.sample()
    y = model(x)
    other = copy.deepcopy(model)
    close(other(x), y, 0.0, "deepcopy")
    close(pickle.loads(pickle.dumps(model))(x), y, 0.0, "pickle")
    shake(other)
    close(model(x), y, 0.0, "the original after its copy moved")


def _compile(how: Parameterization, kind: str) -> None:
    """One graph; switching adapters by name or weight recompiles nothing."""
    torch._dynamo.reset()
    model = adapted(how, kind, torch.float32, "a")
    attach.adapt(model, Method("contract", how), [model.target], name="b")
    shake(model, "b", 0.2)
    x = model.sample()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        for active in ("a", "b", {"a": 0.5}, None, ["a"]):
            attach.activate(model, active)  # type: ignore[arg-type]
            close(compiled(x), model(x), 2e-5, f"compiled output with {active!r} active")


def _config(how: Parameterization) -> None:
    if from_config(to_config(how)) != how:
        raise AssertionError("hyper-parameters do not survive to_config → from_config")


def _hashes(model: World) -> dict[str, str]:
    return {k: digest(v) for k, v in attach.base_state_dict(model).items()}


# -- rules, combinations, methods -------------------------------------------------------------------------------------------


def check_rule(method: Method, steps: int = 12) -> int:
    """A run of ``steps`` updates, cut in two by a save of the rules' state, ends as the uncut run does."""

    def train(model: World, cut: int | None) -> list[Tensor]:
        attach.adapt(model, method, [model.target])
        made = copy.deepcopy(method.rules)
        r = run.start(model, total_steps=steps)
        r.rules = made
        opt = run.wrapped_optimizer(r, run.param_groups(model, 1e-2), lambda g: torch.optim.Adam(g))
        r.bind(opt)
        model.train()
        g = torch.Generator().manual_seed(3)
        x = torch.randn(64, 3, 5, generator=g)
        r.others = others = partial(_slices, x)

        def evaluate(batch: Tensor) -> tuple[Tensor, Tensor]:
            out = model(batch)
            return (out - 1).square().mean(), out

        for step in range(steps):
            if step == cut:
                saved = r.state_dict()
                r.close()
                r = run.start(model, total_steps=steps)
                r.rules, r.others = copy.deepcopy(method.rules), others
                r.bind(opt)
                r.load_state_dict(saved)
            torch.manual_seed(step)
            opt.zero_grad()
            if r.update([x[step : step + 4]], evaluate) is None:
                value, out = evaluate(x[step : step + 4])
                (value + r.loss(None, out)).backward()
            opt.step()
        r.finish()
        return [t.detach().clone() for s in attach.slots(model) for _, t in s.tensors()]

    whole = train(world("linear", torch.float32), None)
    halves = train(world("linear", torch.float32), steps // 2)
    for a, b in zip(whole, halves, strict=True):
        if not torch.equal(a, b):
            raise AssertionError("a run resumed from its rules' state differs from the uncut run")
    return 1


def _slices(x: Tensor, at: int) -> Iterator[Tensor]:
    """Batches of four rows from number ``at`` on, taken from the end."""
    while True:
        yield x[len(x) - 4 - at % 50 : len(x) - at % 50]
        at += 1


def check_combine(combine: Combine, states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """A combination returns a state that loads, saves, and does not depend on its inputs' storage."""
    before = [s.content() for s in states]
    made = combine(states, weights)
    if [s.content() for s in states] != before:
        raise AssertionError("combine changed one of its inputs")
    with tempfile.TemporaryDirectory() as folder:
        files.save_state(made, Path(folder) / "a")
        if files.load_file(Path(folder) / "a").content() != made.content():
            raise AssertionError("the combined state does not survive saving")
    return made


def _combines(method: Method) -> None:
    """The combination of two adapters loads on their model, and of one adapter at weight 1 is that adapter."""
    model = adapted(LoRA(3, 5.0), "linear", torch.float32, "a")
    attach.adapt(model, Method("contract", LoRA(2, 3.0)), [model.target], name="b")
    shake(model, "b", 0.2)
    assert method.combine is not None
    x = model.sample()
    attach.activate(model, "a")
    alone = model(x)
    made = check_combine(method.combine, [state.state(model, "a"), state.state(model, "b")], [0.5, 2.0])
    state.load_state(model, made, "both")
    state.load_state(model, check_combine(method.combine, [state.state(model, "a")], [1.0]), "one")
    close(model(x), alone, 1e-5, "the combination of one adapter")


def checks_for(entry: Entry, kinds: Sequence[str] = KINDS, compile: bool = True) -> Iterator[Check]:
    """All checks of a method, over the cases of its card."""
    for number, case in enumerate(entry.card.cases):
        made = entry.make(**case)
        if made.parameterization is not None:
            for check in parameterization_checks(made.parameterization, entry.card.tags, kinds, compile=compile):
                yield Check(f"{entry.card.key}-{number}-{check.name}", check.run)
        if made.combine is not None:
            yield Check(f"{entry.card.key}-{number}-combine", lambda m=made: _combines(m))  # type: ignore[misc]
        if made.rules:
            yield Check(f"{entry.card.key}-{number}-rules", lambda m=made: check_rule(m))  # type: ignore[misc]


def check_method(key: str) -> int:
    """Run the whole contract of a registered method; returns how many checks ran."""
    from omnilora.core.method import entry

    done = 0
    for check in checks_for(entry(key)):
        check.run()
        done += 1
    return done


__all__ = ["Check", "check_combine", "check_method", "check_parameterization", "check_rule", "checks_for", "state"]
