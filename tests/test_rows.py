"""Batches of many adapters: every plan against the trees, and never a stale number."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora.core import mixed
from omnilora.plans import native, ragged, rows, rules
from omnilora.plans.executor import off

RANKS = {"a": 4, "b": 8, "c": 13, "d": 32}
SPREAD = ["a", None, "c", "b", "a", {"b": 0.5, "d": -2.0}, "d", None, ["c", "a"]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_native = pytest.mark.skipif(native.library(native.RAGGED) is None, reason=native.reason(native.RAGGED))


def filled(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for slot in ol.slots(model):
            for _, t in slot.tensors():
                t.copy_(torch.randn(t.shape, generator=g, dtype=torch.float64) * 0.3)
    return model.eval()


def net(dtype=torch.float32, methods=None, width=40, out=51):
    """Two layers, the first one without adapter "d"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, out, bias=False)).to(dtype)
    for name, r in RANKS.items():
        how = ol.method("lora", r=r, alpha=7.0, dropout=0.1) if methods is None else methods(r)
        ol.adapt(model, how, targets=["0", "2"] if name != "d" else ["2"], name=name)
    return filled(model)


def both(model, x, spread=SPREAD, **how):
    with torch.no_grad(), ol.context(model, rows=spread, **how):
        y = model(x)
        with off():
            tree = model(x)
    return y, tree


def close(y, tree):
    assert y.dtype == tree.dtype and y.shape == tree.shape
    assert float((y.double() - tree.double()).abs().max()) <= TOLERANCE[y.dtype] * float(tree.double().abs().max())


def ways(monkeypatch, way):
    if way != "native":
        monkeypatch.setattr(rows, "function", lambda dtype: None)
        monkeypatch.setattr(rows, "few", lambda dtype: 0)
        monkeypatch.setattr(rules, "stacks", lambda *shape: way == "stacked")


def counted(monkeypatch):
    seen = []
    add = rows.Plan.add
    monkeypatch.setattr(rows.Plan, "add", lambda self, *a: (seen.append(self), add(self, *a))[1])
    return seen


@pytest.mark.parametrize("way", [pytest.param("native", marks=needs_native), "grouped", "stacked"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("length", [None, 1, 7])
def test_every_way_is_the_trees(monkeypatch, way, dtype, length):
    ways(monkeypatch, way)
    model, seen = net(dtype), counted(monkeypatch)
    x = torch.randn(9, *([] if length is None else [length]), 40).to(dtype)
    y, tree = both(model, x)
    assert len(seen) == 2
    close(y, tree)
    again, _ = both(model, x)
    assert torch.equal(y, again)


@pytest.mark.parametrize("way", [pytest.param("native", marks=needs_native), "grouped", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_are_the_bare_models(monkeypatch, way, dtype):
    """Bitwise, whatever their neighbours, also where an adapter would have given NaN."""
    ways(monkeypatch, way)
    model = net(dtype)
    bare = ol.detach(copy.deepcopy(model))
    x = torch.randn(9, 3, 40).to(dtype)
    y, _ = both(model, x)
    with torch.no_grad():
        assert torch.equal(y[[1, 7]], bare(x)[[1, 7]]) and not torch.equal(y[[0]], bare(x)[[0]])
    with torch.no_grad(), ol.context(model, rows=[None] * 9):
        assert torch.equal(model(x), bare(x))
    with torch.no_grad():
        for slot in ol.slots(model, "a"):
            slot.A.fill_(float("nan"))
    y, _ = both(model, x)
    with torch.no_grad():
        assert torch.equal(y[[1, 7]], bare(x)[[1, 7]])
    assert y[0].isnan().all() and not y[2].isnan().any()


@pytest.mark.parametrize("way", [pytest.param("native", marks=needs_native), "grouped", "stacked"])
def test_packed_segments_repeats_and_one_adapter(monkeypatch, way):
    ways(monkeypatch, way)
    model, seen = net(), counted(monkeypatch)
    segments = torch.tensor([[0, 0, 1, 2, 2], [3, 1, 1, 0, 4]])
    for x in (torch.randn(2, 5, 40), torch.randn(10, 40)):
        close(*both(model, x, ["a", "c", None, {"b": 2.0, "d": 1.0}, "a"], segments=segments))
    close(*both(model, torch.randn(6, 2, 40), ["b", "a"], repeat=3))
    close(*both(model, torch.randn(4, 2, 40), ["a"] * 4))
    assert len(seen) == 8
    wrong = torch.randn(5, 40)
    with torch.no_grad(), ol.context(model, rows=["a", "b"]), pytest.raises(ol.errors.ContextError, match="leading"):
        model(wrong)


@pytest.mark.parametrize("key", ["lora", "rslora", "vera", "adalora", "tied-lora", "lora-fa", "dora", "loha", "tt-lora"])
def test_methods_are_their_trees(key):
    """Whatever lowers runs planned, whatever does not by its tree: the numbers are the same."""
    if key not in {c.key for c in ol.cards()}:
        pytest.skip("no such entry")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    for name in ("a", "b"):
        ol.adapt(model, ol.method(key), targets=["0", "2"], name=name)
    model = filled(model)
    y, tree = both(model, torch.randn(6, 3, 24), ["a", None, "b", "b", {"a": 0.3, "b": 1.0}, "a"])
    close(y, tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_never_stale_after_an_optimizer_step(dtype, fused, between):
    """Also where a forward without gradients stands between loss and step, and the step leaves no version."""
    model = net(dtype)
    x = torch.randn(9, 40).to(dtype)
    spread = ["a", "b", "c", "d", "a", "b", "c", "d", None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(2):
        before, tree = both(model, x, spread)
        close(before, tree)
        with ol.context(model, rows=spread):
            model(x).float().square().sum().backward()
        if between:
            both(model, x, spread)
        optimizer.step()
        optimizer.zero_grad()
        y, tree = both(model, x, spread)
        close(y, tree)
        assert not torch.allclose(before[:8], y[:8], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_stale_after_writes(dtype):
    model = net(dtype)
    x = torch.randn(4, 40).to(dtype)
    spread = ["a", "b", None, "a"]
    both(model, x, spread)
    slot = ol.slots(model, "a")[0]

    def scale():
        slot.scale *= 2.0

    def version():
        slot.B.mul_(-1.5)

    def data():
        slot.A.data = slot.A.data + 1.0

    def data_in_place():
        slot.A.data.mul_(0.5)
        rows.forget(model)

    with torch.no_grad(), ol.context(model, rows=spread):
        for change in (scale, version, data, data_in_place):
            old = model(x)
            change()
            new = model(x)
            with off():
                close(new, model(x))
            assert not torch.equal(old[0], new[0]) and torch.equal(old[1:3], new[1:3]), change.__name__


def test_load_detach_and_activate_inside_a_batch(tmp_path):
    model = net()
    x = torch.randn(4, 40)
    ol.save(model, tmp_path / "b", adapter="b")
    with torch.no_grad(), ol.context(model, rows=["a", "b", None, "b"]):
        first = model(x)
        ol.detach(model, "b")
        gone = model(x)
        assert torch.equal(gone[0], first[0]) and torch.equal(gone[2], first[2]) and not torch.equal(gone[1], first[1])
        ol.load(model, tmp_path / "b", "b")
        ol.activate(model, "a")
        assert torch.equal(model(x), first)


def test_training_mode_gradients_and_autocast_run_the_trees(monkeypatch):
    model, seen = net(), counted(monkeypatch)
    x = torch.randn(4, 40)
    with ol.context(model, rows=["a", "b", None, "c"]):
        assert model(x).requires_grad
        with torch.no_grad():
            model.train()
            model(x)
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                assert model(x).dtype == torch.bfloat16
            assert not seen
            model(x)
        assert len(seen) == 2
        with torch.inference_mode():
            model(x)


def test_threads_have_batches_of_their_own():
    model = net()
    x = torch.randn(6, 40)
    mixes = [["a"] * 6, ["b", None, "c", "a", "d", "d"], [None] * 6, ["d", "c", "b", "a", None, "a"]]
    expected = [both(model, x, m)[1] for m in mixes]
    wrong = []

    def serve(mix, tree):
        for _ in range(60):
            with torch.no_grad(), ol.context(model, rows=mix):
                if not torch.allclose(model(x), tree, atol=1e-5):
                    wrong.append(mix)

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(mixes, expected)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_without_a_compiler(tmp_path):
    """The same numbers, and nothing is built."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests')\n"
        "import torch, test_rows as t\n"
        "from omnilora.plans import native, ragged, rows\n"
        "assert native.library(native.RAGGED) is None and 'OMNILORA_NATIVE' in native.reason(native.RAGGED)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    t.close(*t.both(t.net(dtype), torch.randn(9, 2, 40).to(dtype)))\n"
        "assert rows.few(torch.float32) == 0\n"
    )
    env = {**os.environ, "OMNILORA_NATIVE": "0", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_native
def test_odd_sizes_and_high_ranks():
    """Tails of every loop: widths, ranks and row counts that are no multiple of anything."""
    call = rows.function(torch.float32)
    g = torch.Generator().manual_seed(0)
    for fan_in, fan_out in ((1, 1), (7, 9), (37, 53), (130, 16), (64, 200)):
        for ranks in ([1], [3, 8], [4, 70, 0, 12, 33]):
            for count, per in ((1, 1), (3, 2), (13, 3)):
                n = count * len(ranks)
                order = torch.randperm(n, generator=g)
                x, y = torch.randn(n * per, fan_in, generator=g), torch.randn(n * per, fan_out, generator=g)
                A = [torch.randn(r, fan_in, generator=g) for r in ranks]
                B = [torch.randn(fan_out, r, generator=g) for r in ranks]
                spans = [(i * count, (i + 1) * count) for i in range(len(ranks))]
                scales = torch.rand(len(ranks), generator=g).tolist()
                want = y.double()
                for i, (a, b) in enumerate(zip(A, B)):
                    at = (order[i * count : (i + 1) * count, None] * per + torch.arange(per)).flatten()
                    want[at] += scales[i] * (x[at].double() @ a.double().T) @ b.double().T
                job = ragged.Job((fan_in, fan_out), n, per, order, spans, list(zip(A, B, scales)))
                call(x.data_ptr(), y.data_ptr(), job.address)
                torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def test_the_hook_can_be_taken_out(monkeypatch):
    model, x = net(), torch.randn(9, 40)
    y, _ = both(model, x)
    monkeypatch.setattr(mixed, "rows_executor", None)
    close(y, both(model, x)[0])
