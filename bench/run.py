"""Every benchmark against PEFT, several times over: training steps, serving, overheads, a whole job.

    python bench/run.py [--runs 3] [--quick] [--only training,serving,overhead,job] [--out bench/results]

Each section is a process of its own (`python bench/training.py --help`), so that none runs in memory that another has used. The last
run's figures go to OUT/PART.json, every run's to OUT/gates.json beside what is to be reached; docs/benchmark.md is made from them.
Nothing else should run on the machine meanwhile. Three runs take about three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine
from gates import judged, show

HERE = Path(__file__).parent
SECTIONS: dict[str, list[list[str]]] = {
    "training": [["--only", part] for part in ("fp32", "bf16", "nf4", "wide", "smollm", "sites", "methods")],
    "serving": [["--only", part, "--dtype", dtype] for dtype in ("fp32", "bf16") for part in ("decode", "prefill")] + [["--only", "load"]],
    "overhead": [[]],
    "job": [["--rounds", "1", "--steps", "6"]],
}


def one_run(parts: list[str], quick: bool, out: Path) -> dict[str, Any]:
    """The results of every part, by its name."""
    for part in parts:
        for section in SECTIONS[part]:
            print(f"\n== {' '.join((part, *section))}", flush=True)
            command = [sys.executable, str(HERE / f"{part}.py"), *section, "--out", str(out / f"{part}.json")]
            subprocess.run([*command, *(["--quick"] if quick else [])], check=True)
    return {part: json.loads((out / f"{part}.json").read_text()) for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small models, one run, few rounds, nothing kept: whether everything runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    parts, runs = args.only.split(","), []
    for i in range(1 if args.quick else args.runs):
        with tempfile.TemporaryDirectory() as scratch:
            if args.runs > 1 and not args.quick:
                print(f"\n==== run {i + 1} of {args.runs}")
            runs.append(one_run(parts, args.quick, Path(scratch)))
            if not args.quick:  # after every run: a stop loses one
                rows = judged(runs)
                show(rows)
                args.out.mkdir(parents=True, exist_ok=True)
                for part in parts:
                    shutil.copyfile(Path(scratch) / f"{part}.json", args.out / f"{part}.json")
                kept = args.out / "gates.json"
                others = json.loads(kept.read_text())["gates"] if kept.exists() else []
                others = [g for g in others if g["name"] not in {r["name"] for r in rows}]
                kept.write_text(json.dumps({"machine": machine(), "gates": [*rows, *others]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
