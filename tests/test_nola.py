"""Seeded bases: private generators, chunks that change nothing, derivatives under function transforms."""

import torch

import omnilora as ol
from omnilora import proofs
from omnilora.parameterizations import nola
from omnilora.parameterizations.nola import Mix, bases


def test_the_global_generator_is_untouched():
    model = ol.adapt(proofs.Stack(12, 9), ol.method("nola", k_A=5, k_B=4))
    before = torch.get_rng_state()
    model(torch.randn(3, 12, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_change_no_number(monkeypatch):
    whole = torch.cat([u for _, u in bases("k", 7, 30)])
    monkeypatch.setattr(nola, "CHUNK", 60)
    parts = [u for _, u in bases("k", 7, 30)]
    assert len(parts) == 4 and torch.equal(torch.cat(parts), whole)
    assert whole.abs().max() < 1 and abs(float(whole.std()) - 3**-0.5) < 0.05


def test_transforms_and_second_derivatives():
    c = torch.randn(4, 6, dtype=torch.float64)
    f = lambda v: Mix.apply(v, "k", [3, 2]).square().sum()  # noqa: E731
    rows = torch.stack([torch.func.grad(f)(v) for v in c])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(c), rows)
    c.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: Mix.apply(v, "k", [3, 2]).square(), c)


def test_another_seed_is_another_adapter():
    x, outs = torch.randn(3, 12), []
    torch.manual_seed(0)
    base = proofs.Stack(12, 9)
    for seed in (0, 1):
        model = ol.adapt(proofs.Stack(12, 9), ol.method("nola", k_A=5, k_B=4, seed=seed))
        model.load_state_dict(base.state_dict(), strict=False)
        with torch.no_grad():
            for t in ol.trainable(model):
                t.fill_(1.0)
        outs.append(model(x))
    assert (outs[0] - outs[1]).norm() > 0.1 * outs[0].norm()
