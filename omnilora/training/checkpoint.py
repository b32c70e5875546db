"""Checkpoints: everything a run needs to go on as if it had not stopped, in one atomic folder without pickles.

``step-000100/`` holds the adapter in omnilora's own format (``ol.load`` reads it), ``optimizer.safetensors`` (every
tensor of optimizer, rules and random states) and ``trainer.json`` (everything else).
"""

from __future__ import annotations

import copy
import math
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as encode
from torch import Tensor, nn

from omnilora.core import files
from omnilora.core.attach import TiedUse, hub_of, slots
from omnilora.core.run import Run
from omnilora.core.state import carried_weights, state
from omnilora.errors import FileRefused, OmniloraError, RunError, StateMismatch

TENSORS, TRAINER = "optimizer.safetensors", "trainer.json"
_NAME = re.compile(r"step-(\d{6,})")
_DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
                               torch.int16, torch.int8, torch.uint8, torch.bool)}  # fmt: skip


# -- nested values as JSON and tensors ---------------------------------------------------------------------------------


def flatten(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON data for ``value``; its tensors go to ``tensors`` under names that begin with ``at``."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else {"number": str(float(value))}
    if isinstance(value, Tensor):
        tensors[at] = value.detach().cpu().clone().contiguous()
        return {"tensor": at, "device": str(value.device)}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, list):
        return [flatten(v, f"{at}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, f"{at}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, (set, frozenset)):
        return {"set": [flatten(v, f"{at}.{i}", tensors) for i, v in enumerate(sorted(value, key=repr))]}
    if isinstance(value, Mapping):
        return {"items": [[flatten(k, f"{at}.key{i}", tensors), flatten(v, f"{at}.{k}", tensors)]
                          for i, (k, v) in enumerate(value.items())]}  # fmt: skip
    raise RunError(f"The state at {at} holds a {type(value).__name__}, which no checkpoint can keep.",
                   "state_dict() may hold numbers, text, tensors, lists, tuples, sets and dicts.")  # fmt: skip


def restore(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(data, list):
        return [restore(v, tensors) for v in data]
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        if data["tensor"] not in tensors:
            raise FileRefused(f"{TENSORS} lacks {data['tensor']!r}.", "The checkpoint is damaged.")
        return tensors[data["tensor"]].clone().to(data["device"])
    if "number" in data:
        return float(data["number"])
    if "array" in data:
        return np.array(data["array"], dtype=data["dtype"])
    if "dtype" in data:
        return _DTYPES[data["dtype"]]
    if "tuple" in data:
        return tuple(restore(v, tensors) for v in data["tuple"])
    if "set" in data:
        return {restore(v, tensors) for v in data["set"]}
    return {restore(k, tensors): restore(v, tensors) for k, v in data["items"]}


# -- random states -----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The global random states of this process."""
    made = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        made["cuda"] = torch.cuda.get_rng_state_all()
    return made


def set_random_state(saved: Mapping[str, Any]) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in saved["cuda"]])


def check_random_state(saved: Mapping[str, Any]) -> None:
    """Raises what Python, numpy or torch raise for a state that they would not take."""
    random.Random().setstate(saved["python"])
    np.random.RandomState().set_state(saved["numpy"])
    torch.Generator().set_state(saved["torch"])


# -- parameters by path ------------------------------------------------------------------------------------------------


def named(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's tensors once each, as ``site::name``."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for slot in slots(model, adapter):
        if not isinstance(slot.how, TiedUse):
            for name, t in slot.tensors():
                key = f"shared::{slot.shared[name]}" if name in slot.shared else f"{slot.site.name}::{name}"
                found.setdefault(id(t), (key, t))
    return {key: t for key, t in found.values()}


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The optimizer's state with parameters by path instead of by number."""
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    keys = [names.get(id(p), f"parameter {i}") for i, p in enumerate(flat)]
    return {**optimizer.state_dict(), "names": keys}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: Mapping[int, str]) -> None:
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    keys = [names.get(id(p), f"parameter {i}") for i, p in enumerate(flat)]
    if keys != saved.pop("names"):
        raise StateMismatch("The optimizer of the checkpoint has other parameters.",
                            "Resume with the same method, targets and hyper-parameters.")  # fmt: skip
    optimizer.load_state_dict(saved)


# -- the folder --------------------------------------------------------------------------------------------------------


def save(home: str | os.PathLike[str], run: Run, progress: Mapping[str, Any], randoms: list[dict[str, Any]]) -> Path:
    """Write ``home/step-…`` atomically; see :func:`write`."""
    return write(Path(home) / f"step-{run.step:06d}", run, progress, randoms)


def write(folder: str | os.PathLike[str], run: Run, progress: Mapping[str, Any], randoms: list[dict[str, Any]]) -> Path:
    """Write one checkpoint as ``folder``, atomically.

    Args:
        progress: position in the data, best figures, losses … (plain values or tensors).
        randoms: the random state of every process.
    """
    model, adapter = run.model, run.adapter
    value = state(model, adapter)
    parameters = named(model, adapter)
    names = {id(p): key for key, p in parameters.items()}
    tensors: dict[str, Tensor] = {}
    assert run.optimizer is not None
    body = flatten({
        "run": run.state_dict(), "random": randoms, "progress": dict(progress),
        "optimizer": optimizer_state(run.optimizer, names),
        "scheduler": None if run.scheduler is None else _scheduler_state(run.scheduler),
        "learning": {key: p.requires_grad for key, p in parameters.items()},
    }, "", tensors)  # fmt: skip
    content = {
        files.NATIVE: encode(files._ordered(value.everything())),
        files.MANIFEST: files._json(files.manifest(value, files.NATIVE)),
        TENSORS: encode(files._ordered(tensors)),
        TRAINER: files._json({"format": 1, "body": body}),
    }
    return files.write_folder(folder, content)


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}


def load(path: str | os.PathLike[str], run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Restore adapter, optimizer, scheduler and rules in place; returns (progress, random states).

    Nothing is changed before the whole folder has been read. Raises :class:`FileRefused` for a damaged one and
    :class:`StateMismatch` for one of another adapter.
    """
    folder = Path(path)
    if not (folder / TRAINER).is_file():
        raise FileRefused(f"{folder} is no checkpoint.", f"It has no {TRAINER}.")
    value = files.load_file(folder)
    tensors = files.read_tensors(folder / TENSORS)
    data = files.read_json(folder / TRAINER)
    if data.get("format") != 1:
        raise FileRefused(f"{TRAINER} has format {data.get('format')!r}.", "This version reads format 1.")
    with _refused_if_broken():
        body = restore(data["body"], tensors)
        progress, randoms = dict(body["progress"]), list(body["random"])
        for each in randoms:
            check_random_state(each)
        old = _held(run)
    try:
        with _refused_if_broken():
            weights = carried_weights(value, dict(run.model.named_modules()))
            load_adapter(run, value.flat(), value)
            for key, p in named(run.model, run.adapter).items():
                p.requires_grad_(bool(body["learning"][key]))
            _put(run, body["run"], body["optimizer"], body["scheduler"])
    except BaseException:
        _give_back(run, old)
        raise
    for put in weights:
        put()
    return progress, randoms


BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError, RecursionError)


@contextmanager
def _refused_if_broken() -> Iterator[None]:
    """What Python and torch say of damaged data, as a typed error."""
    try:
        yield
    except OmniloraError:
        raise
    except BROKEN as error:
        text = " ".join(str(error).split())[:200]
        raise FileRefused(f"{TRAINER} breaks the format: {type(error).__name__} {text}.", "It is damaged.") from error


def _put(run: Run, saved: dict[str, Any], optimizer: dict[str, Any], scheduler: dict[str, Any] | None) -> None:
    """Rules, optimizer and schedule as they were saved."""
    run.load_state_dict(saved)
    assert run.optimizer is not None
    load_optimizer(run.optimizer, optimizer, {id(p): key for key, p in named(run.model, run.adapter).items()})
    if run.scheduler is not None and scheduler is not None:
        run.scheduler.load_state_dict({**scheduler, "lr_lambdas": [None] * len(run.scheduler.lr_lambdas)})


def _held(run: Run) -> dict[str, Any]:
    """What :func:`load` changes, to be put back where it fails."""
    assert run.optimizer is not None
    parameters = named(run.model, run.adapter)
    names = {id(p): key for key, p in parameters.items()}
    return {
        "tensors": {k: (p.data, p.data.clone(), p.requires_grad) for k, p in parameters.items()},
        "slots": [(s, s.scale, dict(s.marks)) for s in slots(run.model, run.adapter)],
        "run": copy.deepcopy(run.state_dict()), "optimizer": copy.deepcopy(optimizer_state(run.optimizer, names)),
        "scheduler": None if run.scheduler is None else _scheduler_state(run.scheduler),
    }  # fmt: skip


@torch.no_grad()
def _give_back(run: Run, old: dict[str, Any]) -> None:
    for key, p in named(run.model, run.adapter).items():
        p.data, values, learns = old["tensors"][key]
        p.copy_(values)
        p.requires_grad_(learns)
    for slot, scale, marks in old["slots"]:
        slot.scale = scale
        slot.marks.clear()
        slot.marks.update(marks)
    _put(run, old["run"], old["optimizer"], old["scheduler"])
    hub_of(run.model).changed()


@torch.no_grad()
def load_adapter(run: Run, flat: Mapping[str, Tensor], value: Any) -> None:
    """Copy saved tensors, scales and marks into the adapter on the model."""
    parameters = named(run.model, run.adapter)
    if set(parameters) != set(flat):
        odd = sorted(set(parameters) ^ set(flat))
        raise StateMismatch(f"The checkpoint is of another adapter: {odd[:4]} are on one side only.",
                            "Resume with the same method, targets and hyper-parameters.")  # fmt: skip
    for key, p in parameters.items():
        if p.shape == flat[key].shape:
            p.copy_(flat[key])
        else:
            p.data = flat[key].to(device=p.device, dtype=p.dtype).clone()
    for slot in slots(run.model, run.adapter):
        saved = value.sites[slot.site.name]
        slot.scale = saved.scale
        kept = {k: v for k, v in slot.marks.items() if k == "optional"}
        slot.marks.clear()
        slot.marks.update({**saved.marks, **kept})
    hub_of(run.model).changed()


def found(home: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    folder = Path(home)
    if not folder.is_dir():
        return []
    named_so = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / TRAINER).is_file()]
    return [p for _, p in sorted(named_so)]


def prune(home: str | os.PathLike[str], keep: int, best: Path | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one."""
    for path in found(home)[:-keep]:
        if best is None or path.name != best.name:
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove one checkpoint."""
    shutil.rmtree(path, ignore_errors=True)
