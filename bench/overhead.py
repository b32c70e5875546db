"""What is left of speed when the arithmetic is nothing: one adapted site without gradients, and the start of the command line.

    python bench/overhead.py [--rounds 9] [--out bench/results/overhead.json]

A site is a linear layer of width 64 that reads one token, on one thread, in processor time. A command is a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from common import machine, write
from torch import nn

import omnilora as ol

CALLS = 2000
COMMANDS = {"--help": ["--help"], "list": ["list"], "show dora": ["show", "dora"]}


def sites(rounds: int) -> dict[str, Any]:
    """µs a call, and above nn.Linear's in the same round."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).eval()
    x = torch.randn(1, 64)
    layers = {"nn.Linear": base[0]}
    for key in ("lora", "dora"):
        config = peft.LoraConfig(r=8, target_modules=["0"], use_dora=key == "dora")
        layers[f"peft {key}"] = peft.get_peft_model(copy.deepcopy(base), config).base_model.model.eval()[0]
        layers[f"omnilora {key}"] = ol.adapt(copy.deepcopy(base), ol.method(key, r=8))[0]
    layers["omnilora vera"] = ol.adapt(copy.deepcopy(base), ol.method("vera", r=8))[0]
    layers["omnilora tt_lora"] = ol.adapt(copy.deepcopy(base), ol.method("tt_lora"))[0]
    times: dict[str, list[float]] = {n: [] for n in layers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.eval()
            if (hub := getattr(getattr(layer, "adapters", None), "hub", None)) is not None:
                hub.visits = None  # as after a first forward of the model
            for _ in range(200):
                layer(x)
        for _ in range(rounds):
            for name, layer in layers.items():
                start = time.process_time()
                for _ in range(CALLS):
                    layer(x)
                times[name].append((time.process_time() - start) / CALLS * 1e6)
    torch.set_num_threads(threads)
    out = {}
    for name, each in times.items():
        over = [a - b for a, b in zip(each, times["nn.Linear"])]
        out[name] = {"us": statistics.median(each), "over": statistics.median(over), "min": min(over), "max": max(over)}
        print(f"{name:20s} {out[name]['us']:7.1f} µs  + {out[name]['over']:6.1f}  [{out[name]['min']:.1f} … {out[name]['max']:.1f}]")
    return out


def commands(rounds: int) -> dict[str, Any]:
    out = {}
    for name, words in COMMANDS.items():
        each = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            subprocess.run([str(Path(sys.executable).with_name("omnilora")), *words], check=True, capture_output=True)
            each.append(time.perf_counter() - start)
        out[name] = {"seconds": statistics.median(each[1:]), "min": min(each[1:]), "max": max(each[1:])}
        print(f"omnilora {name:12s} {out[name]['seconds']:.3f} s  [{out[name]['min']:.3f} … {out[name]['max']:.3f}]")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    write(args.out, {"machine": machine(), "sites": sites(rounds), "commands": commands(rounds)})


if __name__ == "__main__":
    main()
