"""A whole training job against PEFT with transformers' Trainer: wall time and peak memory of a process each.

    python bench/job.py [--rounds 3] [--steps 12] [--quick] [--only omnilora,peft] [--out bench/results/job.json]

SmolLM2-135M (or a small Llama), LoRA of rank 8 on all linear layers, 8 rows an update of log-normal lengths, the first half of
every row masked. Every variant sees the same rows; the order within an epoch is each trainer's own, and one epoch is trained.

    omnilora            ol.fit with its defaults
    omnilora padded     the same with padding = True: what is left are the logits that are not made
    peft                get_peft_model and Trainer with their defaults
    peft padding-free   DataCollatorWithFlattening, the layers compiled: what a user of PEFT can reach by hand

Rounds run all variants in turn (A B A B …), each in a process of its own. Wall time is that of training alone, from the
loaded model on; "processor" is its processor time, which a shared machine sways less; "whole" counts the process from its
start. Memory is the peak resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("peft", "omnilora", "omnilora padded", "peft padding-free")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 8  # an update


def rows(count: int, vocabulary: int, quick: bool) -> list[dict[str, list[int]]]:
    """Token ids and labels; lengths exp(N(μ, 0.7)) with a median of 100 tokens, at most 512."""
    draw, made = random.Random(0), []
    for _ in range(count):
        n = max(8, min(512, int(draw.lognormvariate(2.5 if quick else 4.6, 0.7))))
        ids = [draw.randrange(5, vocabulary) for _ in range(n)]
        made.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    return made


def model_of(quick: bool) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    if not quick:
        from omnilora.demo.sources import load_smollm2

        return load_smollm2()[0]
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      vocab_size=2000)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def omnilora(model: Any, data: list[Any], padding: bool) -> list[float]:
    import omnilora as ol
    from omnilora.training.batches import Collate
    from omnilora.training.encode import Example
    from omnilora.training.fit import _run
    from omnilora.training.losses import task_of

    ol.adapt(model, ol.method("lora", r=8, alpha=16.0))
    examples = [Example(r["input_ids"], r["labels"]) for r in data]
    config = ol.TrainConfig(batch_size=ROWS, lr=5e-5, schedule="linear", warmup=0, padding=padding)
    report = _run(model, examples, None, Collate(0), task_of("causal-lm", padding=padding), config, None)
    return report.losses


def peft(model: Any, data: list[Any], free: bool) -> list[float]:
    import peft as theirs
    import torch
    import transformers

    if free:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    model = theirs.get_peft_model(model, theirs.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(r["input_ids"]) for r in batch)
        fill = lambda xs, v: torch.tensor([x + [v] * (width - len(x)) for x in xs])  # noqa: E731
        ids = [r["input_ids"] for r in batch]
        return {"input_ids": fill(ids, 0), "labels": fill([r["labels"] for r in batch], -100),
                "attention_mask": fill([[1] * len(i) for i in ids], 0)}  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, per_device_train_batch_size=ROWS, num_train_epochs=1, report_to=[],
                                              save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True)  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=data, data_collator=(
            transformers.DataCollatorWithFlattening() if free else collate))  # fmt: skip
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def work(variant: str, steps: int, quick: bool, threads: int | None) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())
    model = model_of(quick)
    data = rows(steps * ROWS, model.config.vocab_size, quick)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, spent = time.perf_counter(), time.process_time()
    name, _, how = variant.partition(" ")
    losses = omnilora(model, data, how == "padded") if name == "omnilora" else peft(model, data, bool(how))
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - spent, "losses": losses, "loaded MiB": loaded / 1024,
            "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="updates of a job")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a small model, for a look")
    parser.add_argument("--only", help="variants, comma-separated")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(work(args.variant, args.steps, args.quick, args.threads)))
        return
    chosen = args.only.split(",") if args.only else list(VARIANTS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name in chosen:
            command = [sys.executable, __file__, "--variant", name, "--steps", str(args.steps), *["--quick"] * args.quick,
                       *(["--threads", str(args.threads)] if args.threads else [])]  # fmt: skip
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}:\n{done.stderr[-2000:]}")
            made = json.loads(done.stdout.strip().splitlines()[-1]) | {"whole": time.perf_counter() - began}
            found[name].append(made)
            loss = statistics.mean(made["losses"])
            print(f"{name:20s} {made['seconds']:8.2f} s  processor {made['processor']:8.2f} s  "
                  f"{made['peak MiB']:8.0f} MiB  whole {made['whole']:8.2f} s  loss {loss:.4f}", flush=True)  # fmt: skip
        table = {name: summary(runs, found[chosen[0]]) for name, runs in found.items()}
        if args.out is not None:  # after every round: a round takes minutes
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine(args.threads), "steps": args.steps, "quick": args.quick, "jobs": table},
                                           indent=1) + "\n")  # fmt: skip
    print(f"\nratio to {chosen[0]}: median (min – max)")
    for name, row in table.items():
        print(f"{name:20s} " + "   ".join(f"{k} {v[0]:.3f} ({v[1]:.3f} – {v[2]:.3f})" for k, v in row["ratios"].items()))


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ratios to the same round of ``base`` as (median, min, max)."""
    out: dict[str, Any] = {k: statistics.median(r[k] for r in runs) for k in ("seconds", "processor", "whole", "peak MiB", "loaded MiB")}
    each = {k: [a[k] / b[k] for a, b in zip(runs, base)] for k in ("seconds", "processor", "whole", "peak MiB")}
    out["ratios"] = {k: [statistics.median(v), min(v), max(v)] for k, v in each.items()}
    out["mean loss"] = statistics.mean(runs[-1]["losses"])
    return out


def machine(threads: int | None) -> dict[str, Any]:
    import importlib.metadata as installed

    import torch

    return {"threads": threads or torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
            **{name: installed.version(name) for name in ("torch", "transformers", "peft", "accelerate")}}  # fmt: skip


if __name__ == "__main__":
    main()
