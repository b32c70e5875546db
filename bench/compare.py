"""All methods on two real tasks with the 22 M encoder, under one budget: ``python bench/compare.py [topics] [functions]``.

topics: docstring → chapter of the library reference (classification); functions: docstring → signature (retrieval among
240 candidates). Both are read from the running interpreter's standard library. 60 updates of 8 (40 for functions, whose
rows are pairs), three seeds, three learning rates a method (for functions wider apart: the rates of topics proved too
low for most). Goes on where it was interrupted; figures go to bench/results/compare-TASK.json, from which docs/tables.py
makes a page; the report lies in FOLDER/TASK/report.html.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from omnilora.cli import cards
from omnilora.comparison import compare
from omnilora.demo import functions, topics
from omnilora.training.config import TrainConfig

APART = {"xlora"}  # is made of adapters that are trained before it
RATES = {"topics": (1 / 3, 1.0, 3.0), "functions": (0.5, 2.0, 8.0)}  # factors on each method's default
STEPS = {"topics": 60, "functions": 40}
RESULTS = Path(__file__).parent / "results"


def methods() -> list[str]:
    """Every method that a training command can run on its own."""
    return [c["key"] for c in cards.read() if "trains_lm" in c["tags"] and c["key"] not in APART]


def run(task: str, folder: Path, workers: int, rounds: int) -> None:
    train, test = (topics if task == "topics" else functions).examples(seed=0)
    kind = "classification" if task == "topics" else "embedding"
    config = TrainConfig(model="package:minilm", task=kind, data=train, batch_size=8, max_length=48, dtype="fp32",
                         threads=1)  # fmt: skip
    ends = ["frozen", "full"] if task == "topics" else ["full"]
    compare([*ends, *methods()], config=config, test=test, steps=STEPS[task], rates=RATES[task], workers=workers, rounds=rounds,
            output=folder / task, metric="accuracy")  # fmt: skip
    shutil.copyfile(folder / task / "results.json", RESULTS / f"compare-{task}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="topics, functions; default: both")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare-all"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for task in args.tasks or ["topics", "functions"]:
        run(task, args.folder, args.workers, args.rounds)


if __name__ == "__main__":
    main()
