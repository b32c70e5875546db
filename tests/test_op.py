"""Each operator against its dense twin: values, gradients, norms, factors, transposes; trees drawn at random."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilora.core.op import Chain, Dropout, Gate, Lerp, Matrix, Op, Residual, Rows, Scaled, Splice, Sum, chain, weigh
from omnilora.errors import NotMergeable
from omnilora.parameterizations.kronecker import Kron
from omnilora.parameterizations.orthogonal import Blocks

OUT, IN = 6, 5


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def tree(draw_, depth=3):
    seed = draw_(st.integers(0, 10_000))
    kind = draw_(st.sampled_from(["matrix", "lowrank", "diag", "sum", "scaled", "vector", "splice", "lerp", "series"] if depth else ["matrix", "lowrank"]))
    if kind == "matrix":
        return Matrix(draw(OUT, IN, seed=seed))
    if kind in ("lowrank", "diag"):
        r = draw_(st.integers(1, 4))
        middle = [draw(r, seed=seed + 1)] if kind == "diag" else [draw(r, r, seed=seed + 2)] if draw_(st.booleans()) else []
        return chain(draw(OUT, r, seed=seed), *middle, draw(r, IN, seed=seed + 3), Dropout(0.5))
    inner = draw_(tree(depth - 1))
    if kind == "scaled":
        return Scaled(0.7, inner)
    if kind == "series":
        return chain(Residual(chain(draw(OUT, 2, seed=seed), draw(2, OUT, seed=seed + 1))), inner)
    if kind == "vector":
        return chain(draw(OUT, seed=seed), inner)
    if kind == "splice":
        return Splice(inner, 1, 4, Scaled(2.0, Rows(inner, 1, 4)))
    other = draw_(tree(depth - 1))
    return Sum(inner, other) if kind == "sum" else Lerp(0.3, inner, other)


@settings(max_examples=150, deadline=None)
@given(tree())
def test_a_tree_equals_its_matrix(op: Op):
    x = draw(3, 2, IN, seed=1)
    m = op.dense()
    torch.testing.assert_close(op(x), x @ m.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(op.sq_norm(), m.square().sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(op.transpose()(draw(3, OUT, seed=2)), draw(3, OUT, seed=2) @ m, rtol=1e-10, atol=1e-10)
    ba = op.factors()
    if ba is not None:
        torch.testing.assert_close(ba[0] @ ba[1], m, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(tree(), st.integers(0, 99))
def test_offsets_survive_composition(op, seed):
    c = draw(OUT, seed=seed)
    shifted = chain(draw(OUT, seed=seed + 1), op.shift(c))
    x = draw(4, IN, seed=3)
    torch.testing.assert_close(shifted(x), shifted.linear(x) + shifted.offset, rtol=1e-10, atol=1e-10)
    left = chain(draw(OUT, 2, seed=seed + 2), draw(2, OUT, seed=seed + 3)).shift(draw(OUT, seed=seed + 4))
    series = chain(Residual(left), shifted)
    torch.testing.assert_close(series(x), x @ series.dense().mT + series.offset, rtol=1e-10, atol=1e-10)
    part = Splice(op, 1, 4, Rows(op, 1, 4).shift(c[1:4]))
    torch.testing.assert_close(part(x), x @ part.dense().mT + part.offset, rtol=1e-10, atol=1e-10)


def test_weighing_an_added_map_does_not_cancel():
    """old + w·D, not old + w·((old + D) − old): exact even where D is far below old."""
    old, d = Matrix(torch.full((2, 2), 1e8)), chain(torch.full((2, 1), 1e-3), torch.ones(1, 2))
    half = weigh(0.5, old, old + d)
    assert isinstance(half, Sum) and torch.equal(half.right.dense(), torch.full((2, 2), 5e-4))
    assert isinstance(weigh(0.5, old, Matrix(torch.zeros(2, 2))), Lerp)


def test_gates_apply_and_refuse_a_matrix():
    gate = Gate(lambda x: torch.sigmoid(x[..., :2]))
    a, b, x = draw(2, IN, seed=1), draw(OUT, 2, seed=2), draw(7, IN, seed=3)
    op = chain(b, gate, a)
    torch.testing.assert_close(op(x), ((x @ a.mT) * torch.sigmoid(x[:, :2])) @ b.mT)
    for ask in (op.dense, op.sq_norm, op.factors):
        with pytest.raises(NotMergeable):
            ask()


def test_dropout_is_applied_once_and_only_in_training():
    a, b, x = torch.eye(4), torch.eye(4), torch.ones(1000, 4)
    torch.manual_seed(0)
    y = chain(b, a, Dropout(0.25, True))(x)
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.03 and y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(chain(b, a, Dropout(0.25, False))(x), x)


def test_gram_norm_equals_dense_norm_for_small_updates():
    w, op = draw(OUT, IN, seed=1).float(), chain(draw(OUT, 2, seed=2).float() * 1e-3, draw(2, IN, seed=3).float())
    tree = Matrix(w) + op
    torch.testing.assert_close(tree.sq_norm(), tree.dense().square().sum(1), rtol=2e-6, atol=0.0)


def test_applying_never_forms_the_matrix():
    """4096 × 4096 at rank 2: the largest tensor made is the output."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    op = 0.5 * chain(torch.zeros(4096, 2), torch.ones(2), torch.zeros(2, 4096))
    with Spy():
        op(torch.zeros(3, 4096))
    assert max(seen) <= 2 * 4096 * 3
    assert isinstance(op, Scaled) and isinstance(op.op, Chain)


@pytest.mark.parametrize("g", [1, 2, 4])
def test_blocks_and_kronecker_products_equal_their_matrices(g):
    x = draw(3, 16, seed=1)
    blocks = Blocks(draw(4, 4, 4, seed=2), g)
    kron = Kron(draw(2, 4, seed=3), draw(3, 4, seed=4))
    for op, out in ((blocks, 16), (kron, 6), (chain(kron, blocks), 6), (chain(draw(6, seed=5), kron), 6)):
        m = op.dense()
        assert m.shape == (out, 16)
        torch.testing.assert_close(op(x), x @ m.mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(op.transpose()(draw(5, out, seed=6)), draw(5, out, seed=6) @ m, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kron.dense(), torch.kron(kron.a, kron.b))
    perm = torch.arange(16).view(-1, g, 2, 2).transpose(1, 2).flatten() if g > 1 else torch.arange(16)
    torch.testing.assert_close(blocks.dense()[torch.argsort(perm)][:, torch.argsort(perm)], torch.block_diag(*blocks.m))
