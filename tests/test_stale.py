"""Short ways against everything that changes under them: objects replaced, memory exchanged, defaults, tracers, modes, threads.

Every case compares what runs with what the trees give, and the second load of a file with the first.
"""

import collections
import copy
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import pair, saved
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

import omnilora as ol
from omnilora.contract import shake
from omnilora.core import proven
from omnilora.plans import native
from omnilora.plans.executor import off
from omnilora.rules.budget import compact

FEW, MANY = 4, 100  # tokens: for the native call, and for products


def adapted(key="lora", **hyper):
    model = ol.adapt(pair(), ol.method(key, **{"r": 4} | hyper))
    shake(model)
    return model


def trees(model, x, rows=None):
    """The outputs of plans and of trees, without gradients."""
    with torch.no_grad(), ol.context(model, **({} if rows is None else {"rows": rows})):
        y = model(x)
        with off():
            return y, model(x)


def same(model, tolerance=1e-5):
    for tokens in (FEW, MANY):
        x = torch.randn(tokens, 12, dtype=model[0].weight.dtype)
        for rows in (None, ["default"] * (tokens - 1) + [None]):
            y, tree = trees(model, x, rows)
            assert float((y - tree).abs().max()) <= tolerance * float(tree.abs().max()), (tokens, rows is None)


def replaced(model):
    for slot in ol.slots(model):
        for name, t in list(slot.tensors()):
            setattr(slot.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Parameter(t.detach() * 3))


def exchanged(model):
    for slot in ol.slots(model):
        slot.A.data, slot.B.data = torch.randn(7, slot.A.shape[1]), torch.randn(slot.B.shape[0], 7)


def called(model):
    x, other = torch.randn(FEW, 12), {n: p * 2 for n, p in model.named_parameters()}
    for rows in (None, ["default"] * 3 + [None]):
        with torch.no_grad(), ol.context(model, **({} if rows is None else {"rows": rows})):
            torch.func.functional_call(model, other, x)


def pruned(model):
    for slot in ol.slots(model):
        with torch.no_grad():
            slot.B[:, 1] = 0
        compact(slot, torch.tensor([0, 2, 3]))


CHANGES = {
    "assigned": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "replaced": replaced,
    "exchanged": exchanged,
    "called": called,
    "pruned": pruned,
    "vectors": lambda m: vector_to_parameters(parameters_to_vector(m.parameters()) * 2, m.parameters()),
    "emptied": lambda m: (state := copy.deepcopy(m.state_dict()), m.to_empty(device="cpu"), m.load_state_dict(state)),
    "cast": lambda m: m.bfloat16().float(),
    "doubled": lambda m: m.double(),
    "bias": lambda m: setattr(m[2], "bias", nn.Parameter(torch.randn(8), requires_grad=False)),
    "weight": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "norm": lambda m: parametrizations.weight_norm(m[2]),
}


ONLY_LORA = ("exchanged", "pruned", "norm", "weight")  # they name LoRA's factors, or leave no weight for DoRA's norm to read


@pytest.mark.parametrize(("key", "change"), [*(("lora", c) for c in CHANGES), *(("dora", c) for c in CHANGES if c not in ONLY_LORA)])
def test_what_runs_follows_every_change(key, change):
    model = adapted(key)
    same(model)
    CHANGES[change](model)
    same(model, 1e-5 if key == "lora" else 1e-4)


def test_rows_see_slots_that_train_alone():
    model = adapted(dropout=0.5)
    same(model)
    for slot in ol.slots(model):
        slot.train()
    x = torch.randn(FEW, 12)
    one, two = (trees(model, x, ["default"] * 3 + [None])[0] for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_default_dtype_means_nothing(dtype):
    model = adapted()
    torch.set_default_dtype(dtype)
    try:
        xs = [torch.randn(t, 12, dtype=torch.float32) for t in (FEW, MANY)]
        pairs = [trees(model, x, rows) for x in xs for rows in (None, ["default"] * (len(x) - 1) + [None])]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(float((y - t).abs().max()) < 1e-5 * float(t.abs().max()) for y, t in pairs)


def test_a_default_device_means_nothing(tmp_path):
    path, model, x = saved(tmp_path / "a"), adapted(), torch.randn(FEW, 12)
    bare = pair()
    with torch.device("meta"):
        pairs = [trees(model, x), trees(model, x, ["default"] * 3 + [None])]
        ol.load(bare, path)
    assert all(y.device.type == "cpu" and float((y - t).abs().max()) < 1e-5 * float(t.abs().max()) for y, t in pairs)
    assert all(not t.is_meta for s in ol.slots(bare) for _, t in s.tensors())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_tracers_and_modes_see_everything(tokens):
    model, x, z = adapted(), torch.randn(tokens, 12), torch.randn(tokens, 12)
    with torch.no_grad():
        model(x)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        made = make_fx(lambda v: model(v))(x)
    with torch.no_grad():
        want = model(z)
        assert torch.allclose(traced(z), want, rtol=1e-4, atol=1e-4) and torch.allclose(made(z), want, rtol=1e-4, atol=1e-4)
    flops = {}
    for name, how in (("plans", None), ("trees", off)):
        with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            if how is None:
                model(x)
            else:
                with how():
                    model(x)
        flops[name] = counter.get_total_flops()
    assert flops["plans"] == flops["trees"]


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_inference_mode(tmp_path, key):
    path = saved(tmp_path / "a", key)
    x = torch.randn(FEW, 12)
    with torch.inference_mode():
        model = pair()
        ol.load(model, path)
        inside = model(x)
        assert torch.equal(model(x), inside) and ol.adapters(model) == ["default"]
    outside = pair()
    ol.load(outside, path)
    with torch.no_grad():
        assert torch.allclose(outside(x), inside, rtol=1e-5, atol=1e-5)


def test_a_compiler_of_c_is_not_taken_for_one_of_c_plus_plus(monkeypatch):
    monkeypatch.setenv("CXX", "gcc")
    assert native._compiler() == (shutil.which("g++") or shutil.which("clang++"))
    monkeypatch.setenv("CXX", "/opt/bin/clang++-19")
    assert native._compiler() == "/opt/bin/clang++-19"


def test_libraries_leave_the_float_mode_alone():
    """Linked with -ffast-math, a library would flush denormals to zero in every thread that loads it. The process loads what this
    one has: both libraries, or, without a compiler, none."""
    there = [native.library(name) is not None for name in (native.KERNELS, native.RAGGED)]
    code = ("import torch\nfrom omnilora.plans import native\nnames = (native.KERNELS, native.RAGGED)\n"
            f"assert [native.library(n) is not None for n in names] == {there}, [native.reason(n) for n in names]\n"
            "assert float(torch.tensor(1e-39) * 1.0) > 0 and 1e-309 * float(torch.ones(1)) > 0")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_forwards_beside_changes_in_other_threads():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)]).eval()
    ol.adapt(model, ol.method("lora", r=2), name="a")
    x, end, found = torch.randn(4, 16), time.time() + 2.5, collections.Counter()

    def serve():
        while time.time() < end:
            try:
                with torch.no_grad():
                    model(x)
                found["fine"] += 1
            except Exception as error:  # whatever it is
                found[f"{type(error).__name__}: {error}"] += 1

    def change():
        while time.time() < end:
            ol.adapt(model, ol.method("lora", r=2), name="b")
            ol.activate(model, "a")
            ol.detach(model, "b")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve) for _ in range(2)] + [threading.Thread(target=change)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert set(found) == {"fine"} and found["fine"] > 10, found


def test_nothing_of_a_detached_adapter_stays():
    import gc
    import weakref

    model = adapted()
    ol.adapt(model, ol.method("lora", r=2), name="gone")
    same(model)
    x = torch.randn(FEW, 12)
    trees(model, x, ["gone", "default", None, "gone"])
    ol.activate(model, "gone")
    trees(model, x)
    kept = [weakref.ref(t) for s in ol.slots(model, "gone") for _, t in s.tensors()]
    ol.detach(model, "gone")
    gc.collect()
    assert [r() for r in kept] == [None] * len(kept)


# -- loading again --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Whether each attempt at the short way came to something."""
    seen, again = [], proven.again

    def attempt(*args):
        report = again(*args)
        seen.append(report is not None)
        return report

    monkeypatch.setattr(proven, "again", attempt)
    monkeypatch.setattr(proven, "RACY", 0)
    return seen


def twice(model, path):
    first = ol.load(model, path, "one")
    assert ol.load(model, path, "two") == first
    assert ol.state(model, "one").content() == ol.state(model, "two").content()
    assert [s.site.name for s in ol.slots(model, "one")] == [s.site.name for s in ol.slots(model, "two")]


def test_regions_of_one_layer(tmp_path, quick):
    model = ol.adapt(pair(), ol.method("lora", r=2), targets=["0[0/2]", "0[1/2]"])
    shake(model)
    ol.save(model, tmp_path / "a")
    twice(pair(), tmp_path / "a")


@pytest.mark.parametrize("key", ["oft", "tt_lora", "melora"])
def test_the_file_that_the_manifest_names(tmp_path, quick, key):
    path = saved(tmp_path / "a", key)
    assert (path / "omnilora.safetensors").is_file()
    shutil.copy(saved(tmp_path / "b", "lora", seed=9, r=32) / "adapter_model.safetensors", path)
    twice(pair(), path)


def test_parts_of_one_model_are_told_apart(tmp_path, quick):
    path = saved(tmp_path / "a")
    whole = nn.ModuleDict({"a": pair(), "b": pair(), "c": nn.Linear(8, 2)})
    ol.adapt(whole, ol.method("lora", r=2), name="base")
    ol.load(whole["a"], path, "one")
    ol.load(whole["b"], path, "two")
    assert len(ol.slots(whole["b"], "two")) == 2 and not ol.slots(whole["a"], "two")


def test_an_encoder_layer_is_kept_off_its_fused_path(tmp_path, quick):
    def encoder():
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)).eval()

    model = ol.adapt(encoder(), ol.method("lora", r=2), targets=["linear1", "linear2"])
    shake(model)
    ol.save(model, tmp_path / "a")
    model, x = encoder(), torch.randn(3, 5, 16)
    ol.adapt(model, ol.method("lora", r=2), targets=["1"], name="z")
    ol.load(model, tmp_path / "a", "a")
    with torch.no_grad():
        want = model(x)
    ol.detach(model, "a")
    ol.load(model, tmp_path / "a", "a")
    with torch.no_grad():
        assert torch.equal(model(x), want) and torch.equal(model(x), want)
    assert quick[-1]


def test_a_layer_of_another_model_is_refused(tmp_path, quick):
    path = saved(tmp_path / "a")
    model = pair()
    ol.adapt(model, ol.method("lora", r=2), targets=["0"], name="z")
    ol.load(model, path, "a")
    ol.detach(model, "a")
    ol.adapt(nn.Sequential(model[2]), ol.method("lora", r=2), targets=["0"], name="other")
    with pytest.raises(ol.errors.AttachError, match="another adapted model"):
        ol.load(model, path, "a")
    assert ol.adapters(model) == ["z"]


def test_marks_belong_to_one_adapter(tmp_path, quick):
    path, model = saved(tmp_path / "a"), pair()
    ol.load(model, path, "one")
    for slot in ol.slots(model, "one"):
        slot.marks["optional"] = True
        slot.roles["x"] = "y"
    ol.load(model, path, "two")
    assert quick[-1] and all("optional" not in s.marks and "x" not in s.roles for s in ol.slots(model, "two"))


def test_the_base_is_frozen_and_proven_again(tmp_path, quick):
    path = saved(tmp_path / "a")
    model = nn.Sequential(*pair(), nn.Linear(8, 3)).eval()
    ol.load(model, path, "one")
    removed, model[3] = model[3], nn.Linear(8, 5)
    removed.requires_grad_(True)
    ol.load(model, path, "two")
    assert quick[-1] and not model[3].weight.requires_grad and removed.weight.requires_grad
    model[2].weight.data.mul_(-1)  # leaves no version
    with pytest.raises(ol.errors.BaseMismatch):
        ol.load(model, path, "three")
    with pytest.raises(ol.errors.FileRefused, match="quota"):
        ol.load(model, path, "three", quota=10)
