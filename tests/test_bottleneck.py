"""Bottleneck adapters: what the cards' cases do not reach."""

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.contract import KINDS, check_parameterization, own_tags
from omnilora.errors import BadValue, NotExpressible, NotMergeable, TargetError
from omnilora.parameterizations.bottleneck import Bottleneck


@pytest.mark.parametrize("place", ["series-in", "series-out", "parallel"])
def test_linear_bottlenecks_keep_the_contract_and_merge(place):
    how = Bottleneck(m=3, place=place, phi="identity", c=0.7, bias=True, start="normal")
    assert check_parameterization(how, own_tags(how), KINDS) > 50


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=40)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    return transformers.BertForMaskedLM(config).eval()


def names(model):
    return sorted({s.site.name.split("layer")[-1].split(".", 2)[-1] for s in ol.slots(model) if s.site.called and "norm" not in s.site.name.lower()})


@pytest.mark.parametrize(("make", "want"), [
    (llama, ["mlp.down_proj", "self_attn.o_proj"]), (bert, ["attention.output.dense", "output.dense"])])  # fmt: skip
def test_loretta_stands_after_attention_and_feed_forward(make, want):
    model = ol.adapt(make(), ol.method("loretta_adp", m=8, tensor_rank=2))
    assert names(model) == want
    norms = [s for s in ol.slots(model) if s.site.role == "norm"]
    assert len({s.site.layer for s in norms}) == sum("norm" in type(m).__name__.lower() for m in model.modules())
    ids = torch.arange(8).view(1, 8)
    before = ol.detach(model)(input_ids=ids).logits
    ol.adapt(model, ol.method("loretta_adp", m=8, tensor_rank=2))
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_series_adapters_choose_their_side():
    model = ol.adapt(llama(), ol.method("llm_adapters", m=4))
    sides = {s.site.name.split(".")[-1]: s.how.place for s in ol.slots(model)}
    assert sides == {"gate_proj": "series-in", "up_proj": "series-in", "down_proj": "series-out"}
    model = ol.adapt(bert(), ol.method("llm_adapters", m=4))
    assert names(model) == ["intermediate.dense", "output.dense"]
    assert names(ol.adapt(llama(), ol.method("llm_adapters", kind="parallel", m=4))) == [f"self_attn.{n}_proj" for n in "kqv"]
    lora = ol.adapt(llama(), ol.method("llm_adapters", kind="lora", r=4))
    assert {s.how.dropout for s in ol.slots(lora)} == {0.05} and len(ol.slots(lora)) == 2 * 6


def test_a_parallel_linear_bottleneck_is_lora():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7))
    x, state = torch.randn(4, 9), base.state_dict()
    a = ol.adapt(base, ol.Method("x", Bottleneck(m=3, place="parallel", phi="identity", c=2.0)))
    other = nn.Sequential(nn.Linear(9, 7))
    other.load_state_dict(state, strict=False)
    b = ol.adapt(other, ol.method("lora", r=3, alpha=6.0))
    other[0].load_state_dict({k: v for k, v in base[0].state_dict().items() if "adapters" not in k}, strict=False)
    with torch.no_grad():
        for s, t in zip(ol.slots(a), ol.slots(b)):
            s.U.normal_()
            t.A.copy_(s.D)
            t.B.copy_(s.U)
    torch.testing.assert_close(a(x), b(x))


def test_refusals():
    with pytest.raises(BadValue, match="phi"):
        ol.method("llm_adapters", phi="sin")
    with pytest.raises(BadValue, match="kind"):
        ol.method("llm_adapters", kind="prefixes")
    with pytest.raises(BadValue, match="place"):
        ol.method("llm_adapters", place="parallel")
    with pytest.raises(TargetError):
        ol.adapt(nn.Sequential(nn.Linear(4, 4)), ol.method("llm_adapters", m=2))
    conv = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(NotExpressible, match="series-in"):
        ol.adapt(conv, ol.method("llm_adapters", m=2, place="series-in"), "0")
    model = ol.adapt(nn.Sequential(nn.Linear(4, 4, bias=False)), ol.Method("x", Bottleneck(m=2, phi="identity", bias=True, start="normal")))
    with pytest.raises(NotMergeable, match="no bias"):
        ol.merge(model)
