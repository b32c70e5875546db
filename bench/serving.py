"""Serving against PEFT, as ratios of one interleaved run: many adapters in a batch, prefill, bare rows, loading, switching.

    python bench/serving.py [--rounds 9] [--only decode prefill load] [--dtype fp32 bf16] [--quick] [--busy] [--out FILE]

The model is the 30 M Llama of bench/common.py; adapters of ranks 4, 8, 16, 32, 64 in turn on all linear layers (one adapter: 16),
rows sorted by adapter. Decoding is one step of 32 rows with a cache of 96 positions, prefill one forward of 8 × 128 tokens. A ratio
is the median over rounds of (variant / bare model) of that round, with the least and the largest. The context is entered, and
PEFT is given its names, inside the timed step. On a machine that others use, --busy measures one thread's processor time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import LINEAR, interleave, llama, ratios, write
from torch import Tensor, nn

import omnilora as ol
from omnilora.plans import native

RANKS = (4, 8, 16, 32, 64)
ROWS, CACHED = 32, 96
FACTOR = re.compile(r"(?P<layer>layers\.\d+\.\w+\.\w+)\.(lora_(?P<a>[AB])\.(?P<theirs>\w+)\.weight"
                    r"|adapters\.(?P<ours>\w+)\.weight\.(?P<b>[AB]))$")  # fmt: skip


clock = time.perf_counter


def ranks(count: int) -> list[int]:
    return [16] if count == 1 else [RANKS[i % len(RANKS)] for i in range(count)]


def fill(model: nn.Module, seed: int = 0) -> None:
    """Factors of the size that A's have at first, by the adapter's and the layer's name: the same for PEFT and for us."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            found = FACTOR.search(name)
            if found is not None:
                layer, adapter, factor = found["layer"], found["theirs"] or found["ours"], found["a"] or found["b"]
                g = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer} {adapter} {factor}".encode()))
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)


def with_peft(base: nn.Module, count: int) -> nn.Module:
    model = None
    for i, r in enumerate(ranks(count)):
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR)
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    assert model is not None
    fill(model)
    return model.eval()


def with_ours(base: nn.Module, count: int, seed: int = 0) -> nn.Module:
    model = copy.deepcopy(base)
    for i, r in enumerate(ranks(count)):
        ol.adapt(model, ol.method("lora", r=r, alpha=2.0 * r), name=f"a{i}")
    fill(model, seed)
    return model.eval()


def sorted_names(count: int, rows: int) -> list[str]:
    return [f"a{i * count // rows}" for i in range(rows)]


def decoding(model: nn.Module, rows: int, cached: int) -> Callable[..., Tensor]:
    """A call that decodes one token a row; the cache is cut back to its length before each."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, cached, head)
    dtype = next(model.parameters()).dtype
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype))
             for _ in range(config.num_hidden_layers)]  # fmt: skip
    cache = transformers.DynamicCache()
    for i, (k, v) in enumerate(pairs):
        cache.update(k, v, i)
    ids = torch.arange(rows)[:, None] + 5

    def step(**extra: Any) -> Tensor:
        cache.crop(-1) if cache.get_seq_length() > cached else None
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache, use_cache=True, **extra).logits

    return step


def prefilling(model: nn.Module, rows: int, length: int) -> Callable[..., Tensor]:
    ids = torch.randint(0, 900, (rows, length), generator=torch.Generator().manual_seed(1))

    def step(**extra: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **extra).logits

    return step


def mixed(base: nn.Module, counts: list[int], rows: int, make: Callable[[nn.Module], Callable[..., Tensor]], rounds: int) -> dict[str, Any]:
    """One table: bare model, our bare rows, and for each number of adapters PEFT and us."""
    out: dict[str, Any] = {}
    for count in counts:
        frozen, theirs, ours = copy.deepcopy(base).eval(), with_peft(base, count), with_ours(base, count)
        names = sorted_names(count, rows)
        bare, other, mine = make(frozen), make(theirs), make(ours)

        def rowed(names: list[str | None], mine: Callable[..., Tensor] = mine, ours: nn.Module = ours) -> Tensor:
            with ol.context(ours, rows=names):
                return mine()

        table = ratios(interleave({
            "bare": bare, "omnilora": lambda n=names, f=rowed: f(list(n)), "omnilora bare rows": lambda f=rowed: f([None] * rows),
            "peft": lambda n=names, f=other: f(adapter_names=n)}, rounds, clock=clock), "bare")  # fmt: skip
        with torch.no_grad():
            gap = float((rowed(list(names)) - other(adapter_names=names)).abs().max() / other(adapter_names=names).abs().max())
        out[str(count)] = {**table, "largest difference to peft": gap}
        del frozen, theirs, ours, bare, other, mine, rowed
        gc.collect()
    return out


def loading(base: nn.Module, many: int) -> dict[str, Any]:
    """The first load with its proof, on a base never seen and on one whose fingerprint is known (another file each time); the n-th
    load of a proven file, also in the memory of one that was taken off; and switching. PEFT's beside."""
    out: dict[str, Any] = {}
    few = min(many, 16)
    with tempfile.TemporaryDirectory() as folder:
        source = with_ours(base, 1)
        path = ol.save(source, Path(folder) / "ours", adapter="a0")
        theirs = with_peft(base, 1)
        theirs.save_pretrained(str(Path(folder) / "peft"))
        found = Path(folder) / "peft" / "a0"
        others = [ol.save(with_ours(base, 1, seed=i + 1), Path(folder) / f"other{i}", adapter="a0") for i in range(few)]
        settle()
        model = copy.deepcopy(base).eval()
        out["omnilora first, base new"] = _milliseconds(lambda: ol.load(model, path, "n0"))
        fresh = [_milliseconds(lambda i=i, p=p: ol.load(model, p, f"o{i}")) for i, p in enumerate(others)]
        out["omnilora first, base fingerprinted"] = _spread(fresh)
        for i in range(few):
            ol.detach(model, f"o{i}")
        times = [_milliseconds(lambda i=i: ol.load(model, path, f"n{i}")) for i in range(1, many)]
        out["omnilora load"] = _at([times[0], *times])
        turns = []
        for i in range(few):
            turns.append(_milliseconds(lambda i=i: ol.load(model, path, f"t{i}")))
            ol.detach(model, f"t{i}")
        out["omnilora load after a detach"] = _spread(turns)
        spent = [_milliseconds(lambda i=i: theirs.load_adapter(str(found), f"n{i}")) for i in range(few)]
        out["peft first"], out["peft load"] = spent[0], _at(spent)
        ours = [_milliseconds(lambda i=i: ol.activate(model, f"n{i % many}")) for i in range(50)]
        other = [_milliseconds(lambda i=i: theirs.set_adapter(f"n{i % few}")) for i in range(10)]
        out["omnilora switch"], out["peft switch"] = _spread(ours), _spread(other)
    return out


def settle() -> None:
    """Files that were written just now are not remembered."""
    time.sleep(0.1)


def _milliseconds(call: Callable[[], Any]) -> float:
    begin = clock()
    call()
    return (clock() - begin) * 1e3


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _at(times: list[float]) -> dict[str, dict[str, float]]:
    """Around the n-th load: median, least and largest of up to eight loads that end there."""
    return {str(n): _spread(times[max(1, n - 8) : n]) for n in (2, 4, 8, 16, 32, 64, 96, 128, 256) if n <= len(times)}


def show(part: str, dtype: str, tables: dict[str, Any]) -> None:
    for count, table in tables.items():
        for name, row in table.items():
            if isinstance(row, dict):
                print(f"{part:8s} {dtype:5s} k={count:3s} {name:20s} {row['seconds'] * 1e3:9.2f} ms {row['ratio']:7.3f}"
                      f"  [{row['min']:.3f} … {row['max']:.3f}]", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=["decode", "prefill", "load"])
    parser.add_argument("--dtype", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: whether everything runs")
    parser.add_argument("--busy", action="store_true", help="one thread, its processor time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.busy:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    rounds = 2 if args.quick else args.rounds
    result: dict[str, Any] = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "peft": peft.__version__,
                    "transformers": transformers.__version__, "processor": platform.processor() or platform.machine(),
                    "capability": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg(),
                    "native": native.reason(native.RAGGED) or "built"},
        "rounds": rounds, "clock": "processor time" if args.busy else "wall time",
    }  # fmt: skip
    for dtype in args.dtype:
        base = llama(args.quick).eval().to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        counts = [c for c in args.adapters if not args.quick or c <= 8]
        if "decode" in args.only:
            found = mixed(base, counts, ROWS, lambda m: decoding(m, ROWS, CACHED), rounds)
            result[f"decode {dtype}"] = found
            show("decode", dtype, found)
        if "prefill" in args.only:
            found = mixed(base, [c for c in counts if c <= 8], 8, lambda m: prefilling(m, 8, 32 if args.quick else 128), rounds)
            result[f"prefill {dtype}"] = found
            show("prefill", dtype, found)
    if "load" in args.only:
        result["load"] = loading(llama(args.quick), 16 if args.quick else 256)
        print(json.dumps(result["load"], indent=1))
    result["machine"]["load after"] = os.getloadavg()
    write(args.out, result)


if __name__ == "__main__":
    main()
