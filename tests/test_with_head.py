"""Every method trains on the tasks of an encoder: beside a new head, as classification needs it, and on pairs of texts."""

import math

import pytest
import tiny
import torch

import omnilora as ol
from omnilora.cli import cards
from omnilora.training import losses
from omnilora.training.batches import Collate
from omnilora.training.data import read_rows
from omnilora.training.encode import encode
from omnilora.training.fit import trained
from omnilora.training.models import load_model, load_trained

KEYS = [c["key"] for c in cards.read() if "trains_lm" in c["tags"] and c["key"] != "xlora"]


HYPER = {"lq_lora": {"budget": 4.0}}  # the default of 3 bits is below what matrices this small can reach


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("key", KEYS)
def test_trains_with_a_head(key, encoder, tmp_path):
    config = ol.TrainConfig(model=str(encoder), method=key, hyper=HYPER.get(key, {}), task="classification", data=tiny.labelled(48), batch_size=8,
                            steps=12, dtype="fp32", output=str(tmp_path / "run"))  # fmt: skip
    parts, report, _ = trained(config)
    assert report.steps == 12 and all(math.isfinite(x) for x in report.losses)
    own = next(s for s in ol.slots(parts.model) if s.site.name == "classifier")
    assert not torch.equal(own.W, own.site.read())
    again, tokenizer = load_trained(tmp_path / "run")
    batch = tokenizer([r["text"] for r in tiny.labelled(8)], return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = parts.model.eval()(**inputs).logits, again.eval()(**inputs).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_trains_on_pairs(key, encoder):
    rows = [{"anchor": r["text"], "positive": r["text"][::-1]} for r in tiny.labelled(24)]
    config = ol.TrainConfig(model=str(encoder), method=key, hyper=HYPER.get(key, {}), task="embedding", data=rows, batch_size=8, steps=3,
                            dtype="fp32")  # fmt: skip
    parts, report, _ = trained(config)
    assert report.steps == 3 and all(math.isfinite(x) for x in report.losses)
    plain, tokenizer = load_model(config)
    batch = tokenizer([r["text"] for r in tiny.labelled(8)], return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (m.eval()(**inputs).last_hidden_state for m in (parts.model, plain))
    assert (ours - theirs).abs().max() > 1e-6


def test_hiddenkey_trains_on_pairs_with_scores(encoder):
    rows = [{"anchor": r["text"], "positive": r["text"][::-1], "score": i % 3 / 2} for i, r in enumerate(tiny.labelled(12))]
    _, report, _ = trained(ol.TrainConfig(model=str(encoder), method="hiddenkey", task="embedding", data=rows, steps=2, dtype="fp32"))
    assert report.steps == 2 and all(math.isfinite(x) for x in report.losses)


@pytest.mark.parametrize("left", [False, True])
def test_pairs_judged_part_by_part_are_judged_alike(left, encoder, monkeypatch):
    rows = [{"anchor": r["text"], "positive": " ".join(r["text"].split()[: 1 + i % 5])} for i, r in enumerate(tiny.labelled(12))]
    config = ol.TrainConfig(model=str(encoder), task="embedding")
    model, tokenizer = load_model(config)
    batch = Collate(tokenizer.pad_token_id)(encode(read_rows(rows), tokenizer, config, 64, None).examples)
    if left:
        batch = {k: v.flip(1) for k, v in batch.items()}
    monkeypatch.setattr(losses, "TEXTS", 5)
    task = losses.task_of("embedding")
    with torch.no_grad():
        near, truth, _ = task._nearness(model.eval(), batch)
        found = task.scores(model, batch)
    assert torch.equal(found["accuracy"][0], (near.argmax(-1) == truth).float())
    assert torch.allclose(found["loss"][0], torch.nn.functional.cross_entropy(near / 0.05, truth, reduction="none"), rtol=1e-4, atol=1e-5)
