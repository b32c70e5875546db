"""The hook on attention: virtual keys equal real ones, nothing is left behind, dropped keys weigh nothing."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import omnilora as ol
from omnilora.attention.dropout import draw, without_keys
from omnilora.attention.hook import Call, hook, unhook
from omnilora.core.method import Method
from omnilora.errors import AttachError, ContextError, NotExpressible
from omnilora.parameterizations.attention_prefix import Prefix

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, **options})).eval()


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1)
    return GPT2LMHeadModel(config).eval()


IDS = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def prefixed(model, n=4, name="default"):
    ol.adapt(model, Method("prefix", Prefix(n)), ["block:attention-layer"], name=name)
    return model


@pytest.mark.parametrize("made", [llama, bert, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_on_off_copy_detach(made, attention):
    model = made()
    model.set_attn_implementation(attention)
    before = model(IDS)[0]
    prefixed(model)
    after = model(IDS)[0]
    assert float((after - before).abs().max()) > 1e-3
    assert torch.equal(copy.deepcopy(model)(IDS)[0], after)
    with ol.disabled(model):
        assert torch.allclose(model(IDS)[0], before, atol=1e-6)
    ol.detach(model)
    assert model.config._attn_implementation == attention and torch.equal(model(IDS)[0], before)
    assert not any("_omnilora_changes" in vars(m) for m in model.modules())


def test_equals_a_cache_that_holds_the_prefix():
    """Without positions, virtual keys are keys of earlier tokens: the same as handing over a filled cache."""
    from transformers.cache_utils import DynamicCache

    model = gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    prefixed(model)
    want = model(IDS).logits
    cache = DynamicCache()
    for layer, slot in enumerate(ol.slots(model)):
        k, v = slot.P.detach().chunk(2, -1)
        cache.update(*(t.reshape(4, 4, 8).movedim(0, 1).expand(3, -1, -1, -1) for t in (k, v)), layer)
    with ol.disabled(model):
        got = model(IDS, past_key_values=cache).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_the_output_is_a_mixture_by_the_prefix_share():
    """attn(q, [P; K], [P_v; V]) = (1 − λ) attn(q, K, V) + λ attn(q, P, P_v), λ the softmax mass on the prefix."""
    torch.manual_seed(0)
    q, k, v, pk, pv = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (5, 6, 6, 3, 3))
    call = Call(torch.nn.Identity(), q, k, v, None).with_keys(pk[0].movedim(0, 1), pv[0].movedim(0, 1))
    weights = torch.softmax(q @ call.k.mT, -1)
    share = weights[..., :3].sum(-1, keepdim=True)
    parts = torch.softmax(q @ k.mT, -1) @ v, torch.softmax(q @ pk.mT, -1) @ pv
    assert torch.allclose(weights @ call.v, (1 - share) * parts[0] + share * parts[1], atol=1e-12)


def test_generation_with_and_without_a_cache_agree():
    model = prefixed(llama())
    mask = torch.ones_like(IDS)
    a, b = (model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)


def test_padding_stays_invisible():
    model = prefixed(llama())
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, :2] = 0
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), IDS[:1]), 1)
    where = (mask.cumsum(-1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=where).logits[:, 2:]
    assert torch.allclose(got, model(IDS[:1]).logits, atol=1e-5)


def test_saves_loads_and_trains(tmp_path):
    model = prefixed(llama(), 3)
    opt = torch.optim.Adam(ol.trainable(model), 1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    ol.save(model, tmp_path / "a")
    other = llama()
    ol.load(other, tmp_path / "a")
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_the_prefix_through_an_embedding():
    model = llama()
    ol.adapt(model, Method("prefix", Prefix(3, hidden=16)), ["block:attention-layer"])
    model(IDS, labels=IDS).loss.backward()
    assert all(t.grad is not None for t in ol.trainable(model))


def test_two_adapters_on_one_layer():
    model = prefixed(prefixed(llama(), 2, "a"), 3, "b")
    ol.activate(model, ["a", "b"])
    both = model(IDS).logits
    ol.detach(model, "b")
    ol.activate(model, "a")
    alone = model(IDS).logits
    assert not torch.allclose(both, alone)
    ol.activate(model, {"a": 0.5})
    with pytest.raises(ContextError):
        model(IDS)
    ol.detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_refusals():
    with pytest.raises(NotExpressible):
        ol.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), Method("prefix", Prefix(2)), ["all-linear"])
    with pytest.raises(AttachError):
        hook(torch.nn.Linear(2, 2), lambda call: call)


def test_a_dropped_key_has_no_weight_and_own_positions_stay():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    call = without_keys(Call(torch.nn.Identity(), q, k, k, None), 0.999, "column")
    weights = torch.softmax(q @ k.mT + call.mask, -1)
    assert torch.allclose(weights, torch.eye(5).expand(2, 3, 5, 5))
    assert draw(4, 10, 0.3, "span", torch.device("cpu")).sum(-1).flatten().tolist() == [3] * 4
    rows = draw(4, 10, 0.5, "column", torch.device("cpu"), 6)
    assert rows.shape == (4, 1, 10)


def test_training_hooks_go_with_the_run():
    from omnilora.core.run import param_groups, start

    model = llama()
    ol.adapt(model, ol.method("hiddenkey", r=2, p_key=0.3, beta=0.0))
    run = start(model, total_steps=2)
    run.bind(torch.optim.SGD(param_groups(model, 1e-2)))
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    run.close()
    assert model.config._attn_implementation == "sdpa"
    unhook(model.model.layers[0].self_attn, len, model)


def test_published_count_of_a_prefix():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))
    ol.adapt(model, ol.method("llm_adapters", kind="prefix", tokens=10))
    assert sum(t.numel() for t in ol.trainable(model)) == 2_621_440
