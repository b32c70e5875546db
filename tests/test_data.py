"""Rows, templates, masks, packing, order: what a model is shown and what it learns from."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml

from omnilora.errors import BadValue, DataError, UnknownName
from omnilora.io.yaml import parse_yaml
from omnilora.training.batches import Collate, Feed, order, pack
from omnilora.training.config import TrainConfig
from omnilora.training.data import Row, hold_out, label_set, read_rows
from omnilora.training.encode import MASKED, encode, prompt_ids
from omnilora.training.losses import CausalLM, block_mask, packing_mode

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
WORDS = ["user", "assistant", "system", ":", "what", "is", "one", "two", "three", "four", "five", "six", "seven", "plus",
         "good", "bad", "fine", "awful", "film", "yes", "no", "a", "b", "c", "d"]  # fmt: skip


def tiny_tokenizer(template: str | None = TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<s>"]})
    made.chat_template = template
    return made


def tiny_llama(seed: int = 0, vocabulary: int = 40, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
                         eos_token_id=3, bos_token_id=2, initializer_range=0.2, **changes)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


def encoded(rows, tok, length=64, labels=None, **config):
    return encode(read_rows(rows), tok, TrainConfig(**config), length, labels)


def learned(tok, example):
    return " ".join(tok.convert_ids_to_tokens([y for y in example.labels if y != MASKED]))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_formats_agree(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [{"text": "one, two", "label": "a"}, {"text": "three", "label": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    (tmp_path / "a.csv").write_text('text,label\n"one, two",a\nthree,b\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(json.dumps(rows[0]))
    for source in ("a.jsonl", "a.csv", "a.parquet", "saved"):
        assert [dict(r.data) for r in read_rows(tmp_path / source)] == rows, source
    assert [dict(r.data) for r in read_rows(rows)] == rows
    assert len(read_rows(tmp_path / "folder")) == 1


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "two"\n', "a.jsonl, line 2"),
        ("a.jsonl", '{"text": "one"}\n\n[1, 2]\n', "a.jsonl, line 3"),
        ("a.csv", 'text,label\none,a\n"two\nlines",b\nthree\n', "a.csv, line 5"),
        ("a.csv", "text,text\n", "a.csv, line 1"),
        ("a.json", "[1]", "a.json, row 1"),
        ("a.jsonl", "\n", "no rows"),
        ("a.parquet", "nonsense", "a.parquet"),
        ("a.txt", "x", "unknown ending"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says.replace(".", r"\.")):
        read_rows(tmp_path / name)


def test_missing_file():
    with pytest.raises(DataError, match="does not exist"):
        read_rows("nowhere/train.jsonl")


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "one", "completion": 3}, "line 7: 'completion' is a int"),
        ({"prompt": "one"}, "line 7: fields"),
        ({"messages": [{"role": "user", "content": "one"}]}, "line 7: no message of the assistant"),
        ({"messages": [{"role": "robot", "content": "one"}]}, "line 7: message 1 has the role 'robot'"),
        ({"messages": [{"role": "user"}]}, "line 7: message 1 has no text"),
        ({"messages": []}, "line 7: messages are no list"),
        ({"prompt": "one " * 80, "completion": "two"}, "line 7: the prompt has 87 tokens, max_length is 64"),
    ],
)
def test_malformed_rows_name_the_line(tok, row, says):
    with pytest.raises(DataError, match=says):
        encode([Row(row, "t.jsonl, line 7")], tok, TrainConfig(), 64)


def test_named_columns(tok):
    rows = [{"frage": "one", "antwort": "two", "text": "three"}]
    assert learned(tok, encoded(rows, tok).examples[0]) == "three </s>"
    assert learned(tok, encoded(rows, tok, prompt="frage", completion="antwort").examples[0]) == "two </s>"
    with pytest.raises(DataError, match=r"no field 'antwrt'.*antwort"):
        encoded(rows, tok, prompt="frage", completion="antwrt")


def test_hold_out():
    rows = read_rows([{"text": str(i)} for i in range(10)])
    train, held = hold_out(rows, 0.2, 0)
    assert len(held) == 2 and len(train) == 8 and {id(r) for r in train + held} == {id(r) for r in rows}
    assert hold_out(rows, 0.2, 0)[1] == held


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_completion_and_its_end_are_learned(tok):
    for row in ({"prompt": "what is one", "completion": "two"},
                {"messages": [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "two"}]},
                {"prompt": [{"role": "user", "content": "what is one"}],
                 "completion": [{"role": "assistant", "content": "two"}]}):  # fmt: skip
        example = encoded([row], tok).examples[0]
        assert learned(tok, example) == "two </s>"
        asked = prompt_ids(tok, "what is one", "chat")
        assert example.ids[: len(asked)] == asked and example.labels[len(asked)] != MASKED
    assert learned(tok, encoded([row], tok, mask_prompt=False).examples[0]).startswith("<s> user : what")


def test_every_turn_of_the_assistant_is_learned(tok):
    turns = [("system", "yes"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns] + [{"role": "user", "content": "five"}]}
    assert learned(tok, encoded([row], tok).examples[0]) == "two </s> four </s>"


def test_template_that_hides_earlier_answers_or_adds_words():
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]}  # fmt: skip
    hides = TEMPLATE.replace("{{ m['content'] }}", "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}")
    tok = tiny_tokenizer(hides)
    assert learned(tok, encoded([row], tok).examples[0]) == "four </s>"
    adds = tiny_tokenizer(TEMPLATE.replace("<s> assistant : {% endif %}", "<s> assistant : yes {% endif %}"))
    assert learned(adds, encoded([row], adds).examples[0]).endswith("four </s>")
    endless = tiny_tokenizer("{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
                             "{% if add_generation_prompt %}assistant : {% endif %}")  # fmt: skip
    assert learned(endless, encoded([row], endless).examples[0]).endswith("four </s>")


def test_plain_text_and_template_files(tok, tmp_path):
    plain = encoded([{"prompt": "what is one", "completion": "two"}], tok, template="plain").examples[0]
    assert tok.convert_ids_to_tokens(plain.ids) == ["what", "is", "one", "two", "</s>"]
    assert learned(tok, plain) == "two </s>"
    bare = tiny_tokenizer(None)
    assert encoded([{"prompt": "one", "completion": "two"}], bare).examples[0].ids == bare("one two </s>").input_ids
    with pytest.raises(BadValue, match="no chat template"):
        encoded([{"prompt": "one", "completion": "two"}], bare, template="chat")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    made = encoded([{"prompt": "one", "completion": "two"}], bare, template=str(tmp_path / "t.jinja")).examples[0]
    assert learned(bare, made) == "two </s>" and len(made.ids) == 10


def test_long_completions_are_cut_and_counted(tok):
    rows = [{"prompt": "one", "completion": "two " * n} for n in (2, 90, 70)]
    with pytest.warns(UserWarning, match="2 of 3 rows were cut at 64"):
        made = encoded(rows, tok)
    assert made.truncated == 2 and max(map(len, made.examples)) == 64


def test_labels(tok):
    rows = [{"text": "good film", "label": "pos"}, {"text": "awful film", "label": "neg"}]
    labels = label_set(read_rows(rows), TrainConfig(task="classification"))
    assert labels == ["neg", "pos"]
    assert [e.target for e in encoded(rows, tok, labels=labels, task="classification").examples] == [1, 0]
    with pytest.raises(BadValue, match=r"row 1: label 'pos' is outside the set \['neg', 'neutral'\]"):
        encoded(rows, tok, labels=["neg", "neutral"], task="classification")


# -- batches -----------------------------------------------------------------------------------------------------------


def test_collation_pads_right(tok):
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "one two three", "completion": "four"}]
    batch = Collate(0)(encoded(rows, tok).examples)
    assert batch["input_ids"].shape == (2, 12) and batch["labels"][0, -2:].tolist() == [MASKED] * 2
    assert batch["attention_mask"].sum(1).tolist() == [10, 12] and batch["input_ids"][0, -2:].tolist() == [0, 0]


def test_packed_rows_equal_the_rows_alone(tok):
    model, task = tiny_llama(), CausalLM()
    rows = [{"prompt": "one " * n, "completion": "two " * (n % 3 + 1)} for n in range(1, 9)]
    examples = encoded(rows, tok).examples
    packed = pack(examples, 40)
    assert len(packed) < len(examples) and max(map(len, packed)) <= 40
    assert sum(map(len, packed)) == sum(map(len, examples))
    assert packing_mode(model, 40) == "positions"
    batch = Collate(0)(packed)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        blocks = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False,
                       attention_mask=block_mask(batch["position_ids"], torch.float32)).logits  # fmt: skip
        for row, example in enumerate(packed):
            starts = [i for i, p in enumerate(example.positions) if p == 0] + [len(example)]
            for a, b in zip(starts, starts[1:]):
                alone = model(input_ids=batch["input_ids"][row : row + 1, a:b], use_cache=False).logits[0]
                for some in (together, blocks):
                    assert (some[row, a:b] - alone).norm() / alone.norm() < 1e-5
        loss, _ = task.total(model, batch)
        whole = Collate(0)(examples)
        reference, _ = task.total(model, whole)
    assert task.weight(batch) == task.weight(whole)
    assert float(loss) == pytest.approx(float(reference), rel=1e-5)


def test_order_is_a_permutation_that_wastes_little():
    lengths = [int(x) for x in torch.randint(5, 200, (1003,), generator=torch.Generator().manual_seed(0))]
    plan = order(lengths, 8, 0, 0)
    assert sorted(i for b in plan for i in b) == list(range(1003))
    assert plan == order(lengths, 8, 0, 0) != order(lengths, 8, 0, 1) and plan != order(lengths, 8, 1, 0)
    used = sum(max(lengths[i] for i in b) * len(b) for b in plan)
    assert used < 1.1 * sum(lengths)
    mixed = order(lengths, 8, 0, 0, grouped=False)
    assert sorted(i for b in mixed for i in b) == sorted(i for b in plan for i in b) and len(mixed) == len(plan)
    spread = lambda p: sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in p)  # noqa: E731
    assert spread(mixed) > 2 * spread(plan)
    two = order(lengths, 4, 0, 0, world=2)
    assert all(len(b) >= 2 for b in two) and {tuple(b) for b in two} <= {tuple(b) for b in plan}


@pytest.mark.parametrize("workers", [0, 2])
def test_feed_goes_on_from_a_position(tok, workers):
    examples = encoded([{"prompt": "one " * (n % 5 + 1), "completion": "two"} for n in range(21)], tok).examples
    feed = Feed(examples, Collate(0), 4, seed=3, workers=workers)
    state = torch.get_rng_state()
    whole = [b["input_ids"] for b in feed.epoch(2)]
    rest = [b["input_ids"] for b in feed.epoch(2, skip=4)]
    assert len(whole) == len(feed) == 6 and all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert torch.equal(state, torch.get_rng_state())


# -- configuration -----------------------------------------------------------------------------------------------------


def test_configuration_round_trip(tmp_path):
    made = TrainConfig(method="dora", hyper={"r": 4}, targets=["q_proj"], lr=3e-4, steps=5, data="a.jsonl")
    text = made.to_yaml(tmp_path / "c.yaml")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == made and "packing: false" in text
    (tmp_path / "d.yaml").write_text("lr: 1e-3\nepochs: 2\n")
    assert TrainConfig.from_yaml(tmp_path / "d.yaml", steps=3) == TrainConfig(lr=1e-3, epochs=2.0, steps=3)


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"bath_size": 3}, UnknownName, "batch_size"),
        ({"batch_size": "three"}, BadValue, "batch_size = 'three' is a str"),
        ({"batch_size": True}, BadValue, "is a bool"),
        ({"batch_size": 0}, BadValue, "batch_size = 0"),
        ({"lr": float("nan")}, BadValue, "lr = nan"),
        ({"schedule": "cosinus"}, BadValue, "cosine"),
        ({"packing": True, "task": "classification"}, BadValue, "packing"),
        ({"best": "accuracy"}, UnknownName, "no metric of causal-lm"),
        ({"template": "nowhere.jinja"}, BadValue, "no file"),
        ({"eval_data": 1.5}, BadValue, "fraction"),
        ({"hyper": [1]}, BadValue, "hyper"),
        ({"stop_at": 9, "steps": 5}, BadValue, "stop_at"),
    ],
)
def test_bad_configurations(changes, error, says):
    with pytest.raises(error, match=says):
        TrainConfig.from_dict(changes)


def test_bad_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [1")
    with pytest.raises(BadValue, match="no YAML"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    with pytest.raises(BadValue, match="cannot be read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 20_000, "nests deeper than 32"),
        ('{"a": ' * 33 + "1" + "}" * 33, "nests deeper than 32"),
        ("x: &a [1, 2]\ny: [*a, *a]", r"alias \*a"),
        ("steps: 3\nlr: 1.0\nsteps: 4", "'steps' is given twice"),
        ("a: " + "x" * (1 << 20), "more than 1048576 characters"),
        ("a: 2001-99-99", "no YAML"),
        (b"\xff\xfe\x00", "not UTF-8 at byte 0"),
    ],
)
def test_yaml_is_refused_before_it_costs(text, says, tmp_path):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.thread_time()
    with pytest.raises(BadValue, match=says) as refused:
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    assert time.thread_time() - start < 0.1
    assert len(str(refused.value)) < 1500


def test_yaml_reads_what_the_library_reads():
    text = TrainConfig(hyper={"r": 4}, overrides={"q_proj": {"r": 2}}, data="x.jsonl").to_yaml()
    assert parse_yaml(text, "text") == yaml.safe_load(text)
    nested = "a: " + "[" * 31 + "1" + "]" * 31
    assert parse_yaml(nested, "text") == yaml.safe_load(nested)
