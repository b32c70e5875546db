"""bitsandbytes layers read as they multiply, before and after its CPU kernel rearranges them."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from omnilora.errors import AttachError, BadValue
from omnilora.stores import nf4
from omnilora.stores.bnb import bits_of, dequantized, keep_layout, reordered

bnb = pytest.importorskip("bitsandbytes")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def four(i=256, o=96, dtype=torch.float32, quant_type="nf4", compute=None, double=True, **more) -> nn.Module:
    torch.manual_seed(i + o)
    layer = bnb.nn.Linear4bit(
        i, o, bias=False, quant_type=quant_type, compute_dtype=compute, compress_statistics=double, **more
    )
    layer.weight = bnb.nn.Params4bit(torch.randn(o, i).to(dtype), requires_grad=False, quant_type=quant_type,
                                     compress_statistics=double, module=layer, **more)  # fmt: skip
    return layer.to("cpu")


def eight(i=64, o=48, keep=False, threshold=0.0) -> nn.Module:
    torch.manual_seed(i)
    layer = bnb.nn.Linear8bitLt(i, o, bias=False, has_fp16_weights=keep, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(torch.randn(o, i), has_fp16_weights=keep, requires_grad=keep)
    return layer.to("cpu")


def evaluated(layer: nn.Module) -> nn.Module:
    """After one evaluation forward without gradient."""
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, layer.in_features))
    if not reordered(layer):
        pytest.skip("this CPU keeps the layout")
    return layer


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bits_forward(dtype, compute, quant_type, double):
    layer = four(dtype=dtype, quant_type=quant_type, compute=compute, double=double)
    x = torch.randn(5, 256).to(compute)
    weight = dequantized(layer)
    assert weight.dtype == compute and weight.shape == (96, 256)
    assert torch.equal(layer(x), x @ weight.T)
    assert torch.equal(weight, nf4.from_bnb_state(layer.state_dict()).dequantize(compute))


@pytest.mark.parametrize("width", [16, 32, 48, 96, 100, 7, 2])
def test_four_bits_whose_rows_are_no_multiple_of_the_block(width):
    layer = four(width, 37)
    x = torch.randn(5, width)
    assert torch.equal(layer(x), x @ dequantized(layer).T)


def test_compute_dtype_is_fixed_by_the_first_forward():
    layer = four(dtype=torch.bfloat16)
    assert dequantized(layer).dtype == torch.bfloat16
    layer(torch.randn(2, 256))
    assert dequantized(layer).dtype == torch.float32
    assert dequantized(layer, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_four_bits_in_another_storage_dtype(storage):
    layer = four(quant_storage=storage)
    plain = dequantized(layer)
    assert torch.equal(plain, dequantized(four()))
    assert torch.equal(dequantized(evaluated(layer)), dequantized(evaluated(four())))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bits_reordered(dtype, quant_type, double):
    layer = four(dtype=dtype, quant_type=quant_type, double=double)
    before = dequantized(layer, torch.float32)
    evaluated(layer)
    weight = dequantized(layer)
    with torch.no_grad():
        columns = layer(torch.eye(256)).T
        x = torch.randn(4096, 256).bfloat16()
        got, want = layer(x.float()), (x.double() @ weight.double().T).bfloat16().float()
    assert torch.equal(columns, weight.bfloat16().float()), "every element"
    assert (got == want).float().mean() > 0.999, "and the bits that rounding the output hides"
    assert 0 < (weight - before).norm() / before.norm() < 0.01
    live = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (live - before).norm() / before.norm() > 0.5, "the trap that this module avoids"


def test_reading_changes_nothing_and_survives_saving():
    layer = evaluated(four())
    bits = layer.weight.data.clone()
    first = dequantized(layer)
    assert torch.equal(first, dequantized(layer)) and torch.equal(bits, layer.weight.data) and reordered(layer)
    state = layer.state_dict()
    assert not reordered(layer)
    assert torch.equal(dequantized(layer), nf4.from_bnb_state(state).dequantize(torch.float32))
    assert (dequantized(layer) - first).norm() / first.norm() < 0.02
    evaluated(layer)
    assert (dequantized(layer) - first).norm() / first.norm() < 0.02


def test_a_failed_reordering_is_read_too():
    layer = four(96, 64)
    before = dequantized(layer)
    layer.eval()
    try:
        with torch.no_grad():
            layer(torch.randn(2, 96))
    except (RuntimeError, AssertionError):
        assert torch.equal(dequantized(layer), before)


def test_keep_layout():
    layer = four()
    keep_layout(layer)
    before = dequantized(layer)
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        each.eval()
        with torch.no_grad():
            x = torch.randn(3, 256)
            assert torch.equal(each(x), x @ before.T) and not reordered(each)
        each.train()
        x.requires_grad_()
        each(x).sum().backward()
        assert torch.allclose(x.grad, before.sum(0).expand(3, -1), atol=1e-4)
    with pytest.raises(AttachError, match="reordered"):
        keep_layout(evaluated(four()))


def test_gradients_are_cut_by_the_reordered_layout():
    """Why keep_layout refuses: should bitsandbytes repair this, the refusal can go."""
    layer = evaluated(four()).train()
    x = torch.randn(3, 256, requires_grad=True)
    with pytest.warns(UserWarning, match="autograd kernel"):
        layer(x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_eight_bits_training_forward(keep, dtype):
    layer = eight(keep=keep)
    x = torch.randn(5, 64).to(dtype)
    before = dequantized(layer, dtype)
    assert torch.equal(layer(x), x @ before.T)
    assert torch.equal(layer(x), x @ dequantized(layer, dtype).T), "after the codes moved to the layer's state"
    assert dequantized(layer).dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bits_evaluation_forward(threshold):
    layer = eight(threshold=threshold).eval()
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, 0] = 127
    if threshold:
        x = x / 64
    with torch.no_grad():
        before, y, after = dequantized(layer), layer(x), dequantized(layer)
    assert torch.equal(before, after)
    assert (y - x @ before.T).abs().max() / y.abs().max() < 1e-4, (
        "an input of int8 is exact but for a constant of 6 digits"
    )


def test_eight_bits_kept_in_floats_follow_the_forward():
    layer = eight(keep=True)
    x = torch.randn(5, 64)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(48, 64))
    assert torch.equal(layer(x), x @ dequantized(layer).T), "quantized again"
    layer.weight.grad = torch.zeros_like(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(48, 64))
    assert torch.equal(layer(x), x @ dequantized(layer).T), "with a gradient: not quantized again"


def test_subclasses_and_strangers():
    made = type("Linear4bit", (bnb.nn.LinearNF4,), {})
    assert bits_of(made(64, 64)) == 4 and bits_of(eight()) == 8
    impostor = type("Linear4bit", (nn.Linear,), {})(4, 4)
    assert bits_of(impostor) is None and bits_of(nn.Linear(4, 4)) is None
    with pytest.raises(BadValue, match="no linear layer of bitsandbytes"):
        dequantized(impostor)
    with pytest.raises(BadValue, match="not quantized yet"):
        dequantized(bnb.nn.Linear4bit(64, 64))


def test_the_module_does_not_import_bitsandbytes():
    code = (
        "import sys, torch; sys.modules['bitsandbytes'] = None; import omnilora.stores.bnb as s;"
        "print(s.bits_of(torch.nn.Linear(2, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
