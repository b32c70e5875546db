"""The folder of a run: ``config.yaml``, ``report.json``, ``adapter/`` and ``checkpoints/``; what may begin in it.

A run begins in an empty folder, goes on in its own, and replaces another only where that is asked for.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from omnilora.core import files
from omnilora.errors import BadValue, FileRefused
from omnilora.io.places import check_folder
from omnilora.training import checkpoint

CONFIG, REPORT, ADAPTER, CHECKPOINTS = "config.yaml", "report.json", "adapter", "checkpoints"
RESULTS = (CONFIG, REPORT, ADAPTER, CHECKPOINTS)


def check(config: Any) -> None:
    """Whether the run that ``config`` describes may begin in its output. Nothing is changed.

    Raises:
        BadValue: it cannot be written, it holds something that the run would replace, or there is nothing to resume.
    """
    if config.output is None or int(os.environ.get("RANK") or 0):
        return
    home = Path(config.output)
    check_folder(home)
    wanted = config.resume
    if wanted is True or wanted == "auto":
        if checkpoint.found(home / CHECKPOINTS):
            return
        if wanted is True:
            raise nothing_to_resume(home)
    elif wanted:
        if not (Path(str(wanted)) / checkpoint.TRAINER).is_file():
            raise FileRefused(f"resume = {str(wanted)!r} is no checkpoint.",
                              f"Give a folder of {home / CHECKPOINTS}, 'auto' or True.")  # fmt: skip
        if Path(str(wanted)).resolve().is_relative_to(home.resolve()):
            return
    if Path(str(config.model)).is_dir() and Path(str(config.model)).resolve() == home.resolve():
        raise BadValue(f"output = {config.output!r} is the folder of the model.", "Name another folder.")
    if not config.overwrite:
        _check_empty(home, bool(wanted))


def nothing_to_resume(home: Path) -> BadValue:
    """The error of a folder without a checkpoint."""
    if not (home / CONFIG).is_file() and not (home / REPORT).is_file():
        return BadValue(f"{home} holds no run to resume: it holds no checkpoint.", "Name the folder of a run, or leave resume out.")
    return BadValue(f"{home} holds no checkpoint, so that there is nothing to resume.",
                    "Start again with overwrite = True (--overwrite); save_every = N writes checkpoints on the way.")  # fmt: skip


def _check_empty(home: Path, may_begin: bool) -> None:
    """``may_begin``: files that are no result of a run do not matter."""
    inside = sorted(p.name for p in home.iterdir()) if home.is_dir() else []
    run = [name for name in RESULTS if name in inside]
    if may_begin and not {REPORT, ADAPTER} & set(run):
        return
    if run:
        raise BadValue(f"output = {str(home)!r} holds a run already ({', '.join(run)}).",
                       "Name another folder, go on with resume = True (--resume), "
                       "or replace that run with overwrite = True (--overwrite).")  # fmt: skip
    if inside:
        raise BadValue(f"output = {str(home)!r} holds other files ({', '.join(inside[:4])}{' …' if inside[4:] else ''}).",
                       "Name a new or an empty folder; overwrite = True (--overwrite) writes beside them.")  # fmt: skip


def begin(config: Any, resumed: bool) -> None:
    """A session begins in ``config.output``: what earlier ones left and this one will write anew is removed.

    ``resumed``: the checkpoints and the adapter are this run's own, and stay.
    """
    home = Path(config.output)
    (home / REPORT).unlink(missing_ok=True)
    if resumed or not config.overwrite:
        return
    (home / CONFIG).unlink(missing_ok=True)
    for name in files.OWN:
        (home / ADAPTER / name).unlink(missing_ok=True)
    for old in checkpoint.found(home / CHECKPOINTS):
        checkpoint.remove(old)
    for name in (ADAPTER, CHECKPOINTS):
        if (home / name).is_dir() and not any((home / name).iterdir()):
            (home / name).rmdir()


def command(home: str | os.PathLike[str]) -> str:
    """What resumes the run in a folder: a command where the folder holds the configuration, else Python."""
    if (Path(home) / CONFIG).is_file():
        return f"omnilora train --output {shlex.quote(str(home))} --resume"
    return f"ol.fit(…, output={str(home)!r}, resume='auto')"


def step_of(path: str | os.PathLike[str]) -> int:
    """The number of updates that a checkpoint's folder is named after."""
    return int(Path(path).name.rpartition("-")[2])


def interrupted(home: Path | None, step: int) -> list[str]:
    """What to say of a session that was interrupted after ``step`` updates: what is kept, what is lost, what goes on."""
    if home is None:
        return [f"Interrupted after step {step}; nothing was written."]
    there = checkpoint.found(home / CHECKPOINTS)
    if not there:
        return [f"Interrupted after step {step}. There is no checkpoint yet: all of it is lost.",
                "save_every = N writes checkpoints on the way; start again with overwrite (--overwrite)."]  # fmt: skip
    lost = step - step_of(there[-1])
    tail = "nothing is lost." if lost <= 0 else f"{lost} step{'s' if lost > 1 else ''} since {'are' if lost > 1 else 'is'} lost."
    return [f"Interrupted after step {step}. The newest checkpoint is {there[-1]}: {tail}", f"Go on: {command(home)}"]
