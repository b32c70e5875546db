"""The first load of a file: read once, proven in full, nothing copied; and what may not grow with the number of adapters."""

import copy
import cProfile
import json
import pstats
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pair, saved
from torch import nn

import omnilora as ol
from omnilora.core import files, row, state
from omnilora.core import fingerprint as prints
from omnilora.core.method import Method
from omnilora.parameterizations.lora import LoRA


def tensors(model, name="default"):
    return [t for s in ol.slots(model, name) for _, t in s.tensors()]


def calls(run, *args):
    profile = cProfile.Profile()
    profile.runcall(run, *args)
    return pstats.Stats(profile).total_calls


# -- the file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lora", "dora", "loha", "vera"])
def test_the_adapter_has_the_memory_that_the_file_was_read_into(tmp_path, monkeypatch, key):
    path = saved(tmp_path / "a", key)
    rows, read = [], row.read
    monkeypatch.setattr(row, "read", lambda *a: (rows.append(read(*a)), rows[-1])[1])
    model = pair()
    ol.load(model, path)
    (found,) = rows
    moved = [t for t in tensors(model) if found[1].offset(t) is None]
    assert not moved or key not in ("lora", "dora", "loha")
    assert len({t.data_ptr() for t in tensors(model)}) == len(tensors(model)) or key == "vera"
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 and t.is_leaf for t in tensors(model))
    assert ol.state(model).content() == ol.load_file(path).content()


def test_the_tensors_are_read_once(tmp_path):
    first, path = saved(tmp_path / "a", r=4), saved(tmp_path / "b", r=4, seed=1)
    model, seen, watching = pair(), [], [True]
    ol.load(model, first, "0")

    def hook(event, args):
        if watching[0] and event == "open" and "safetensors" in str(args[0]):
            seen.append(args[0])

    sys.addaudithook(hook)
    ol.load(model, path, "1")
    watching[0] = False
    assert len(seen) == 2  # the header, then the whole


def test_a_state_that_is_a_value_is_copied(tmp_path):
    found = ol.load_file(saved(tmp_path / "a", r=4))
    model = pair()
    state.load_state(model, found, "one")
    state.load_state(model, found, "two")
    own = {t.data_ptr() for t in found.flat().values()}
    one, two = ({t.data_ptr() for t in tensors(model, n)} for n in ("one", "two"))
    assert not own & one and not own & two and not one & two


def test_tensors_that_are_not_whole_are_copied():
    t = torch.randn(4, 6)
    taken = set()
    assert state._mine(t, taken) and not state._mine(t, taken)
    for other in (torch.randn(6, 4).mT, torch.randn(4, 6)[:2], nn.Parameter(torch.randn(2)), torch.empty(0)):
        assert not state._mine(other, taken)
    assert not state._mine(torch.randn(2), None)


def write(file, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


A, B = ({"dtype": "F32", "shape": [2], "data_offsets": [b, b + 8]} for b in (0, 8))
DATA = torch.arange(4.0).numpy().tobytes()


def test_files_that_are_not_as_writers_make_them_are_judged_as_before(tmp_path):
    file = tmp_path / "f.safetensors"
    write(file, {"b": B, "a": A, "__metadata__": {"x": "y"}}, DATA)
    got, held = files._tensors(file, files.QUOTA, True)
    assert held is not None and all(torch.equal(got[n], t) for n, t in load_file(file).items())
    hole = {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}
    odd = [({"a": A, "b": A}, DATA[:8]), ({"a": A, "b": hole}, DATA), ({"a": A}, DATA), ({"b": B}, DATA),
           ({"a": A, "b": B, "__metadata__": {"x": 1}}, DATA), ({"a": A, "b": B, "__metadata__": []}, DATA)]  # fmt: skip
    for header, data in odd:
        write(file, header, data)
        with pytest.raises(ol.errors.FileRefused):
            files._tensors(file, files.QUOTA, True)
    write(file, {"a": A, "e": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}, DATA[:8])
    got, held = files._tensors(file, files.QUOTA, True)
    assert held is None and got["e"].shape == (0,)
    half = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}
    write(file, {"h": half, "a": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]}}, DATA[:10])
    got, held = files._tensors(file, files.QUOTA, True)
    assert held is None and torch.equal(got["a"], load_file(file)["a"])


def test_a_file_that_changed_after_its_header_was_checked_is_not_taken(tmp_path):
    file = tmp_path / "f.safetensors"
    write(file, {"a": A, "b": B}, DATA)
    header, head = files._header(file, files.QUOTA)
    write(file, {"a": B, "b": A}, DATA)
    assert row.read(file, header, head) is None
    write(file, {"a": A, "b": B}, DATA + DATA)
    assert row.read(file, header, head) is None


def test_numbers_are_all_looked_at():
    assert state._finite(torch.full((64,), 3e38)) and state._finite(torch.tensor([1, 2])) and state._finite(torch.tensor([True]))
    assert state._finite(torch.full((64,), 6e4, dtype=torch.float16))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            t = torch.ones(1000, dtype=dtype)
            t[977] = bad
            assert not state._finite(t)
    assert not state._finite(torch.tensor([float("inf"), -float("inf")]))


def test_shapes_are_those_of_the_form_and_kept_only_where_it_says_so(tmp_path):
    class Odd(LoRA):  # a subclass has not said that sizes decide
        pass

    model = ol.adapt(pair(), Method("m", LoRA(4)))
    for slot in ol.slots(model):
        s = ol.state(model).sites[slot.site.name]
        for _ in range(2):
            assert state._expected(slot.site, s) == {n: tuple(t.shape) for n, t in slot.tensors()}
    before = len(state._sizes)
    odd = copy.copy(s)
    object.__setattr__(odd, "how", Odd(4))
    state._expected(slot.site, odd)
    assert len(state._sizes) == before
    path = saved(tmp_path / "a", r=4)
    stored = load_file(path / "adapter_model.safetensors")
    name = sorted(stored)[0]
    save_file({**stored, name: stored[name][:, :-1].contiguous()}, path / "adapter_model.safetensors")
    with pytest.raises(ol.errors.OmniloraError):
        ol.load(pair(), path)


# -- memory ----------------------------------------------------------------------------------------------------------------------


def test_memory_is_lent_again_only_when_nothing_refers_to_it():
    row._spare.clear()
    size = 1 << 16
    memory = row.lease(size)
    at = memory.ctypes.data
    t = torch.frombuffer(memory, dtype=torch.float32, count=8, offset=64)
    part, array = nn.Parameter(t)[2:4], t.numpy()
    del memory
    assert row.lease(size).ctypes.data != at
    row._spare.clear()
    del t
    assert row.lease(size).ctypes.data != at
    row._spare.clear()
    del part
    assert not row._spare
    del array
    assert [m.ctypes.data for m in row._spare] == [at]
    assert row.lease(size * 2).ctypes.data != at and row.lease(size // 2).ctypes.data != at
    assert row.lease(size - 100).ctypes.data == at
    row._spare.clear()
    big = [row.lease(row.SPARE // 2 + 1) for _ in range(3)]
    del big
    assert len(row._spare) == 1
    row._spare.clear()


def test_an_adapter_that_was_taken_off_keeps_its_numbers_for_whoever_holds_them(tmp_path):
    a, b = saved(tmp_path / "a", r=4), saved(tmp_path / "b", r=4, seed=1)
    model = pair()
    ol.load(model, a, "a")
    held = tensors(model, "a")[0]
    want = held.detach().clone()
    ol.detach(model, "a")
    for i in range(4):
        ol.load(model, b, f"b{i}")
    assert torch.equal(held, want)


# -- the base ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    seen, digest = [], prints.digest
    monkeypatch.setattr(prints, "digest", lambda t: (seen.append(t.data_ptr()), digest(t))[1])
    return seen


def test_a_weight_is_hashed_once(tmp_path, hashed):
    paths = [saved(tmp_path / str(i), r=4, seed=i) for i in range(3)]
    hashed.clear()
    model = pair()
    for i, path in enumerate(paths):
        ol.load(model, path, str(i))
    assert sorted(hashed) == sorted(layer.weight.data_ptr() for layer in (model[0], model[2]))
    hashed.clear()
    with torch.no_grad():
        model[2].weight.mul_(-1.0)
    with pytest.raises(ol.errors.BaseMismatch):
        ol.load(model, paths[0], "3")
    assert hashed == [model[2].weight.data_ptr()]


def test_many_fingerprints_at_once_are_those_of_one_by_one():
    model = ol.adapt(pair(), ol.method("lora", r=2))
    sites = {s.site.name: s.site for s in ol.slots(model)}
    prints._kept.clear()
    together = prints.fingerprints(sites)
    prints._kept.clear()
    assert together == {n: prints.fingerprint(s) for n, s in sites.items()}
    assert list(together) == list(sites) and prints.fingerprints({}) == {}


def test_an_error_of_the_second_thread_is_raised(monkeypatch):
    model = ol.adapt(pair(), ol.method("lora", r=2))
    sites = {s.site.name: s.site for s in ol.slots(model)}
    prints._kept.clear()
    monkeypatch.setattr(prints, "digest", lambda t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prints.fingerprints(sites)
    assert not len(prints._kept)


@pytest.mark.parametrize("shape", [(5,), (37, 41), (256, 128), (300, 333), (1024, 1100)])
def test_the_sketch_is_its_definition(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    total, signs = torch.zeros(prints.WIDTH, dtype=torch.float64), prints._signs()
    for at, part in enumerate(w.flatten().split(prints.BLOCK)):
        signed = part * signs[: part.numel()].roll(at)
        total += nn.functional.pad(signed, (0, -part.numel() % prints.WIDTH)).view(-1, prints.WIDTH).sum(0).double()
    assert prints._sketch(w) == (tuple(total.float().tolist()), float(w.norm()))


# -- many adapters -----------------------------------------------------------------------------------------------------------------


def test_the_forward_after_a_switch_does_not_grow_with_the_number_of_adapters():
    model, x = pair(), torch.randn(2, 12)

    def switch(name):
        ol.activate(model, name)
        with torch.no_grad():
            model(x)

    for i in range(4):
        ol.adapt(model, ol.method("lora", r=2), name=f"n{i}")
    switch("n0")
    switch("n1")
    early = calls(switch, "n2")
    for i in range(4, 68):
        ol.adapt(model, ol.method("lora", r=2), name=f"n{i}")
    switch("n4")
    assert calls(switch, "n2") <= early * 1.05 + 10


def test_adapters_that_a_context_brings_in_are_checked_too():
    model, x = pair(), torch.randn(2, 12)
    ol.adapt(model, ol.method("lora", r=2), targets="0", name="a")
    ol.adapt(model, ol.method("lora", r=2), targets="2", name="b")
    ol.activate(model, "a")
    with torch.no_grad():
        model(x)
        model[2].weight = nn.Parameter(torch.randn(9, 20), requires_grad=False)
        model(x)
        with pytest.raises(ol.errors.AttachError, match="resized"), ol.context(model, adapters="b"):
            model(x)
        with pytest.raises(ol.errors.AttachError, match="resized"), ol.context(model, rows=["a", "b"]):
            model(x)


def test_a_layer_that_is_gone_is_found_whoever_is_active():
    model, x = pair(), torch.randn(2, 12)
    ol.adapt(model, ol.method("lora", r=2), targets="0", name="a")
    ol.adapt(model, ol.method("lora", r=2), targets="2", name="b")
    model[2] = nn.Linear(20, 8)
    ol.activate(model, "a")
    with pytest.raises(ol.errors.AttachError, match="replaced"):
        model(x)


def test_sites_are_counted_as_adapters_come_and_go():
    model = pair()
    for name in ("a", "b"):
        ol.adapt(model, ol.method("lora", r=2), name=name)
    held = model[0].adapters
    roster = model._omnilora.roster
    assert set(held.places) == {"0"} and held.counts == {"0": 2}
    ol.detach(model, "a")
    assert held.counts == {"0": 1} and model._omnilora.roster == roster + 1
    ol.adapt(model, ol.method("lora", r=2), name="a")
    assert held.counts == {"0": 2} and model._omnilora.roster == roster + 2
    del held.__dict__["counts"]
    assert copy.deepcopy(held).counts == {"0": 2}
    held.counts = {"0": 2}
    ol.detach(model)
    assert held.counts == {}
