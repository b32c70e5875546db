"""Every method trains beside a new head, as classification needs it, and the saved run gives the same outputs."""

import math
import random

import pytest
import tokenizers
import torch
import transformers

import omnilora as ol
from omnilora.cli import cards
from omnilora.training.fit import trained
from omnilora.training.models import load_trained

KEYS = [c["key"] for c in cards.read() if "trains_lm" in c["tags"] and c["key"] != "xlora"]


HYPER = {"lq_lora": {"budget": 4.0}}  # the default of 3 bits is below what matrices this small can reach
WORDS = [f"w{i}" for i in range(46)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a tiny BERT without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                                     vocab_size=50, max_position_embeddings=32)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}, "[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def rows(count):
    draw = random.Random(0)
    texts = [[draw.randrange(46) for _ in range(8)] for _ in range(count)]
    return [{"text": " ".join(WORDS[i] for i in t), "label": "abc"[t[0] % 3]} for t in texts]


@pytest.mark.parametrize("key", KEYS)
def test_trains_with_a_head(key, encoder, tmp_path):
    config = ol.TrainConfig(model=str(encoder), method=key, hyper=HYPER.get(key, {}), task="classification", data=rows(48), batch_size=8,
                            steps=12, dtype="fp32", output=str(tmp_path / "run"))  # fmt: skip
    parts, report, _ = trained(config)
    assert report.steps == 12 and all(math.isfinite(x) for x in report.losses)
    own = next(s for s in ol.slots(parts.model) if s.site.name == "classifier")
    assert not torch.equal(own.W, own.site.read())
    again, tokenizer = load_trained(tmp_path / "run")
    batch = tokenizer([r["text"] for r in rows(8)], return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = parts.model.eval()(**inputs).logits, again.eval()(**inputs).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
