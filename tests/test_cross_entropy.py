"""The head's cross-entropy in chunks: the values of the formula, what it keeps, what it never makes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import omnilora.plans.cross_entropy as module
from omnilora.errors import BadValue, RunError
from omnilora.plans import native
from omnilora.plans.cross_entropy import MASKED, cross_entropy, plain_cross_entropy

V, D, ROWS = 50, 12, (3, 17)


def case(dtype=torch.float32, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, D, generator=g, dtype=torch.float64).to(dtype) for s in (ROWS, (V,)))
    labels = torch.randint(0, V, ROWS, generator=g)
    labels[torch.rand(ROWS, generator=g) < 0.5] = MASKED
    return hidden, weight, labels, torch.randn(V, generator=g, dtype=torch.float64).to(dtype) if bias else None


def gradients(loss, tensors):
    return torch.autograd.grad(3 * loss, tensors)


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 3.0}, {"divisor": 7.0}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_it_is_the_formula(dtype, tolerance, options, bias, chunk):
    hidden, weight, labels, b = case(dtype, bias)
    learned = [t.requires_grad_() for t in (hidden, weight, b) if t is not None]
    made = cross_entropy(hidden, weight, labels, b, chunk=chunk, **options)
    plain = plain_cross_entropy(hidden, weight, labels, b, **options)
    assert made.dtype == dtype and apart(made.detach(), plain.detach()) < tolerance
    for a, p in zip(gradients(made, learned), gradients(plain, learned), strict=True):
        assert a.dtype == dtype and apart(a, p) < tolerance
    with torch.no_grad():
        assert apart(cross_entropy(hidden, weight, labels, b, chunk=chunk, **options), plain) < tolerance


def test_sum_and_mean():
    hidden, weight, labels, _ = case()
    n = int((labels != MASKED).sum())
    total = cross_entropy(hidden, weight, labels, reduction="sum")
    assert torch.allclose(total / n, cross_entropy(hidden, weight, labels), rtol=1e-6)
    z = torch.nn.functional.linear(hidden, weight).flatten(0, 1)
    assert torch.allclose(total, torch.nn.functional.cross_entropy(z, labels.flatten(), reduction="sum"), rtol=1e-6)


@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_learns_gets_a_gradient(learns):
    tensors = [*case(torch.float64, True)]
    hidden, weight, labels, bias = tensors
    for t, on in zip((hidden, weight, bias), learns):
        t.requires_grad_(on)
    cross_entropy(hidden, weight, labels, bias, chunk=5).backward()
    assert [t.grad is not None for t in (hidden, weight, bias)] == list(learns)


def test_half_precision_sums_in_fp32():
    hidden, weight, labels, _ = case(torch.bfloat16)
    z = torch.nn.functional.linear(hidden, weight).double().flatten(0, 1)
    truth = torch.nn.functional.cross_entropy(z, labels.flatten(), reduction="sum")
    made = cross_entropy(hidden.requires_grad_(), weight, labels, reduction="sum", chunk=7)
    assert made.dtype == torch.float32 and apart(made.detach(), truth) < 1e-6
    got = torch.autograd.grad(made, hidden)[0]
    p = torch.softmax(z, -1) - torch.nn.functional.one_hot(labels.clamp_min(0).flatten(), V)
    exact = (p * (labels.flatten() != MASKED)[:, None]) @ weight.double()
    assert got.dtype == torch.bfloat16 and apart(got.double().flatten(0, 1), exact) < 5e-3


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}])
def test_kernels_give_what_torch_gives(dtype, tolerance, options, monkeypatch):
    if native.library() is None:
        pytest.skip(native.reason())
    hidden, weight, labels, bias = case(dtype, bias=True)
    hidden.requires_grad_()
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(module, "serves", lambda *tensors: False)
        loss = cross_entropy(hidden, weight, labels, bias, chunk=7, **options)
        found.append((loss.detach(), torch.autograd.grad(loss, hidden)[0].float()))
    (loss, slope), (loss_, slope_) = found
    assert apart(loss, loss_) < 1e-6 and apart(slope, slope_) < tolerance  # bf16: the slope is rounded before the product


def test_under_autocast():
    hidden, weight, labels, _ = case()
    narrow = hidden.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(narrow, weight, labels, chunk=7)
        loss.backward()
    hidden.requires_grad_()
    plain_cross_entropy(hidden, weight, labels).backward()
    assert narrow.grad.dtype == torch.bfloat16 and apart(narrow.grad.float(), hidden.grad) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(dtype):
    hidden, weight, labels, _ = case()
    hidden.requires_grad_()
    want = cross_entropy(hidden, weight, labels)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = cross_entropy(hidden, weight, labels)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(made, want)
    with torch.device("meta"):
        assert torch.equal(cross_entropy(hidden, weight, labels), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bias_of_another_dtype(dtype):
    hidden, weight, labels, bias = case(bias=True)
    assert apart(cross_entropy(hidden, weight, labels, bias.to(dtype)), cross_entropy(hidden, weight, labels, bias)) < 1e-2


def test_labels_may_be_of_any_whole_type_and_of_no_other():
    hidden, weight, labels, _ = case()
    want = cross_entropy(hidden, weight, labels)
    assert torch.equal(cross_entropy(hidden, weight, labels.int()), want)
    grad = torch.func.grad(lambda h: cross_entropy(h, weight, labels.int()))(hidden)
    assert torch.isfinite(grad).all()
    for bad in (labels.float(), labels > 0):
        with pytest.raises(BadValue, match="whole numbers"):
            cross_entropy(hidden, weight, bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_hidden(bad):
    hidden, weight, labels, _ = case()
    hidden[0, 0, 0], labels[0, 0] = bad, 1
    loss = cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward()
    assert not torch.isfinite(loss) and torch.isnan(hidden.grad[0, 0]).any() and torch.isfinite(hidden.grad[1:]).all()


@pytest.mark.parametrize("label", [-1, V, 2**40])
def test_labels_that_are_no_class_are_refused(label):
    hidden, weight, labels, _ = case()
    labels[1, 2] = label
    with pytest.raises(BadValue, match=f"from 0 to {V - 1}"):
        cross_entropy(hidden, weight, labels)


def saved(fn):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = fn()
    return sum(kept.values()), loss


def test_what_is_kept_is_the_gradient_of_learned_rows():
    hidden, weight, labels, _ = case()
    n = int((labels != MASKED).sum())
    hidden.requires_grad_()
    kept, _ = saved(lambda: cross_entropy(hidden, weight, labels, reduction="sum", chunk=4))
    assert kept == n * D * 4 + n * 8  # and the rows' numbers


class Largest(TorchDispatchMode):
    """The most numbers that one new tensor holds."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_logits_of_more_than_a_chunk_never_exist():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(500, 4)
    labels = torch.randint(0, 500, (40,))
    with Largest() as seen:
        cross_entropy(hidden, weight, labels, chunk=8).backward()
    assert seen.most == max(8 * 500, 500 * 4)


def test_nothing_learned():
    hidden, weight, labels, _ = case()
    hidden.requires_grad_()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, MASKED), reduction="sum")
    loss.backward()
    assert float(loss) == 0 and not hidden.grad.any()
    assert torch.isnan(cross_entropy(hidden, weight, torch.full_like(labels, MASKED)))  # as torch's own mean


def test_transforms_run_the_formula_and_second_derivatives_are_refused():
    hidden, weight, labels, _ = case(torch.float64)
    f = lambda h: cross_entropy(h, weight, labels, chunk=5)  # noqa: E731
    plain = lambda h: plain_cross_entropy(h, weight, labels)  # noqa: E731
    assert torch.allclose(torch.func.grad(f)(hidden), torch.func.grad(plain)(hidden), rtol=1e-12)
    one = torch.ones_like(hidden)
    assert torch.allclose(torch.func.jvp(f, (hidden,), (one,))[1], torch.func.jvp(plain, (hidden,), (one,))[1], rtol=1e-12)
    twice = torch.func.grad(lambda h: torch.func.grad(f)(h).square().sum())(hidden)
    assert torch.allclose(twice, torch.func.grad(lambda h: torch.func.grad(plain)(h).square().sum())(hidden), rtol=1e-10)
    hidden.requires_grad_()
    with pytest.raises(RunError, match="second derivative"):
        torch.autograd.grad(f(hidden), hidden, create_graph=True)


@pytest.mark.parametrize("changes", [{"reduction": "none"}, {"chunk": 0}, {"softcap": 0.0}, {"labels": torch.zeros(3, 16).long()},
                                     {"weight": torch.zeros(V, D + 1)}])  # fmt: skip
def test_refusals(changes):
    hidden, weight, labels, _ = case()
    with pytest.raises(BadValue):
        cross_entropy(hidden, **{"weight": weight, "labels": labels, **changes})
