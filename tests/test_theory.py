"""Constructions on real modules: the adapter between two models, its smallest ranks, its refusals."""

import copy
import json

import pytest
import torch
from test_data import tiny_llama

import omnilora as ol
from omnilora import proofs
from omnilora.errors import BadValue, StateMismatch
from omnilora.theory.construct import error_bound, linear_chain, product, smallest_rank
from omnilora.theory.difference import construct, rank_for


def moved(rank=3):
    """A tiny Llama and a copy whose matrices moved by ``rank`` and whose norms and embedding moved as well."""
    base = tiny_llama().eval()
    other = copy.deepcopy(base)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if p.dim() == 2 and "proj" in n:
                p.add_(0.1 * torch.randn(p.shape[0], rank, generator=g) @ torch.randn(rank, p.shape[1], generator=g))
            elif "norm" in n:
                p.mul_(1.1)
        other.model.embed_tokens.weight[3] += 0.5
    return base, other


IDS = torch.arange(3, 15).view(2, 6)


def test_the_adapter_between_two_models(tmp_path):
    base, other = moved()
    plain = copy.deepcopy(base)
    want = other(input_ids=IDS).logits
    reports = construct(base, other)
    assert {r.rank for r in reports} == {3} and max(r.error for r in reports) < 1e-6
    got = base(input_ids=IDS).logits
    assert float((got - want).norm() / want.norm()) < 1e-5
    ol.save(base, tmp_path / "a")
    ol.load(plain, tmp_path / "a")
    assert torch.equal(plain(input_ids=IDS).logits, got)


def test_a_smaller_rank_leaves_the_tail():
    base, other = moved(4)
    reports = construct(base, other, rank=2)
    assert {r.rank for r in reports} == {2} and min(r.error for r in reports) > 1e-3


def test_rank_for_is_the_least():
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [rank_for(sigma, 1.0, t) for t in (4.0, 2.3, 1.0, 0.5)] == [0, 1, 2, 3]


def test_refusals():
    base, other = moved()
    with pytest.raises(StateMismatch):
        construct(base, proofs.Stack(3, 3))
    with pytest.raises(BadValue, match="equal"):
        construct(base, copy.deepcopy(base))
    with pytest.raises(BadValue, match="tolerance"):
        construct(base, other, tolerance=-1.0)
    with pytest.raises(BadValue, match="square"):
        linear_chain([torch.randn(3, 4)], torch.randn(3, 4), 1)
    with pytest.raises(BadValue, match="inverted"):
        linear_chain([torch.eye(3), torch.zeros(3, 3)], torch.randn(3, 3), 2)


@pytest.mark.parametrize(("depth", "rank"), [(2, 6), (3, 4), (4, 3), (2, 4), (3, 3), (2, 5)])
def test_chain_error_is_the_bound(depth, rank):
    torch.manual_seed(depth)
    W = [torch.randn(12, 12, dtype=torch.float64) for _ in range(depth)]
    goal = torch.randn(12, 12, dtype=torch.float64)
    made = linear_chain(W, goal, rank)
    reached = product([w + B @ A for w, (B, A) in zip(W, made.factors)], 12)
    gap = float(torch.linalg.matrix_norm(reached - goal, 2))
    assert abs(gap - error_bound(W, goal, rank)) < 1e-8 and made.rank <= rank
    assert smallest_rank(W, goal) == -(-12 // depth)


def test_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from omnilora.cli.main import app

    base, other = moved()
    from test_data import tiny_tokenizer

    for name, model in (("base", base), ("other", other)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    done = CliRunner().invoke(app, ["apply", "--method", "lora_construct", "--model", str(tmp_path / "base"), "--dtype", "fp32",
                                    "--set", f"hyper.target={tmp_path / 'other'}", "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["largest_rank"] == 3 and report["output_error_of_adapter"] < 1e-5 < report["output_change_of_target"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    missing = CliRunner().invoke(app, ["apply", "--method", "lora_construct", "--model", str(tmp_path / "base")])
    assert missing.exit_code == 2
    trained = CliRunner().invoke(app, ["apply", "--method", "lora", "--model", str(tmp_path / "base")])
    assert trained.exit_code == 2
