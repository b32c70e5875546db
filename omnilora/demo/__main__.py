"""The main job on real models, end to end: ``python -m omnilora.demo [--quick] [--seed N] [--folder PATH]``.

1. SmolLM2-135M-Instruct answers questions with SQL: measured before (zero and three shots), fine-tuned with LoRA,
   measured after, saved, loaded in PEFT with equal outputs, merged, asked again.
2. MiniLM sorts docstrings into chapters: LoRA and a fresh head, saved, loaded, equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import omnilora as ol
from omnilora.demo import sources, sql, topics
from omnilora.errors import OmniloraError
from omnilora.training.evaluate import generate
from omnilora.training.models import dtype_of

SETTINGS = {"steps": 90, "batch_size": 8, "lr": 2e-3, "warmup": 0.1, "schedule": "cosine", "max_length": 160}


class Stopper:
    """Ends an answer once every row has written its ``;``."""

    def __init__(self, tokenizer: Any) -> None:
        self.ends = [i for i in range(len(tokenizer)) if ";" in tokenizer.decode([i])]

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        last = ids[:, -1:]
        return torch.isin(last, torch.tensor(self.ends, device=ids.device)).any(-1)


def answers(model: Any, tokenizer: Any, prompts: list[str], batch: int = 50) -> list[str]:
    return generate(model, tokenizer, prompts, max_new_tokens=48, batch_size=batch, stopping_criteria=[Stopper(tokenizer)])


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, str]], prompts: list[str] | None = None) -> tuple[float, list[str]]:
    """Share of rows whose query gives the reference's result, and the answers."""
    said = answers(model, tokenizer, prompts or [r["prompt"] for r in rows])
    connection = sql.database()
    return sum(sql.judge(connection, a, r["completion"]) for a, r in zip(said, rows, strict=True)) / len(rows), said


def questions(console: Console, folder: Path, seed: int, quick: bool) -> float:
    """The language model's part; returns the accuracy after training."""
    train, test = sql.examples(seed=0)
    if quick:
        train, test = train[:64], test[:8]
    dtype = dtype_of("auto")
    model, tokenizer = sources.load_smollm2(dtype)
    console.rule(f"1  SmolLM2-135M-Instruct: questions → SQLite queries  ({len(train)} to learn, {len(test)} to answer; generated)")
    shown = test[:: max(1, len(test) // 3)][:3]
    table = Table("", "accuracy", "seconds", title="share of held-out questions whose query gives the right result")
    start = time.perf_counter()
    zero, before = accuracy(model, tokenizer, test)
    table.add_row("base, question alone", f"{zero:.3f}", f"{time.perf_counter() - start:.0f}")
    start, few = time.perf_counter(), test[: 100 if not quick else 4]
    three, _ = accuracy(model, tokenizer, few, [sql.three_shot(r["prompt"], train) for r in few])
    table.add_row(f"base, three examples (first {len(few)})", f"{three:.3f}", f"{time.perf_counter() - start:.0f}")

    torch.manual_seed(seed)
    ol.adapt(model, ol.method("lora", r=8, alpha=16.0))
    options = {**SETTINGS, "steps": 2} if quick else SETTINGS
    report = ol.fit(model, train, tokenizer=tokenizer, seed=seed, log_every=15, **options)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * report.trainable / total
    table.add_row(f"trained {report.steps} steps, {report.trainable:,} parameters ({share:.1f} %)", "", f"{report.seconds:.0f}")
    start = time.perf_counter()
    tuned, after = accuracy(model, tokenizer, test)
    table.add_row("with the adapter", f"{tuned:.3f}", f"{time.perf_counter() - start:.0f}")
    console.print(table)
    for row in shown:
        i = test.index(row)
        console.print(f"[bold]{row['prompt'].splitlines()[-1]}[/bold]\n  before: {before[i][:100]!r}\n  after:  {after[i]!r}")

    path = ol.save(model, folder / "sql-adapter")
    size = sum(f.stat().st_size for f in path.iterdir()) / 2**20
    console.print(f"saved: {path} ({size:.1f} MiB)")
    again = _agree_with_peft(console, tokenizer, path, shown[0]["prompt"])
    probe = tokenizer(shown[0]["prompt"], return_tensors="pt")
    merged = ol.merge(again, probe=lambda m: m(**probe).logits)
    console.print(f"merged (fp32): outputs change by {merged.largest:.1e} at most, {merged.mean:.1e} on average")
    console.print(f"the merged model says: {answers(again, tokenizer, [shown[0]['prompt']])[0]!r}")
    return tuned


def _agree_with_peft(console: Console, tokenizer: Any, path: Path, prompt: str) -> Any:
    """Both libraries on an fp32 base, from the same file; returns our model."""
    import peft

    plain, _ = sources.load_smollm2(torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(path)).eval()
    again, _ = sources.load_smollm2(torch.float32)
    verdict = ol.load(again.eval(), path)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        a, b = theirs(**ids).logits, again(**ids).logits
    gap = float((a - b).norm() / a.norm())
    console.print(f"PEFT {peft.__version__} loads the folder: outputs differ by {gap:.1e} relative; "
                  f"base in fp32: {verdict['base']}, distance {verdict['distance']:.1e}")  # fmt: skip
    if gap > 1e-5:
        raise SystemExit(f"PEFT and omnilora disagree: {gap}")
    return again


def chapters(console: Console, folder: Path, seed: int, quick: bool) -> float:
    """The encoder's part; returns the accuracy after training."""
    from omnilora.training.config import TrainConfig
    from omnilora.training.fit import train

    rows, test = topics.examples(seed=0)
    if quick:
        rows, test = rows[:48], test[:12]
    console.rule(f"2  MiniLM: docstring → chapter of the library  ({len(rows)} to learn, {len(test)} to answer; real)")
    config = TrainConfig(model="package:minilm", task="classification", method="lora", hyper={"r": 8, "alpha": 16.0},
                         data=rows, eval_data=test, labels=sorted({r["label"] for r in rows}), lr=1e-3, batch_size=16,
                         steps=4 if quick else 190, max_length=96, seed=seed, dtype="fp32", log_every=30,
                         output=str(folder / "chapters"), overwrite=True)  # fmt: skip
    report = train(config)
    base = topics.baselines(rows, test)
    table = Table("", "accuracy", title="held-out modules")
    for name, value in base.items():
        table.add_row(name, f"{value:.3f}")
    tuned = report.evaluations[-1]["accuracy"]
    table.add_row(f"LoRA and head, {report.steps} steps, {report.seconds:.0f} s", f"{tuned:.3f}")
    console.print(table)
    return tuned


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m omnilora.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where adapters go (default: a temporary folder)")
    parser.add_argument("--only", choices=("questions", "chapters"))
    args = parser.parse_args()
    console = Console(width=110 if not sys.stdout.isatty() else None)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        try:
            if args.only != "chapters":
                questions(console, folder, args.seed, args.quick)
            if args.only != "questions":
                chapters(console, folder, args.seed, args.quick)
        except OmniloraError as error:
            console.print(f"[red]{error}[/red]")
            return 2
    console.print(f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
