"""A run that stops and goes on is the run that never stopped, bit for bit; two processes compute what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_fit
import torch
from test_data import tiny_llama, tiny_tokenizer

import omnilora as ol
from omnilora.core.method import Method
from omnilora.core.rule import Group, Rule
from omnilora.errors import AttachError, BadValue, FileRefused, NeedsExtra, RunError, StateMismatch, UnknownName
from omnilora.parameterizations.lora import LoRA
from omnilora.training import checkpoint

HERE = Path(__file__).parent
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]
ROWS = [{"prompt": f"what is {a} plus {b}" + " good" * i, "completion": NUMBERS[(i * j) % 7]}
        for i, a in enumerate(NUMBERS[:5]) for j, b in enumerate(NUMBERS[:5])]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(Rule):
    """Draws, adds a loss, moves a tensor of its own and scales: everything a checkpoint must keep."""

    loss_is_added = True

    def __init__(self):
        self.mean, self.drawn = {}, []

    def groups(self, model, adapter):
        return [Group([p for s in ol.slots(model, adapter) for _, p in s.by_role("output")], factor=4.0)]

    def before_forward(self, run):
        self.drawn.append(float(torch.rand(())))
        run.set("noise", self.drawn[-1])

    def loss(self, run, batch, outputs):
        return self.drawn[-1] * 1e-2 * sum((t**2).sum() for s in run.slots() for _, t in s.tensors())

    def after_step(self, run):
        for s in run.slots():
            for name, t in s.by_role("output"):
                key = f"{s.site.name}:{name}"
                self.mean[key] = 0.9 * self.mean.get(key, torch.zeros_like(t)) + 0.1 * t
                t.sub_(0.01 * self.mean[key])
            s.scale *= 0.99
            s.marks["seen"] = run.step

    def state_dict(self):
        return {"mean": self.mean, "drawn": self.drawn, "pair": (1, float("inf"))}

    def load_state_dict(self, state):
        self.mean, self.drawn = state["mean"], list(state["drawn"])
        assert state["pair"] == (1, float("inf"))


SCHEDULED = {
    "adalora": {},
    "bilora": {"r": 2},
    "cola": {"links": 3, "r": 2},
    "delta_lora": {"r": 2, "start": 4},
    "dylora": {"r": 4},
    "flora_opt": {"rank": 4, "gap": 3, "accumulation": True},
    "galore": {"rank": 4, "gap": 3},
    "hiddenkey": {"r": 2, "p_key": 0.2, "beta": 1.0},
    "local_lora": {"parts": 2, "r": 2},
    "lte": {"heads": 2, "r": 2, "every": 3},
    "prilora": {"r_start": 2, "r_end": 3, "every": 3},
    "relora": {"r": 2, "every": 4, "warmup": 2, "reset": "zero"},
    "rosa": {"r": 2, "every": 3},
    "sora": {"r": 4, "xi": 1e-2},
}


def how(kind):
    if kind == "noisy":
        return Method("noisy", LoRA(r=4, dropout=0.1), (Noisy(),))
    if kind in SCHEDULED:
        return ol.method(kind, **SCHEDULED[kind])
    return Method("plain", LoRA(r=4, dropout=0.1))


def go(kind, output, **options):
    model = tiny_llama()
    torch.manual_seed(1)
    ol.adapt(model, how(kind), targets=["attention", "mlp"])
    given = {"batch_size": 4, "steps": 20, "lr": 1e-2, "output": str(output), **options}
    report = ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), **given)
    return ol.state(model), report


def same(a, b):
    left, right = a.flat(), b.flat()
    return set(left) == set(right) and all(torch.equal(left[k], right[k]) for k in left) and all(
        a.sites[s].scale == b.sites[s].scale and a.sites[s].marks == b.sites[s].marks for s in a.sites)  # fmt: skip


@pytest.mark.parametrize(
    "kind, workers, options",
    [
        ("plain", 0, {"accumulate": 2, "eval_data": 0.2, "eval_every": 3}),
        ("plain", 2, {"packing": True, "max_length": 48, "batch_size": 1}),
        ("noisy", 0, {}),
        ("adalora", 0, {}),
    ],
)
def test_ten_and_ten_are_twenty(tmp_path, kind, workers, options):
    whole, first = go(kind, tmp_path / "whole", workers=workers, **options)
    _, half = go(kind, tmp_path / "parts", workers=workers, stop_at=10, **options)
    assert half.stopped == "stop_at" and half.steps == 10
    torch.randn(7)
    rest, last = go(kind, tmp_path / "parts", workers=workers, resume="auto", **options)
    assert last.losses == first.losses and last.evaluations == first.evaluations and last.steps == 20
    assert same(whole, rest)
    _, fresh = go(kind, tmp_path / "other", workers=workers, seed=5, **options)
    assert fresh.losses != first.losses


@pytest.mark.parametrize("kind", sorted(SCHEDULED))
def test_every_schedule_resumes(tmp_path, kind):
    """Stopped at 7 of 20, in the middle of whatever the method is doing."""
    whole, first = go(kind, tmp_path / "whole")
    go(kind, tmp_path / "parts", stop_at=7)
    rest, last = go(kind, tmp_path / "parts", resume="auto")
    assert last.losses == first.losses and same(whole, rest)


def test_a_data_loader_of_your_own_resumes(tmp_path):
    from torch.utils.data import DataLoader, TensorDataset

    x = torch.randn(26, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.flip(1))

    def run(output, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 6))
        ol.adapt(model, Method("plain", LoRA(r=2, dropout=0.1)), targets=["0", "2"])
        report = ol.fit(model, DataLoader(data, batch_size=4, shuffle=True), steps=12, lr=1e-2, output=str(output),
                        loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), **options)  # fmt: skip
        return ol.state(model), report

    whole, first = run(tmp_path / "a")
    run(tmp_path / "b", stop_at=9)
    rest, last = run(tmp_path / "b", resume="auto")
    assert last.losses == first.losses and same(whole, rest)


def test_a_checkpoint_is_an_adapter(tmp_path):
    state, report = go("plain", tmp_path)
    model = tiny_llama()
    ol.load(model, report.checkpoint)
    assert same(ol.state(model), state)


def test_newest_and_best_are_kept(tmp_path):
    state, report = go("plain", tmp_path, save_every=4, keep=2, eval_data=0.2, eval_every=4, best="loss", lr=0.3)
    kept = {p.name for p in checkpoint.found(tmp_path / "checkpoints")}
    values = {e["step"]: e["loss"] for e in report.evaluations}
    best = min(values, key=values.get)
    if best:
        assert report.best.endswith(f"step-{best:06d}") and report.best_value == values[best]
        assert kept == {"step-000016", "step-000020", f"step-{best:06d}"}
        model = tiny_llama()
        ol.load(model, report.best)
        assert same(ol.state(model), state)


def test_patience(tmp_path):
    _, report = go("plain", tmp_path, eval_data=0.2, eval_every=1, patience=2, lr=1e-9, best="perplexity")
    assert report.stopped in ("patience", "done") and report.steps <= 20
    with pytest.raises(BadValue, match="patience = 2 needs eval_data"):
        go("plain", tmp_path, patience=2)
    with pytest.raises(BadValue, match="save_every = 2 needs output"):
        model = ol.adapt(tiny_llama(), how("plain"))
        ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), save_every=2)


def test_wrong_checkpoints_are_refused(tmp_path):
    go("plain", tmp_path, stop_at=2, steps=4)
    (path,) = checkpoint.found(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="batch_size: 4 → 2"):
        go("plain", tmp_path, steps=4, resume="auto", batch_size=2)
    with pytest.raises(StateMismatch, match="another adapter"):
        model = ol.adapt(tiny_llama(), how("plain"), targets=["mlp"])
        ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), batch_size=4, steps=4, lr=1e-2, output=str(tmp_path), resume="auto")
    with pytest.raises(FileRefused, match="no checkpoint"):
        go("plain", tmp_path, steps=4, resume=str(tmp_path / "nowhere"))
    data = (path / checkpoint.TENSORS).read_bytes()
    (path / checkpoint.TENSORS).write_bytes(data[: len(data) // 2])
    with pytest.raises(FileRefused):
        go("plain", tmp_path, steps=4, resume="auto")
    (path / checkpoint.TENSORS).write_bytes(data)
    body = json.loads((path / checkpoint.TRAINER).read_text())
    body["body"] = {"items": []}
    (path / checkpoint.TRAINER).write_text(json.dumps(body))
    with pytest.raises(FileRefused, match="breaks the format"):
        go("plain", tmp_path, steps=4, resume="auto")
    assert not any(p.suffix in (".pt", ".bin", ".pkl") for p in tmp_path.rglob("*"))


def test_resume_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(BadValue, match="holds no checkpoint"):
        go("plain", tmp_path, resume=True)


# -- processes, trackers, wrong use --------------------------------------------------------------------------------------


_DDP = """
import json, sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import test_fit
from accelerate import PartialState
made = []
for size, accumulate in ((4, 1), (1, 4)):
    grads, loss = test_fit.gradients(batch_size=size, accumulate=accumulate)
    made.append({"loss": loss, "grads": {k: g.flatten().tolist() for k, g in grads.items()}})
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    json.dump(made, open(sys.argv[2], "w"))
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path / "two.json"
    jobs = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
               "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        jobs.append(subprocess.Popen([sys.executable, "-c", _DDP, str(HERE), str(out)], env=env,
                                     stderr=subprocess.PIPE, text=True))  # fmt: skip
    for job in jobs:
        _, said = job.communicate(timeout=120)
        assert job.returncode == 0, said[-2000:]
    one, loss = test_fit.gradients(batch_size=8)
    for two in json.loads(out.read_text()):
        assert two["loss"] == pytest.approx(loss, rel=1e-5)
        for key, g in one.items():
            assert (torch.tensor(two["grads"][key]) - g.flatten()).norm() <= 1e-5 * g.norm() + 1e-9, key


def test_trackers_get_what_is_measured():
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self):
            super().__init__()
            self.rows, self.config = [], None

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step, **_):
            self.rows.append((step, values))

    tracker = Kept()
    test_fit.fitted(trackers=[tracker], steps=2, eval_data=ROWS[:2], eval_every=1)
    assert tracker.config["lr"] == 1e-2
    assert [s for s, v in tracker.rows if "loss" in v] == [1, 2]
    assert [s for s, v in tracker.rows if "eval_perplexity" in v] == [0, 1, 2]


def test_wrong_use_is_refused():
    with pytest.raises(AttachError, match="no adapter"):
        ol.fit(tiny_llama(), ROWS, tokenizer=tiny_tokenizer())
    with pytest.raises(UnknownName, match="batch_size"):
        test_fit.fitted(bath_size=3)
    with pytest.raises(BadValue, match="there is no tokenizer"):
        ol.fit(ol.adapt(tiny_llama(), test_fit.PLAIN), "rows.jsonl")
    with pytest.raises(BadValue, match="max_length = 99, but the model takes 64"):
        test_fit.fitted(max_length=99)
    with pytest.raises(RunError, match="The loss is nan at update 1"):
        net = ol.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), test_fit.PLAIN)
        ol.fit(net, torch.randn(8, 4), loss=lambda m, b: m(b).sum() * float("nan"))
    with pytest.raises(UnknownName, match="No tracker 'tensorbord'"):
        test_fit.fitted(trackers=["tensorbord"])
    with pytest.raises(NeedsExtra, match="comet_ml"):
        test_fit.fitted(trackers=["comet_ml"])
    with pytest.raises(BadValue, match="gradient_checkpointing_enable"):
        net = ol.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), test_fit.PLAIN)
        ol.fit(net, torch.randn(8, 4), loss=lambda m, b: m(b).sum(), gradient_checkpointing=True)
