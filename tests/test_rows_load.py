"""Loading a proven file again: the same as the full way, and only where nothing has changed."""

import os
import pickle
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny import pair, saved
from torch import nn

import omnilora as ol
from omnilora.core import files, proven
from omnilora.errors import OmniloraError


def settle():
    """Files written just now are not remembered: their clock may not tell a second write."""
    time.sleep(proven.RACY / 1e9 + 0.05)


@pytest.fixture
def quick(monkeypatch):
    """The answers of every attempt at the short way."""
    seen = []
    again = proven.again
    monkeypatch.setattr(proven, "again", lambda *a: (seen.append(again(*a)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("key", ["lora", "lora_fa", "rslora", "dora", "adalora", "vera", "loha"])
def test_the_short_way_gives_what_the_full_way_gives(tmp_path, quick, key):
    path = saved(tmp_path / "a", key)
    settle()
    model, x = pair(), torch.randn(5, 12)
    first = ol.load(model, path, "one")
    with torch.no_grad():
        y = model(x)
    second = ol.load(model, path, "two")
    assert first == second and ol.adapters(model) == ["one", "two"] and ol.active(model) == {"two": 1.0}
    with torch.no_grad():
        assert torch.equal(model(x), y)
    a, b = ol.state(model, "one"), ol.state(model, "two")
    assert a.content() == b.content() and a.method == b.method and a.hyper == b.hyper
    for one, two in zip(ol.slots(model, "one"), ol.slots(model, "two")):
        assert type(one) is type(two) and vars(one).keys() == vars(two).keys() and one.site.name == two.site.name
        for (n, p), (m, q) in zip(one.tensors(), two.tensors()):
            assert n == m and torch.equal(p, q) and p.requires_grad == q.requires_grad and q.is_leaf and q.is_contiguous()
            assert p.data_ptr() != q.data_ptr()
    ol.save(model, tmp_path / "back", "two")
    for name in os.listdir(path):
        assert (tmp_path / "back" / name).read_bytes() == (path / name).read_bytes()
    assert key not in ("lora", "lora_fa", "rslora") or quick[-1] is not None


@pytest.mark.parametrize("key", ["lora", "adalora"])  # tensors that stay where they were read, and others
@pytest.mark.parametrize("trouble", ["slow disk", "no thread", "cut off", "gone", "written", "cut off meanwhile", "written meanwhile"])
def test_a_file_is_read_beside(tmp_path, quick, monkeypatch, key, trouble):
    """Whatever the second thread meets: the numbers of the file, or the full way and its error, with nothing touched."""
    path = saved(tmp_path / "a", key)
    settle()
    model, x = pair(), torch.randn(5, 12)
    ol.load(model, path, "one")
    with torch.no_grad():
        y = model(x)
    file = next(path.glob("*.safetensors"))
    read, stat, stamps, seen, looked = proven._Reading._read, os.fstat, proven.stamps, [], threading.Event()
    what, meanwhile, _ = trouble.partition(" meanwhile")

    def happen():
        if what == "slow disk":
            time.sleep(0.05)
        elif what == "cut off":
            file.write_bytes(file.read_bytes()[:-8])
        elif what == "gone":
            file.unlink()
        elif what == "written":
            file.write_bytes(file.read_bytes())

    def troubled(self):
        if not meanwhile:
            happen()
        read(self)

    def fstat(descriptor):
        found = stat(descriptor)
        if meanwhile and not seen and threading.current_thread().name == "omnilora-read":
            seen.append(1)
            assert looked.wait(5)
            happen()
        return found

    def refused(self):
        raise RuntimeError("can't start new thread")

    if trouble == "no thread":
        monkeypatch.setattr(proven.threading.Thread, "start", refused)
    monkeypatch.setattr(proven._Reading, "_read", troubled)
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(proven, "stamps", lambda folder: (stamps(folder), looked.set())[0])
    if what in ("cut off", "gone"):
        with pytest.raises(OmniloraError):
            ol.load(model, path, "two")
        assert ol.adapters(model) == ["one"] and ol.active(model) == {"one": 1.0}
    else:
        ol.load(model, path, "two")
        assert (quick[-1] is None) == (what == "written")
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_adapters_that_were_loaded_so_are_like_others(tmp_path, quick):
    """They train apart, have memory of their own, pickle, save as state dicts, and come off without a trace."""
    path = saved(tmp_path / "a", r=4)
    settle()
    model, x = pair(), torch.randn(5, 12)
    ol.load(model, path, "one")
    ol.load(model, path, "two")
    ol.load(model, path, "three")
    assert quick[-2:] != [None, None]
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    model.train()
    model(x).square().sum().backward()
    assert all(t.grad is not None for s in ol.slots(model, "three") for _, t in s.tensors())
    assert all(t.grad is None for s in ol.slots(model, "two") for _, t in s.tensors())
    with torch.no_grad():
        for s in ol.slots(model, "three"):
            s.B.zero_()
    assert all(bool(s.B.any()) for s in ol.slots(model, "two"))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    for name in ("one", "two"):
        ol.detach(model, name)
    ol.load(model, path, "one")
    assert quick[-1] is not None
    ol.detach(model)
    assert torch.equal(model(x), pair()(x)) and type(model[0]) is nn.Linear


def test_anything_that_changed_takes_the_full_way(tmp_path, quick):
    path = saved(tmp_path / "a", r=4)
    other = saved(tmp_path / "b", r=4, seed=1)
    settle()
    model, x = pair(), torch.randn(5, 12)
    ol.load(model, path, "0")
    ol.load(model, path, "1")
    assert quick[-1] is not None
    tensors = path / "adapter_model.safetensors"
    good = tensors.read_bytes()

    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ol.errors.OmniloraError, match="content hash"):
        ol.load(model, path, "2")
    stat = tensors.stat()
    tensors.write_bytes(good)
    settle()
    ol.load(model, path, "2")
    ol.load(model, path, "3")
    assert quick[-1] is not None
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(tensors, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the times of modification lie
    with pytest.raises(ol.errors.OmniloraError, match="content hash"):
        ol.load(model, path, "4")

    shutil.rmtree(path)
    shutil.copytree(other, path)
    ol.load(model, path, "4")
    with torch.no_grad():
        y = model(x)
    ol.load(model, other, "5")
    with torch.no_grad():
        assert torch.equal(model(x), y)
    settle()
    ol.load(model, other, "6")
    ol.load(model, other, "7")
    assert quick[-1] is not None
    with torch.no_grad():
        model[0].weight.mul_(-1.0)
    with pytest.raises(ol.errors.BaseMismatch):
        ol.load(model, other, "8")
    assert "8" not in ol.adapters(model) and quick[-1] is None


def test_a_manifest_that_changed_takes_the_full_way(tmp_path, quick):
    path = saved(tmp_path / "a", r=4)
    settle()
    model = pair()
    ol.load(model, path, "0")
    ol.load(model, path, "1")
    assert quick[-1] is not None
    manifest = path / files.MANIFEST
    manifest.write_text(manifest.read_text().replace('"scale": 4.0', '"scale": 5.0'))
    with pytest.raises(ol.errors.OmniloraError, match="content hash"):
        ol.load(model, path, "2")


def test_a_replaced_layer_takes_the_full_way(tmp_path, quick):
    path = saved(tmp_path / "a", r=4)
    settle()
    model = pair()
    ol.load(model, path, "0")
    ol.load(model, path, "1")
    assert quick[-1] is not None
    model[2] = nn.Linear(20, 8, bias=False)
    with pytest.raises(ol.errors.BaseMismatch):
        ol.load(model, path, "2")
    assert quick[-1] is None


def test_errors_are_those_of_the_full_way(tmp_path):
    path = saved(tmp_path / "a", r=4)
    settle()
    model = pair()
    ol.load(model, path, "0")
    with pytest.raises(ol.errors.AttachError, match="already"):
        ol.load(model, path, "0")
    shutil.rmtree(path)
    with pytest.raises(ol.errors.OmniloraError):
        ol.load(model, path, "1")
    assert ol.adapters(model) == ["0"]


def test_a_base_that_was_unfrozen_is_frozen_again(tmp_path):
    path = saved(tmp_path / "a", r=4)
    settle()
    model = pair()
    ol.load(model, path, "0")
    model.requires_grad_(True)
    ol.load(model, path, "1")
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad


def test_the_time_does_not_grow_with_the_number_of_adapters(tmp_path, quick):
    """Counted in calls, which a busy machine does not change."""
    import cProfile
    import pstats

    path = saved(tmp_path / "a", r=4)
    settle()
    model = pair()
    ol.load(model, path, "first")

    def calls(name):
        profile = cProfile.Profile()
        profile.runcall(ol.load, model, path, name)
        return pstats.Stats(profile).total_calls

    calls("warm")
    early = calls("early")
    for i in range(60):
        ol.load(model, path, f"n{i}")
    late = min(calls(f"late{i}") for i in range(3))  # a collection may fall into one of them
    assert late <= early * 1.05 + 20
    assert all(r is not None for r in quick[1:])
