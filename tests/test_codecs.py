"""Codecs, coded layers and their store: exact bits, copies, files, gradients; merging into zero points."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.contract import shake
from omnilora.core.store import store_of
from omnilora.errors import BadValue, FileRefused, StateMismatch, UnknownName
from omnilora.parameterizations.pooled import PooledLoRA
from omnilora.stores import bits
from omnilora.stores.codecs import IntGroups, MXInt, NormalFloat, from_config, named, to_config
from omnilora.stores.coded import Coded, CodedLinear, quantize_with
from omnilora.stores.nf4 import quantize as nf4

CODECS = [NormalFloat(2), NormalFloat(3), NormalFloat(4), NormalFloat(8), NormalFloat(3, 64, 8, 256),
          NormalFloat(4, 16, 3, 16, "bfloat16"), IntGroups(2), IntGroups(4), IntGroups(5, 7), IntGroups(8, held_in="float16"),
          IntGroups(3, 0, clip=2.0), MXInt(2), MXInt(4), MXInt(8)]  # fmt: skip
by_name = pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.name}-{c.block}")


@pytest.mark.parametrize("k", range(1, 9))
def test_codes_take_k_bits(k):
    codes = torch.randint(0, 2**k, (1003,), dtype=torch.uint8)
    packed = bits.pack(codes, k)
    assert packed.numel() == bits.size(1003, k) == 126 * k and packed.dtype == torch.uint8
    assert torch.equal(bits.unpack(packed, k)[:1003], codes.int())
    table = torch.randn(2**k)
    assert torch.equal(bits.levels(packed, k, table)[:1003], table[codes.long()])
    stream = sum(int(c) << (k * i) for i, c in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == stream.to_bytes(126 * k, "little")


@by_name
@pytest.mark.parametrize("shape", [(12, 64), (5, 37), (1, 8), (70, 128)])
def test_layout(codec, shape):
    """What is stored has the announced shapes, dtypes and bytes, also on the meta device."""
    w = torch.randn(shape)
    held = codec.encode(w)
    layout = codec.layout(shape)
    assert {k: tuple(t.shape) for k, t in held.items()} == {k: s for k, (s, _) in layout.items()}
    assert all(t.dtype in layout[k][1] for k, t in held.items())
    assert codec.bits_per_weight(shape) == 8 * sum(t.nbytes for t in held.values()) / w.numel()
    once = codec.decode(held, shape)
    assert once.shape == w.shape and once.isfinite().all()
    assert (once - w).norm() < {2: 0.8, 3: 0.4}.get(codec.bits, 0.15) * w.norm()
    assert from_config(json.loads(json.dumps(to_config(codec)))) == codec
    meta = codec.encode(w.to("meta"))
    assert {k: (t.shape, t.dtype) for k, t in meta.items()} == {k: (t.shape, t.dtype) for k, t in held.items()}


@pytest.mark.parametrize("codec, want", [
    (NormalFloat(4), 4.5), (NormalFloat(4, 64, 8, 256), 4.127197265625), (NormalFloat(3, 64, 8, 256), 3.127197265625),
    (IntGroups(4, 32), 6.0), (IntGroups(4, 32, held_in="float16"), 5.0), (MXInt(4), 4.5), (MXInt(8), 8.5)])  # fmt: skip
def test_published_bits(codec, want):
    assert codec.bits_per_weight((1024, 1024)) == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize("codec, error", [
    (NormalFloat(4), 0.092), (NormalFloat(3), 0.202), (NormalFloat(2), 0.563), (NormalFloat(4, 64, 8, 256), 0.092)])
def test_published_errors(codec, error):
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    assert float((codec.round(w) - w).norm() / w.norm()) == pytest.approx(error, abs=0.003)


def test_nf4_is_that_of_the_four_bit_layer():
    w = torch.randn(96, 128)
    assert torch.equal(NormalFloat(4).round(w), nf4(w, double=False).dequantize())


def test_block_floating_point_by_formula():
    w = torch.randn(7, 40) * torch.logspace(-6, 6, 7)[:, None]
    w[3] = 0
    w[4, :16] = torch.tensor([2.0**k for k in range(-8, 8)])
    got = MXInt(4).round(w)
    for row in range(7):
        for start in range(0, 40, 16):
            block = w[row, start : start + 16].double()
            top = block.abs().max()
            e = torch.ceil(torch.log2(top)) if top > 0 else torch.tensor(0.0)
            want = block.sign() * 2**e / 8 * (block.abs() / 2**e * 8).round().clamp(max=7)
            torch.testing.assert_close(got[row, start : start + 16].double(), want, rtol=1e-6, atol=0)


def test_integers_by_formula_and_a_constant_group():
    w = torch.randn(3, 10)
    w[1, :4] = 0.7
    got = IntGroups(3, 4).round(w)
    for row in range(3):
        for start in (0, 4, 8):
            g = w[row, start : start + 4]
            s = (g.max() - g.min()) / 7
            want = g if s == 0 else s * ((g / s - g.min() / s).round() + g.min() / s)
            torch.testing.assert_close(got[row, start : start + 4], want)


def test_float64_stays_wide():
    w = torch.randn(8, 64, dtype=torch.float64)
    held = IntGroups(4).encode(w)
    assert held["scale"].dtype == torch.float64 == IntGroups(4).decode(held, (8, 64), torch.float64).dtype


@pytest.mark.parametrize("bad", [lambda: NormalFloat(1), lambda: NormalFloat(9), lambda: NormalFloat(4, 12),
                                 lambda: NormalFloat(4, 64, 1), lambda: IntGroups(4, clip=-1.0), lambda: named("nf9"),
                                 lambda: named("fp4"), lambda: MXInt(4).encode(torch.randn(3)),
                                 lambda: MXInt(4).encode(torch.full((2, 2), float("nan"))),
                                 lambda: IntGroups(4).encode(torch.ones(2, 2, dtype=torch.int32))])  # fmt: skip
def test_bad_values(bad):
    with pytest.raises(BadValue):
        bad()


def test_unknown_codecs():
    with pytest.raises(UnknownName):
        from_config({"codec": "Nothing"})
    with pytest.raises(UnknownName):
        from_config({"codec": "MXInt", "bits": 4})


# -- layers ------------------------------------------------------------------------------------------------------------


def model_of(codec, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48, bias=False)).to(dtype)
    quantize_with(model, codec)
    return model.eval()


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(codec, dtype):
    model = model_of(codec, dtype)
    x = torch.randn(5, 64, dtype=dtype)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y) and type(other[0]) is CodedLinear
    fresh = model_of(codec, dtype)
    for layer in fresh[0], fresh[2]:
        layer.weight.data.zero_()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(x), y)
    moved = copy.deepcopy(model).to(torch.float64)
    assert moved[0].dequantized().dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(moved[0].scales.values(), model[0].scales.values(), strict=True))
    store = store_of(model[0])
    assert isinstance(store, Coded) and store.shape() == (32, 64) and store.dtype == dtype
    assert set(store.tensors()) == {"weight", *(f"weight.{k}" for k in model[0].scales)}
    before = {k: t.clone() for k, t in store.tensors().items()}
    store.write(store.read() + 0.3)
    assert any(not torch.equal(t, before[k]) for k, t in store.tensors().items())


@by_name
def test_gradients_are_those_of_the_dense_weight(codec):
    model = model_of(codec)
    x = torch.randn(5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = model(x)
    y.square().sum().backward()
    assert max(kept) < 64 * 32, "no dense weight waits for the backward pass"
    other = x.detach().clone().requires_grad_()
    dense = torch.relu(other @ model[0].dequantized().T + model[0].bias) @ model[2].dequantized().T
    dense.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("codec", [NormalFloat(3), IntGroups(4), MXInt(4)], ids=lambda c: c.name)
def test_layers_compile(codec):
    torch._dynamo.reset()
    model, x = model_of(codec), torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_damaged_states_are_refused():
    model = model_of(IntGroups(4))
    good = model.state_dict()
    key = "0.weight.codec"

    def said(**changes):
        text = json.loads(bytes(good[key].tolist()))
        return {**good, key: torch.tensor(list(json.dumps({**text, **changes}).encode()), dtype=torch.uint8)}

    for bad, error in [({**good, key: torch.tensor([1, 2], dtype=torch.uint8)}, FileRefused),
                       (said(codec="Other"), FileRefused), (said(shape=[64, 64]), StateMismatch),
                       (said(bits=5), StateMismatch), (said(shape=[1 << 40, 1 << 40]), StateMismatch),
                       ({**good, "0.weight.scale": good["0.weight.scale"][:-1]}, StateMismatch),
                       ({**good, "0.weight.zero": good["0.weight.zero"] * float("nan")}, StateMismatch),
                       ({k: v for k, v in good.items() if k != "0.weight.zero"}, StateMismatch)]:  # fmt: skip
        with pytest.raises(error):
            copy.deepcopy(model).load_state_dict(bad)


def test_quantize_takes_names():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48))
    done = ol.quantize(model, "int4", blocksize=16)
    assert model[0].codec == IntGroups(4, 16) and done.layers == 2
    assert done.bits == IntGroups(4, 16).bits_per_weight((32, 64)) == 8.0
    with pytest.raises(BadValue, match="nf2"):
        ol.quantize(nn.Sequential(nn.Linear(4, 4)), "int1000")


# -- absorbing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["ram", "disk"])
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_an_update_constant_by_group_folds_into_zero_points(pool, keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16)).double().eval()
    ol.adapt(model, ol.method("qa_lora", r=4, alpha=6.0, group=8, pool=pool))
    ol.adapt(model, ol.method("qa_lora", r=2, alpha=3.0, group=16), name="second")
    shake(model)
    ol.activate(model, {"default": 0.5, "second": 2.0})
    x = torch.randn(5, 64, dtype=torch.float64)
    y, before = model(x), {k: v.clone() for k, v in ol.base_state_dict(model).items()}
    report = ol.merge(model, keep=keep)
    assert all(r.absorbed and r.written and r.action_error < 1e-12 for r in report.layers)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    changed = {k for k, v in ol.base_state_dict(model).items() if not torch.equal(v, before[k])}
    assert changed == {"0.weight.zero", "2.weight.zero"}, "codes and scales are the same bytes"
    ol.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())
    assert torch.equal(model(x), y)
    plain = ol.merge_and_unload(model)
    assert type(plain[0]) is CodedLinear
    torch.testing.assert_close(plain(x), y, rtol=1e-10, atol=1e-10)


def test_other_updates_do_not_fold():
    """Another group, and plain LoRA: a dense copy, as for any quantized base."""
    for how in (PooledLoRA(2, 3.0, group=12), ol.method("lora", r=2).parameterization):
        model = nn.Sequential(nn.Linear(64, 32)).eval()
        quantize_with(model, IntGroups(4, 8))
        ol.adapt(model, ol.Method("x", how))
        shake(model)
        x, before = torch.randn(3, 64), model[0].scales["zero"].clone()
        y = model(x)
        assert not any(r.absorbed or r.written for r in ol.merge(model).layers)
        assert torch.equal(model[0].scales["zero"], before)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_pooled_updates_are_constant_by_group():
    model = nn.Sequential(nn.Linear(20, 6))
    for pool in ("mean", "sum"):
        ol.adapt(model, ol.Method("x", PooledLoRA(3, 5.0, 0.0, 8, pool)), name=pool)
        shake(model, pool)
        (slot,) = ol.slots(model, pool)
        delta = slot.how.delta(slot, None).dense().detach()
        x = torch.randn(4, 20)
        sums = torch.stack([x[:, :8].sum(1), x[:, 8:16].sum(1), x[:, 16:].sum(1)], 1)
        pooled = sums / torch.tensor([8.0, 8.0, 4.0]) if pool == "mean" else sums
        torch.testing.assert_close(x @ delta.T, 5.0 / 3 * (pooled @ slot.A.T @ slot.B.T).detach())
        assert torch.linalg.matrix_rank(delta) == 3
    assert torch.equal(delta[:, 0], delta[:, 7]) and torch.equal(delta[:, 16], delta[:, 19])


def test_group_dropout_drops_pooled_features():
    model = nn.Sequential(nn.Linear(64, 8)).train()
    ol.adapt(model, ol.Method("x", PooledLoRA(2, 2.0, 0.5, 16)))
    (slot,) = ol.slots(model)
    seen = set()
    with torch.no_grad():
        slot.A.copy_(torch.eye(4)[:2])
        slot.B.fill_(1.0)
        for _ in range(60):
            y = slot.how.delta(slot, None)(torch.ones(1, 64))
            seen.add(round(float(y[0, 0]), 4))
    assert seen == {0.0, 2.0, 4.0}, "one coin for each pooled feature, scaled by 1/(1 − p)"
