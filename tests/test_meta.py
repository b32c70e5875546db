"""The inner and outer loop on real modules: what moves, what is refused, the command on an encoder."""

import json

import pytest
import torch

import omnilora as ol
from omnilora import proofs
from omnilora.contract import shake
from omnilora.errors import BadValue
from omnilora.methods.foundations.amal import learner_on
from omnilora.procedures.episodes import Episodes, interval
from omnilora.procedures.meta import by_roles, inner_loop, meta_train
from omnilora.training.encode import Example


def task(seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(n, 6, generator=g), torch.randn(n, 4, generator=g)) for n in (5, 7))


def learner(method="lora", roles=("output",), **how):
    torch.manual_seed(0)
    model = proofs.Stack(6, 8, 4, act=torch.tanh)
    ol.adapt(model, ol.method(method, r=2))
    shake(model, 0.3)
    return learner_on(model, roles, **how)


def test_no_inner_step_is_ordinary_training():
    made = learner(steps=0)
    support, query = task()
    assert torch.equal(made.outer([(support, query)]), made.loss({}, query))


@pytest.mark.parametrize(("roles", "names"), [(("output",), {"B"}), (("input", "output"), {"A", "B"})])
def test_maml_over_lora(roles, names):
    """The same loop learns over B alone, or over all of LoRA; the outer loop moves every tensor and the rates."""
    made = learner(roles=roles, rate=0.01)
    assert {n.rpartition(".")[2] for n in made.fast} == names
    before = [p.detach().clone() for p in made.parameters()]
    losses = meta_train(made, [[task(0), task(1)]] * 15, lr=1e-2)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, made.parameters()))


def test_first_order_differs_and_reaches_the_start():
    grads = []
    for second in (True, False):
        made = learner(second_order=second)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(made.outer([task()]), list(made.fast.values()))]))
    assert 1e-3 < proofs.relative(grads[1], grads[0]) < 2


def test_inner_loop_is_gradient_descent():
    x = torch.tensor(3.0, requires_grad=True)
    got = inner_loop(lambda v: v["x"] ** 2, {"x": x}, {"x": torch.tensor(0.1)}, 2)
    assert torch.allclose(got["x"], torch.tensor(3.0 * 0.8**2))


def test_refusals():
    made = learner()
    with pytest.raises(BadValue, match="role"):
        by_roles(made.model, "router")
    with pytest.raises(BadValue, match="ways"):
        ol.method("amal", ways=1)
    with pytest.raises(BadValue, match="inner_steps"):
        learner(steps=-1)
    with pytest.raises(BadValue, match="classes"):
        Episodes([Example([1], target=0)] * 9, 0, 2, 2, 2)


def test_episodes_do_not_share_texts():
    examples = [Example([10 * c + i], target=c) for c in range(4) for i in range(6)]
    support, query = next(Episodes(examples, 0, 3, 2, 3).draw(0))
    assert support["labels"].tolist() == [0, 0, 1, 1, 2, 2] and len(query["labels"]) == 9
    assert not set(support["input_ids"].flatten().tolist()) & set(query["input_ids"].flatten().tolist())
    assert interval([1.0, 0.0, 1.0, 0.0])[0] == 0.5


def test_the_command(tmp_path):
    from test_data import tiny_tokenizer
    from transformers import BertConfig, BertModel
    from typer.testing import CliRunner

    from omnilora.cli.main import app

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=32)).save_pretrained(tmp_path / "base")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "base")
    files = []
    for name, letters in (("old", "abc"), ("new", "def")):
        rows = [{"text": f"{c * (i + 1)} {c}", "label": c} for c in letters for i in range(5)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    args = ["apply", "--method", "amal", "--model", str(tmp_path / "base"), "--task", "classification", "--dtype", "fp32",
            "--data", str(files[0]), "--output", str(tmp_path / "out"), "--threads", "1", "--json"]  # fmt: skip
    for item in ("pool=2", "ways=2", "shots=2", "queries=2", "updates=3", "test_episodes=3"):
        args += ["--set", f"hyper.{item}"]
    same = CliRunner().invoke(app, [*args, "--eval-data", str(files[0])])
    assert same.exit_code == 2
    done = CliRunner().invoke(app, [*args, "--eval-data", str(files[1])])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["unseen_classes"] == 3 and 0 <= report["meta_adapted_accuracy"] <= 1
    model = BertModel.from_pretrained(tmp_path / "base")
    ol.load(model, report["adapter"])
    assert (tmp_path / "out" / "rates.json").is_file()
