"""Whole runs on quantized bases through the command line: train or apply, load again, evaluate, merge."""

import json

import pytest
import torch
from typer.testing import CliRunner

import omnilora as ol
from omnilora.cli.main import app
from omnilora.stores.coded import CodedLinear

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def ok(*args):
    done = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama whose matrices have decaying spectra, its tokenizer, and data."""
    home = tmp_path_factory.mktemp("quantized")
    words = ["<pad>", "<unk>", "<s>", "</s>", *(f"w{i}" for i in range(40))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                         eos_token="</s>").save_pretrained(home / "model")  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                u, s, v = torch.linalg.svd(p, full_matrices=False)
                p.copy_(10 * u * (s / torch.arange(1, len(s) + 1)) @ v)
    model.save_pretrained(home / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(16)]
    for name, part in (("train", rows), ("test", rows[:4])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return home


@pytest.mark.parametrize("key, hyper", [
    ("loftq", {"r": 4, "alpha": 8, "bits": 2}), ("lq_lora", {"r": 4, "alpha": 8, "budget": 3.5, "calibration": 8}),
    ("qa_lora", {"r": 4, "alpha": 8, "bits": 3, "group": 16}), ("qdylora", {"r": 4, "alpha": 8}),
    ("qlora", {"r": 4, "alpha": 8, "paged": True})])  # fmt: skip
def test_train_load_evaluate_merge(tiny, key, hyper):
    run = tiny / key
    sets = [a for k, v in hyper.items() for a in ("--set", f"hyper.{k}={json.dumps(v)}")]
    made = ok("train", "--model", tiny / "model", "--method", key, "--data", tiny / "train.jsonl", "--steps", 10,
              "--batch-size", 8, "--lr", "1e-2", "--dtype", "fp32", "--output", run, "--eval-data", tiny / "test.jsonl",
              "--threads", 1, *sets)  # fmt: skip
    assert made["last_loss"] < made["first_loss"]
    model, tokenizer = ol.load_trained(run)
    found = ol.evaluate(model, str(tiny / "test.jsonl"), tokenizer=tokenizer)
    assert found["loss"] == pytest.approx(made["metrics"]["loss"], rel=1e-5)
    carries = key in ("loftq", "lq_lora")
    if carries or key == "qa_lora":
        assert sum(isinstance(m, CodedLinear) for m in model.modules()) == 14
    if carries:
        again = ok("eval", "--adapter", run, "--data", tiny / "test.jsonl")
        assert again["adapter"]["loss"] == pytest.approx(found["loss"], rel=1e-4)
        report = ok("merge", "--adapter", run, "--output", tiny / f"{key}-merged", "--probe", "w1 w2 w3")
        assert report["largest"] <= report["bound"]
        after = ok("eval", "--model", tiny / f"{key}-merged", "--data", tiny / "test.jsonl", "--set", "dtype=fp32")
        assert after["base"]["loss"] == pytest.approx(found["loss"], rel=1e-3)
    if key == "qa_lora":
        report = ol.merge(model)
        assert all(r.absorbed for r in report.layers)
        after = ol.evaluate(model, str(tiny / "test.jsonl"), tokenizer=tokenizer)
        assert after["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_lqer_applies(tiny):
    made = ok("apply", "--method", "lqer", "--model", tiny / "model", "--data", tiny / "train.jsonl", "--dtype", "fp32",
              "--eval-data", tiny / "test.jsonl", "--output", tiny / "lqer", "--set", "hyper.codec=nf2", "--set", "hyper.k=16",
              "--threads", 1)  # fmt: skip
    gap = {k: abs(made[f"loss_{k}"] - made["loss_base"]) for k in ("quantized", "reconstructed")}
    assert gap["reconstructed"] < 0.7 * gap["quantized"] and made["judged_on"] == "held-out data"
    assert made["layers"] == 14 and made["bits_a_weight"] == 2.5
    found = ok("eval", "--adapter", tiny / "lqer" / "adapter", "--model", tiny / "model", "--data", tiny / "test.jsonl",
               "--set", "dtype=fp32")  # fmt: skip
    assert found["adapter"]["loss"] == pytest.approx(made["loss_reconstructed"], rel=1e-4)
    model, _ = ol.load_trained(tiny / "lqer")
    assert sum(isinstance(m, CodedLinear) for m in model.modules()) == 14
    shown = ok("info", tiny / "lqer" / "adapter")
    assert shown["method"] == "lqer" and shown["parameters"] == made["pair_parameters"]
