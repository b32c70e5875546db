"""Against PEFT, as ratios of one interleaved run: step, saved activations, mixed batch, load, switch.

    python bench/run.py [--rounds 7] [--quick] [--out bench/results/peft.json]

Every round runs all variants in turn; a ratio is the median over rounds of (variant / frozen model) of that round.
Saved activations count unique storages kept for the backward pass, parameters excluded: exact, not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import omnilora as ol


def llama(quick: bool) -> nn.Module:
    """The 30 M model of the issue on speed (8 layers of width 512), or a small one."""
    width, depth, vocab = (128, 2, 1000) if quick else (512, 8, 8192)
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth,
                                      num_attention_heads=8, num_key_value_heads=8, vocab_size=vocab)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_peft(base: nn.Module, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, **options)
    return peft.get_peft_model(copy.deepcopy(base), config)


def with_ours(base: nn.Module, key: str = "lora", **hyper: Any) -> nn.Module:
    return ol.adapt(copy.deepcopy(base), ol.method(key, r=16, alpha=32.0, **hyper))


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward, loss, backward to the input's embeddings."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x, labels=ids).loss.backward()


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=x, labels=ids).loss
    del loss
    return sum(kept.values())


def interleave(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    out = {}
    for name, values in times.items():
        each = [v / b for v, b in zip(values, times[base])]
        out[name] = {"seconds": statistics.median(values), "ratio": statistics.median(each), "min": min(each), "max": max(each)}
    return out


def training(base: nn.Module, ids: Tensor, rounds: int) -> dict[str, Any]:
    frozen = copy.deepcopy(base).requires_grad_(False)
    models = {
        "frozen": frozen,
        "peft lora": with_peft(base), "omnilora lora": with_ours(base),
        "peft lora dropout": with_peft(base, lora_dropout=0.05), "omnilora lora dropout": with_ours(base, dropout=0.05),
        "peft dora": with_peft(base, use_dora=True), "omnilora dora": with_ours(base, "dora", dropout=0.0),
    }  # fmt: skip
    for model in models.values():
        model.train()
    times = interleave({n: (lambda m=m: step(m, ids)) for n, m in models.items()}, rounds)
    table = ratios(times, "frozen")
    for name, model in models.items():
        table[name]["saved MiB"] = saved_bytes(model, ids) / 2**20
    return table


def serving(base: nn.Module, rounds: int, rows: int = 8, adapters: int = 8) -> dict[str, Any]:
    """One forward of ``rows`` rows, each with its own adapter; base rows; loading the n-th adapter; switching."""
    theirs, ours, frozen = with_peft(base), with_ours(base), copy.deepcopy(base)
    for i in range(1, adapters):
        theirs.add_adapter(str(i), peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR))
        ol.adapt(ours, ol.method("lora", r=16, alpha=32.0), name=str(i))
    for model in (theirs, ours, frozen):
        model.eval()
    ids = torch.randint(0, 900, (rows, 16))
    names = ["default", *map(str, range(1, adapters))]
    spread = [names[i % adapters] for i in range(rows)]

    def our(rows_of: list[str | None]) -> None:
        with torch.no_grad(), ol.context(ours, rows=rows_of):
            ours(ids)

    def peft_rows() -> None:
        with torch.no_grad():
            theirs(input_ids=ids, adapter_names=spread)

    def bare() -> None:
        with torch.no_grad():
            frozen(ids)

    table = ratios(interleave({"base": bare, "peft mixed": peft_rows, "omnilora mixed": lambda: our(list(spread)),
                               "omnilora base rows": lambda: our([None] * rows)}, rounds), "base")  # fmt: skip
    switches = interleave({"peft switch": lambda: theirs.set_adapter(names[-1]),
                           "omnilora switch": lambda: ol.activate(ours, names[-1])}, rounds)  # fmt: skip
    table |= ratios(switches, "peft switch")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, selected_adapters=["default"])
        path = ol.save(ours, Path(folder) / "ours", adapter="default")
        count = iter(range(10_000))
        loads = interleave({"peft load": lambda: theirs.load_adapter(folder, f"n{next(count)}"),
                            "omnilora load": lambda: ol.load(ours, path, f"n{next(count)}")}, rounds)  # fmt: skip
        table |= ratios(loads, "peft load")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small model, for a look")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = llama(args.quick)
    ids = torch.randint(0, 900, (4, 32 if args.quick else 128))
    result = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "peft": peft.__version__,
                    "transformers": transformers.__version__, "processor": platform.processor() or platform.machine()},
        "training": training(base, ids, args.rounds),
        "serving": serving(base, args.rounds),
    }  # fmt: skip
    for part in ("training", "serving"):
        print(f"\n{part:24s} {'seconds':>9s} {'ratio':>7s} {'min':>7s} {'max':>7s} {'saved MiB':>10s}")
        for name, row in result[part].items():
            saved = f"{row['saved MiB']:10.1f}" if "saved MiB" in row else ""
            print(f"{name:24s} {row['seconds']:9.4f} {row['ratio']:7.3f} {row['min']:7.3f} {row['max']:7.3f} {saved}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
