"""Runs trials one at a time, each in a fresh child process: ``python -m omnilora.comparison.worker FOLDER``.

Reads a line of JSON a trial from stdin and answers a line with the child's exit code. The libraries are imported once;
where processes can fork, a trial starts in milliseconds, and its memory is its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import omnilora.training.fit  # noqa: F401  (imported before children are made)
from omnilora.comparison.plan import Plan
from omnilora.comparison.trial import restored, run
from omnilora.core.method import entries

# What a trial would import: done once here. Nothing is computed before children are made, for torch's threads do not
# survive a fork.
IMPORTED = ("accelerate", "transformers.modeling_utils", "torch._dynamo", "peft", "bitsandbytes", "rich.progress",
            "transformers.models.auto.modeling_auto", "scipy.optimize")  # fmt: skip


def _child(plan: dict[str, Any], folder: str, trial: dict[str, Any], path: str) -> None:
    run(Plan.from_dict(plan), restored(trial), Path(folder), Path(path))


def serve(folder: str) -> None:
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    entries()
    plan = json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    answers = sys.stdout
    sys.stdout = sys.stderr
    how = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(how)
    for line in sys.stdin:
        asked = json.loads(line)
        child = context.Process(target=_child, args=(plan, folder, asked["trial"], asked["path"]))  # type: ignore[attr-defined]
        child.start()
        child.join()
        print(json.dumps({"code": child.exitcode}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
