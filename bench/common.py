"""What the benchmarks share: models, interleaved timing, what is kept for the backward pass, tables."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import omnilora as ol

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def llama(quick: bool = False, dtype: str = "fp32", width: int = 512) -> nn.Module:
    """A Llama of 8 layers (30 M at width 512), or a small one."""
    width, depth, vocab = (128, 2, 1000) if quick else (width, 8, 8192)
    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth,
                                      num_attention_heads=8, num_key_value_heads=8, vocab_size=vocab)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(DTYPES[dtype])


def without_cache(model: nn.Module) -> nn.Module:
    """Training needs no keys and values of earlier passes: they are kept and copied, and compiled code is made for each layer."""
    model.config.use_cache = False
    return model


def smollm(quick: bool = False, dtype: str = "bf16") -> nn.Module:
    """The architecture of SmolLM2-135M with random weights, or its first two layers."""
    config = transformers.LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2 if quick else 30,
                                      num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(DTYPES[dtype])


def interleave(variants: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] | None = None,
               clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every variant in every round; one round that is not counted comes first. Each round has an order of its own, for a
    variant's time depends on what ran before it."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    order, shuffled = list(variants), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if before is not None:
                before()
            start = clock()
            variants[name]()
            times[name].append(clock() - start)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Medians over rounds of the ratio to ``base`` in the same round."""
    out = {}
    for name, values in times.items():
        each = [v / b for v, b in zip(values, times[base])]
        out[name] = {"seconds": statistics.median(values), "ratio": statistics.median(each), "min": min(each), "max": max(each)}
    return out


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Unique storages kept for the backward pass, parameters and buffers excluded: exact, not timed."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss
    return sum(kept.values())


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> dict[str, Any]:
    fast = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return {"processor": processor(), "bf16 in hardware": fast, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "peft": peft.__version__, "transformers": transformers.__version__, "omnilora": ol.__version__}  # fmt: skip


def show(title: str, table: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title:34s} {'seconds':>9s} {'ratio':>7s} {'min':>7s} {'max':>7s} {'kept MiB':>10s}")
    for name, row in table.items():
        kept = f"{row['kept MiB']:10.1f}" if "kept MiB" in row else ""
        print(f"{name:34s} {row['seconds']:9.4f} {row['ratio']:7.3f} {row['min']:7.3f} {row['max']:7.3f} {kept}", flush=True)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Results by section and table; those of other runs stay."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    all_ = json.loads(path.read_text()) if path.exists() else {}
    for name, value in result.items():
        all_[name] = all_[name] | value if isinstance(value, dict) and isinstance(all_.get(name), dict) else value
    path.write_text(json.dumps(all_, indent=1) + "\n")
