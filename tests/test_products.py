"""The table of what goes with what is what a run gives; and methods with each other's rules, stores and forms."""

import dataclasses
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch

import omnilora as ol
from omnilora import contract, proofs
from omnilora.core.attach import base_state_dict
from omnilora.core.method import Method, entries
from omnilora.core.run import param_groups, start
from omnilora.errors import BadValue, NotMergeable
from omnilora.parameterizations.accumulated import Accumulated
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.pruning import PruneA
from omnilora.rules.rates import Rates
from omnilora.rules.restart import Restart
from omnilora.rules.structured_dropout import HiddenKey
from omnilora.stores.nf4_layer import quantize

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import products  # noqa: E402

pytest.importorskip("peft")
TABLE = products.read((ROOT / "docs" / "products.md").read_text(encoding="utf-8"))
SAMPLE = random.Random(len(TABLE)).sample(sorted(TABLE), 15)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks are large for layers this small
        yield


def test_every_method_has_a_row():
    want = {(k, c) for k in products.rows() for c in products.COLUMNS}
    assert set(TABLE) == want, "run: python docs/tables.py"


@pytest.mark.parametrize("key, column", SAMPLE)
def test_a_cell_is_what_a_run_gives(key, column):
    assert products.cell(key, column) == TABLE[key, column], "run: python docs/tables.py"


def test_a_page_reads_back():
    made = {(k, c): products.NONE for k in products.rows() for c in products.COLUMNS}
    first, second = list(made)[:2]
    made[first], made[second] = "yes", "no: because | of this."
    assert products.read(products.page(made)) == made


FORMS = {k: products.forms_of(e)[0] for k, e in entries().items() if products.forms_of(e)}
DROPS = {k: how for k, how in FORMS.items() if "dropout" in {f.name for f in dataclasses.fields(how)}}


@pytest.mark.parametrize("key", DROPS)
def test_dropout_on_any_form(key):
    """In training the output is random and its mean is the output in evaluation; a hidden dropout goes with it."""
    how = dataclasses.replace(DROPS[key], dropout=0.3)
    try:
        how.check()
    except BadValue:
        pytest.skip("the method refuses dropout")
    kind = products.place(how)
    model = contract.adapted(how, kind)
    x = model.sample()
    y = model.layer(x)
    model.train()
    drawn = torch.stack([model.layer(x) for _ in range(400)]).detach()
    assert not torch.equal(drawn[0], drawn[1])
    if how.mergeable:
        gap = (drawn.mean(0) - y).norm() / (drawn.std(0).norm() / 20).clamp_min(1e-9)
        assert gap < 3
    ol.detach(model)
    rule = HiddenKey(p_key=0.0, p_hidden=0.5, beta=0.0, hidden_at="layer")
    run = proofs.train(model, Method("x", how, (rule,)), proofs.full_batch(x, y.detach().tanh() + 1), 3, targets=("layer",))
    assert run.step == 3


def stack(bits=4):
    model = proofs.Stack(64, 64, 64)
    if bits == 4:
        quantize(model)
    return model


def batch(out=64):
    x = torch.randn(64, 64)
    return proofs.full_batch(x, torch.randn(64, out))


def test_adalora_budget_on_a_4_bit_base():
    model = stack()
    before = {k: v.clone() for k, v in base_state_dict(model).items()}
    proofs.train(model, ol.method("adalora", r=6, target=2), batch(), 60, lr=1e-2)
    alive = [int((s.lam.abs() > 0).sum()) for s in ol.slots(model)]
    assert sum(alive) == 2 * len(alive)
    for k, v in before.items():
        assert torch.equal(v, base_state_dict(model)[k])


@pytest.mark.parametrize("base", ["qlora", "qa_lora"])
def test_pruned_rows_on_a_quantized_base(base):
    """NF4, and integers in groups."""
    model = stack(16)
    made = Method("x", LoRA(4, 8.0), (PruneA(every=2, share=0.5),), store=ol.method(base).store)
    proofs.train(model, made, batch(), 6)
    assert not any(s.site.store.dense for s in ol.slots(model))
    assert all(bool(((s.A == 0).sum(-1) == 32).all()) for s in ol.slots(model))


def test_lora_plus_groups_with_rank_stabilized_scale():
    model = stack(16)
    ol.adapt(model, Method("x", LoRA(16, 8.0, scaling="alpha/sqrt(r)"), (Rates(8.0),)))
    assert {s.scale for s in ol.slots(model)} == {2.0}
    start(model, total_steps=4)
    rates = {id(p): g["lr"] for g in param_groups(model, 1e-3) for p in g["params"]}
    for s in ol.slots(model):
        assert rates[id(s.B)] == pytest.approx(8e-3) and rates[id(s.A)] == pytest.approx(1e-3)


@pytest.mark.parametrize("key", ["nola", "tt_lora", "loha", "lokr", "vera", "melora", "prolora", "loretta_rep", "pissa"])
def test_dora_over(key):
    over = DoRA(FORMS[key])
    for check in contract.parameterization_checks(over, contract.own_tags(over), ("linear", "conv"), compile=False):
        check.run()


def test_dora_over_what_is_no_matrix():
    with pytest.raises(NotMergeable, match="gate"):
        contract._train(DoRA(FORMS["molora"]), "linear", torch.float32)


def test_dora_over_masked_factors():
    """Entries outside the mask have no gradient under DoRA either."""

    def fill(slot, seen):
        slot.inner.mask.A[:, ::2] = 0

    model, x = proofs.Stack(16, 16), torch.randn(64, 16)
    ol.adapt(model, Method("x", DoRA(FORMS["sparse_adapter"]), fill=fill))
    model(x).square().mean().backward()
    (s,) = ol.slots(model)
    A = s.inner.inner.A.grad
    assert not A[:, ::2].any() and A[:, 1::2].all() and s.m.grad.all()


@pytest.mark.parametrize("key", ["lora", "dylora", "melora", "loha", "prolora"])
def test_restarts_over(key):
    """At a restart what was learnt is kept: the map just after it is the map just before it, and a run goes on beyond it."""
    made = entries()[key].make(**entries()[key].card.cases[0])
    how, maps = Accumulated(made.parameterization), []
    model = proofs.Stack(24, 24)
    rule = Restart(every=5, warmup=0, reset="zero")
    x = torch.randn(128, 24)
    y = x @ torch.randn(24, 24).mT * 0.2

    def watch(run):
        maps.append((rule.restarts, proofs.learned(run.model), float(run.slots()[0].acc.norm())))

    proofs.train(model, Method("x", how, (*made.rules, rule)), proofs.full_batch(x, model(x).detach() + y), 17, lr=1e-2, watch=watch)
    restarts = [n for n, _, _ in maps]
    at = restarts.index(1)
    assert restarts[-1] == 3 and maps[at][2] > 0
    assert proofs.relative(maps[at][1], maps[at - 1][1]) < 0.5  # one update apart
    assert proofs.relative(maps[-1][1], maps[at][1]) > 0.05
