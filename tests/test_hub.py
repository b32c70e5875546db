"""The Hub, with its functions replaced: what is sent, what is fetched, and what happens offline."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import omnilora as ol
from omnilora.cli.main import app
from omnilora.errors import BadValue, FileRefused, HubError
from omnilora.io import hub

library = pytest.importorskip("huggingface_hub")
hub_errors = pytest.importorskip("huggingface_hub.errors")


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.fixture
def run(tmp_path):
    """A run's folder as training leaves it."""
    model = base()
    ol.adapt(model, ol.method("lora", r=2))
    home = tmp_path / "runs" / "first"
    ol.save(model, home / "adapter")
    (home / "config.yaml").write_text(f"model: user/base\ndata: {tmp_path}/secret/train.jsonl\nlr: 0.001\nsteps: 12\n")
    (home / "report.json").write_text(json.dumps({
        "steps": 12, "total_steps": 12, "stopped": "done", "losses": [2.5, 1.25], "evaluations": [{"step": 12, "loss": 1.5}]}))  # fmt: skip
    return home


class Api:
    seen: dict = {}

    def create_repo(self, repo, private=None, exist_ok=False):
        self.seen["made"] = (repo, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None):
        self.seen["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return type("Info", (), {"commit_url": f"hub:{repo_id}"})()


def test_push_and_pull(run, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "HfApi", Api)
    report = ol.push(run, "user/adapter", private=True)
    assert report["url"] == "hub:user/adapter" and Api.seen["made"] == ("user/adapter", True, True)
    sent = Api.seen["files"]
    assert set(sent) == {"README.md", "omnilora.json", "adapter_config.json", "adapter_model.safetensors"} == set(report["files"])
    text = sent["README.md"].decode()
    for part in ('base_model: "user/base"', "| method | lora |", "LoRA", "| data | train.jsonl |", "| lr | 0.001 |",
                 "2.5 → 1.25", "| evaluation: loss | 1.5 |", 'ol.pull("user/adapter")'):  # fmt: skip
        assert part in text, part
    assert str(tmp_path) not in text, "paths of this machine stay here"

    there = tmp_path / "snapshot"
    there.mkdir()
    for name, data in sent.items():
        (there / name).write_bytes(data)
    asked = {}
    monkeypatch.setattr(library, "snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or str(there))
    assert ol.pull("user/adapter") == there
    path = ol.pull("user/adapter", tmp_path / "mine", revision="v2")
    assert asked["revision"] == "v2" and not any(p.endswith((".py", ".bin")) for p in asked["allow_patterns"])
    assert ol.load(base(), path)["base"] == "same bytes"
    done = CliRunner().invoke(app, ["pull", "user/adapter", str(tmp_path / "cli"), "--json"])
    assert json.loads(done.stdout) == {"repo": "user/adapter", "path": str(tmp_path / "cli")}


@pytest.mark.parametrize("error, says", [
    (hub_errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
    (hub_errors.LocalEntryNotFoundError("x"), "Go online once"),
    (hub_errors.RepositoryNotFoundError("x", response=MagicMock(headers={})), "log in"),
    (ConnectionError("no route"), "online"), (TimeoutError("slow"), "online"),
])  # fmt: skip
def test_offline_and_refused(error, says, run, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(library, "snapshot_download", fail)
    with pytest.raises(HubError, match=says):
        ol.pull("user/adapter", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    monkeypatch.setattr(library.HfApi, "create_repo", fail)
    with pytest.raises(HubError, match=says):
        ol.push(run, "user/adapter")
    done = CliRunner().invoke(app, ["pull", "user/adapter", str(tmp_path / "mine"), "--json"])
    assert done.exit_code == 2 and json.loads(done.stdout)["error"]["code"] == "hub"


def test_offline_mode_of_the_library(tmp_path):
    """Without a replaced function: a process with HF_HUB_OFFLINE and an empty cache."""
    import os
    import subprocess
    import sys

    code = ("import omnilora as ol\ntry:\n    ol.pull('user/adapter')\nexcept ol.errors.HubError as e:\n    print('typed', e)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})  # fmt: skip
    assert "typed [hub]" in done.stdout, done.stderr


def test_what_is_no_adapter_is_not_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "HfApi", Api)
    with pytest.raises(FileRefused):
        ol.push(tmp_path, "user/adapter")
    for name in ("adapter", "a/b/c", "us er/x", "/x"):
        with pytest.raises(BadValue, match="user/adapter"):
            ol.push(tmp_path, name)
    there = tmp_path / "snapshot"
    there.mkdir()
    (there / "config.json").write_text("{}")
    monkeypatch.setattr(library, "snapshot_download", lambda repo, **options: str(there))
    with pytest.raises(FileRefused):
        ol.pull("user/adapter", tmp_path / "mine")


def test_card_of_a_single_file(tmp_path):
    model = base()
    ol.adapt(model, ol.method("loha", r=2))
    ol.export(model, tmp_path / "a.safetensors", "lycoris")
    assert "| base | not recorded |" in hub.card(tmp_path / "a.safetensors", "user/x")
    done = CliRunner().invoke(app, ["push", str(tmp_path / "a.safetensors"), "user/x", "--card"])
    assert "# x" in done.stdout and done.exit_code == 0
