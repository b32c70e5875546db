"""Every benchmark against PEFT, one after the other: training steps, serving, overheads, a whole job.

    python bench/run.py [--quick] [--only training,serving,overhead,job] [--out bench/results]

Each part is a script of its own with options of its own (`python bench/training.py --help`) and writes OUT/PART.json, from which
docs/benchmark.md is made. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("training", "serving", "overhead", "job")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, nothing kept: whether everything runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.quick else args.out
        for part in args.only.split(","):
            print(f"\n== {part}", flush=True)
            command = [sys.executable, str(HERE / f"{part}.py"), "--out", str(out / f"{part}.json"), *(["--quick"] if args.quick else [])]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
