"""The posterior on real modules: its closed forms and limits, its files, its refusals, the command on a language model."""

import json
import math

import pytest
import torch
from test_data import tiny_llama, tiny_tokenizer

import omnilora as ol
from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import slots
from omnilora.core.watch import matrices, watching
from omnilora.errors import BadValue, FileRefused, NotExpressible, StateMismatch
from omnilora.posthoc.calibration import scores
from omnilora.posthoc.kronecker import Gathered
from omnilora.posthoc.laplace import fit, gaussian_directions, jacobians, predict, probabilities
from omnilora.posthoc.posterior_file import load_posterior, save_posterior


def logits(model, batch):
    return model(batch[0])


def labels(batch):
    return batch[1]


def fitted(rank=None, method=None, rows=40):
    torch.manual_seed(0)
    model = proofs.Stack(14, 24, 5, act=torch.tanh)
    ol.adapt(model, method or ol.method("lora", r=2, alpha=3.0))
    shake(model)
    data = [(torch.randn(rows, 14), torch.randint(0, 5, (rows,))) for _ in range(3)]
    return model, data, fit(model, slots(model), data, logits, labels, rank)


def test_slope_of_the_evidence_and_its_maximum():
    _, _, post = fitted()
    for lam in (0.01, 1.0, 30.0):
        h = 1e-4
        numeric = (post.evidence(lam * math.exp(h)) - post.evidence(lam * math.exp(-h))) / (2 * h)
        assert abs(post.slope(lam) - numeric) < 1e-6 * max(1, abs(numeric))
    best = post.best().lam
    assert all(post.evidence(best) > post.evidence(best * f) for f in (0.5, 0.9, 1.1, 2.0))


def test_a_strong_prior_is_the_map():
    model, data, post = fitted()
    sizes = []
    for lam in (0.1, 10.0, 1e9):
        f, S = predict(model, slots(model), post.at(lam), data[:1], logits)
        sizes.append(float(S.diagonal(dim1=-2, dim2=-1).mean()))
    assert sizes[0] > sizes[1] > sizes[2]
    for way in ("joint", "probit"):
        assert torch.allclose(probabilities(f, S, way, 2000), torch.softmax(f, -1), atol=3e-3)


def test_linear_regression_is_exact():
    """One linear map and equal inputs: the K-FAC posterior over B is the closed form of Bayesian regression."""
    torch.manual_seed(0)
    model = proofs.Stack(4, 3)
    ol.adapt(model, ol.method("lora", r=2, alpha=2.0))
    shake(model)
    x = torch.randn(1, 4).expand(7, 4)
    post = fit(model, slots(model), [(x, torch.zeros(7, dtype=torch.long))], logits, labels, None,
               names=lambda n: n.endswith(".B"), directions=gaussian_directions).at(0.7)
    _, S = predict(model, slots(model), post, [(x[:1], None)], logits)
    (slot,) = slots(model)
    h = (slot.scale * x[0] @ slot.A.detach().mT).double()
    want = h @ torch.linalg.inv(7 * torch.outer(h, h) + 0.7 * torch.eye(2, dtype=torch.float64)) @ h
    assert torch.allclose(S[0], want * torch.eye(3, dtype=torch.float64), atol=1e-6)


def test_probit_keeps_the_order_at_equal_variances():
    f = torch.randn(50, 4, dtype=torch.float64)
    S = 3 * torch.eye(4, dtype=torch.float64).expand(50, 4, 4)
    p, q = probabilities(f, S, "probit"), torch.softmax(f, -1)
    assert torch.equal(p.argmax(-1), q.argmax(-1)) and bool((p.max(-1).values < q.max(-1).values).all())


def test_joint_samples_match_the_integral_of_two_classes():
    f, S = torch.tensor([[1.2, -0.3]]).double(), torch.tensor([[[2.0, 0.4], [0.4, 1.0]]]).double()
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    d = 1.5 + math.sqrt(2.0 + 1.0 - 0.8) * z
    want = (torch.sigmoid(d) * torch.exp(-z * z / 2)).sum() / torch.exp(-z * z / 2).sum()
    assert abs(float(probabilities(f, S, "joint", 200_000)[0, 0] - want)) < 3e-3


def test_low_rank_factors_keep_the_leading_part():
    torch.manual_seed(0)
    scale = 0.5 ** torch.arange(60.0)
    exact, few = Gathered(60), Gathered(60, 10)
    for _ in range(40):
        rows = torch.randn(64, 60) * scale
        exact.add(rows)
        few.add(rows)
    want, have = exact.side(), few.side()
    assert have.U.shape == (60, 10) and proofs.relative(have.dense(), want.dense()) < 1e-3
    assert torch.allclose(have.U.mT @ have.U, torch.eye(10, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_fa", "dora"])
def test_jacobians_are_autograd_s(method):
    torch.manual_seed(0)
    model = proofs.Stack(7, 6, 3, act=torch.tanh)
    ol.adapt(model.eval(), ol.method(method, r=2))
    shake(model, 0.1)
    mine = matrices(slots(model))
    x = torch.randn(2, 7)
    plain = model(x)
    with watching(slots(model)) as tape:
        f = model(x)
        J = jacobians(tape, f)
    assert torch.allclose(f, plain, atol=1e-6) and set(J) == set(mine)
    for c in range(3):
        for n in range(2):
            want = torch.autograd.grad(model(x)[n, c], list(mine.values()))
            for (name, _), g in zip(mine.items(), want):
                assert torch.allclose(J[name][n, c], g, atol=1e-5)


def test_files(tmp_path):
    model, data, post = fitted(rank=2)
    post = post.best()
    folder = save_posterior(post, tmp_path / "p", "abc")
    back = load_posterior(folder, "abc")
    a, b = (predict(model, slots(model), p, data[:1], logits)[1] for p in (post, back))
    assert torch.allclose(a, b, rtol=1e-4)
    with pytest.raises(FileRefused, match="another adapter"):
        load_posterior(folder, "xyz")
    said = json.loads((folder / "posterior.json").read_text())
    (folder / "posterior.json").write_text(json.dumps({**said, "lam": -1}))
    with pytest.raises(FileRefused):
        load_posterior(folder)
    other = proofs.Stack(9, 24, 5)
    ol.adapt(other, ol.method("lora", r=2))
    with pytest.raises(StateMismatch):
        predict(other, slots(other), post, [(torch.randn(2, 9), None)], logits)


def test_refusals():
    model = proofs.Stack(6, 5)
    ol.adapt(model, ol.method("vera"))
    with pytest.raises(NotExpressible):
        fit(model, slots(model), [(torch.randn(2, 6), torch.zeros(2).long())], logits, labels)
    with pytest.raises(BadValue, match="prior"):
        ol.method("laplace_lora", prior=0.0)
    with pytest.raises(BadValue, match="predictive"):
        ol.method("laplace_lora", predictive="mean")
    fresh = proofs.Stack(6, 5)
    ol.adapt(fresh, ol.method("lora", r=2))
    with pytest.raises(BadValue, match="no data"):
        fit(fresh, slots(fresh), [], logits, labels)


def test_scores():
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    s = scores(p, torch.tensor([0, 1]), bins=10)
    assert s["accuracy"] == 0.5 and abs(s["ece"] - (0.2 + 0.6) / 2) < 1e-6
    assert abs(s["brier"] - (0.08 + 0.72) / 2) < 1e-6 and abs(s["nll"] + (math.log(0.8) + math.log(0.4)) / 2) < 1e-6


def test_a_language_model_that_chooses(tmp_path):
    from typer.testing import CliRunner

    from omnilora.cli.main import app

    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"the cat sat {'on' if i % 2 else 'in'} ", "completion": "ab"[i % 2]} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = ["--data", str(data), "--threads", "1", "--json"]
    done = CliRunner().invoke(app, ["train", "--model", str(tmp_path / "base"), "--method", "lora", "--dtype", "fp32",
                                    "--steps", "4", "--output", str(tmp_path / "run"), *common])
    assert done.exit_code == 0, done.output
    args = ["apply", "--method", "laplace_lora", "--adapter", str(tmp_path / "run"), "--eval-data", str(data),
            "--output", str(tmp_path / "post"), *common]
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 2
    done = CliRunner().invoke(app, [*args, "--set", "hyper.answers=[a, b]", "--set", "hyper.samples=1000"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rows"] == 12 and 0 <= report["joint_ece"] <= 1 and report["prior_precision"] > 0
    assert load_posterior(report["posterior"]).rows == 12
