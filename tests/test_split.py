"""W ≈ Q + s B A: identities of the split; what an adapter carries with it, on disk and back."""

import json

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.core.files import load_file
from omnilora.errors import AttachError, BadValue, BaseMismatch, FileRefused, NotExpressible, StateMismatch
from omnilora.initializers.allocation import allocate, grid
from omnilora.initializers.fisher import fisher_weights, samples
from omnilora.initializers.split import split, top
from omnilora.stores.codecs import IntGroups, NormalFloat
from omnilora.stores.coded import CodedLinear


def decaying(n=256):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
    return u * torch.arange(1, n + 1).rsqrt() @ v.mT


@pytest.mark.parametrize("bits, once, five", [(4, 0.887, 0.781), (3, 0.886, 0.783), (2, 0.871, 0.811)])
def test_published_ratios(bits, once, five):
    """On a 256 × 256 matrix with decaying spectrum, r = 16. The spectrum is ours, so figures agree to 0.03."""
    W, codec = decaying(), NormalFloat(bits)
    plain = float((W - codec.round(W)).norm())
    made = split(W, codec, 16, 5)
    assert made.errors[0] / plain == pytest.approx(once, abs=0.03)
    assert min(made.errors) / plain == pytest.approx(five, abs=0.03)
    assert min(made.errors) <= made.errors[0] < plain


def test_identities():
    W = torch.randn(24, 40, dtype=torch.float64)
    same = split(W, None, 5, 3)
    assert torch.equal(same.Q, W) and (same.B @ same.A).abs().max() < 1e-12
    whole = split(W, NormalFloat(2), 24, 1)
    torch.testing.assert_close(whole.Q + whole.B @ whole.A, W, rtol=1e-10, atol=1e-10)
    none = split(W, NormalFloat(3), 4, 0)
    assert not none.B.any() and torch.equal(none.Q, NormalFloat(3).round(W))
    pissa = split(W, None, 4, 1, order="factor")
    torch.testing.assert_close(pissa.Q + pissa.B @ pissa.A, W)
    wide = split(W, NormalFloat(2), 40, 1)
    assert wide.B.shape == (24, 40) and wide.A.shape == (40, 40), "a rank above the matrix's is filled with zeros"


def test_the_scale_is_folded_in():
    W = torch.randn(32, 48)
    one, four = split(W, NormalFloat(3), 4, 2), split(W, NormalFloat(3), 4, 2, s=4.0)
    torch.testing.assert_close(4.0 * four.B @ four.A, one.B @ one.A)
    for order in ("quantize", "factor"):
        made = split(W, NormalFloat(3), 4, 3, order=order, s=0.25)
        error = (W - made.Q - 0.25 * made.B @ made.A).norm()
        assert float(error) == pytest.approx(made.errors[-1], rel=1e-5)


def test_weights():
    W, row, col = torch.randn(32, 48).double(), torch.rand(32).double() + 0.1, torch.rand(48).double() + 0.1
    B, A = top(W, 6, row, col)
    left = (row[:, None] * (W - B @ A) * col).square().sum()
    tail = torch.linalg.svdvals(row[:, None] * W * col)[6:].square().sum()
    assert float(left) == pytest.approx(float(tail), rel=1e-12)
    flat = split(W, NormalFloat(3), 6, 4, order="factor", row=torch.full_like(row, 2.0), col=torch.full_like(col, 3.0))
    plain = split(W, NormalFloat(3), 6, 4, order="factor")
    torch.testing.assert_close(flat.B @ flat.A, plain.B @ plain.A)
    torch.manual_seed(0)
    big = torch.linalg.qr(torch.randn(200, 40)).Q * torch.logspace(0, -3, 40) @ torch.linalg.qr(torch.randn(150, 40)).Q.mT
    (b1, a1), (b2, a2) = top(big, 8, random=True), top(big, 8)
    assert (b1 @ a1 - b2 @ a2).norm() < 1e-3 * (b2 @ a2).norm()
    balanced, all_left = top(big, 8), top(big, 8, balance=False)
    torch.testing.assert_close(all_left[1] @ all_left[1].mT, torch.eye(8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(balanced[0] @ balanced[1], all_left[0] @ all_left[1], atol=1e-5, rtol=1e-5)
    picked = top(big, 2, pick=torch.tensor([3, 5]))
    assert torch.linalg.svdvals(picked[0] @ picked[1])[:2].tolist() == pytest.approx(
        torch.linalg.svdvals(big)[[3, 5]].tolist(), rel=1e-3)  # fmt: skip


def test_best_and_patience():
    W = decaying(64)
    rising = split(W, NormalFloat(2), 8, 30, order="factor", patience=True, best=True)
    assert len(rising.errors) < 30 and rising.errors[-1] > rising.errors[-2]
    error = float((W - rising.Q - rising.B @ rising.A).norm())
    assert error == pytest.approx(min(rising.errors), rel=1e-5)


@pytest.mark.parametrize("bad", [
    lambda W: split(W, None, 2, -1), lambda W: split(W, None, 2, s=0.0), lambda W: split(W, None, 2, order="other"),
    lambda W: split(W, None, 2, row=torch.zeros(4)), lambda W: split(W * float("nan"), NormalFloat(4), 2)])
def test_bad_splits(bad):
    with pytest.raises(BadValue):
        bad(torch.randn(4, 8))


# -- Fisher weights and bits -------------------------------------------------------------------------------------------


def test_fisher_by_sample():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6), torch.randn(5, 4)

    def loss(m, batch):
        return (m(batch[0]) - batch[1]).square().sum()

    ol.adapt(model, ol.method("lora", r=1))
    sites = [s.site for s in ol.slots(model)]
    ol.detach(model)
    row, col = fisher_weights(model, sites, [(x, y)], loss)["0"]
    F = torch.zeros(4, 6)
    for i in range(5):
        model.zero_grad()
        model[0].weight.requires_grad_(True)
        loss(model, (x[i], y[i])).backward()
        F += model[0].weight.grad.square()
    torch.testing.assert_close(row, F.mean(1).sqrt())
    torch.testing.assert_close(col, (F.mean(0) / F.mean()).sqrt())


def test_samples_of_nested_batches():
    batch = {"x": torch.arange(6).view(3, 2), "name": "kept", "pair": 7}
    assert [(s["x"].tolist(), s["name"]) for s in samples(batch)] == [([[0, 1]], "kept"), ([[2, 3]], "kept"), ([[4, 5]], "kept")]
    assert [tuple(t.shape) for t in next(samples((torch.zeros(3, 2), torch.zeros(3))))] == [(1, 2), (1,)]


def test_allocation():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    cost = torch.rand(6, 8).sort(1, descending=True).values
    bits = torch.tensor([c.bits_per_weight((64, 64)) for c in grid("small")]).expand(6, 8)
    cost = cost[:, bits[0].argsort().argsort()]
    numel = torch.tensor([100, 50, 400, 30, 200, 70])
    for budget in (2.6, 3.1, 4.0, 9.0):
        chosen = allocate(cost, bits, numel, budget)
        used = sum(float(bits[m, c]) * int(numel[m]) for m, c in enumerate(chosen)) / int(numel.sum())
        assert used <= budget + 1e-6
    assert chosen == cost.argmin(1).tolist(), "with room for all, each matrix takes its best"
    heavy = cost.clone()
    heavy[2] *= 0.5
    first, second = allocate(cost, bits, numel, 3.1), allocate(heavy, bits, numel, 3.1)
    assert bits[2, second[2]] <= bits[2, first[2]]
    with pytest.raises(BadValue, match="smallest configurations"):
        allocate(cost, bits, numel, 1.5)
    assert len(grid("paper")) == 432


# -- an adapter that carries its base ----------------------------------------------------------------------------------


def base(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16)).to(dtype).eval()


@pytest.fixture
def saved(tmp_path):
    model = base()
    ol.adapt(model, ol.method("loftq", r=4, alpha=6.0, bits=3, iterations=2))
    folder = ol.save(model, tmp_path / "a")
    x = torch.randn(5, 64)
    return model, folder, x, model(x)


def test_it_loads_on_the_dense_base(saved, tmp_path):
    model, folder, x, y = saved
    assert sorted(p.name for p in folder.iterdir()) == ["omnilora.json", "omnilora.safetensors"]
    other = base()
    report = ol.load(other, folder)
    assert report["base"] == "same bytes" and report["parameters"] == 4 * (64 + 48 + 48 + 16)
    assert torch.equal(other(x), y) and isinstance(other[0], CodedLinear)
    again = ol.save(other, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    ol.detach(other)
    assert ol.load(other, folder)["base"] == "same bytes", "and on the quantized base itself"
    assert torch.equal(other(x), y)


def test_another_precision_is_the_same_base(saved):
    _, folder, x, y = saved
    other = base(dtype=torch.bfloat16)
    assert ol.load(other, folder)["base"] == "same weights"
    assert (other(x.bfloat16()).float() - y).norm() < 0.02 * y.norm()


def test_nothing_moves_where_it_does_not_fit(saved):
    _, folder, x, _ = saved
    stranger = base(seed=1)
    before = stranger(x)
    with pytest.raises(BaseMismatch):
        ol.load(stranger, folder)
    wide = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 17))
    with pytest.raises((StateMismatch, BaseMismatch)):
        ol.load(wide, folder)
    adapted = base()
    ol.adapt(adapted, ol.method("lora", r=2), name="other")
    with pytest.raises(StateMismatch, match="without adapters"):
        ol.load(adapted, folder)
    for model in (stranger, wide):
        assert ol.adapters(model) == [] and type(model[0]) is nn.Linear
    assert torch.equal(stranger(x), before) and type(adapted[0]).__name__ == "Linear"


def test_a_second_adapter_carries_it_too(saved, tmp_path):
    model, _, x, _ = saved
    ol.adapt(model, ol.method("lora", r=2), name="second")
    with torch.no_grad():
        for slot in ol.slots(model, "second"):
            slot.B.normal_()
    ol.activate(model, "second")
    y = model(x)
    folder = ol.save(model, tmp_path / "second", adapter="second")
    assert not (folder / "adapter_config.json").exists(), "PEFT would load it on the wrong weights"
    other = base()
    ol.load(other, folder)
    assert torch.equal(other(x), y)
    with pytest.raises(NotExpressible, match="carries"):
        ol.export(model, tmp_path / "out", for_="peft")
    with pytest.raises(NotExpressible, match="base weights"):
        ol.combine("lora_sum", [ol.state(model, "second"), ol.state(model, "default")], [0.5, 0.5])


def test_damaged_folders_are_refused(saved):
    _, folder, _, _ = saved
    manifest = json.loads((folder / "omnilora.json").read_text())
    assert set(manifest["carried"]) == {"0", "2"}

    def spoilt(**changes):
        made = json.loads(json.dumps(manifest))
        made["carried"]["0"].update(changes)
        (folder / "omnilora.json").write_text(json.dumps(made))

    said = manifest["carried"]["0"]["said"]
    for changes in ({"store": "Nothing"}, {"said": {**said, "bits": 4}}, {"tensors": ["weight", "other"]},
                    {"tensors": ["weight"]}, {"said": 3}):
        spoilt(**changes)
        with pytest.raises((FileRefused, StateMismatch)):
            ol.load(base(), folder)
    (folder / "omnilora.json").write_text(json.dumps({**manifest, "content": "0" * 64}))
    with pytest.raises(FileRefused, match="hash"):
        load_file(folder)


def test_a_quantized_or_adapted_base_is_not_split():
    model = base()
    ol.quantize(model)
    with pytest.raises(AttachError, match="dense"):
        ol.adapt(model, ol.method("loftq", r=2))
    with pytest.raises(NotExpressible, match="conv"):
        ol.adapt(nn.Sequential(nn.Conv2d(4, 4, 3)), ol.method("loftq", r=2), ["0"])
    model = base()
    ol.adapt(model, ol.method("lora", r=2))
    with pytest.raises(AttachError, match="adapters"):
        ol.adapt(model, ol.method("loftq", r=2), name="b")
    assert ol.adapters(model) == ["default"]


def test_ranks_and_bits_by_layer():
    model = base()
    W = model[2].weight.detach().clone()
    ol.adapt(model, ol.method("loftq", r=4, alpha=8.0, bits=2, bits_of={"2": 4}, quantizer="uniform", iterations=1),
             overrides={"2": {"r": 8}})  # fmt: skip
    assert model[0].codec == IntGroups(2, 0, 2.0) and model[2].codec == IntGroups(4, 0, 2.0)
    slot = next(s for s in ol.slots(model) if s.site.name == "2")
    assert slot.how.r == 8 and slot.scale == 1.0
    now = model[2].dequantized() + slot.scale * (slot.B @ slot.A).detach()
    assert (now - W).norm() < (model[2].dequantized() - W).norm()


def test_training_resumes_and_loads(tmp_path):
    """The interrupted run goes on from its checkpoint, and a fresh dense base loads what it saved."""
    def run(home, **options):
        model = base()
        torch.manual_seed(3)
        ol.adapt(model, ol.method("lq_lora", r=4, alpha=6.0, budget=4.0, fisher=False))
        g = torch.Generator().manual_seed(0)
        data = [(torch.randn(64, generator=g), torch.randn(16, generator=g)) for _ in range(64)]
        ol.fit(model, data, loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), steps=8, output=str(home), **options)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=4)
    rest = run(tmp_path / "cut", resume="auto")
    x = torch.randn(3, 64)
    assert torch.equal(whole.eval()(x), rest.eval()(x))
    folder = ol.save(rest, tmp_path / "adapter")
    other = base()
    ol.load(other, folder)
    assert torch.equal(other(x), rest(x))
