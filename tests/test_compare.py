"""The comparison: equal budgets, no look at the test set before the report, intervals that hold, resume, the report."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

import omnilora as ol
from omnilora import errors
from omnilora.cli.main import app
from omnilora.comparison import Plan, contestant, report, runner, statistics
from omnilora.comparison.charts import front
from omnilora.comparison.plan import first_trials
from omnilora.comparison.problem import reference
from omnilora.comparison.trial import write_json


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """One comparison of three methods, with one that cannot run."""
    home = tmp_path_factory.mktemp("compare") / "c"
    config = ol.TrainConfig(model=str(base), task="classification", data=tiny.labelled(90), batch_size=8, dtype="fp32", threads=1)
    found = ol.compare(["lora r=4", "vera r=4", "frozen", "local_lora parts=9"], config=config, output=home, steps=12,
                       seeds=(0, 1), rates=(1.0, 3.0), rounds=1, test=tiny.labelled(40, seed=1), baseline="frozen")  # fmt: skip
    return home, found, config


def trials(home):
    return {str(p.relative_to(home)): json.loads(p.read_text()) for p in sorted((home / "trials").rglob("*.json"))}


# -- what is run ---------------------------------------------------------------------------------------------------------


def test_every_method_has_the_same_budget(done):
    home, found, _ = done
    fits = [t for t in trials(home).values() if t["kind"] == "fit" and t["ok"]]
    by = {}
    for t in fits:
        by.setdefault(t["label"], []).append(t)
    assert set(by) == {"lora r=4", "vera r=4", "frozen"}
    assert {len(v) for v in by.values()} == {found.trials} == {3}
    assert {t["steps"] for t in fits} == {12} and {len(t["losses"]) for t in fits} == {12}


def test_the_rate_is_chosen_by_validation(done):
    home, found, _ = done
    for line in found.lines:
        if line["complete"]:
            scores = dict(line["rates"])
            assert scores[line["rate"]] == max(scores.values())
            assert set(line["values"]) == {"0", "1"}


def test_the_test_rows_choose_nothing(tmp_path):
    """Planted trials: one rate is best on validation, another on the test rows."""
    plan = Plan(("lora",), ol.TrainConfig(task="classification"), rates=(1.0, 3.0), seeds=(0,), steps=5)
    for rate, validation, test in ((1.0, 0.9, 0.1), (3.0, 0.2, 0.8)):
        scores = [{"accuracy": {"sum": [x], "weight": [1.0]}} for x in (validation, test)]
        trial = next(t for t in first_trials(plan, {"lora": 5}) if t.rate == rate)
        write_json(trial.path(tmp_path), {"ok": True, "validation": scores[0], "test": scores[1]})
    assert runner.choose(plan, tmp_path, {"lora": 5}) == {"lora": 1.0}


def test_the_metric_is_that_of_the_test_rows(done):
    home, found, _ = done
    line = found.line("lora r=4")
    mine = [t for t in trials(home).values() if t["kind"] == "fit" and t["label"] == "lora r=4" and t["rate"] == line["rate"]]
    means = [np.mean(t["test"]["accuracy"]["sum"]) for t in mine]
    assert line["test"]["mean"] == pytest.approx(np.mean(means)) and len(mine[0]["test"]["accuracy"]["sum"]) == 40


def test_a_method_that_cannot_run_is_named_and_stops_nobody(done):
    _, found, _ = done
    line = found.line("local_lora parts=9")
    assert not line["complete"] and line["verdict"] == "failed" and "9" in line["errors"][0]
    assert found.lines[-1] is line


def test_results_are_written(done):
    home, found, _ = done
    raw = json.loads((home / "results.json").read_text())
    assert [x["label"] for x in raw["lines"]] == [x["label"] for x in found.lines]
    assert report.read(home).to_dict() == json.loads(json.dumps(found.to_dict()))
    page = (home / "report.html").read_text()
    assert page.count("<svg") == 3 and "omnilora compare --plan" in page
    assert not re.search(r'(src|href)="(http|//)', page)  # nothing is fetched
    assert (home / "report.md").read_text().count("\n| ") >= 4


def test_it_goes_on_where_it_stopped(done, monkeypatch):
    home, found, config = done
    before = {p: p.stat().st_mtime_ns for p in (home / "trials").rglob("*.json")}
    gone = next(p for p in before if "seed1" in p.name)
    old = json.loads(gone.read_text())
    gone.unlink()
    again = ol.compare(["lora r=4", "vera r=4", "frozen", "local_lora parts=9"], config=config, output=home, steps=12,
                       seeds=(0, 1), rates=(1.0, 3.0), rounds=1, test=tiny.labelled(40, seed=1), baseline="frozen")  # fmt: skip
    after = {p: p.stat().st_mtime_ns for p in (home / "trials").rglob("*.json")}
    assert {p for p in after if after[p] != before[p]} == {gone}
    assert json.loads(gone.read_text())["losses"] == old["losses"]  # the same trial gives the same numbers
    assert again.line("lora r=4")["test"] == found.line("lora r=4")["test"]


def test_another_comparison_is_refused(done):
    home, _, config = done
    with pytest.raises(errors.RunError, match="steps"):
        ol.compare(["lora"], config=config, output=home, steps=13, test=tiny.labelled(40, seed=1))
    with pytest.raises(errors.RunError, match="other rows"):
        ol.compare(["lora"], config=config, output=home, steps=12, test=tiny.labelled(40, seed=2))


def test_the_command_repeats_it(done, tmp_path):
    home, found, _ = done
    result = CliRunner().invoke(app, ["compare", "--plan", str(home / "plan.yaml"), "--output", str(tmp_path / "again"),
                                                  "--rounds", "0", "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output[-800:]
    again = json.loads(result.stdout)
    ours = {x["label"]: x["values"] for x in found.lines}
    assert {x["label"]: x["values"] for x in again["lines"]} == ours


def test_a_worker_that_dies_is_replaced(base, tmp_path, monkeypatch):
    original, calls = runner._Pool._start, []

    def start(self):
        calls.append(1)
        if len(calls) > 1:
            return original(self)
        return subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(runner._Pool, "_start", start)
    config = ol.TrainConfig(model=str(base), task="classification", data=tiny.labelled(60), batch_size=8, dtype="fp32", threads=1)
    found = ol.compare(["lora r=2", "frozen"], config=config, output=tmp_path / "c", steps=3, seeds=(0,), rates=(1.0,), rounds=0)
    assert "worker died" in found.line("lora r=2")["errors"][0] and found.line("frozen")["complete"]


def test_seconds_as_the_budget(base, tmp_path):
    config = ol.TrainConfig(model=str(base), task="classification", data=tiny.labelled(60), batch_size=8, dtype="fp32", threads=1)
    found = ol.compare(["lora r=2", "frozen"], config=config, output=tmp_path / "c", steps=None, seconds=0.3, seeds=(0,),
                       rates=(1.0,), rounds=0)  # fmt: skip
    paces = {t["label"]: t for t in trials(tmp_path / "c").values() if t["kind"] == "pace"}
    for line in found.lines:
        assert line["steps"] == max(1, int(0.3 / paces[line["label"]]["step_seconds"]))
    assert found.line("frozen")["steps"] > found.line("lora r=2")["steps"]


def test_language_models_have_a_base_line(tmp_path):
    folder = tiny.llama(tmp_path / "llama")
    rows = [{"prompt": tiny.text(3, i % 7), "completion": " " + tiny.text(2, i % 7)} for i in range(40)]
    config = ol.TrainConfig(model=str(folder), data=rows, batch_size=8, dtype="fp32", threads=1)
    found = ol.compare(["lora r=4"], config=config, output=tmp_path / "c", steps=20, seeds=(0,), rates=(3.0,), rounds=0, test=0.25)
    assert found.metric == "loss" and found.lower_is_better
    assert found.base > found.line("lora r=4")["test"]["mean"]


DIGITS = '''
import torch
from torch import nn
from omnilora.comparison import Problem

def make(seed):
    torch.manual_seed(0)
    x = torch.randn(120, 1, 6, 6)
    y = (x.mean((1, 2, 3)) > 0).long()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    data = [(a, b) for a, b in zip(x, y)]
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
    def score(model, rows):
        return {"accuracy": [float(model(a[None]).argmax() == b) for a, b in rows]}
    return Problem(net, data[:80], data[80:100], data[100:], loss, score, targets=["0"], unfreeze=["3"])
'''


def test_images_and_any_module(tmp_path):
    file = tmp_path / "digits.py"
    file.write_text(DIGITS)
    result = CliRunner().invoke(app, [
        "compare", "lora r=2", "loha r=2", "--problem", f"{file}:make", "--steps", "15", "--seeds", "0,1", "--rates", "3",
        "--rounds", "1", "--metric", "accuracy", "--baseline", "lora r=2", "--output", str(tmp_path / "c"), "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output[-800:]
    lines = json.loads(result.stdout)["lines"]
    assert {x["label"] for x in lines if x["complete"]} == {"lora r=2", "loha r=2"}
    assert all(x["time_ratio"] for x in lines)


def test_problems_must_be_importable():
    with pytest.raises(errors.BadValue, match="cannot be imported"):
        reference(lambda seed: None)
    with pytest.raises(errors.BadValue, match="no such file"):
        reference("nowhere.py:make")


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_methods_as_text():
    made = contestant("lora r=4 alpha=8")
    assert (made.label, made.method, made.hyper) == ("lora r=4 alpha=8", "lora", {"r": 4, "alpha": 8})
    with pytest.raises(errors.UnknownName):
        contestant("lorra")
    with pytest.raises(errors.BadValue):
        contestant("lora 4")


@pytest.mark.parametrize("change, word", [
    ({"methods": ()}, "No method"), ({"methods": ("lora", "lora")}, "twice"), ({"seeds": ()}, "seeds"), ({"rates": (0.0,)}, "rates"),
    ({"steps": None}, "budget"), ({"steps": 10, "seconds": 3.0}, "budget"), ({"baseline": "dora"}, "baseline"),
    ({"config": ol.TrainConfig(steps=5)}, "config.steps"), ({"metric": "f2"}, "metric")])  # fmt: skip
def test_plans_are_checked(change, word):
    with pytest.raises(errors.OmniloraError, match=re.escape(word)):
        Plan(**{"methods": ("lora",), **change})


# -- statistics ----------------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_student_s():
    """Hand-computed: mean 2, s = 1, t(0.975, 2) = 4.3027."""
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.high - 2.0 == pytest.approx(4.3026527 / math.sqrt(3), rel=1e-6)


def test_intervals_cover_as_often_as_they_say():
    """95 % intervals hold the truth in 95 % of many worlds; differences of nothing are called real in few."""
    draw = np.random.default_rng(0)
    held = wrong = rows = 0
    for _ in range(400):
        a = draw.normal(0, 1, 5)
        b = a + draw.normal(0, 0.5, 5)
        gap = statistics.paired_seeds(b, a)
        held += gap.low <= 0 <= gap.high
        wrong += gap.p < 0.05
    for _ in range(100):
        w = draw.integers(1, 5, 80).astype(float)
        a, b = draw.normal(0, 1, 80) * w, draw.normal(0, 1, 80) * w
        found = statistics.paired_rows(b, a, w)
        rows += found.low <= 0 <= found.high
    assert 0.92 < held / 400 < 0.98 and wrong / 400 < 0.08 and 0.88 <= rows / 100 <= 1.0


def test_pairing_takes_out_what_seeds_share():
    noise = np.array([0.1, 0.5, 0.9])
    gap = statistics.paired_seeds(noise + 0.05 + np.array([0.001, 0.0, -0.001]), noise)
    assert gap.low > 0.04 and gap.high < 0.06


def test_a_verdict_needs_seeds_rows_and_adjustment():
    up, none = statistics.Interval(0.1, 0.05, 0.15, 0.01), statistics.Interval(0.1, -0.05, 0.25)
    assert statistics.verdict(up, 0.01, up, False) == "better" and statistics.verdict(up, 0.01, up, True) == "worse"
    assert statistics.verdict(up, 0.01, none, False) == "not told apart"
    assert statistics.verdict(up, 0.2, up, False) == "not told apart"
    assert statistics.adjusted([0.01, None, 0.04]) == [0.02, None, 0.04]


def test_the_front():
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.8)]
    assert front(points, lower=False) == [0, 1, 3] and front(points, lower=True) == [0]


def test_trials_hide_nothing_of_the_test_set(done):
    """The configuration of a trial has no evaluation data: nothing stops early or is chosen by it."""
    home, _, _ = done
    plan = Plan.from_dict(json.loads((home / "plan.json").read_text()))
    assert plan.config.eval_data is None and plan.config.best is None and plan.config.patience is None
