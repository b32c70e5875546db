"""The same numbers as PEFT: LoftQ's split (with s = 1) and QA-LoRA's pooled product up to its own factor."""

import types

import pytest
import torch

import omnilora as ol
from omnilora.initializers.split import split
from omnilora.parameterizations.pooled import PooledLoRA
from omnilora.stores.codecs import NormalFloat


@pytest.fixture
def on_the_cpu(monkeypatch):
    """PEFT's loftq_init moves everything to "cuda"; here that word means the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")

    def here(to):
        def moved(self, *args, **options):
            args = tuple("cpu" if a == "cuda" else a for a in args)
            return to(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in options.items()})

        return moved

    monkeypatch.setattr(torch.Tensor, "to", here(torch.Tensor.to))
    monkeypatch.setattr(bnb.nn.Params4bit, "to", here(bnb.nn.Params4bit.to))


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq(on_the_cpu, iterations):
    from peft.utils.loftq_utils import loftq_init

    torch.manual_seed(0)
    W = torch.randn(192, 256) @ torch.diag(torch.arange(1, 257).rsqrt())
    Q, A, B = loftq_init(W, num_bits=4, reduced_rank=16, num_iter=iterations)
    made = split(W, NormalFloat(4), 16, iterations)
    assert (made.Q - Q).norm() <= 1e-5 * Q.norm()
    assert (made.B @ made.A - B @ A).norm() <= 1e-4 * (B @ A).norm()
    assert (made.Q + made.B @ made.A - Q - B @ A).norm() <= 1e-5 * W.norm()


def test_qalora():
    """PEFT multiplies the mean of each group by the number of groups: its A is ours over i/L. Values and gradients."""
    variants = pytest.importorskip("peft.tuners.lora.variants")
    torch.manual_seed(0)
    L, r, alpha, x = 8, 3, 5.0, torch.randn(4, 6, 64)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16))
    ol.adapt(model, ol.Method("x", PooledLoRA(r, alpha, 0.0, L)))
    (slot,) = ol.slots(model)
    torch.nn.init.normal_(slot.B)
    A, B = torch.nn.Linear(64 // L, r, bias=False), torch.nn.Linear(r, 16, bias=False)
    with torch.no_grad():
        A.weight.copy_(slot.A / (64 / L))
        B.weight.copy_(slot.B)
    theirs = types.SimpleNamespace(lora_A={"a": A}, lora_B={"a": B}, lora_dropout={"a": torch.nn.Identity()}, in_features=64,
                                   scaling={"a": alpha / r}, qalora_group_size={"a": L}, training=True)  # fmt: skip
    base = model[0](x) - slot.how.delta(slot, None)(x)
    want = variants.QALoraLinearVariant.forward(theirs, "a", x, base.detach())
    got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(slot.B.grad, B.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slot.A.grad, A.weight.grad / (64 / L), rtol=1e-4, atol=1e-4)
