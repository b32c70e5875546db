"""Methods that need another learning rate say so; a rate that the user gives always stands."""

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.training.config import TrainConfig
from omnilora.training.loop import learning_rate


@pytest.mark.parametrize(("key", "factor"), [("lora", 1.0), ("adalora", 5.0), ("vera", 10.0)])
def test_default_rate_follows_the_method(key, factor):
    made = ol.method(key)
    model = nn.Linear(4, 4)
    assert learning_rate(model, TrainConfig(), made.rate) == pytest.approx(1e-3 * factor)
    assert learning_rate(model, TrainConfig(lr=3e-4), made.rate) == 3e-4


def test_fit_uses_it():
    torch.manual_seed(0)
    seen = []

    class Watch(ol.Rule):
        def after_step(self, run):
            seen.append(run.optimizer.param_groups[0]["lr"])

    model = nn.Sequential(nn.Linear(6, 6))
    made = ol.method("adalora", r=2, target=1)
    ol.adapt(model, ol.Method(**{**vars(made), "rules": (*made.rules, Watch())}))
    data = [(torch.randn(6), torch.randn(6)) for _ in range(8)]
    ol.fit(model, data, loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), steps=4, schedule="constant", warmup=0.0)
    assert seen[0] == pytest.approx(5e-3)
