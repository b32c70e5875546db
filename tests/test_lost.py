"""Nothing is lost: processes that die while they write, disks that fail, folders that change under a reader."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import omnilora as ol
from omnilora import errors
from omnilora.contract import shake
from omnilora.core import files
from omnilora.proofs import Stack

WRITER = """
import sys, torch, omnilora as ol
from omnilora.proofs import Stack
torch.manual_seed(0)
model = Stack(8, 10, 6).eval()
ol.adapt(model, ol.method("lora", r=2))
first, step = int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
i = first
while True:
    with torch.no_grad():
        for s in ol.slots(model):
            for _, t in s.tensors():
                t.fill_(float(i))
    ol.save(model, sys.argv[1])
    i += step
"""


def values(path):
    """The numbers that the tensors of a saved adapter hold: one if it is of one save."""
    return {float(v) for s in ol.load_file(path).sites.values() for t in s.tensors.values() for v in t.unique()}


def writer(path, first=1, step=1):
    made = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first), str(step)], stdout=subprocess.PIPE, text=True)
    assert made.stdout.readline().strip() == "ready"
    return made


def wait_for(path):
    end = time.monotonic() + 30
    while not (path / files.MANIFEST).exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


# -- saving ------------------------------------------------------------------------------------------------------------


def killed_savers(path, times, seed=0):
    """Kill a process that saves all the time at random moments; what lies there is always one whole save."""
    draw, last = random.Random(seed), 0.0
    for _ in range(times):
        process = writer(path, first=int(last) + 1)
        wait_for(path)
        time.sleep(draw.random() * 0.05)
        kill(process)
        found = values(path)
        assert len(found) == 1, found
        (now,) = found
        assert now >= last
        last = now
    return last


def test_killed_while_saving(tmp_path):
    assert killed_savers(tmp_path / "a", 2) >= 1


@pytest.mark.slow
def test_killed_while_saving_two_hundred_times(tmp_path):
    """One parent that forks savers, so that 200 deaths take a minute."""
    path, draw, last = tmp_path / "a", random.Random(1), 0.0
    torch.manual_seed(0)
    model = Stack(8, 10, 6).eval()
    ol.adapt(model, ol.method("lora", r=2))
    torch.set_num_threads(1)
    ol.save(model, path)
    for _ in range(200):
        child = os.fork()
        if child == 0:
            i = int(last)
            while True:
                i += 1
                with torch.no_grad():
                    for s in ol.slots(model):
                        for _, t in s.tensors():
                            t.fill_(float(i))
                ol.save(model, path)
        time.sleep(0.005 + draw.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = values(path)
        if last or len(found) == 1:
            assert len(found) == 1, found
            assert next(iter(found)) >= last
            last = next(iter(found))
    assert last > 20


def test_two_write_and_one_reads(tmp_path):
    """Odd saves by one process, even ones by another: a reader sees whole ones of both, and never a mixture."""
    path = tmp_path / "a"
    two = [writer(path, 1, 2), writer(path, 2, 2)]
    try:
        wait_for(path)
        seen, end = set(), time.monotonic() + 4
        while time.monotonic() < end:
            found = values(path)
            assert len(found) == 1, found
            seen |= found
    finally:
        for process in two:
            kill(process)
    assert {v % 2 for v in seen} == {0.0, 1.0} and len(seen) > 5


# -- disks that fail -----------------------------------------------------------------------------------------------------


class Fails:
    """Raises ``error`` at the n-th system call that writes: open for writing, write, fsync, mkdir, rename."""

    def __init__(self, monkeypatch, at, error):
        self.at, self.error, self.count = at, error, 0
        for name in ("fsync", "rename", "mkdir", "link"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        original = open

        def opened(file, mode="r", *args, **kwargs):
            if "w" in mode:
                self.tick()
                made = original(file, mode, *args, **kwargs)
                made_write = made.write
                return _File(made, made_write, self)
            return original(file, mode, *args, **kwargs)

        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(files, "_exchange", self.wrapped(files._exchange))

    def tick(self):
        self.count += 1
        if self.count == self.at:
            raise self.error

    def wrapped(self, function):
        def run(*args, **kwargs):
            self.tick()
            return function(*args, **kwargs)

        return run


class _File:
    def __init__(self, made, write, fails):
        self.made, self._write, self.fails = made, write, fails

    def write(self, data):
        self.fails.tick()
        self._write(data[: len(data) // 2])
        self.fails.tick()
        self._write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.made, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.made.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_every_write_may_fail(tmp_path, code):
    """Whichever call fails, the old adapter loads and nothing else is left."""
    torch.manual_seed(0)
    model = Stack(8, 10, 6).eval()
    ol.adapt(model, ol.method("lora", r=2))
    shake(model)
    ol.save(model, tmp_path / "a")
    old = ol.load_file(tmp_path / "a").content()
    with torch.no_grad():
        for s in ol.slots(model):
            s.A.add_(1.0)
    new, failed, at = ol.state(model).content(), 0, 0
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            fails = Fails(patch, at, OSError(code, os.strerror(code)))
            try:
                ol.save(model, tmp_path / "a")
            except OSError:
                failed += 1
        found = ol.load_file(tmp_path / "a").content()
        assert found in (old, new)
        assert not [p for p in tmp_path.iterdir() if p.name != "a"], list(tmp_path.iterdir())
        if fails.count < at:
            break
    assert found == new and failed >= 8


def test_a_read_only_folder(tmp_path):
    model = Stack(8, 10, 6).eval()
    ol.adapt(model, ol.method("lora", r=2))
    if os.geteuid() == 0:
        target = Path("/proc/omnilora-adapter")  # root may write everywhere else
    else:
        (tmp_path / "sealed").mkdir(mode=0o500)
        target = tmp_path / "sealed" / "a"
    with pytest.raises((OSError, errors.OmniloraError)):
        ol.save(model, target)
    assert not target.exists()


# -- training ------------------------------------------------------------------------------------------------------------

TRAINER = """
import sys, torch
import omnilora as ol
from torch import nn
from omnilora.proofs import Stack
torch.set_num_threads(1)
torch.manual_seed(0)
model = Stack(8, 16, 6)
data = [(torch.randn(8), torch.randn(6)) for _ in range(40)]
ol.adapt(model, ol.method(sys.argv[2], **eval(sys.argv[3])))
def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
print("ready", flush=True)
report = ol.fit(model, data, loss=loss, steps=60, batch_size=4, lr=1e-2, output=sys.argv[1], save_every=2, resume="auto",
                seed=3, log_every=1000)
ol.save(model, sys.argv[1] + "/final")
print("done", flush=True)
"""


def trained(path, key, hyper, patience=None):
    """Run the training process; kill it after ``patience`` seconds. Whether it came to its end."""
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(path), key, repr(hyper)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert process.stdout.readline().strip() == "ready"
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        kill(process)
        return False
    assert process.returncode == 0
    process.stdout.close()
    return True


def killed_training(tmp_path, key, hyper, deaths, seed):
    """A run that dies ``deaths`` times at random moments ends as one that never does."""
    whole, torn, draw = tmp_path / "whole", tmp_path / "torn", random.Random(seed)
    assert trained(whole, key, hyper)
    died = 0
    while died < deaths:
        if trained(torn, key, hyper, draw.random() * 0.6):
            break
        died += 1
    while not trained(torn, key, hyper, 60):
        pass
    assert ol.load_file(torn / "final").content() == ol.load_file(whole / "final").content()
    return died


def test_killed_training_ends_as_the_uninterrupted_run(tmp_path):
    assert killed_training(tmp_path, "adalora", {"r": 4, "target": 2}, 1, 0) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("key, hyper", [("adalora", {"r": 4, "target": 2}), ("relora", {"r": 2}), ("galore", {}),
                                        ("lora", {"r": 2, "dropout": 0.1})])  # fmt: skip
def test_killed_training_many_times(tmp_path, key, hyper):
    total, seed = 0, 0
    while total < 25:
        total += killed_training(tmp_path / str(seed), key, hyper, 10, seed)
        seed += 1
