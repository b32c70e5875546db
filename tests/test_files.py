"""Files: byte-identical, atomic, proven against the base; hostile ones refused with a typed error, cheaply."""

import contextlib
import json
import os
import random
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz import bytes_of

import omnilora as ol
from omnilora import errors
from omnilora.contract import shake
from omnilora.core.method import Method
from omnilora.parameterizations.lora import LoRA
from omnilora.proofs import Stack


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Stack(8, 10, 6, bias=True).eval()
    ol.adapt(model, ol.method("molora", experts=2, r=2))
    shake(model)
    ol.save(model, tmp_path / "a")
    return model, tmp_path / "a"


def base_of(model):
    other = Stack(8, 10, 6, bias=True).eval()
    other.load_state_dict(ol.base_state_dict(model))
    return other


def test_two_saves_are_equal_and_hold_no_time(saved, tmp_path):
    model, path = saved
    ol.save(model, tmp_path / "b")
    assert all((tmp_path / "b" / f.name).read_bytes() == f.read_bytes() for f in path.iterdir())
    assert sorted(p.name for p in path.iterdir()) == ["omnilora.json", "omnilora.safetensors"]


def test_overwriting_is_whole_and_leaves_nothing_behind(saved):
    model, path = saved
    shake(model)
    ol.save(model, path)
    ol.load(other := base_of(model), path)
    x = torch.randn(2, 8)
    assert torch.equal(other(x), model(x)) and [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_failed_write_keeps_the_old_folder(saved, monkeypatch):
    model, path = saved
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    shake(model)
    for call in ("fsync", "rename"):
        with monkeypatch.context() as m:
            m.setattr(os, call, lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            m.setattr("omnilora.core.files._exchange", lambda a, b: False)
            with pytest.raises(OSError):
                ol.save(model, path)
        assert {f.name: f.read_bytes() for f in path.iterdir()} == before
        assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_saving_keeps_what_else_lies_there(saved):
    model, path = saved
    (path / "notes.txt").write_text("mine")
    (path / "omnilora.safetensors").write_bytes(b"of an older save")
    ol.save(model, path)
    assert (path / "notes.txt").read_text() == "mine"
    assert ol.load_file(path).sites
    assert not list(path.parent.glob(".a.*"))


def test_saving_over_folders_is_refused(saved, tmp_path):
    model, _ = saved
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "src" / "main.py").write_text("work")
    with pytest.raises(errors.FileRefused, match="src"):
        ol.save(model, tmp_path / "project")
    assert (tmp_path / "project" / "src" / "main.py").read_text() == "work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "project"]


def test_the_folder_of_a_run_loads_its_adapter(saved, tmp_path):
    model, path = saved
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / "adapter")
    assert ol.load(base_of(model), tmp_path / "run")["sites"] == 2


def test_verdicts_on_the_base(saved):
    model, path = saved
    assert ol.load(base_of(model), path)["base"] == "same bytes"
    half = base_of(model).bfloat16()
    report = ol.load(half, path)
    assert report["base"] == "same weights" and 1e-4 < report["distance"] < 1e-2
    torch.manual_seed(5)
    stranger = Stack(8, 10, 6, bias=True)
    with pytest.raises(errors.BaseMismatch, match="another base"):
        ol.load(stranger, path)
    assert ol.adapters(stranger) == []
    assert ol.load(stranger, path, check_base=False)["base"] == "unproven"


def test_load_is_all_or_nothing(saved):
    model, path = saved
    small = Stack(8, 10, 7, bias=True)
    with pytest.raises(errors.StateMismatch, match=r"layers\.1"):
        ol.load(small, path, check_base=False)
    assert ol.adapters(small) == [] and not hasattr(small.layers[0], "adapters")
    with pytest.raises(errors.StateMismatch, match="no linear at"):
        ol.load(Stack(8, 10), path)


def edit(path, change):
    data = json.loads((path / "omnilora.json").read_text())
    change(data)
    (path / "omnilora.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.update(format=99), errors.FileRefused),
        (lambda d: d.update(surprise=1), errors.UnknownName),
        (lambda d: d.pop("sites"), errors.UnknownName),
        (lambda d: d["sites"]["layers.0"]["how"].update(kind="Nope"), errors.UnknownName),
        (lambda d: d["sites"]["layers.0"]["how"].update(kind="os.system"), errors.UnknownName),
        (lambda d: d["sites"]["layers.0"]["how"].update(rr=3), errors.UnknownName),
        (lambda d: d["sites"]["layers.0"]["how"].update(r=2**31), errors.OmniloraError),
        (lambda d: d["sites"]["layers.0"]["how"].update(r=-1), errors.BadValue),
        (lambda d: d["sites"]["layers.0"].update(scale=9.0), errors.FileRefused),
        (lambda d: d["sites"]["layers.0"].update(roles=[]), errors.FileRefused),
        (lambda d: d.update(tensors="../../etc/passwd"), errors.FileRefused),
        (lambda d: d["sites"].update({"layers.0": None}), errors.FileRefused),
    ],
)
def test_edited_manifests_are_refused(saved, change, error):
    model, path = saved
    edit(path, change)
    with pytest.raises(error):
        ol.load(base_of(model), path)


def test_nan_tensors_and_wrong_tensors_are_refused(saved):
    model, path = saved
    tensors = load_file(path / "omnilora.safetensors")
    first = sorted(tensors)[0]
    save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, path / "omnilora.safetensors")
    with pytest.raises(errors.OmniloraError):
        ol.load(base_of(model), path)
    save_file({**tensors, "extra": torch.zeros(1)}, path / "omnilora.safetensors")
    with pytest.raises(errors.FileRefused, match="extra"):
        ol.load(base_of(model), path)


def test_pickles_and_strangers_are_refused(tmp_path, saved):
    model, _ = saved
    folder = tmp_path / "p"
    folder.mkdir()
    torch.save({"x": 1}, folder / "adapter_model.bin")
    with pytest.raises(errors.FileRefused, match="pickle"):
        ol.load(base_of(model), folder)
    with pytest.raises(errors.FileRefused):
        ol.load(base_of(model), tmp_path / "none")


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 10) + b"{", struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 300) + b"[" * 300,
     (lambda h: struct.pack("<Q", len(h)) + h)(b'{"a":{"dtype":"F32","shape":[99999999999,9999999],"data_offsets":[0,4]}}'),
     (lambda h: struct.pack("<Q", len(h)) + h)(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}')],
)  # fmt: skip
def test_hostile_tensor_files(saved, data):
    model, path = saved
    (path / "omnilora.safetensors").write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(errors.FileRefused):
        ol.load_file(path)
    assert time.perf_counter() - start < 0.5


def test_a_thousand_mutations_give_typed_errors_or_the_same_adapter(saved):
    _, path = saved
    rng = random.Random(0)
    want = ol.load_file(path).content()
    files = {f: f.read_bytes() for f in path.iterdir()}
    for _ in range(1000):
        f = rng.choice(list(files))
        f.write_bytes(bytes_of(files[f], rng))
        with contextlib.suppress(errors.OmniloraError):
            assert ol.load_file(path).content() == want
        f.write_bytes(files[f])


def test_reading_executes_and_opens_nothing_else(saved):
    _, path = saved
    ol.load_file(path)
    events = []
    watching = [True]

    def hook(event, args):
        if watching[0] and event in ("exec", "compile", "os.system", "subprocess.Popen", "socket.connect", "open"):
            events.append((event, str(args[0])))

    sys.addaudithook(hook)
    ol.load_file(path)
    watching[0] = False
    assert {e for e, _ in events} == {"open"} and all(str(path) in name for _, name in events)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "golden").rglob("*.safetensors"))[::9], ids=lambda p: p.stem)
def test_reading_foreign_files_executes_nothing(file):
    """kohya, LyCORIS, diffusers and PEFT files: the file (or its folder's) is opened, nothing is run or connected to."""
    path = file.parent if (file.parent / "adapter_config.json").exists() else file
    with contextlib.suppress(errors.OmniloraError):
        ol.load_file(path)
    events, watching = [], [True]

    def hook(event, args):
        if watching[0] and event in ("exec", "compile", "os.system", "subprocess.Popen", "socket.connect", "open"):
            events.append((event, str(args[0])))

    sys.addaudithook(hook)
    with contextlib.suppress(errors.OmniloraError):
        ol.load_file(path)
    watching[0] = False
    assert {e for e, _ in events} == {"open"} and all(str(file.parent) in name for _, name in events), events


def test_names_are_data(tmp_path):
    model = Stack(4, 4)
    x = torch.randn(2, 4)
    for name in ("lora", "A", "weight", "a.b", "../x", "keys", "training", "ü λ", "%2E"):
        ol.adapt(model, Method("m", LoRA(1)), name=name)
    shake(model)
    outs = []
    for name in ol.adapters(model):
        ol.activate(model, name)
        outs.append(model(x))
    assert len({tuple(o.flatten().tolist()) for o in outs}) == len(outs)
    ol.save(model, tmp_path / "s", adapter="../x")
    ol.detach(model, "a.b")
    assert "a.b" not in ol.adapters(model) and len(ol.adapters(model)) == 8


def test_every_kind_of_adapter_loads_in_a_fresh_process(tmp_path):
    """Forms come with their methods' files; nothing has been imported there before."""
    import subprocess

    from omnilora.parameterizations.vera import VeRA

    for key, hyper in [("molora", {"experts": 2}), ("dylora", {"r": 3}), ("relora", {"r": 2}), ("dora", {"inner": VeRA(4)})]:
        torch.manual_seed(0)
        model = Stack(8, 10).eval()
        torch.save(model.state_dict(), tmp_path / "base.pt")
        ol.adapt(model, ol.method(key, **hyper))
        shake(model)
        ol.save(model, tmp_path / key)
        save_file({"y": model(torch.ones(2, 8)).detach()}, tmp_path / "y.safetensors")
        code = (
            "import torch, omnilora as ol; from omnilora.proofs import Stack; from safetensors.torch import load_file\n"
            f"m = Stack(8, 10).eval(); m.load_state_dict(torch.load({str(tmp_path / 'base.pt')!r}))\n"
            f"ol.load(m, {str(tmp_path / key)!r})\n"
            f"assert torch.equal(m(torch.ones(2, 8)), load_file({str(tmp_path / 'y.safetensors')!r})['y'])"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_xlora_is_saved_whole(tmp_path):
    from omnilora.methods.frontiers.xlora import _world

    torch.manual_seed(0)
    model, experts, x, _ = _world()
    paths = [ol.save_state(s, tmp_path / f"e{i}") for i, s in enumerate(experts)]
    for given in (experts, [str(p) for p in paths]):
        ol.adapt(model, ol.methods.xlora(adapters=given), name="mix")
        shake(model, "mix", 0.1)
        y = model(x)
        ol.save(model, tmp_path / "mix", adapter="mix")
        ol.detach(model)
        [p.rename(p.with_name(p.name + "-gone")) for p in paths if given is not experts]
        ol.load(model, tmp_path / "mix", "again")
        assert torch.equal(model(x), y)
        ol.detach(model)


def test_saving_while_merged_is_refused(saved, tmp_path):
    torch.manual_seed(0)
    model = Stack(8, 10)
    ol.adapt(model, ol.method("lora", r=2))
    ol.merge(model)
    with pytest.raises(errors.AttachError, match="unmerge"):
        ol.save(model, tmp_path / "m")
