"""Foreign bases: adapters over other libraries' quantized layers, trained, merged into a dense copy, saved."""

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.contract import shake
from omnilora.stores.nf4_layer import FourBitLinear, quantize


def use(model, x, tmp_path, key):
    model.eval()
    ol.adapt(model, ol.method(key, r=4, dropout=0.0))
    with ol.disabled(model):
        before = model(x)
    start = (model(x) - before).norm() / before.norm()
    assert start < 5e-3
    shake(model)
    y = model(x)
    model.train()
    wants = x.clone().requires_grad_()
    model(wants).sum().backward()
    assert wants.grad.abs().sum() > 0 and all(t.grad is not None for t in ol.trainable(model))
    model.eval()
    assert torch.equal(model(x), y)
    report = ol.merge(model, bound=0.05)
    assert (model(x) - y).norm() / y.norm() < 0.02 and not any(r.written for r in report.layers)
    ol.unmerge(model)
    assert torch.equal(model(x), y)
    ol.save(model, tmp_path / key)
    ol.detach(model)
    assert ol.load(model, tmp_path / key)["base"] == "same bytes"
    assert torch.equal(model(x), y)
    ol.detach(model)


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_bitsandbytes_layers(tmp_path, key):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    four = nn.Sequential(bnb.nn.Linear4bit(128, 64, quant_type="nf4"), nn.ReLU(), bnb.nn.Linear4bit(64, 32)).to("cpu")
    use(four, torch.randn(4, 128), tmp_path, key)
    eight = nn.Sequential(bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)).to("cpu")
    use(eight, torch.randn(4, 128), tmp_path, key)


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_torchao_tensors(tmp_path, key):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    use(model, torch.randn(4, 128), tmp_path, key)


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_own_four_bits(tmp_path, key):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    quantize(model)
    use(model, torch.randn(4, 128), tmp_path, key)


@pytest.mark.parametrize("keep", ["ram", "disk"])
def test_requantizing_merge_restores_every_byte(keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False)).eval()
    quantize(model)
    x = torch.randn(4, 128)
    ol.adapt(model, ol.method("lora", r=4))
    shake(model, size=0.05)
    y = model(x)
    before = {k: v.clone() for k, v in ol.base_state_dict(model).items()}
    with pytest.raises(ol.errors.MergeRefused):
        ol.merge(model, requantize=True, bound=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())
    report = ol.merge(model, requantize=True, bound=0.5, keep=keep)
    assert report.layers[0].written and 0.01 < report.largest < 0.2
    assert any(not torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())
    ol.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items()) and torch.equal(model(x), y)


def test_qlora_quantizes_on_adapt_and_unloads_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    x = torch.randn(4, 128)
    ol.adapt(model, ol.method("qlora", r=4))
    assert type(model[0]).__name__ == "FourBitLinear" and isinstance(model[0], FourBitLinear)
    shake(model)
    y = model(x)
    plain = ol.merge_and_unload(model)
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)


def test_four_bits_keep_no_dense_weight_for_the_backward():
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    quantize(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(2, 256, requires_grad=True))
    assert sum(kept) < 256 * 256 // 4
