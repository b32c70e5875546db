"""What is refused before a model is loaded, how it is said, and what is not said at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import tiny_llama, tiny_tokenizer
from test_fit import ROWS, TEXTS
from torch import nn
from typer.testing import CliRunner

import omnilora as ol
from omnilora.cli import common
from omnilora.cli.main import app
from omnilora.core.method import Method
from omnilora.errors import AttachError, BadValue, DataError, HubError, RunError, TargetError, UnknownName
from omnilora.io import places, reach
from omnilora.io.yaml import parse_yaml
from omnilora.parameterizations.lora import LoRA
from omnilora.training.config import TrainConfig
from omnilora.training.data import read_rows
from omnilora.training.fit import train
from omnilora.training.models import load_model

ROOT = Path(__file__).parents[1]
NOWHERE = "/nowhere/at/all"


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


# -- before the model is loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, error, says", [
    ({"bias": "some"}, BadValue, "bias = 'some'"), ({"tied": "some"}, BadValue, "tied = 'some'"),
    ({"targets": ["re:("]}, TargetError, r"'re:\(' is no regular expression"), ({"exclude": ["re:["]}, TargetError, "no regular"),
    ({"targets": "re:("}, TargetError, "no regular"), ({"unfreeze": ["block:re:("]}, TargetError, "no regular"),
    ({"overrides": {"re:(": {"r": 2}}}, TargetError, "no regular"),
    ({"data": [{"text": None}]}, DataError, "row 1: 'text' is null"), ({"data": [*ROWS, {"other": 1}]}, DataError, "row 9: fields"),
    ({"data": ROWS, "eval_data": [{"prompt": 3, "completion": "x"}]}, DataError, "'prompt' is a int"),
    ({"data": [*TEXTS, {"label": "neg"}], "task": "classification"}, DataError, "no text among"),
    ({"data": [{"anchor": "a"}], "task": "embedding"}, DataError, "no pair"),
])  # fmt: skip
def test_checked_without_the_model(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        train(TrainConfig(**{"model": NOWHERE, "data": ROWS, "output": str(tmp_path / "run"), **changes}))
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for output, says in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot be made")):
        with pytest.raises(BadValue, match=says):
            train(TrainConfig(model=NOWHERE, data=ROWS, output=str(output)))
    for command in (("merge", "--adapter", NOWHERE, "--output"), ("pull", "user/adapter"), ("convert", NOWHERE),
                    ("compare", "lora", "dora", "--model", NOWHERE, "--data", "x.jsonl", "--output"),
                    ("apply", "--method", "lqer", "--model", NOWHERE, "--output")):  # fmt: skip
        done = call(*command, tmp_path / "file")
        assert done.exit_code == 2 and "is a file" in done.stderr, (command, done.output)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadValue, match="is not writable"):
        places.check_folder(tmp_path / "new" / "run")
    with pytest.raises(BadValue, match="cannot be written"):
        places.check_file(tmp_path / "file")


def test_formats_have_endings(tmp_path):
    for form, name, says in (("kohya", "file.jsonl", "ends with .safetensors"), ("llama.cpp", "a.safetensors", "ends with .gguf"),
                             ("peft", "a.safetensors", "Give a folder")):  # fmt: skip
        done = call("convert", NOWHERE, tmp_path / name, "--for", form)
        assert done.exit_code == 2 and says in done.stderr, done.output
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("chat",)])
def test_only_language_models_write_text(tmp_path, command):
    from transformers import BertConfig, BertModel

    home = tmp_path / "bert"
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         max_position_embeddings=64)).save_pretrained(home)  # fmt: skip
    tiny_tokenizer(None).save_pretrained(home)
    train(TrainConfig(model=str(home), task="classification", data=TEXTS, steps=1, dtype="fp32", output=str(tmp_path / "run")))
    for file in home.iterdir():
        file.unlink()
    done = call(*command, "--adapter", tmp_path / "run")
    assert done.exit_code == 2 and "is of the task 'classification'" in done.stderr, done.output
    assert f"omnilora eval --adapter {tmp_path / 'run'}" in done.stderr


# -- the Hub -------------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_said_at_once(monkeypatch):
    from huggingface_hub import HfApi, constants

    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "repo_info", refuse)
    with pytest.raises(HubError, match="cannot be reached"):
        load_model(TrainConfig(model="nobody/nothing"))
    with pytest.raises(DataError, match="cannot be reached"):
        read_rows("nobody/nothing")
    assert call("explain", "--model", "nobody/nothing").stderr.count("cannot be reached") == 1
    assert asked == ["nobody/nothing"] * 3
    offline = constants.HF_HUB_OFFLINE
    with reach.asked("nobody/nothing") as reached:
        assert not reached and constants.HF_HUB_OFFLINE
    assert offline == constants.HF_HUB_OFFLINE


# -- the library ----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_of_functions():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BadValue, match="targets holds 0, a int"):
        ol.adapt(net, ol.method("lora", r=2), [0])
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        ol.adapt(nn.Sequential(nn.ReLU()), ol.method("lora", r=2))
    ol.adapt(net, ol.method("lora", r=2))
    for lr in ("1e-3", None, True, float("nan"), -1.0):
        with pytest.raises(BadValue, match="lr = "):
            ol.param_groups(net, lr)
    assert ol.param_groups(net, torch.tensor(0.1)) and ol.param_groups(net, 1)
    with pytest.raises(AttachError, match="model is a dict"):
        ol.param_groups({}, 1e-3)
    with pytest.raises(AttachError, match="dict has no adapter"):
        ol.fit({}, [1])
    with pytest.raises(BadValue, match="Pass loss= a function"):
        ol.fit(net, [(torch.randn(4), torch.randn(4))] * 4, steps=1)
    with pytest.raises(BadValue, match=r"alpha = 'x' is not allowed\. Give a finite number\."):
        ol.method("lora", alpha="x")


def test_an_optimizer_without_the_adapter_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = list(net.parameters())
    ol.adapt(net, ol.method("lora", r=2))
    with pytest.raises(RunError, match=r"holds 0 of the adapter's 4 trainable tensors.*ol\.param_groups"):
        ol.start(net, torch.optim.SGD(before, lr=0.1), total_steps=3)
    with pytest.raises(RunError, match="holds 3 of the adapter's 4"):
        ol.start(net, torch.optim.SGD(ol.trainable(net)[1:], lr=0.1), total_steps=3)
    ol.start(net, torch.optim.SGD([*before, *ol.trainable(net)], lr=0.1), total_steps=3).close()
    ol.trainable(net)[0].requires_grad_(False)
    ol.start(net, torch.optim.SGD(ol.param_groups(net, 0.1)), total_steps=3).close()
    ol.start(net, total_steps=3).close()


def test_the_rate_shown_is_the_rate_used(capsys):
    model = tiny_llama()
    ol.adapt(model, Method("plain", LoRA(r=2)))
    ol.fit(model, ROWS, tokenizer=tiny_tokenizer(), steps=4, batch_size=2, lr=1e-2, warmup=0, schedule="linear", log_every=3)
    said = [line for line in " ".join(capsys.readouterr().err.split()).split("step ") if "lr" in line]
    assert [(x.split("/")[0], x.split("lr ")[1].split()[0]) for x in said] == [
        ("1", "1.00e-02"), ("3", "5.00e-03"), ("4", "2.50e-03")]  # fmt: skip


# -- remedies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, says", [
    ("a: 1\na: 2", "'a' is given twice.*Keep one"), ("a:\n\tb: 1", "no tabs"), ("a: [1", "Quote texts")])  # fmt: skip
def test_remedies_of_yaml_fit_the_cause(text, says):
    with pytest.raises(BadValue, match=says) as raised:
        parse_yaml(text, "run.yaml")
    assert "unicode string" not in str(raised.value)


def test_remedies_of_configurations():
    with pytest.raises(BadValue, match=r"steps = 'many' is a str\. Give a whole number\."):
        TrainConfig(steps="many")
    with pytest.raises(UnknownName, match=r"hyper-parameter of lora: write hyper\.r"):
        TrainConfig.from_dict({"r": 3})
    with pytest.raises(UnknownName, match="Nearest: lr"):
        TrainConfig.from_dict({"lrr": 3})
    assert "There are: composition," in call("list", "--kind", "form").stderr
    assert "nope does not exist" in call("info", "nope").stderr


# -- the command line -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, code, exit_code", [
    (OSError(28, "No space left on device", "x.bin"), "os", 2), (ZeroDivisionError("oh"), "unexpected", 1),
    (BrokenPipeError(32, "Broken pipe"), "unexpected", 1)])  # fmt: skip
def test_whatever_fails_is_one_line(monkeypatch, error, code, exit_code):
    def fail(*_):
        raise error

    monkeypatch.setattr("omnilora.cli.comparing.about", fail)
    monkeypatch.delenv("OMNILORA_DEBUG", raising=False)
    done = call("info", "x")
    assert done.exit_code == exit_code and done.stderr.startswith(f"error [{code}] ") and len(done.stderr.splitlines()) == 1
    assert "OMNILORA_DEBUG=1 shows the traceback" in done.stderr
    assert json.loads(call("info", "x", "--json").stdout)["error"]["code"] == code
    monkeypatch.setenv("OMNILORA_DEBUG", "1")
    assert "Traceback" in call("info", "x").stderr


@pytest.mark.parametrize("args", [["list"], ["list", "--json"], ["list", "--section=foundations"]])
def test_a_closed_pipe_is_quiet(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "omnilora.cli.main", *args], stdout=write, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
    os.close(write)
    assert done.returncode == common.CLOSED and done.stderr == ""


def test_errors_hold_nothing_but_what_was_asked_for(tmp_path):
    """A model is loaded and saved: stderr says that it is loaded, and nothing else."""
    home = tmp_path / "model"
    tiny_llama().save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))

    def run(*args):
        done = subprocess.run([sys.executable, "-m", "omnilora.cli.main", *map(str, args)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    said = run("train", "--model", home, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run", "--steps", 2, "--dtype", "fp32")
    assert said[0] == f"loading {home} …" and all(line.startswith("step ") for line in said[1:]) and len(said) == 3, said
    assert run("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged") == [f"loading {home} …"]


def test_help_of_train_names_the_keys():
    text = call("train", "--help").stdout
    assert all(word in text for word in ("stop_at", "overrides", "--overwrite", "TrainConfig().to_yaml()"))


@pytest.mark.parametrize("call", [lambda: ol.adapt({}, ol.method("lora")), lambda: ol.adapters([])])
def test_what_is_no_module(call):
    with pytest.raises(BadValue, match=r"Give a torch\.nn\.Module"):
        call()
