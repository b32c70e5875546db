"""Figures before anything is built equal those of the built thing, and nothing is touched."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.errors import BadValue, TargetError, UnknownName

transformers = pytest.importorskip("transformers")
explain = importlib.import_module("omnilora.explanation").explain

CONFIG = transformers.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return transformers.LlamaForCausalLM(CONFIG).eval()


def on_meta():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(CONFIG)


def built(model, method, **options):
    """(trainable, frozen, bytes of both) of the adapter once it is there."""
    other = copy.deepcopy(model)
    ol.adapt(other, method, **options)
    tensors = {id(t): t for s in ol.slots(other) for _, t in s.tensors()}.values()
    learns = sum(t.numel() for t in tensors if t.requires_grad)
    return learns, sum(t.numel() for t in tensors) - learns, sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("key, hyper", [
    ("lora", {"r": 3}), ("dora", {"r": 3}), ("vera", {"r": 4}), ("tied_lora", {"r": 3}), ("lora_fa", {"r": 2}),
    ("adalora", {"r": 4, "target": 2}), ("relora", {"r": 2})])
@pytest.mark.parametrize("meta", [False, True])
def test_counts_are_those_of_the_built_adapter(llama, key, hyper, meta):
    method = ol.method(key, **hyper)
    found = explain(on_meta() if meta else llama, method)
    learns, still, size = built(llama, method)
    assert (found.trainable, found.frozen, found.adapter) == (learns, still, size)
    assert found.gradients == 4 * learns and found.optimizer == 8 * learns
    assert found.plans == {"node" if key == "relora" else "block": len(found.sites)} and len(found.sites) == 14


def test_own_copies_and_overrides_are_counted(llama):
    options = {"targets": ["attention"], "unfreeze": ["norm", "lm_head"], "overrides": {"q_proj": {"r": 7}}}
    method = ol.method("lora", r=3)
    found = explain(on_meta(), method, **options)
    assert (found.trainable, found.frozen, found.adapter) == built(llama, method, **options)
    assert {s.rank for s in found.sites if s.name.endswith("q_proj")} == {7}
    assert {s.how for s in found.sites} == {"LoRA", "Full"}


def test_nothing_is_touched(llama):
    before = {n: (p.data_ptr(), p._version, p.requires_grad) for n, p in llama.named_parameters()}
    random = torch.get_rng_state()
    modules = {n: (type(m), list(vars(m))) for n, m in llama.named_modules()}
    explain(llama, "dora", ["attention"], unfreeze=["norm"])
    assert {n: (p.data_ptr(), p._version, p.requires_grad) for n, p in llama.named_parameters()} == before
    assert {n: (type(m), list(vars(m))) for n, m in llama.named_modules()} == modules
    assert torch.equal(random, torch.get_rng_state())
    meta = on_meta()
    explain(meta, "lora")
    assert all(p.is_meta for p in meta.parameters())


def test_weights_flops_and_activations():
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.bfloat16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    found = explain(model, ol.method("lora", r=2), batch_size=3, length=5)
    assert found.weights == {"bfloat16": 2 * (8 * 16 + 16), "float32": 4 * 16 * 4}
    assert found.parameters == 8 * 16 + 16 + 64
    base = 8 * 16 + 16 * 4
    assert found.flop_ratio == pytest.approx((base + 2 * (8 + 16) + 2 * (16 + 4)) / base)
    assert found.activations == 15 * (2 * (8 + 2) + 4 * (16 + 2))
    assert found.total == (sum(found.weights.values()) + found.adapter + found.gradients + found.optimizer
                           + found.activations)  # fmt: skip
    frozen_a = explain(model, ol.method("lora_fa", r=2), batch_size=3, length=5)
    assert frozen_a.activations == 15 * (2 * 2 + 4 * 2)


def test_four_bits_are_counted_as_they_will_be_held():
    nf4 = pytest.importorskip("omnilora.stores.nf4_layer")
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64, bias=False))
    planned = explain(model, "lora", store={"quant_type": "nf4"}).weights["nf4"]
    after = nf4.quantize(model).after
    assert planned == after
    assert sum(explain(model, "lora").weights.values()) == after + 4 * 128


@pytest.mark.parametrize("key, hyper", [("qlora", {}), ("qlora", {"double": False, "blocksize": 32}), ("qdylora", {}),
                                        ("qa_lora", {"bits": 3, "group": 16}), ("loftq", {"bits": 2}),
                                        ("loftq", {"quantizer": "uniform"}),
                                        ("lqer", {"k": 3, "scaled": False})])  # fmt: skip
@pytest.mark.parametrize("meta", [False, True])
def test_a_quantized_base_is_counted_as_it_will_be_held(llama, key, hyper, meta):
    counting = importlib.import_module("omnilora.counting")
    method = ol.method(key, **({"r": 3} if key != "lqer" else {}), **hyper)
    found = explain(on_meta() if meta else llama, method)
    other = copy.deepcopy(llama)
    ol.adapt(other, method)
    assert sum(found.weights.values()) == sum(counting.weights(other).values()) < sum(explain(llama, "lora").weights.values())
    assert any("quantized" in note for note in found.notes)
    assert all(type(m) is type(n) for m, n in zip(llama.modules(), on_meta().modules(), strict=True)), "nothing changed"


def test_formats_say_why_not(llama):
    assert explain(llama, "lora").formats["peft"] == {"can": True, "why": ""}
    assert explain(llama, "tied_lora").formats["peft"]["can"], "a thin product is LoRA to PEFT"
    answer = explain(llama, "ssf").formats["peft"]
    assert not answer["can"] and "SSF" in answer["why"] and all(site in why for site, why in answer["sites"].items())
    assert not explain(llama, "dora").formats["vllm"]["can"]


def test_convolutions_attention_and_recurrent_layers():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "mha": nn.MultiheadAttention(8, 2), "rnn": nn.LSTM(5, 7)})
    found = explain(model, ol.method("lora", r=2), ["conv", "mha", "rnn"])
    assert found.trainable == built(model, ol.method("lora", r=2), targets=["conv", "mha", "rnn"])[0]
    base = 6 * 4 * 9 + 24 * 8 + 8 * 8 + 28 * 5 + 28 * 7
    added = 2 * (36 + 6) + 2 * (8 + 24) + 2 * (8 + 8) + 2 * (5 + 28) + 2 * (7 + 28)
    assert found.flop_ratio == pytest.approx((base + added) / base)


def test_bad_input(llama):
    with pytest.raises(TargetError):
        explain(llama, "lora", ["nothing_like_this"])
    with pytest.raises(UnknownName):
        explain(llama, "lorra")
    with pytest.raises(UnknownName):
        explain(llama, "lora", optimizer="adamww")
    with pytest.raises(BadValue):
        explain(llama, "lora", batch_size=0)


def test_output_is_plain_data_and_a_table(llama):
    found = explain(llama, "lora")
    assert json.loads(json.dumps(found.as_dict()))["trainable"] == found.trainable
    text = str(found)
    assert "model.layers.*.self_attn.q_proj" in text and f"{found.trainable:,}" in text


def test_the_function_stays_callable_after_its_module_is_imported(llama):
    assert ol.explain(llama, "lora").trainable == ol.explain(llama, "lora").trainable


def test_plans_are_told_with_their_reasons(llama):
    assert explain(llama, ol.method("ia3")).plans == {"block": 4, "tree": 2}
    assert "IA3 is no product of low rank" in " ".join(explain(llama, ol.method("ia3")).notes)
    quantized = explain(llama, ol.method("qlora", r=2))
    assert quantized.plans == {"block": 14}
    assert explain(llama, "lora", ["embed_tokens"]).plans == {"tree": 1}
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.Linear(4, 4))
    assert [s.plan for s in explain(net, "lora", ["0", "1", "2"]).sites] == ["node", "tree", "node"]
