"""A language model's loss without padding and without logits: the same loss and gradients, or a reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from test_data import tiny_llama, tiny_tokenizer
from test_fit import ROWS, Gradients

import omnilora as ol
from omnilora.core.method import Method
from omnilora.core.op import Part, chain
from omnilora.parameterizations.lora import LoRA
from omnilora.training import frugal, joined
from omnilora.training.encode import MASKED
from omnilora.training.losses import CausalLM

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KV = {"num_key_value_heads": 2}
MODELS = {"Llama": KV, "Mistral": {**KV, "sliding_window": 4}, "Qwen2": KV, "Qwen3": {**KV, "head_dim": 8}, "Gemma": {**KV, "head_dim": 8},
          "Gemma2": {**KV, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
          "Gemma3Text": {**KV, "head_dim": 8, "sliding_window": 4}, "GPTNeoX": {}, "SmolLM3": KV, "Phi": {}, "Phi3": KV,
          "Granite": {**KV, "logits_scaling": 4.0}, "Cohere": {**KV, "logit_scale": 0.25}, "Olmo2": {}, "Starcoder2": KV,
          "GPT2": {}}  # fmt: skip


def model_of(name, **changes):
    own = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64) if name == "GPT2" else {**BASE, **MODELS[name]}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**own, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(model, method=None):
    torch.manual_seed(1)
    ol.adapt(model, method or Method("plain", LoRA(r=4)))
    with torch.no_grad():
        for p in ol.trainable(model):
            p.add_(0.1 * torch.randn(p.shape))
    return model


def batch_of(lengths=(20, 11, 5), learned=3):
    torch.manual_seed(2)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)))
    mask = torch.stack([(torch.arange(ids.shape[1]) < n).long() for n in lengths])
    labels = ids.masked_fill(mask == 0, MASKED)
    labels[:, :learned] = MASKED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def measured(task, model, batch):
    params = [p for p in model.parameters() if p.requires_grad]
    loss, _ = task.total(model, batch)
    return [loss.detach(), *torch.autograd.grad(loss, params)]


def same(a, b, tolerance=1e-5):
    x, y = (torch.cat([t.flatten() for t in ts[1:]]) for ts in (a, b))
    return abs(a[0] / b[0] - 1) < tolerance and (x - y).norm() < tolerance * y.norm()


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("learned", [0, 3])
def test_known_families_train_alike(name, learned):
    model, task, batch = adapted(model_of(name)), CausalLM(), batch_of(learned=learned)
    usual = measured(task, model, batch)
    own = model(**batch).loss * task.weight(batch)
    with task.prepared(model):
        made, declined = measured(task, model, batch), task.declined()
    assert declined == ({"padding": "its attention is 'eager'"} if name == "Gemma2" else {})
    assert same(made, usual) and float(made[0]) == pytest.approx(float(own), rel=1e-5)
    assert model.config._attn_implementation in ("sdpa", "eager") and task.frugal is None


def test_a_base_in_bf16_spares_the_same_and_learns_as_well():
    """Adapters are fp32 leaves on it; the loss falls as it does with padding and logits, and as in fp32."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for padding in (False, True):
            model = tiny_llama().to(dtype)
            torch.manual_seed(1)
            ol.adapt(model, Method("plain", LoRA(r=4)))
            report = ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), batch_size=8, steps=30, lr=2e-2, padding=padding)
            found[dtype, padding] = report.losses
            assert set(report.declined) == ({"padding"} if padding else set()), report.declined
            assert {t.dtype for t in ol.trainable(model)} == {torch.float32}
    usual = found[torch.float32, True]
    assert usual[-1] < 0.2 * usual[0]
    assert all(abs(a - b) < 0.1 * usual[0] for losses in found.values() for a, b in zip(losses, usual, strict=True))


def test_no_mask_no_padding_and_no_logits_exist(monkeypatch):
    model, task, batch = adapted(model_of("Llama")), CausalLM(), batch_of()
    seen, rows = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape[0], q.shape[2], options["attn_mask"], options["is_causal"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with task.prepared(model):
        task.total(model, batch)
        seen.clear()
        model.lm_head.register_forward_hook(lambda layer, args, y: rows.append(y.shape))
        _, outputs = task.total(model, batch)
    assert seen == [(1, n, None, True) for n in (20, 11, 5)] * 2
    assert rows == [(1, 0, 60)] and outputs.logits is None


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"accumulate": 3, "batch_size": 3},
                                     {"packing": True, "accumulate": 9}])  # fmt: skip
def test_fit_computes_the_padded_gradients(options):
    found = []
    for given in ({"padding": True}, options):
        rule, model = Gradients(), tiny_llama()
        torch.manual_seed(1)
        ol.adapt(model, Method("g", LoRA(r=4), (rule,)))
        report = ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), **{"batch_size": 8, "steps": 1, "lr": 1e-2, "clip": None, **given})
        found.append((rule.kept, report.losses[0], report.declined))
        assert model.config._attn_implementation == "sdpa"
    (whole, loss, why), (parts, other, nothing) = found
    assert why == {"padding": "padding = True"} and nothing == {}
    assert other == pytest.approx(loss, rel=1e-5) and any(g.norm() > 0 for g in whole.values())
    assert all((whole[k] - parts[k]).norm() <= 1e-5 * whole[k].norm() + 1e-9 for k in whole)


def test_joined_rows_are_not_grouped_by_length(monkeypatch):
    from omnilora.training.batches import Feed

    seen, epoch = [], Feed.epoch
    monkeypatch.setattr(Feed, "epoch", lambda self, *a: seen.append(self.grouped) or epoch(self, *a))
    for padding in (False, True):
        model = tiny_llama()
        ol.adapt(model, Method("plain", LoRA(r=4)))
        ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), steps=1, padding=padding)
    assert seen == [False, True]


def test_evaluation_inside_and_outside_of_a_run_agree():
    model, rows = adapted(tiny_llama()), ROWS
    plain = ol.evaluate(model, rows, tokenizer=tiny_tokenizer(), padding=True)
    assert ol.evaluate(model, rows, tokenizer=tiny_tokenizer())["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_rows_of_the_caller_hold():
    model, task, batch = adapted(model_of("Llama")), CausalLM(), batch_of()
    ol.adapt(model, Method("plain", LoRA(r=2)), name="other")
    with torch.no_grad():
        for p in ol.trainable(model, "other"):
            p.add_(0.3)
    names = ["default", None, "other"]
    with torch.no_grad():
        each = []
        for i, name in enumerate(names):
            with ol.context(model, rows=[name]):
                each.append(float(CausalLM().total(model, {k: v[i : i + 1] for k, v in batch.items()})[0]))
        with task.prepared(model):
            task.total(model, batch)
            with ol.context(model, rows=names):
                together = float(task.total(model, batch)[0])
            assert together == pytest.approx(sum(each), rel=1e-5)
            n = int(batch["attention_mask"].sum())  # and of a caller who joins rows: segments name each token's row
            inputs, labels = joined.join(batch)
            segments = torch.repeat_interleave(torch.arange(3), batch["attention_mask"].sum(1))[None]
            with ol.context(model, rows=names, segments=segments), joined.joined_call():
                logits = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=MASKED, reduction="sum")
            assert logits.shape[1] == n and float(loss) == pytest.approx(sum(each), rel=1e-5)


@dataclass(frozen=True, eq=False)
class Neighbours(Part):
    """Adds the mean over the sequence: what a layer must not do if rows are to be joined."""

    def __call__(self, h, x, geo, entered):
        return h + h.mean(-2, keepdim=True)


class Mixes(LoRA):
    def delta(self, p, ctx):
        return p.scale * chain(p.B, p.A, Neighbours())


class Reads(ol.Rule):
    reads_outputs = True


DECLINED = {
    "mixes tokens": (lambda: adapted(model_of("Llama"), Method("m", Mixes(r=4))), (), {"padding"}),
    "adapted head": (lambda: _headed(), (), {"logits"}),
    "rule reads outputs": (lambda: adapted(model_of("Llama")), (Reads(),), {"logits"}),
    "hook": (lambda: _hooked(), (), {"padding"}),
    "family": (lambda: adapted(model_of_opt()), (), {"padding"}),
    "eager": (lambda: adapted(model_of("Llama", attn_implementation="eager")), (), {"padding"}),
}


def _headed():
    model = model_of("Llama")
    torch.manual_seed(1)
    ol.adapt(model, Method("plain", LoRA(r=4)), targets=["q_proj", "lm_head"])
    return model


def _hooked():
    model = adapted(model_of("Llama"))
    model.model.layers[0].mlp.register_forward_hook(lambda layer, args, y: y * (1 + torch.arange(len(y))[:, None, None]))
    return model


def model_of_opt():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60, word_embed_proj_dim=32,
        max_position_embeddings=64)).eval()  # fmt: skip


@pytest.mark.parametrize("what", sorted(DECLINED))
def test_what_is_not_the_same_is_declined_with_a_reason(what):
    make, rules, expected = DECLINED[what]
    model, task, batch = make(), CausalLM(), batch_of()
    usual = measured(task, model, batch)
    with task.prepared(model, rules):
        made, declined = measured(task, model, batch), task.declined()
    assert set(declined) == expected and all(declined.values())
    assert same(made, usual)


def test_a_wrong_short_cut_is_noticed(monkeypatch):
    model, task, batch = adapted(model_of("Llama")), CausalLM(), batch_of()
    usual = measured(task, model, batch)
    attend = joined.attend_pieces
    monkeypatch.setattr(joined, "attend_pieces", lambda q, k, v, lengths, **o: attend(q, k, v, [sum(lengths)], **o))
    with task.prepared(model):
        made, declined = measured(task, model, batch), task.declined()
    assert declined == {"padding": frugal.DIFFERS} and same(made, usual)
    monkeypatch.setattr(frugal, "cross_entropy", lambda *a, **o: 1.01 * ol_cross_entropy(*a, **o))
    with task.prepared(model):
        made, declined = measured(task, model, batch), task.declined()
    assert declined == {"padding": frugal.DIFFERS, "logits": frugal.DIFFERS} and same(made, usual)


ol_cross_entropy = frugal.cross_entropy


def test_left_padding_goes_the_usual_way():
    model, task, batch = adapted(model_of("Llama")), CausalLM(), batch_of()
    left = {k: torch.stack([r.roll(20 - n) for r, n in zip(v, (20, 11, 5))]) for k, v in batch.items()}
    assert joined.join(left) is None
    with task.prepared(model):
        assert same(measured(task, model, left), measured(CausalLM(), model, left))


def test_joined_rows():
    inputs, labels = joined.join(batch_of((4, 2), learned=0))
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]] and inputs["cu_seq_lens_q"].tolist() == [0, 4, 6]
    ids = inputs["input_ids"][0].tolist()
    assert labels.tolist() == [[*ids[1:4], MASKED, ids[5], MASKED]]


def test_draws_and_modes_are_as_before():
    model, task = adapted(model_of("Llama")).train(), CausalLM()
    model.model.layers[1].eval()
    modes, batch = [m.training for m in model.modules()], batch_of()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with task.prepared(model):
        task.total(model, batch)
    assert torch.equal(state, torch.get_rng_state()) and [m.training for m in model.modules()] == modes
