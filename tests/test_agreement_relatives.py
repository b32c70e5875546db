"""LoRA's relatives against PEFT on the same tensors: forward and gradients."""

import copy
import warnings

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.parameterizations.orthogonal import Blocks, cayley

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))

    def forward(self, x):
        return self.a(x)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(10, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.b(self.a(x))


def names(**pairs):
    return {ours: (lambda m, t=theirs: dict(m.named_parameters())[t.replace("*", "default")]) for ours, theirs in pairs.items()}


def agree(base, config, made, get, x, targets, tolerance=1e-5):
    """Same tensors, same outputs, same gradients."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        ours = ol.adapt(base, made, targets)
    pairs = []
    for slot in ol.slots(ours):
        layer = theirs.base_model.model.get_submodule(slot.site.name)
        for name, find in get.items():
            if name in dict(slot.tensors()):
                pairs.append((slot.get_parameter(name), find(layer)))
    assert pairs
    with torch.no_grad():
        for mine, other in pairs:
            mine.add_(0.2 * torch.randn_like(mine))
            if mine.numel() == other.numel():
                other.copy_(mine.reshape(other.shape))
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)
    y.square().sum().backward()
    z.square().sum().backward()
    for mine, other in pairs:
        gap = (mine.grad - other.grad.reshape(mine.shape)).norm() / mine.grad.norm()
        assert float(gap) < tolerance
    return ours, theirs


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 4, 7, 6, generator=torch.Generator().manual_seed(0))
LOHA = names(B1="hada_w1_a.*", A1="hada_w1_b.*", B2="hada_w2_a.*", A2="hada_w2_b.*")
LOKR = names(w1="lokr_w1.*", w1a="lokr_w1_a.*", w1b="lokr_w1_b.*", w2="lokr_w2.*", w2a="lokr_w2_a.*", w2b="lokr_w2_b.*")


@pytest.mark.parametrize(("base", "x", "targets"), [(Net, X, ["a", "b"]), (Conv, IMAGES, ["a"])])
def test_loha(base, x, targets):
    agree(base(), peft.LoHaConfig(r=3, alpha=5, target_modules=targets), ol.method("loha", r=3, alpha=5.0), LOHA, x, targets)


@pytest.mark.parametrize(("base", "x", "targets"), [(Net, X, ["a", "b"]), (Conv, IMAGES, ["a"])])
@pytest.mark.parametrize("hyper", [{"r": 1, "alpha": 3}, {"r": 1, "alpha": 3, "both": True}, {"r": 9, "alpha": 9, "factor": 2}])
def test_lokr(base, x, targets, hyper):
    config = peft.LoKrConfig(r=hyper["r"], alpha=hyper["alpha"], decompose_both=hyper.get("both", False),
                             decompose_factor=hyper.get("factor", -1), target_modules=targets)  # fmt: skip
    agree(base(), config, ol.method("lokr", **hyper), LOKR, x, targets)


def test_hira():
    get = names(A="hira_A.*", B="hira_B.*")
    agree(Net(), peft.HiraConfig(r=3, target_modules=["a", "b"]), ol.method("hira", r=3), get, X, ["a", "b"])


@pytest.mark.parametrize("side", ["output", "input"])
def test_ia3(side):
    config = peft.IA3Config(target_modules=["a", "b"], feedforward_modules=["a", "b"] if side == "input" else [])
    agree(Net(), config, ol.method("ia3", side=side), names(l="ia3_l.*"), X, ["a", "b"])


def test_ia3_of_a_convolution():
    config = peft.IA3Config(target_modules=["a"], feedforward_modules=["a"])
    agree(Conv(), config, ol.method("ia3", side="input"), names(l="ia3_l.*"), IMAGES, ["a"])


def test_randlora_with_its_bases():
    config = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["a", "b"], projection_prng_key=5)
    get = names(lam="randlora_lambda.*", gamma="randlora_gamma.*")
    ours, theirs = agree(Net(), config, ol.method("randlora", r=3, alpha=6.0, seed=5), get, X, ["a", "b"])
    (s, _), layer = ol.slots(ours), theirs.base_model.model.a
    assert torch.equal(s.A, layer.randlora_A["default"].squeeze(1)) and torch.equal(s.B, layer.randlora_B["default"])


def test_fourierft_with_its_places():
    config = peft.FourierFTConfig(n_frequency=30, scaling=7.0, random_loc_seed=11, target_modules=["a", "b"])
    agree(Net(), config, ol.method("fourierft", n=30, alpha=7.0, seed=11), names(c="fourierft_spectrum.*"), X, ["a", "b"])


@pytest.mark.parametrize("block", [4, 5])
def test_oft(block):
    config = peft.OFTConfig(oft_block_size=block, r=0, target_modules=["a", "b"], use_cayley_neumann=False)
    agree(Net(), config, ol.method("oft", block=block), names(q="oft_R.*.weight"), X, ["a", "b"])


def test_oft_of_an_embedding():
    config = peft.OFTConfig(oft_block_size=4, r=0, target_modules=["a"], use_cayley_neumann=False)
    get = names(q="oft_embedding_R.*.weight")
    agree(Table(), config, ol.method("oft", block=4), get, torch.arange(10).view(2, 5), ["a"])


def test_boft_at_one_level():
    """PEFT stores the whole matrix of which (R − Rᵀ)/2 is Q: its gradient above the diagonal is half of ours."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16))
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = ol.adapt(base, ol.method("boft", block=4, factors=1), "0")
    (s,), layer = ol.slots(ours), theirs.base_model.model[0]
    i, j = torch.triu_indices(4, 4, 1)
    R = layer.boft_R["default"]
    with torch.no_grad():
        s.q.normal_(std=0.3)
        s.s.normal_()
        R[0, :, i, j], R[0, :, j, i] = s.q[0], -s.q[0]
        layer.boft_s["default"].copy_(s.s.unsqueeze(1))
    y, z = ours(X), theirs(X)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(s.s.grad, layer.boft_s["default"].grad[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.q.grad[0], 2 * R.grad[0][:, i, j], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "block", "levels"), [(16, 4, 2), (32, 4, 3), (24, 4, 2)])
def test_boft_levels_use_their_permutations(n, block, levels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(nn.Linear(n, 4)), peft.BOFTConfig(boft_block_size=block, target_modules=["0"]))
    layer = model.base_model.model[0]
    torch.manual_seed(0)
    q = 0.3 * torch.randn(levels, n // block, block * (block - 1) // 2)
    i, j = torch.triu_indices(block, block, 1)
    want, ours = torch.eye(n), torch.eye(n)
    for level in range(levels):
        skew = torch.zeros(n // block, block, block)
        skew[:, i, j], skew[:, j, i] = q[level], -q[level]
        P = layer.perm2mat(layer.block_butterfly_perm(n, n // block // 2**level, block // 2, levels - 1))
        want = P @ torch.block_diag(*layer.cayley_batch(skew)) @ P.mT @ want
        ours = Blocks(cayley(q[level], block), 2**level).dense() @ ours
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)


def test_ln_tuning():
    torch.manual_seed(0)
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["norm"]))
    ours = ol.adapt(base, ol.method("ln_tuning"))
    layer = theirs.base_model.model.norm.ln_tuning_layers["default"]
    with torch.no_grad():
        for slot in ol.slots(ours):
            slot.W.normal_()
            dict(layer.named_parameters())[slot.site.param].copy_(slot.W.view(-1))
    y, z = ours(X), theirs(X)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    for slot in ol.slots(ours):
        torch.testing.assert_close(slot.W.grad.view(-1), dict(layer.named_parameters())[slot.site.param].grad, rtol=1e-5, atol=1e-5)
