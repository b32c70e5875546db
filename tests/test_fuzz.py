"""Damaged and hostile files: every mutation of every format loads, or is refused with a typed error, fast and small."""

import copy
import gc
import json
import random
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import omnilora as ol
from omnilora import errors
from omnilora.contract import shake
from omnilora.core.method import Method
from omnilora.parameterizations.lora import LoRA
from omnilora.proofs import Stack
from omnilora.training import checkpoint

GOLDEN = Path(__file__).parent / "golden"
SECONDS, BYTES = 0.05, 32 << 20
HOSTILE = [None, True, -1, 0, 2**31, 2**63, 1e308, "", "x" * 5000, [], {}, [[]], {"a": {}}, [1] * 3000, "../../etc/passwd",
           "NaN", -(2**70), 0.5, {"kind": "Nothing"}, ["0"], "\x00", "__class__", "ü"]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "C64", "U64", "nonsense"]


# -- what is damaged -----------------------------------------------------------------------------------------------------


def native(path):
    torch.manual_seed(0)
    model = Stack(8, 10, 6, bias=True).eval()
    ol.adapt(model, ol.method("molora", experts=2, r=2))
    shake(model)
    return ol.save(model, path)


def peft(path):
    torch.manual_seed(0)
    model = Stack(8, 10, 6, bias=True).eval()
    ol.adapt(model, Method("lora", LoRA(2, 5.0)))
    shake(model)
    made = ol.save(model, path)
    (made / "omnilora.json").unlink()
    return made


def both(path):
    torch.manual_seed(0)
    model = Stack(8, 10, 6, bias=True).eval()
    ol.adapt(model, ol.method("dora", r=2))
    shake(model)
    return ol.save(model, path)


def target():
    torch.manual_seed(0)
    return Stack(8, 10, 6, bias=True).eval()


def trainer(model=None):
    """A run of AdaLoRA with an optimizer, as a checkpoint is loaded into."""
    torch.manual_seed(0)
    model = Stack(8, 10, 6, bias=True)
    ol.adapt(model, ol.method("adalora", r=3, target=2))
    optimizer = torch.optim.AdamW(ol.param_groups(model, 1e-2))
    return model, ol.start(model, optimizer, total_steps=40), optimizer


def stopped(path):
    model, run, optimizer = trainer()
    for _ in range(3):
        y = model(torch.randn(4, 8))
        (y.square().mean() + run.loss(None, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    made = checkpoint.write(path, run, {"epoch": 1}, [checkpoint.random_state()])
    run.close()
    return made


SOURCES = {"native": native, "peft": peft, "both": both}
FILES = sorted(GOLDEN.rglob("*.safetensors")) + sorted(GOLDEN.rglob("*.gguf"))


# -- how -------------------------------------------------------------------------------------------------------------------


def bytes_of(raw, draw):
    """One random change of a file's bytes."""
    raw = bytearray(raw)
    kind, at = draw.randrange(7), draw.randrange(max(len(raw), 1))
    if kind == 0:
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        raw = raw[:at]
    elif kind == 2:
        raw[at:at] = draw.randbytes(draw.randrange(1, 40))
    elif kind == 3:
        raw[at : at + 8] = draw.randbytes(8)
    elif kind == 4:
        raw[:8] = struct.pack("<Q", draw.choice([0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(raw), len(raw) - 8]))
    elif kind == 5:
        raw = raw[:at] + raw[at:] * 2
    else:
        for _ in range(draw.randrange(2, 20)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)


def places(data, at=()):
    """Paths of all values in a JSON value."""
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def json_of(data, draw):
    """The text of a JSON value with one value replaced, dropped, renamed, doubled or nested deeply."""
    data = copy.deepcopy(data)
    path = draw.choice([p for p in places(data) if p])
    home = data
    for key in path[:-1]:
        home = home[key]
    kind, key = draw.randrange(6), path[-1]
    if kind <= 2:
        home[key] = draw.choice(HOSTILE)
    elif kind == 3:
        del home[key]
    elif kind == 4 and isinstance(home, dict):
        home[draw.choice(["r", "sites", "x", "", "__proto__", str(key) + " ", "how"])] = home.pop(key)
    text = json.dumps(data)
    if kind == 5:
        word = json.dumps(key) if isinstance(key, str) else '"sites"'
        text = draw.choice([text.replace(word, word + ": 1, " + word, 1), "[" * 20_000 + text, text.replace("1", "NaN", 1),
                            text.replace("{", '{"r": 1e999, ', 1), text[:-1] + ', "a": ' * 3000 + "1" + "}" * 3000])  # fmt: skip
    return text


def tensors_of(raw, draw):
    """A safetensors file whose header, or whose numbers, are changed where it hurts."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    names = [n for n in header if n != "__metadata__"]
    name, kind = draw.choice(names), draw.randrange(6)
    info = header[name]
    if kind == 0:
        info["dtype"] = draw.choice(DTYPES)
    elif kind == 1:
        info["shape"] = draw.choice([[], [0], [2**31], [2**31, 2**31], [-1, 4], info["shape"][::-1], [1, *info["shape"]], [2**62]])
    elif kind == 2:
        info["data_offsets"] = draw.choice([[0, 0], [0, 2**40], [-4, 4], [8, 4], header[draw.choice(names)]["data_offsets"]])
    elif kind == 3:
        header[draw.choice([name + "x", "a" * 3000, "", "base_model.model." + name, "lora_" + name])] = header.pop(name)
    elif kind == 4:
        begin, end = info["data_offsets"]
        value = draw.choice([float("nan"), float("inf"), -float("inf"), 3e38])
        body[begin : begin + 4] = struct.pack("<f", value)[: end - begin]
    else:
        return json_of(header, draw).encode(), bytes(body)
    return json.dumps(header).encode(), bytes(body)


def mutated(path, raw, draw):
    """New bytes for the file at ``path``."""
    if path.suffix == ".json" and draw.random() < 0.7:
        return json_of(json.loads(raw), draw).encode()
    if path.suffix == ".safetensors" and draw.random() < 0.6:
        head, body = tensors_of(raw, draw)
        return struct.pack("<Q", len(head)) + head + body
    return bytes_of(raw, draw)


@pytest.fixture(autouse=True)
def nothing_else_is_collected():
    """What other tests left behind is not collected on the time of a refusal."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- and what comes of it --------------------------------------------------------------------------------------------------


def resident(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def attempt(path, model, name):
    """(seconds of this thread, bytes the process grew by, the error's code or None) of loading ``path``."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start, code = resident("VmRSS"), time.thread_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ol.load(model, path, name)
    except errors.OmniloraError as error:
        code = error.code
    return time.thread_time() - start, resident("VmHWM") - before, code


def storm(sources, count, seed, tmp_path):
    """``count`` mutations over all sources; (refused, loaded, slowest refusal, largest growth)."""
    draw = random.Random(seed)
    homes = {name: make(tmp_path / name) for name, make in sources.items()}
    for file in FILES:
        home = tmp_path / f"single-{file.parent.name}-{file.name}"
        home.write_bytes(file.read_bytes())
        homes[home.name] = home
    plan, model = list(homes), target()
    originals = {home: {f: f.read_bytes() for f in (home.iterdir() if home.is_dir() else [home])} for home in homes.values()}
    refused, loaded, slowest, largest, codes = 0, 0, (0.0, ""), (0, ""), set()
    for i in range(count):
        home = homes[plan[i % len(plan)]]
        file = draw.choice(sorted(originals[home]))
        new = mutated(file, originals[home][file], draw)
        file.write_bytes(new)
        try:
            seconds, grown, code = attempt(home, model, "x")
        except Exception as error:
            kept = tmp_path / f"crash-{i}"
            kept.write_bytes(new)
            raise AssertionError(f"mutation {i} of {file.name}: {type(error).__name__}: {error} (kept as {kept})") from error
        file.write_bytes(originals[home][file])
        if code is None:
            loaded += 1
            ol.detach(model, "x")
        else:
            refused += 1
            codes.add(code)
            slowest, largest = max(slowest, (seconds, f"{file.name} {i} {code}")), max(largest, (grown, f"{file.name} {i} {code}"))
    print(f"{refused} refused, {loaded} loaded, slowest {slowest}, largest {largest}, {sorted(codes)}")
    return refused, loaded, slowest, largest


def checkpoint_storm(count, seed, tmp_path):
    """The same for checkpoints of training; what is refused has changed nothing."""
    draw, home = random.Random(seed), stopped(tmp_path / "step-000003")
    originals = {f: f.read_bytes() for f in home.iterdir()}
    model, run, _ = trainer()
    checkpoint.load(home, run)
    want, refused = ol.state(model).content(), 0
    for i in range(count):
        file = draw.choice(sorted(originals))
        new = mutated(file, originals[file], draw)
        file.write_bytes(new)
        try:
            checkpoint.load(home, run)
        except errors.OmniloraError:
            refused += 1
            assert ol.state(model).content() == want, f"mutation {i} of {file.name} was refused half way"
        except Exception as error:
            raise AssertionError(f"mutation {i} of {file.name}: {type(error).__name__}: {error}") from error
        file.write_bytes(originals[file])
        checkpoint.load(home, run)
    return refused


def config_storm(count, seed, tmp_path):
    """Configurations in YAML: a typed error, or a configuration."""
    draw, path = random.Random(seed), tmp_path / "run.yaml"
    text = ol.TrainConfig(hyper={"r": 4}, overrides={"q_proj": {"r": 2}}, data="x.jsonl", labels=None).to_yaml()
    data, refused = yaml.safe_load(text), 0
    for i in range(count):
        made = json_of(data, draw) if draw.random() < 0.6 else bytes_of(text.encode(), draw)
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
        start = time.thread_time()
        try:
            ol.TrainConfig.from_yaml(path)
        except errors.OmniloraError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {i}: {type(error).__name__}: {error}\n{made[:300]!r}") from error
        assert time.thread_time() - start < 0.1, f"mutation {i} took {time.thread_time() - start:.3f} s"
    return refused


def test_checkpoints_and_configurations(tmp_path):
    assert checkpoint_storm(80, 0, tmp_path) > 40
    assert config_storm(150, 0, tmp_path) > 50


@pytest.mark.slow
def test_thousands_of_checkpoints_and_configurations(tmp_path):
    assert checkpoint_storm(3000, 1, tmp_path) > 1500
    assert config_storm(3000, 1, tmp_path) > 1000


def test_a_thousand_mutations(tmp_path):
    refused, loaded, slowest, largest = storm(SOURCES, 1000, 0, tmp_path)
    assert refused > 500 and largest[0] < BYTES, largest
    assert slowest[0] < 4 * SECONDS, slowest  # this machine may be busy


@pytest.mark.slow
def test_twenty_thousand_mutations(tmp_path):
    refused, loaded, slowest, largest = storm(SOURCES, 20_000, 1, tmp_path)
    assert refused > 10_000 and largest[0] < BYTES, largest
    assert slowest[0] < SECONDS, slowest
