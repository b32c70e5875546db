"""Inductor for four forms, and everything without a C++ compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import omnilora as ol
from omnilora.contract import shake
from omnilora.proofs import Stack


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(("key", "hyper"), [("lora", {"r": 3}), ("dora", {"r": 3, "dropout": 0.0}), ("vera", {"r": 4}), ("molora", {"experts": 2, "r": 2})])
def test_inductor(key, hyper):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Stack(8, 12, 6, act=torch.tanh, bias=True), torch.randn(5, 8)
    ol.adapt(model, ol.method(key, **hyper), name="a")
    ol.adapt(model, ol.method(key, **hyper), name="b")
    shake(model, "a")
    shake(model, "b", 0.2)
    compiled = torch.compile(model, fullgraph=True)
    ol.activate(model, "a")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for active in ("a", "b", {"a": 0.5, "b": 2.0}, None):
            ol.activate(model, active)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)
    ol.activate(model, "a")
    compiled(x).square().sum().backward()
    got = [t.grad.clone() for t in ol.trainable(model, "a")]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, t in zip(got, ol.trainable(model, "a"), strict=True):
        torch.testing.assert_close(a, t.grad, rtol=1e-4, atol=1e-4)


def test_one_graph_for_a_hundred_switches_of_rows():
    """Rows are data too: who uses which adapter changes, nothing is compiled again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Stack(8, 12, 6), torch.randn(6, 8)
    for i in range(3):
        ol.adapt(model, ol.method("lora", r=2 + i), name=str(i))
        shake(model, str(i), 0.1 * (i + 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    g = torch.Generator().manual_seed(0)
    with ol.context(model, rows=["0", "1", "2", None, "0", {"1": 0.5, "2": 2.0}]):
        compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(100):
            rows = [None if i == 3 else str(i) for i in torch.randint(0, 4, (6,), generator=g).tolist()]
            with ol.context(model, rows=rows):
                torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)


def test_without_a_compiler(tmp_path):
    """Adapt, train, mix rows, merge and save where no compiler can be found."""
    code = f"""
import shutil, torch, omnilora as ol
from omnilora.proofs import Stack, train, full_batch
assert shutil.which("g++") is None and shutil.which("cc") is None
model, x = Stack(8, 8), torch.randn(4, 8)
train(model, ol.method("dora", r=2), full_batch(x, x), 3)
with ol.context(model, rows=["default", None, "default", None]): model(x)
ol.merge(model); ol.unmerge(model); ol.save(model, {str(tmp_path / "a")!r})
"""
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "/nowhere/c++", "CC": "/nowhere/cc"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=env)
