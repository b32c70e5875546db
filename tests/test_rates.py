"""Methods that need another learning rate say so; a rate that the user gives always stands."""

import warnings

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora import proofs
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


@pytest.mark.parametrize(("total", "want"), [
    (17, [1] * 5 + [0, 1 / 3, 2 / 3, 1, 1] * 2 + [0, 1 / 3]),
    (16, [1] * 5 + [0, 1 / 3, 2 / 3, 1, 1, 0, 1 / 3, 2 / 3, 1, 1, 1]),  # a restart after which nothing would be learnt
])  # fmt: skip
def test_relora_folds_after_the_update_at_rate_zero(total, want):
    model, x, rates, folds = nn.Linear(6, 5), torch.randn(20, 6), [], []

    class Watch(ol.Rule):
        def after_step(self, run):
            folds.append(run.rules[0].restarts)

        def rate(self, run):
            rates.append(run.rules[0].rate(run))
            return 1.0

    made = ol.method("relora", r=2, dropout=0.0, every=5, warmup=3, reset="zero")
    proofs.train(nn.Sequential(model), ol.Method(**{**vars(made), "rules": (*made.rules, Watch())}),
                 proofs.full_batch(x, torch.randn(20, 5)), total)  # fmt: skip
    assert rates == pytest.approx(want)
    assert [k + 1 for k in range(1, total) if folds[k] > folds[k - 1]] == [k + 1 for k in range(1, total) if want[k] == 0]


@pytest.mark.parametrize(("prune", "left"), [(0.0, 24), (0.9, 3), (0.5, 12), (1.0, 0)])
def test_relora_keeps_the_moments_above_the_quantile(prune, left):
    rule = ol.method("relora", prune=prune).rules[0]
    t, moment = nn.Parameter(torch.zeros(4, 6)), torch.randn(4, 6)
    above = moment.abs() > torch.quantile(moment.abs().flatten(), prune) if prune else torch.ones(4, 6, dtype=torch.bool)

    class Clock:
        class optimizer:
            state = {t: {"step": torch.tensor(3.0), "exp_avg": moment}}

    rule._prune(Clock, t)
    assert int((moment != 0).sum()) == left and torch.equal(moment != 0, above)


@pytest.mark.parametrize(("key", "hyper"), [("delta_lora", {"start": 9}), ("relora", {"every": 9})])
def test_a_schedule_that_never_begins_says_so(key, hyper):
    data = proofs.full_batch(torch.randn(20, 6), torch.randn(20, 5))
    with pytest.warns(UserWarning, match="this run has 9: it stays plain LoRA"):
        proofs.train(nn.Sequential(nn.Linear(6, 5)), ol.method(key, r=2, **hyper), data, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proofs.train(nn.Sequential(nn.Linear(6, 5)), ol.method(key, r=2, **hyper), data, 11)
