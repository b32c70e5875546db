"""Training: what an update computes, whole runs from a configuration, heads, tokens, evaluation and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import WORDS, tiny_llama, tiny_tokenizer

import omnilora as ol
from omnilora.core.attach import hub_of
from omnilora.core.method import Method
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA
from omnilora.training import evaluate as ev
from omnilora.training.config import TrainConfig
from omnilora.training.fit import train
from omnilora.training.losses import mean_pooled, packing_mode
from omnilora.training.models import dtype_of, load_model, load_trained

HERE = Path(__file__).parent
ROWS = [{"prompt": f"what is {a}" + " good" * i, "completion": f"{b} " * (i % 3 + 1)}
        for i, (a, b) in enumerate(zip(WORDS[6:14], "abcdabcd"))]  # fmt: skip
TEXTS = [{"text": f"{'good fine' if i % 2 else 'awful bad'} film {WORDS[8 + i % 6]}", "label": ["neg", "pos"][i % 2]}
         for i in range(24)]  # fmt: skip
PLAIN = Method("plain", LoRA(r=4))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    home = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    return str(home)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT without a head."""
    from transformers import BertConfig, BertModel

    home = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=48, max_position_embeddings=64)).save_pretrained(home)  # fmt: skip
    tiny_tokenizer(None).save_pretrained(home)
    return str(home)


def fitted(model=None, rows=ROWS, method=PLAIN, **options):
    model = model if model is not None else tiny_llama()
    torch.manual_seed(1)
    ol.adapt(model, method)
    given = {"batch_size": 8, "steps": 1, "lr": 1e-2, "schedule": "constant", "warmup": 0, "clip": None, **options}
    return model, ol.fit(model, rows, tokenizer=tiny_tokenizer(), **given)


def close(a, b, tolerance=1e-5):
    left, right = ol.state(a).flat(), ol.state(b).flat()
    return all((left[k] - right[k]).norm() <= tolerance * left[k].norm().clamp_min(1e-6) for k in left)


# -- one update --------------------------------------------------------------------------------------------------------


class Gradients(ol.Rule):
    """Keeps the gradients of the first update."""

    def __init__(self):
        self.kept = {}

    def before_step(self, run):
        if not self.kept:
            self.kept = {f"{s.site.name}.{n}": t.grad.clone() for s in run.slots() for n, t in s.tensors()}


def gradients(**options):
    rule = Gradients()
    _, report = fitted(method=Method("g", LoRA(r=4), (rule,)), **options)
    return rule.kept, report.losses[0]


def test_the_loss_is_that_of_transformers():
    model, report = fitted(method=PLAIN)
    from omnilora.training.batches import Collate
    from omnilora.training.data import read_rows
    from omnilora.training.encode import encode

    batch = Collate(0)(encode(read_rows(ROWS), tiny_tokenizer(), TrainConfig(), 64).examples)
    assert report.losses[0] == pytest.approx(tiny_llama()(**batch).loss.item(), rel=1e-5)
    assert report.tokens == int(batch["attention_mask"].sum()) and report.trainable == ol.state(model).numel()


@pytest.mark.parametrize("options", [{"accumulate": 8, "batch_size": 1}, {"accumulate": 3, "batch_size": 3},
                                     {"packing": True, "accumulate": 9}, {"gradient_checkpointing": True}])  # fmt: skip
def test_accumulation_packing_and_checkpointing_change_no_gradient(options):
    whole, loss = gradients()
    parts, other = gradients(**options)
    assert other == pytest.approx(loss, rel=1e-5)
    assert any(g.norm() > 0 for g in whole.values())
    assert all((whole[k] - parts[k]).norm() <= 1e-5 * whole[k].norm() + 1e-9 for k in whole)


def test_other_adapters_stay_as_they_are():
    model = tiny_llama()
    ol.adapt(model, PLAIN, name="other")
    before = ol.state(model, "other").flat()
    model, report = fitted(model, steps=3)
    assert ol.active(model) == {"default": 1.0}
    after = ol.state(model, "other").flat()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for s in ol.slots(model, "other") for _, p in s.tensors())
    assert hub_of(model).run is None and len(report.losses) == 3


def test_any_module_with_a_loss_of_its_own():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(128, 2))
    x = torch.randn(64, 3, 6, 6)
    data = [(img, int(img.mean() > 0)) for img in x]
    statistics = net[1].running_mean.clone()
    base = {k: v.clone() for k, v in net.state_dict().items()}
    ol.adapt(net, PLAIN, targets=["0", "3"])
    loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    before = ev.evaluate(net, data, loss=loss)["loss"]
    report = ol.fit(net, data, loss=loss, epochs=12, lr=2e-2, eval_data=data)
    assert report.steps == 96 and report.metrics["loss"] < 0.7 * before
    assert torch.equal(net[1].running_mean, statistics)
    ol.detach(net)
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())


def test_a_model_that_returns_its_loss():
    tok = tiny_tokenizer()
    data = [{"input_ids": torch.tensor(tok("what is one two").input_ids), "labels": torch.tensor([4, 5, 6, 7])}] * 8
    model = ol.adapt(tiny_llama(), PLAIN)
    report = ol.fit(model, data, steps=3, lr=1e-2)
    assert report.losses[-1] < report.losses[0]


def test_models_that_mix_packed_rows_are_refused():
    class Mixes(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.e = torch.nn.Embedding(20, 4)

        def forward(self, input_ids, position_ids=None, attention_mask=None):
            return type("Out", (), {"logits": self.e(input_ids).cumsum(1)})

    with pytest.raises(BadValue, match="mixes packed rows"):
        packing_mode(Mixes(), 20)


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_that_loads(llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS * 4)))
    (tmp_path / "c.yaml").write_text(f"model: {llama}\ndata: {tmp_path}/rows.jsonl\nlr: 1e-2\nhyper: {{r: 16}}\n")
    config = TrainConfig.from_yaml(tmp_path / "c.yaml", output=str(tmp_path / "run"), epochs=10, eval_data=0.1)
    report = train(config)
    assert report.metrics["loss"] < 0.5 * report.evaluations[0]["loss"] and report.stopped == "done"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"adapter", "checkpoints", "config.yaml", "report.json"}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == report.steps
    written = TrainConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert written.template == "chat" and written.hyper["r"] == 16 and written.max_length == 64
    model, tok = load_trained(tmp_path / "run", dtype="fp32")
    base, _ = load_trained(tmp_path / "run", adapter=False)
    figures = ev.evaluate(model, ROWS, tokenizer=tok)
    assert figures["loss"] < ev.evaluate(base, ROWS, tokenizer=tok)["loss"]
    assert figures["perplexity"] == pytest.approx(2.718281828 ** figures["loss"], rel=1e-3)
    prompts = [r["prompt"] for r in ROWS]
    answers = ev.generate(model, tok, prompts, max_new_tokens=5, batch_size=3)
    assert answers == [ev.generate(model, tok, [p], max_new_tokens=5)[0] for p in prompts]
    assert "".join(ev.stream(model, tok, prompts[1], max_new_tokens=5)).strip() == answers[1]
    with ol.disabled(model):
        assert "".join(ev.stream(model, tok, prompts[1], max_new_tokens=5)).strip() == ev.generate(
            base, tok, prompts[1], max_new_tokens=5)[0]  # fmt: skip
    again = train(config.replace(resume="auto"))
    assert again.losses == report.losses


@pytest.mark.parametrize("key, hyper", [("qlora", {"r": 4}), ("lora_drop", {"r": 4, "threshold": 0.5, "probe_steps": 3}),
                                        ("adalora", {}), ("lora_plus", {})])  # fmt: skip
def test_methods_of_every_kind_train_and_load(llama, tmp_path, key, hyper):
    four = key == "lora_plus"
    report = train(TrainConfig(model=llama, method=key, hyper=hyper, data=ROWS, load_in_4bit=four, eval_data=ROWS, steps=10, lr=1e-2,
                               dtype="fp32", output=str(tmp_path)))  # fmt: skip
    assert report.method == key and report.metrics["loss"] < report.evaluations[0]["loss"]
    model, tok = load_trained(tmp_path)
    assert ev.evaluate(model, ROWS, tokenizer=tok)["loss"] == pytest.approx(report.metrics["loss"], rel=1e-4)


def test_checked_before_anything_is_loaded():
    for changes, says in (({}, "data is not given"), ({"data": ROWS, "patience": 2}, "needs eval_data"),
                          ({"method": "lorra", "data": ROWS}, "lora"), ({"hyper": {"rank": 3}, "data": ROWS}, "rank"),
                          ({"data": "none.jsonl"}, "does not exist")):  # fmt: skip
        with pytest.raises(ol.errors.OmniloraError, match=says):
            train(TrainConfig(**{"model": "/nowhere/at/all", **changes}))
    with pytest.raises(BadValue, match="does not exist"):
        load_model(TrainConfig(model="/nowhere/at/all"))


_RELOAD = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from omnilora.training.models import load_trained
torch.manual_seed(123)
model, tok = load_trained(sys.argv[1])
with torch.no_grad():
    torch.save(model(**tok(["good film one", "awful film"], padding=True, return_tensors="pt")).logits, sys.argv[2])
"""


def test_a_classifier_reloads_in_a_new_process(bert, tmp_path):
    report = train(TrainConfig(model=bert, task="classification", data=TEXTS, eval_data=TEXTS, epochs=8, lr=5e-3,
                               dtype="fp32", output=str(tmp_path / "run"), seed=3))  # fmt: skip
    assert report.metrics["accuracy"] == 1.0 and report.metrics["macro_f1"] == 1.0
    state = ol.load_file(tmp_path / "run" / "adapter")
    assert state.extra["labels"] == ["neg", "pos"] and state.extra["fresh"] == ["classifier.bias", "classifier"]
    assert {"classifier", "classifier.bias"} <= set(state.sites)
    model, tok = load_trained(tmp_path / "run")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    with torch.no_grad():
        mine = model(**tok(["good film one", "awful film"], padding=True, return_tensors="pt")).logits
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", _RELOAD, str(tmp_path / "run"), str(tmp_path / "logits")], env=env,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), mine)


def test_embeddings_of_pairs(bert):
    rows = [{"anchor": f"what is {w}", "positive": f"{w} film"} for w in WORDS[7:15]]
    config = TrainConfig(model=bert, task="embedding", dtype="fp32")
    model, tok = load_model(config)
    ol.adapt(model, PLAIN)
    before = ev.evaluate(model, rows, tokenizer=tok, task="embedding")
    report = ol.fit(model, rows, tokenizer=tok, task="embedding", steps=40, lr=1e-2, eval_data=rows, eval_every=40)
    assert report.metrics["loss"] < 0.5 * before["loss"] and report.metrics["accuracy"] == 1.0
    made = ev.embed(model, tok, [r["anchor"] for r in rows], batch_size=3)
    assert torch.allclose(made.norm(dim=-1), torch.ones(8)) and made.shape == (8, 32)
    scored = [{**r, "score": i % 2} for i, r in enumerate(rows)]
    assert ol.fit(model, scored, tokenizer=tok, task="embedding", steps=20, lr=1e-2).losses[-1] < 0.2


def test_mean_pooling_ignores_padding():
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    short = mean_pooled(hidden[1:, :2], mask[1:, :2])
    assert torch.allclose(mean_pooled(hidden, mask)[1:], short)


def test_added_tokens_are_learned_and_saved(llama, tmp_path):
    rows = [{"prompt": "<sql> one", "completion": "two"}, {"prompt": "one", "completion": "three"}] * 8
    report = train(TrainConfig(model=llama, data=rows, tokens=["<sql>"], steps=40, lr=2e-2, dtype="fp32",
                               output=str(tmp_path / "run")))  # fmt: skip
    assert report.losses[-1] < 0.3
    state = ol.load_file(tmp_path / "run" / "adapter")
    (number,) = state.extra["tokens"]["ids"]
    assert state.extra["tokens"]["tokens"] == ["<sql>"] and state.sites["model.embed_tokens"].how.rows == (number,)
    model, tok = load_trained(tmp_path / "run")
    assert tok.convert_tokens_to_ids("<sql>") == number
    assert ev.generate(model, tok, ["<sql> one", "one"], max_new_tokens=4) == ["two", "three"]


def test_dtype_is_chosen_by_the_processor():
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    fast = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert dtype_of("auto") == (torch.bfloat16 if fast else torch.float32) and dtype_of("fp16") == torch.float16


def test_a_bf16_base_trains_fp32_adapters():
    model, report = fitted(tiny_llama().bfloat16(), steps=5)
    assert report.losses[-1] < report.losses[0]
    assert {t.dtype for s in ol.slots(model) for _, t in s.tensors()} == {torch.float32}


@pytest.mark.slow
def test_the_packaged_model_loads_with_linear_layers():
    model, tok = load_model(TrainConfig(model="package:smollm2", dtype="bf16"))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and model.dtype == torch.bfloat16
    assert ev.generate(model, tok, ["What is the capital of France?"], max_new_tokens=12)[0]
