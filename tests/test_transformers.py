"""On Hugging Face models: rows in generation and beams, checkpointing, compilation, 4 bits, save_pretrained."""

import copy

import pytest
import torch

import omnilora as ol
from omnilora.contract import shake
from omnilora.stores.nf4_layer import quantize

transformers = pytest.importorskip("transformers")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=120, max_position_embeddings=64)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def two(model):
    for i, key in enumerate(("lora", "dora")):
        ol.adapt(model, ol.method(key, r=3, alpha=7.0, dropout=0.0), name=key)
        shake(model, key, 0.05 + 0.05 * i)


IDS = torch.randint(1, 119, (4, 7), generator=torch.Generator().manual_seed(1))
ROWS = ["lora", None, "dora", {"lora": 0.5, "dora": 1.0}]


def answer(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


def test_generation_with_an_adapter_for_each_row(llama):
    two(llama)
    with ol.context(llama, rows=ROWS):
        mixed = answer(llama, IDS)
    for i, row in enumerate(ROWS):
        with ol.context(llama, adapters={} if row is None else row):
            assert torch.equal(answer(llama, IDS[i : i + 1])[0], mixed[i])
    with ol.context(llama, rows=ROWS, repeat=3):
        beams = answer(llama, IDS, num_beams=3)
    for i, row in enumerate(ROWS):
        with ol.context(llama, adapters={} if row is None else row):
            alone = answer(llama, IDS[i : i + 1], num_beams=3)[0]
            assert torch.equal(alone, beams[i][: len(alone)])


def test_gradient_checkpointing_with_rows(llama):
    two(llama)
    llama.train()

    def gradients():
        llama.zero_grad()
        with ol.context(llama, rows=ROWS):
            loss = llama(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [t.grad.clone() for s in ol.slots(llama) for _, t in s.tensors()]

    want = gradients()
    llama.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": ol.checkpoint_context(llama)})
    for a, b in zip(gradients(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_model_switches_without_recompiling(llama):
    torch._dynamo.reset()
    two(llama)
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(IDS, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for active in ("lora", "dora", ["lora", "dora"], {"dora": 0.3}, None):
                ol.activate(llama, active)
                got, want = compiled(IDS, use_cache=False).logits, llama(IDS, use_cache=False).logits
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["lora", "dora", "adalora", "molora", "vera"])
def test_four_bit_base_trains_and_reloads(llama, key, tmp_path):
    report = quantize(llama)
    assert report.layers == 14 and 4 < report.bits < 7  # a kilobyte of maps a layer weighs in on layers this small
    ol.adapt(llama, ol.method(key))
    hashes = {k: v.clone() for k, v in ol.base_state_dict(llama).items()}
    run = ol.start(llama, opt := torch.optim.AdamW(ol.param_groups(llama, 1e-2)), total_steps=12)
    llama.train()
    losses = []
    for _ in range(12):
        out = llama(input_ids=IDS, labels=IDS)
        (out.loss + run.loss({"attention_mask": torch.ones_like(IDS)}, out)).backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(out.loss.detach()))
    run.finish()
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, hashes[k]) for k, v in ol.base_state_dict(llama).items())
    llama.eval()
    y = llama(IDS).logits
    ol.save(llama, tmp_path / key)
    ol.detach(llama)
    ol.load(llama, tmp_path / key)
    assert torch.equal(llama(IDS).logits, y)


def test_clean_base_file(llama, tmp_path):
    plain = copy.deepcopy(llama)
    two(llama)
    llama.save_pretrained(tmp_path, state_dict=ol.base_state_dict(llama))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_added_embeddings_are_refused_with_a_remedy(llama):
    ol.adapt(llama, ol.method("lora", r=2), ["embed_tokens", "q_proj"])
    llama(IDS)
    llama.resize_token_embeddings(150)
    ol.activate(llama, "default")
    with pytest.raises(ol.errors.AttachError, match=r"Resize first|replaced"):
        llama(IDS)
