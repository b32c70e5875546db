"""Sums of adapters are exact; averages of factors are not (the control)."""

import pytest
import torch

import omnilora as ol
from omnilora import errors
from omnilora.compose.merging import average, concat, svd
from omnilora.contract import check_combine, shake
from omnilora.proofs import Stack, relative


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model, states = Stack(8, 10, 6).eval(), []
    for i, (r, alpha) in enumerate([(2, 5.0), (3, 2.0)]):
        ol.adapt(model, ol.method("lora", r=r, alpha=alpha), name=str(i))
        shake(model, str(i), 0.3 + 0.2 * i)
        states.append(ol.state(model, str(i)))
    return model, states


def run_with(model, state, x):
    ol.load_state(model, state, "sum")
    y = model(x)
    ol.detach(model, "sum")
    return y


def test_concat_is_the_weighted_sum(parts):
    model, states = parts
    x = torch.randn(5, 8)
    ol.activate(model, {"0": 0.5, "1": -2.0})
    want = model(x)
    made = check_combine(concat, states, [0.5, -2.0])
    torch.testing.assert_close(run_with(model, made, x), want, rtol=1e-5, atol=1e-5)
    full = svd(states, [0.5, -2.0], rank=5)
    torch.testing.assert_close(run_with(model, full, x), want, rtol=1e-4, atol=1e-4)
    low = svd(states, [0.5, -2.0], rank=1)
    assert relative(run_with(model, low, x), want) > 1e-2


def test_average_of_factors_is_another_map(parts):
    model, states = parts
    x = torch.randn(5, 8)
    same = [states[0], states[0]]
    ol.activate(model, {"0": 1.0})
    want = model(x)
    torch.testing.assert_close(run_with(model, average(same, [0.5, 0.5]), x), want, rtol=1e-5, atol=1e-5)
    ol.adapt(model, ol.method("lora", r=2, alpha=5.0), name="2")
    shake(model, "2", -0.5)
    mixed = [states[0], ol.state(model, "2")]
    exact, naive = run_with(model, concat(mixed, [0.5, 0.5]), x), run_with(model, average(mixed, [0.5, 0.5]), x)
    assert relative(naive, exact) > 0.1
    with pytest.raises(errors.BadValue, match="ranks"):
        average(states, [0.5, 0.5])


def test_routed_adapters_refuse(parts):
    model, states = parts
    ol.adapt(model, ol.method("molora", experts=2, r=2), name="m")
    with pytest.raises(errors.OmniloraError):
        concat([states[0], ol.state(model, "m")], [1.0, 1.0])
