"""Initializations against PEFT on the same weights and data: factors up to sign, ranks, outputs before and after a change."""

import copy
import warnings

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.core.method import prepare
from omnilora.errors import NotExpressible

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(14, 18), nn.Linear(18, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net()


X = torch.randn(96, 14, generator=torch.Generator().manual_seed(3)) * torch.linspace(3, 0.2, 14)
Y = torch.randn(96, 16, generator=torch.Generator().manual_seed(4))


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def layers(theirs):
    return {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def up_to_sign(a, b, tol):
    """Rows of a equal rows of b or their negatives; returns the signs."""
    sign = (a * b).sum(-1).sign()
    torch.testing.assert_close(a * sign[:, None], b, rtol=tol, atol=tol * float(b.abs().max()))
    return sign


def same(ours, theirs, base, tol=1e-5, tied=True):
    """Equal at the start to the base and to each other; equal factors; equal after the same change of both.

    ``tied``: one sign for a column of B and its row of A; else each its own, and ours are turned to theirs."""
    with torch.no_grad():
        torch.testing.assert_close(ours(X), base(X), rtol=0, atol=0)
        torch.testing.assert_close(theirs(X), base(X), rtol=tol, atol=10 * tol)
        found = layers(theirs)
        assert {s.site.name for s in ol.slots(ours)} == set(found)
        for s in ol.slots(ours):
            layer = found[s.site.name]
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert s.scale == pytest.approx(layer.scaling["default"]) and s.A.shape == A.shape
            sign = up_to_sign(s.A, A, tol)
            if not tied:
                turn = sign * up_to_sign(s.B.mT, B.mT, tol)
                s.B.mul_(turn)
                s.B0.mul_(turn)
            torch.testing.assert_close(s.B * sign, B, rtol=tol, atol=tol * float(B.abs().max() + 1))
            dA, dB = torch.randn_like(A) * 0.1, torch.randn_like(B) * 0.1
            A.add_(dA)
            B.add_(dB)
            s.A.add_(sign[:, None] * dA)
            s.B.add_(sign * dB)
        y = ours(X)
        assert float((y - base(X)).norm() / y.norm()) > 1e-2
        torch.testing.assert_close(y, theirs(X), rtol=10 * tol, atol=10 * tol)


def lora(**options):
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"], **options)


@pytest.mark.parametrize("key", ["pissa", "olora"])
def test_of_the_weight(key, base):
    theirs = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=key))
    ours = ol.adapt(copy.deepcopy(base), ol.method(key, r=3, alpha=5.0))
    same(ours, theirs, base)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("whiten", [False, True])
def test_eva(rho, whiten, base):
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    x = X if rho == 2 else X * 2.0 ** -torch.arange(14)  # steep: PEFT's decomposition is a randomized one
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho, whiten=whiten))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    initialize_lora_eva_weights(theirs, [x], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
                                prepare_layer_inputs_fn=None, show_progress_bar=False)  # fmt: skip
    ours = copy.deepcopy(base)
    ol.adapt(ours, *prepare(ours, ol.method("eva", r=3, alpha=5.0, rho=rho, whiten=whiten), [(x, Y)] * 2, loss))
    assert (sorted(s.how.r for s in ol.slots(ours)) == [3, 3]) == (rho == 1.0)
    same(ours, theirs, base, 1e-4)


@pytest.mark.parametrize("theirs_, mode", [("ipm", "instruction"), ("kpm", "knowledge")])
def test_corda(theirs_, mode, base):
    pytest.importorskip("attr")  # peft.tuners.lora.corda imports it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method=theirs_))
    model = copy.deepcopy(base)
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: [model(X[:40]), model(X[40:])])
    theirs = peft.get_peft_model(model, config)
    ours = copy.deepcopy(base)
    batches = [(X[:40], Y[:40]), (X[40:], Y[40:])]
    ol.adapt(ours, *prepare(ours, ol.method("corda", r=3, alpha=5.0, mode=mode), batches, loss))
    same(ours, theirs, base, 1e-4)


@pytest.mark.parametrize("theirs_, size", [("stable", "peft"), ("unit", "unit")])
def test_lora_ga(theirs_, size, base):
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale=theirs_))
    model = copy.deepcopy(base)
    preprocess_loraga(model, config, train_step=lambda: loss(model, (X, Y)).backward())
    theirs = peft.get_peft_model(model, config)
    ours = copy.deepcopy(base)
    made = ol.method("lora_ga", r=3, alpha=5.0, size=size, scaling="alpha/r")
    ol.adapt(ours, *prepare(ours, made, [(X, Y)], loss))
    same(ours, theirs, base, 1e-4, tied=False)


@pytest.mark.parametrize("key", ["pissa", "olora", "corda", "lora_ga"])
def test_peft_loads_what_is_saved(key, base, tmp_path):
    ours = copy.deepcopy(base)
    ol.adapt(ours, *prepare(ours, ol.method(key, r=3, alpha=5.0), [(X, Y)], loss))
    with torch.no_grad():
        for s in ol.slots(ours):
            s.A.add_(torch.randn_like(s.A))
            s.B.add_(torch.randn_like(s.B))
    ol.save(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(theirs(X), ours(X), rtol=1e-5, atol=1e-4)
    again = copy.deepcopy(base)
    ol.load(again, tmp_path / "a")
    assert torch.equal(again(X), ours(X)) and {type(s.how).__name__ for s in ol.slots(again)} == {"ShiftedLoRA"}


class Kinds(nn.Module):
    """An embedding with a padding row, a grouped and a plain convolution, attention whose matrix is read, a linear layer."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 12, padding_idx=0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 16)

    def forward(self, ids):
        h = self.emb(ids)
        h = self.attn(h, h, h)[0]
        y = self.fc(h).mean(1)
        image = h[:, :6].reshape(len(ids), 3, 4, 6)
        return y + self.grouped(self.conv(image)).flatten(1).mean(-1, keepdim=True)


@pytest.mark.parametrize("key", ["pissa", "olora", "eva", "corda", "lora_ga"])
def test_every_kind_of_layer(key):
    torch.manual_seed(0)
    model, ids = Kinds(), torch.randint(0, 20, (5, 7))
    y = model(ids)
    targets = ol.Targets(include=("emb", "conv", "grouped", "attn", "fc[0/2]", "fc[1/2]"))

    def square(m, batch):
        return m(batch).square().mean()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ol.adapt(model, *prepare(model, ol.method(key, r=2), [ids, ids], square, targets))
    told = any("cannot be observed" in str(w.message) for w in seen)
    assert told == (key in ("eva", "corda", "lora_ga"))
    assert torch.equal(model(ids), y)
    moved = {s.site.name for s in ol.slots(model) if "A0" in s.roles and float((s.B @ s.A).norm()) > 0}
    if key in ("pissa", "olora"):
        assert {"emb", "conv", "grouped", "fc[0:8]", "fc[8:16]"} < moved
    elif key != "eva":
        assert moved == {"conv", "fc[0:8]", "fc[8:16]"}


def test_over_four_bits():
    """The triplets are those of the weight that the layer multiplies with."""
    from omnilora.stores.nf4_layer import quantize

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    quantize(model)
    x = torch.randn(3, 64)
    y = model(x)
    ol.adapt(model, ol.method("pissa", r=4))
    (s,) = ol.slots(model)
    W = s.site.W.dense()
    top = torch.linalg.svdvals(W)[:4]
    assert torch.equal(model(x), y)
    torch.testing.assert_close(torch.linalg.svdvals(s.B @ s.A)[:4], top, rtol=1e-4, atol=1e-4)


def test_a_rank_that_a_site_has_not():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.raises(NotExpressible, match="1 has no 4 directions"):
        ol.adapt(model, ol.method("pissa", r=4))
    with pytest.raises(NotExpressible, match="singular vectors"):
        ol.adapt(model, *prepare(model, ol.method("lora_ga", r=3), [torch.randn(4, 8)], lambda m, b: m(b).square().mean()))
    assert ol.slots(model) == [] and "_omnilora" not in vars(model)


def test_eva_with_an_override():
    """A site whose rank is given keeps it; the others share the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 14), nn.Linear(14, 14), nn.Linear(14, 14))
    targets = ol.Targets(overrides={"1": {"r": 2}})
    ol.adapt(model, *prepare(model, ol.method("eva", r=4), [X], lambda m, b: m(b).square().mean(), targets))
    ranks = {s.site.name: s.how.r for s in ol.slots(model)}
    assert ranks["1"] == 2 and ranks["0"] + ranks["2"] == 8
