"""Every method trains on the tasks of an encoder: beside a new head, as classification needs it, and on pairs of texts."""

import math

import pytest
import tiny
import torch

import omnilora as ol
from omnilora.cli import cards
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
