"""Images, and any nn.Module with a loss of its own, through ``ol.fit``: a convolutional net learns turned digits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import omnilora as ol

datasets = pytest.importorskip("sklearn.datasets")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))


def loss(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), logits


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


@pytest.fixture(scope="module")
def world():
    """A net trained on upright digits; real images, split by position in the set."""
    torch.manual_seed(0)
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    model = Net()
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        at = torch.randint(0, 1200, (64,), generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        opt.step()
    return model, x, y


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_a_convolutional_net_learns_a_shift(world, key, tmp_path):
    model, x, y = world
    upright = accuracy(model, x[1200:], y[1200:])
    turned = x.flip(-1).transpose(-1, -2)
    before = accuracy(model, turned[1200:], y[1200:])
    model = copy.deepcopy(model)
    ol.adapt(model, ol.method(key, r=4, alpha=8.0, dropout=0.0), ["conv1", "conv2"], unfreeze=["head"], name="turned")
    report = ol.fit(model, TensorDataset(turned[:600], y[:600]), loss=loss, steps=120, batch_size=32, lr=1e-2, seed=0)
    after = accuracy(model, turned[1200:], y[1200:])
    assert upright > 0.9 and before < 0.5 and after > before + 0.3 and report.steps == 120
    with ol.disabled(model):
        assert accuracy(model, x[1200:], y[1200:]) == upright
    path = ol.save(model, tmp_path / "a", adapter="turned")
    ol.detach(model, "turned")
    assert accuracy(model, x[1200:], y[1200:]) == upright
    ol.load(model, path, "again")
    assert accuracy(model, turned[1200:], y[1200:]) == after
    ol.merge(model)
    assert accuracy(model, turned[1200:], y[1200:]) == after
    ol.unmerge(model)
    ol.detach(model)
