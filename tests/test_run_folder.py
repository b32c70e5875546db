"""The folder of a run: what may begin in it, what a refusal leaves, what goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from typer.testing import CliRunner

import omnilora as ol
from omnilora.cli.main import app
from omnilora.core.method import Method
from omnilora.errors import BadValue, FileRefused, RunError
from omnilora.parameterizations.lora import LoRA
from omnilora.training import folder
from omnilora.training.config import TrainConfig
from omnilora.training.fit import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"prompt": tiny.text(4, i), "completion": " " + tiny.text(3, i % 4)} for i in range(8)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny.llama(tmp_path_factory.mktemp("llama")))


def config(llama, output, **changes):
    return TrainConfig(**{"model": llama, "data": ROWS, "steps": 4, "batch_size": 2, "lr": 1e-2, "dtype": "fp32",
                          "output": str(output), **changes})  # fmt: skip


def content(home):
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(Path(home).rglob("*")) if p.is_file()}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return str(path)


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_a_refusal_to_resume_changes_nothing(llama, tmp_path):
    train(config(llama, tmp_path / "run"))
    before = content(tmp_path / "run")
    with pytest.raises(RunError, match="another run"):
        train(config(llama, tmp_path / "run", resume=True, lr=3e-2))
    with pytest.raises(RunError, match="hyper"):
        train(config(llama, tmp_path / "run", resume=True, hyper={"r": 3}))
    assert content(tmp_path / "run") == before


def test_a_run_is_not_replaced_unasked(llama, tmp_path):
    train(config(llama, tmp_path / "run"))
    before = content(tmp_path / "run")
    with pytest.raises(BadValue, match=r"holds a run already \(config.yaml, report.json, adapter, checkpoints\).*--overwrite"):
        train(config(llama, tmp_path / "run", model="/nowhere/at/all"))
    with pytest.raises(BadValue, match="holds other files"):
        train(config("/nowhere/at/all", llama))
    with pytest.raises(BadValue, match="folder of the model"):
        train(config(llama, llama, overwrite=True))
    assert content(tmp_path / "run") == before
    with pytest.raises(BadValue, match="exclude each other"):
        config(llama, tmp_path / "run", overwrite=True, resume=True)


def test_fit_does_not_replace_checkpoints_unasked(llama, tmp_path):
    def go(**options):
        model = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
        ol.adapt(model, Method("plain", LoRA(r=2)))
        return ol.fit(model, ROWS, tokenizer=tiny.tokenizer(), steps=2, batch_size=2, output=str(tmp_path), **options)

    go()
    with pytest.raises(BadValue, match=r"holds a run already \(checkpoints\)"):
        go()
    assert go(overwrite=True).steps == 2 and go(resume="auto").steps == 2


def test_overwriting_removes_the_old_run_and_nothing_else(llama, tmp_path, monkeypatch):
    home = tmp_path / "run"
    train(config(llama, home))
    (home / "notes.txt").write_text("mine")
    (home / "adapter" / "README.md").write_text("mine")
    train(config(llama, home, steps=2, save_every=1, overwrite=True))
    assert (home / "notes.txt").read_text() == (home / "adapter" / "README.md").read_text() == "mine"
    assert [p.name for p in sorted((home / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    stored = TrainConfig.from_yaml(home / "config.yaml")
    assert stored.steps == 2 and not stored.overwrite and not stored.resume

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("omnilora.training.loop.Loop._update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(llama, home, steps=3, overwrite=True))
    assert TrainConfig.from_yaml(home / "config.yaml").steps == 3
    assert not (home / "report.json").exists() and not (home / "checkpoints").exists()
    assert [p.name for p in (home / "adapter").iterdir()] == ["README.md"]


def test_nothing_to_resume(llama, tmp_path):
    with pytest.raises(BadValue, match="holds no run to resume"):
        train(config("/nowhere/at/all", tmp_path / "none", resume=True))
    done = call("train", "--output", tmp_path / "none", "--resume")
    assert done.exit_code == 2 and "none holds no run to resume" in done.stderr and not (tmp_path / "none").exists()
    with pytest.raises(FileRefused, match="is no checkpoint"):
        train(config("/nowhere/at/all", tmp_path / "none", resume=str(tmp_path / "step-000001")))


def test_a_run_that_stopped_goes_on(llama, tmp_path, rows):
    common = ("--model", llama, "--data", rows, "--steps", "4", "--batch-size", "2", "--lr", "0.01", "--dtype", "fp32")
    done = call("train", *common, "--output", tmp_path / "run", "--set", "stop_at=2")
    assert done.exit_code == 0, done.output
    assert f"go on: omnilora train --output {tmp_path / 'run'} --resume" in done.stdout
    told = call("info", tmp_path / "run")
    assert "stopped at step 2" in told.stdout and "--resume" in told.stdout
    refused = call("train", "--output", tmp_path / "run", "--resume", "--method", "dora")
    assert refused.exit_code == 2 and "that run's method is lora" in refused.stderr
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "stop_at: null" in text
    (tmp_path / "run" / "config.yaml").write_text(text.replace("stop_at: null", "stop_at: 2"))  # as older versions wrote it
    done = call("train", "--output", tmp_path / "run", "--resume")
    assert done.exit_code == 0 and "4 of 4 updates" in done.stdout, done.output


def test_an_end_that_is_reached_is_said(llama, tmp_path, capsys):
    train(config(llama, tmp_path / "run", stop_at=2))
    report = train(config(llama, tmp_path / "run", stop_at=2, resume=True))
    assert report.steps == 2 and "stop_at = 2 is reached already" in " ".join(capsys.readouterr().err.split())


def test_an_interruption_says_what_is_lost(llama, tmp_path, rows, monkeypatch):
    from omnilora.training.loop import Loop

    real = Loop._update

    def update(self, run, *rest):
        if run.step == 3:
            raise KeyboardInterrupt
        real(self, run, *rest)

    monkeypatch.setattr(Loop, "_update", update)
    home = tmp_path / "run"
    options = ("--model", llama, "--data", rows, "--steps", "4", "--batch-size", "2", "--dtype", "fp32")
    done = call("train", *options, "--output", home, "--set", "save_every=2")
    assert done.exit_code == 130
    said = " ".join(done.stderr.split())
    assert f"Interrupted after step 3. The newest checkpoint is {home}/checkpoints/step-000002: 1 step since is lost." in said
    assert f"Go on: omnilora train --output {home} --resume" in said
    told = call("info", home)
    assert told.exit_code == 0 and "interrupted at step 2" in told.stdout, told.output
    assert f"omnilora train --output {home} --resume" in told.stdout
    monkeypatch.setattr(Loop, "_update", real)
    assert call("train", "--output", home, "--resume").exit_code == 0

    monkeypatch.setattr(Loop, "_update", update)
    done = call("train", *options, "--output", tmp_path / "other")
    assert done.exit_code == 130 and "no checkpoint yet" in done.stderr


def test_commands_are_quoted(tmp_path):
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.yaml").touch()
    assert folder.command(tmp_path / "a run") == f"omnilora train --output '{tmp_path}/a run' --resume"
