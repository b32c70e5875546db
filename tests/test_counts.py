"""Facts: trainable numbers as published, on the real shapes, without allocating one weight."""

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.core.method import Method
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA


def stack(layers, **shapes):
    """``layers`` blocks of linear layers given as name=(out, in), on the meta device."""
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (o, i) in shapes.items()}) for _ in range(layers))  # fmt: skip


def roberta(large=False):
    d = 1024 if large else 768
    return stack(24 if large else 12, query=(d, d), value=(d, d))


def llama7b():
    d, f = 4096, 11008
    return stack(32, q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), o_proj=(d, d), gate_proj=(f, d), up_proj=(f, d), down_proj=(d, f))


def llama70b():
    d, f, kv = 8192, 28672, 1024
    return stack(80, q_proj=(d, d), k_proj=(kv, d), v_proj=(kv, d), o_proj=(d, d), gate_proj=(f, d), up_proj=(f, d), down_proj=(d, f))


def count(model):
    return sum(t.numel() for t in ol.trainable(model))


@pytest.mark.parametrize(
    ("made", "model", "want"),
    [
        (ol.method("lora", r=8), roberta(), 294_912),
        (ol.method("lora", r=8), roberta(large=True), 786_432),
        (ol.method("lora_fa", r=8), roberta(), 147_456),
        (ol.method("nola"), llama70b(), 573_440),
        (ol.method("loretta_adp", norms=False), stack(12, o_proj=(768, 768), down_proj=(768, 3072)), 57_408),
        (ol.method("llm_adapters"), stack(32, up_proj=(11_008, 4096), gate_proj=(11_008, 4096)), 134_217_728),
        (ol.method("llm_adapters", kind="parallel"), stack(32, up_proj=(11_008, 4096), down_proj=(4096, 11_008)), 247_463_936),
        (ol.method("llm_adapters", kind="lora", r=8), stack(32, q_proj=(4096, 4096), v_proj=(4096, 4096)), 4_194_304),
        (ol.method("loretta_rep", r=8), roberta(), 27_840),
        (ol.method("melora", n=4, r=8), roberta(), 294_912),
        (ol.method("lotr", r=32), roberta(), 73_728),
        (ol.method("lotr", r=2), roberta(), 3_168),
        (ol.method("lora_asym", r=8), roberta(large=True), 393_216),
        (ol.method("prolora", r=8, u=1, m=8, n=8), llama7b(), 4_684_800),
        (ol.method("dylora", r=8), roberta(), 294_912),
        (ol.method("vera", r=1024), roberta(), 43_008),
        (ol.method("vera", r=256), roberta(large=True), 61_440),
        (ol.method("vera", r=1024), llama7b(), 1_589_248),
        (ol.method("qlora", r=64), llama7b(), 159_907_840),
        (ol.method("qdylora", r=64), llama7b(), 159_907_840),
        (ol.method("loftq", r=64), llama7b(), 159_907_840),
        (ol.method("lq_lora", r=64, fisher=False), llama7b(), 159_907_840),
        (ol.method("qa_lora", r=64, group=32), llama7b(), 89_309_184),
        (ol.method("tied_lora", r=8), stack(32, qkv=(12_288, 4096)), 524_544),
        (ol.method("tied_lora", r=8, train="AB"), stack(32, qkv=(12_288, 4096)), 131_072),
        (ol.method("adalora", r=8), stack(12, **{n: (768, 768) for n in ("q", "k", "v", "o")}, up=(3072, 768), down=(768, 3072)),
         1_327_104 + 8 * 72),
    ],
)  # fmt: skip
def test_published_counts(made, model, want):
    ol.adapt(model, made, "all-linear")
    assert count(model) == want
    assert all(t.is_meta for t in ol.trainable(model))


def test_dora_on_llama():
    model = llama7b()
    ol.adapt(model, Method("dora", DoRA(LoRA(32))), ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    assert count(model) == 56_098_816 + 876_544


def test_lora_drop_shares_one_pair_by_type():
    from omnilora.parameterizations.vera import TiedLoRA

    model = roberta()
    keep = {"re:[0-5]\\..*": {"method": TiedLoRA(8, 16.0, 0.0, "AB", "type")}}
    ol.adapt(model, ol.method("lora", r=8), "all-linear", overrides=keep)
    assert count(model) == 172_032
