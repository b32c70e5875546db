"""What a training run is, in one value: read from YAML or keywords, checked before anything is loaded, written back."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnilora.core.targets import check_patterns
from omnilora.errors import BadValue, UnknownName, nearest, need
from omnilora.io.yaml import read_yaml

TASKS = ("causal-lm", "classification", "embedding")
OPTIMIZERS = ("adamw", "paged_adamw", "adam", "sgd", "adagrad", "rmsprop")
SCHEDULES = ("cosine", "linear", "constant")
METRICS = {"causal-lm": ("loss", "perplexity"), "classification": ("loss", "accuracy", "macro_f1"),
           "embedding": ("loss", "accuracy")}  # fmt: skip
SESSION = ("stop_at", "resume", "overwrite")  # fields of one session, which a run's config.yaml does not keep
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class TrainConfig:
    """Every field has a default that works; ``None`` stands for "decided from the model or the data"."""

    model: str = "package:smollm2"  # Hub name, local folder, .gguf file, package:smollm2 or package:minilm
    method: str = "lora"  # key of a method, see `omnilora list`
    hyper: dict[str, Any] = field(default_factory=dict)  # hyper-parameters of the method
    targets: list[str] | str | None = None  # patterns of layers to adapt; None: the method's own choice
    exclude: list[str] | None = None  # patterns taken out of the targets
    overrides: dict[str, dict[str, Any]] | None = None  # pattern → changed hyper-parameters
    unfreeze: list[str] | None = None  # layers or parameters that train as the adapter's own copies
    bias: str | None = None  # "none", "all" or "lora_only"
    tied: str | None = None  # adapter of a weight shared by embedding and head: "embedding" or "both"
    task: str = "causal-lm"  # "causal-lm", "classification" or "embedding"
    data: str | list[Any] | None = None  # .jsonl, .csv or .parquet file, folder, Hub name[:split], list of dicts
    eval_data: str | float | list[Any] | None = None  # the same, or the fraction of data held out
    messages: str | None = None  # column of chat messages; None: found automatically
    prompt: str | None = None  # column of prompts; None: found automatically
    completion: str | None = None  # column of completions; None: found automatically
    text: str | None = None  # column of plain text; None: found automatically
    label: str | None = None  # column of labels (or scores of pairs); None: found automatically
    labels: list[Any] | None = None  # the label set, in order; None: the labels of the training data
    tokens: list[str] | None = None  # tokens added to the tokenizer and learned with the adapter
    max_length: int | None = None  # tokens a row; None: 512, or what the model can take if that is less
    packing: bool = False  # several rows in one sequence, without attention or loss across them
    padding: bool = False  # pad the rows of a batch even where they can be joined without (causal-lm)
    mask_prompt: bool = True  # learn completions only
    template: str = "auto"  # "chat", "plain", a Jinja file; "auto": chat where the tokenizer has a template
    temperature: float = 0.05  # of the contrastive loss on embeddings
    epochs: float = 1.0  # passes over the data; steps wins
    steps: int | None = None  # optimizer updates of the whole run
    stop_at: int | None = None  # end this session after that update; the schedule still spans the whole run
    batch_size: int = 8  # rows a forward, in each process
    accumulate: int = 1  # forwards an update
    lr: float | None = None  # learning rate; None: 1e-3 below 500 M parameters, else 2e-4, times the method's own factor
    schedule: str = "cosine"  # "cosine", "linear" or "constant"
    warmup: float = 0.05  # below 1: fraction of the run; from 1 on: updates
    weight_decay: float = 0.0  # of AdamW
    optimizer: str = "adamw"  # "adamw", "paged_adamw" (moments in a mapped file), "adam", "sgd" …; a method's own wins
    clip: float | None = 1.0  # largest norm of the gradient; None: not clipped
    seed: int = 0  # of initialization, order of the data and dropout
    dtype: str = "auto"  # of the base: "auto" (bf16 where the processor computes in it), "fp32", "bf16", "fp16"
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    load_in_4bit: bool = False  # hold the base in NF4
    eval_every: int | None = None  # updates between evaluations; None: five a run
    save_every: int | None = None  # updates between checkpoints; None: at the end
    keep: int = 2  # newest checkpoints kept (the best one is kept besides)
    best: str | None = None  # metric that chooses the checkpoint the run ends with; None: the last
    patience: int | None = None  # evaluations without progress before the run stops
    workers: int = 0  # processes that prepare batches
    trackers: list[Any] = field(default_factory=list)  # "tensorboard", "wandb" … (accelerate)
    log_every: int = 10  # updates between lines of progress
    device_map: str | dict[str, Any] | None = None  # of transformers: where the layers go
    output: str | None = None  # folder of the run; None: runs/<method> for `train`, nothing written by `fit`
    resume: bool | str = False  # "auto": newest checkpoint in output, if any; or a checkpoint's folder
    overwrite: bool = False  # replace the run that output holds
    threads: int | None = None  # CPU threads; None: torch's choice

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = _coerced(getattr(self, f.name), hints[f.name])
            if not _fits(value, hints[f.name]):
                raise BadValue(f"{f.name} = {value!r} is a {type(value).__name__}.", f"Give {_wanted(hints[f.name])}.")
            object.__setattr__(self, f.name, value)
        self._ranges()
        self._relations()

    def _ranges(self) -> None:
        _one_of(self, "task", TASKS)
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "optimizer", OPTIMIZERS)
        _one_of(self, "dtype", ("auto", "fp32", "bf16", "fp16"))
        _one_of(self, "bias", (None, "none", "all", "lora_only"))
        _one_of(self, "tied", (None, "embedding", "both"))
        for name in ("targets", "exclude", "overrides", "unfreeze"):
            check_patterns(getattr(self, name) or (), name)
        for name in ("batch_size", "accumulate", "keep", "log_every"):
            _least(self, name, 1)
        for name in ("steps", "stop_at", "eval_every", "save_every", "patience", "threads"):
            _least(self, name, 1)
        for name, low in (("max_length", 2), ("workers", 0), ("seed", 0), ("warmup", 0), ("weight_decay", 0)):
            _least(self, name, low)
        for name in ("epochs", "lr", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadValue(f"{name} = {value!r}.", "Give a finite number above 0.")
        if isinstance(self.eval_data, float) and not 0 < self.eval_data < 1:
            raise BadValue(f"eval_data = {self.eval_data!r}.", "Give a fraction between 0 and 1, or data.")
        if self.template not in ("auto", "chat", "plain") and not Path(self.template).is_file():
            raise BadValue(f"template = {self.template!r} is no file.", "Give 'auto', 'chat', 'plain' or a Jinja file.")

    def _relations(self) -> None:
        if self.packing and self.task != "causal-lm":
            raise BadValue(f"packing = True with task = {self.task!r}.", "Only causal-lm packs rows.")
        metrics = METRICS[self.task]
        if self.best is not None and self.best not in metrics:
            raise UnknownName(f"best = {self.best!r} is no metric of {self.task}.", nearest(self.best, metrics))
        if self.labels is not None and self.task != "classification":
            raise BadValue(f"labels are given with task = {self.task!r}.", "Set task = 'classification'.")
        if self.labels is not None and len(set(map(str, self.labels))) != len(self.labels):
            raise BadValue(f"labels = {self.labels!r} repeats a label.", "Name each once.")
        if self.tokens and self.task == "embedding":
            raise BadValue("tokens are given with task = 'embedding'.", "Added tokens are learned by language models.")
        if self.resume and self.overwrite:
            raise BadValue(f"resume = {self.resume!r} and overwrite = True exclude each other.", "Drop one.")
        if self.stop_at is not None and self.steps is not None and self.stop_at > self.steps:
            raise BadValue(f"stop_at = {self.stop_at} is beyond steps = {self.steps}.", "Lower it.")

    def check_evaluation(self, present: bool) -> None:
        """Fields that need evaluation data. Raises :class:`BadValue` naming the first."""
        if present:
            return
        for name in ("best", "patience", "eval_every"):
            if getattr(self, name) is not None:
                raise BadValue(f"{name} = {getattr(self, name)!r} needs eval_data.", "Give eval_data, or drop it.")

    def check_output(self) -> None:
        """Fields that need a folder to write to."""
        for name in ("save_every", "best", "resume", "overwrite"):
            if self.output is None and getattr(self, name) not in (None, False):
                raise BadValue(f"{name} = {getattr(self, name)!r} needs output.", "Name the folder of the run.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """A configuration from plain data. An unknown key raises :class:`UnknownName` with the nearest."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise UnknownName(f"No configuration key {str(key)[:80]!r}.", _remedy(data, str(key)[:80], known))
        return cls(**data)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **changes: Any) -> TrainConfig:
        """Read a YAML file; ``changes`` win over the file."""
        data = read_yaml(path)
        if data is not None and not isinstance(data, dict):
            raise BadValue(f"{path} holds a {type(data).__name__}.", "Give keys and values.")
        return cls.from_dict({**(data or {}), **changes})

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The complete configuration as YAML, also written to ``path``. Rows given as objects are named, not copied."""
        yaml = need("yaml", "train")
        data = self.to_dict()
        for key in ("data", "eval_data"):
            if isinstance(data[key], list):
                data[key] = None
        data["trackers"] = [t if isinstance(t, str) else type(t).__name__ for t in self.trackers]
        text = yaml.safe_dump(_plain(data), sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        return text

    def stored(self) -> TrainConfig:
        """The run's configuration without what is said to one session only (:data:`SESSION`)."""
        return self.replace(**{f.name: f.default for f in dataclasses.fields(self) if f.name in SESSION})

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values. Unknown keys raise."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "keys and values"}


def _wanted(hint: Any) -> str:
    """A field's type in words."""
    inside = {list[str]: "a list of texts", dict[str, dict[str, Any]]: "patterns with their changed keys"}
    named = [inside.get(o) or WORDS.get(typing.get_origin(o) or o, str(o)) for o in _options(hint) if o is not type(None)]
    return " or ".join(dict.fromkeys(named))


def _remedy(data: Mapping[str, Any], key: str, known: list[str]) -> str:
    """Where an unknown key belongs: hyper-parameters of the method are given under ``hyper``."""
    from omnilora.core.method import entries

    name = data.get("method", TrainConfig.method)
    made = entries().get(name) if isinstance(name, str) else None
    if made is not None and key in inspect.signature(made.make).parameters:
        return f"It is a hyper-parameter of {name}: write hyper.{key} (in a file: hyper: {{{key}: …}})."
    return nearest(key, known)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _coerced(value: Any, hint: Any) -> Any:
    """Numbers that YAML reads as text (``1e-3``), paths, tuples, whole numbers in fields of floats."""
    options = _options(hint)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return dict(value)
    if float in options and bool not in options:
        if isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
    return value


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        if option is Any or (option is type(None) and value is None):
            return True
        if origin is list and isinstance(value, list):
            args = typing.get_args(option)
            if all(_fits(v, args[0]) for v in value):
                return True
        elif origin is dict and isinstance(value, dict):
            args = typing.get_args(option)
            if all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()):
                return True
        elif origin in (int, float) and isinstance(value, bool):
            continue
        elif isinstance(origin, type) and isinstance(value, origin):
            return True
    return False


def _one_of(config: TrainConfig, name: str, allowed: tuple[str | None, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise BadValue(f"{name} = {getattr(config, name)!r}.", nearest(getattr(config, name), filter(None, allowed)))


def _least(config: TrainConfig, name: str, low: float) -> None:
    value = getattr(config, name)
    if value is not None and not (math.isfinite(value) and value >= low):
        raise BadValue(f"{name} = {value!r}.", f"Give a number ≥ {low}.")
