"""``fit`` trains an adapted model; ``train`` does a whole run from a configuration to a folder."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, default_collate

from omnilora.core import attach
from omnilora.core.attach import find_hub, hub_of
from omnilora.core.files import save
from omnilora.core.method import Method, method, prepare
from omnilora.core.observe import Together
from omnilora.core.run import _the_adapter
from omnilora.core.targets import targets_from
from omnilora.errors import AttachError, BadValue, need
from omnilora.training import folder
from omnilora.training.batches import Collate, Feed, pack, to_device, two_parts
from omnilora.training.config import TrainConfig
from omnilora.training.data import Row, hold_out, label_set, read_rows
from omnilora.training.encode import check_rows, encode, room, set_template
from omnilora.training.loop import Loop, learning_rate
from omnilora.training.losses import Custom, OwnLoss, Task, block_mask, packing_mode, task_of
from omnilora.training.memory import kept_blocks
from omnilora.training.models import Loaded, load_parts, remember, targets_for
from omnilora.training.quiet import quiet_imports
from omnilora.training.report import FitReport

Loss = Callable[[nn.Module, Any], Any]
PROBED = 32  # batches that a method which decides from data may look at


def fit(
    model: nn.Module,
    data: Any,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    adapter: str | None = None,
    loss: Loss | None = None,
    config: TrainConfig | None = None,
    **options: Any,
) -> FitReport:
    """Train the adapter on ``model``, which ``ol.adapt`` has put there.

    Args:
        model: adapted; any nn.Module.
        data: with a tokenizer: a file, a folder, a Hub name or rows (see :mod:`omnilora.training.data`). Without:
            a Dataset or sequence of examples (batched by torch's default_collate), or a DataLoader.
        eval_data: the same, or the fraction of ``data`` to hold out.
        tokenizer: of the model, for text.
        adapter: name, where several are active.
        loss: (model, batch) → mean loss, or (mean loss, outputs). Without it and without a tokenizer the model
            must return its loss.
        config: a :class:`TrainConfig`; ``options`` are its fields and win.

    Returns: a :class:`FitReport`. Nothing is written unless ``output`` is given.
    """
    if not isinstance(model, nn.Module) or find_hub(model) is None:
        raise AttachError(f"{type(model).__name__} has no adapter.", "Call ol.adapt(model, method) first.")
    config = (config or TrainConfig()).replace(**options) if options or config is None else config
    eval_data = config.eval_data if eval_data is None else eval_data
    quiet_imports()
    config.check_evaluation(eval_data is not None)
    config.check_output()
    folder.check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if tokenizer is None:
        if isinstance(data, (str, Path)):
            raise BadValue(f"data = {str(data)!r} is text, and there is no tokenizer.", "Pass tokenizer = ….")
        if isinstance(eval_data, float):
            raise BadValue(f"eval_data = {eval_data} needs rows to split.", "Pass evaluation data of its own.")
        task: Task = Custom(loss) if loss is not None else OwnLoss()
        return _run(model, data, eval_data, default_collate, task, config, adapter)
    rows, held = _rows(data, eval_data, config)
    labels = _labels(model, rows, config) if config.task == "classification" else None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    report = _fit_rows(model, tokenizer, rows, held, labels, config, adapter, loss)
    if labels is not None:
        name = adapter or next(n for n, _ in hub_of(model).active)
        remember(model, name, {"labels": labels})
    return report


def _rows(data: Any, eval_data: Any, config: TrainConfig) -> tuple[list[Row], list[Row] | None]:
    rows = read_rows(data)
    if isinstance(eval_data, float):
        return hold_out(rows, eval_data, config.seed)
    return rows, None if eval_data is None else read_rows(eval_data, "validation")


def _labels(model: Any, rows: list[Row], config: TrainConfig) -> list[Any]:
    """The label set; a model that knows its labels by name decides their order."""
    if config.labels is not None:
        return list(config.labels)
    found = label_set(rows, config)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = [names[i] for i in sorted(names)]
    if set(map(str, found)) <= set(own):
        return own
    if own and len(own) < len(found):
        raise BadValue(f"The data has {len(found)} labels, the model {len(own)} classes.", "Load it with num_labels.")
    return found


def _fit_rows(model: Any, tokenizer: Any, rows: list[Row], held: list[Row] | None, labels: list[Any] | None,
              config: TrainConfig, adapter: str | None, loss: Loss | None = None,
              began: Callable[[], Any] | None = None) -> FitReport:  # fmt: skip
    length = room(model.config, config)
    made = encode(rows, tokenizer, config, length, labels)
    seen = None if held is None else encode(held, tokenizer, config, length, labels)
    task = Custom(loss) if loss is not None else task_of(config.task, config.temperature, config.padding)
    collate: Any = Collate(tokenizer.pad_token_id)
    examples = made.examples
    if config.packing:
        if packing_mode(model, len(tokenizer)) == "blocks":
            collate = _Blocks(tokenizer.pad_token_id, model.dtype)
        examples = pack(examples, length)
    report = _run(model, examples, None if seen is None else seen.examples, collate, task, config, adapter, began)
    report.truncated = made.truncated
    return report


class _Blocks(Collate):
    """Packed batches with a 4-D mask, for models that do not read position ids as pieces."""

    def __init__(self, pad: int, dtype: torch.dtype) -> None:
        super().__init__(pad)
        self.dtype = dtype

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        if "position_ids" in batch:
            batch["blocks"] = block_mask(batch["position_ids"], self.dtype)
        return batch


def _run(model: nn.Module, data: Any, eval_data: Any, collate: Any, task: Task, config: TrainConfig,
         adapter: str | None, began: Callable[[], Any] | None = None) -> FitReport:  # fmt: skip
    def feed(rank: int, world: int) -> Feed:
        return Feed(data, collate, config.batch_size, config.seed, config.workers, rank, world)

    name = _the_adapter(model, adapter)
    share = max((r.other_share for r in hub_of(model).values["methods"][name].rules), default=0.0)
    second = None
    if share:
        data, apart = _set_apart(data, share, config)

        def second(rank: int, world: int) -> Feed:
            return Feed(apart, collate, config.batch_size, config.seed, config.workers, rank, world)

    held = None if eval_data is None else Feed(eval_data, collate, config.batch_size, config.seed)
    if isinstance(data, DataLoader) and config.batch_size != TrainConfig.batch_size:
        warnings.warn("batch_size is that of the DataLoader.", stacklevel=3)
    with kept_blocks():
        return Loop(model, feed, task, config, adapter, held, second, began).go()


def _set_apart(data: Any, share: float, config: TrainConfig) -> tuple[Any, Any]:
    """The training data in two parts by the run's seed: what updates learn from, and what rules ask for."""
    if isinstance(data, DataLoader) or not hasattr(data, "__len__"):
        raise BadValue("This method divides the training data, which a DataLoader does not let it.", "Pass the data set.")
    learned, apart = two_parts(len(data), share, config.seed)
    return Subset(data, learned), Subset(data, apart)


# -- a whole run -------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> FitReport:
    """Load, adapt, train, save: ``output/{adapter/, config.yaml, report.json, checkpoints/}``.

    Everything that can be checked without the model is checked before it is loaded.
    """
    return trained(config.replace(output=config.output or f"runs/{config.method}"), say=True)[1]


def trained(config: TrainConfig, rate: float = 1.0, say: bool = False) -> tuple[Loaded, FitReport, TrainConfig]:
    """A whole run: (the trained model with its tokenizer, the report, the configuration with nothing left open).

    Args:
        rate: a factor on the learning rate.
        say: a line on stderr before the model is loaded.

    Without ``config.output`` nothing is written.
    """
    made = method(config.method, **config.hyper)
    if config.data is None:
        raise BadValue("data is not given.", "Give a file, a folder or a Hub name.")
    config.check_evaluation(config.eval_data is not None)
    config.check_output()
    folder.check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows, held = _rows(config.data, config.eval_data, config)
    labels = label_set(rows, config) if config.task == "classification" else None
    for each in (rows, held or ()):
        check_rows(each, config, labels)
    parts = load_parts(config, labels, say)
    length = room(parts.model.config, config)
    template = config.template if config.task != "causal-lm" else _template(parts, config)
    config = config.replace(labels=labels, max_length=length, template=template,
                            lr=rate * learning_rate(parts.model, config, made.rate),
                            hyper=_plain({**made.hyper, **config.hyper}))  # fmt: skip
    need("accelerate.utils", "train").set_seed(config.seed)
    _adapt(parts, made, rows, config)
    remember(parts.model, "default", parts.extra())
    home = None if config.output is None else Path(config.output)
    on_cpu = next(parts.model.parameters()).device.type == "cpu"
    process = need("accelerate", "train").PartialState(cpu=on_cpu)
    written = config.stored()
    report = _fit_rows(parts.model, parts.tokenizer, rows, held, labels, config, "default",
                       began=None if home is None else lambda: written.to_yaml(home / folder.CONFIG))  # fmt: skip
    if process.is_main_process and home is not None:
        save(parts.model, home / folder.ADAPTER, "default")
        report.write(home / folder.REPORT)
    process.wait_for_everyone()
    return parts, report, config


def _plain(hyper: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that YAML can hold."""
    return {k: v for k, v in hyper.items() if v is None or isinstance(v, (bool, int, float, str, list, dict))}


def _template(parts: Loaded, config: TrainConfig) -> str:
    kind = set_template(parts.tokenizer, config.template)
    return kind if config.template == "auto" else config.template


def _adapt(parts: Loaded, made: Method, rows: list[Row], config: TrainConfig) -> None:
    """Put the method on the model; one that decides from data first looks at some batches of it."""
    own = targets_from(config.targets if config.targets is not None else made.targets)
    user = config.overrides or {}  # first, and stronger
    include, overrides, free = targets_for(parts, own.include, {**user, **own.overrides, **user},
                                           [*own.unfreeze, *(config.unfreeze or [])])  # fmt: skip
    wanted = targets_from(replace(own, include=tuple(include)), exclude=config.exclude, overrides=overrides or None,
                          unfreeze=free, bias=config.bias, tied=config.tied)  # fmt: skip
    if made.prepare is not None:
        examples = encode(rows, parts.tokenizer, config, int(config.max_length or 512), parts.labels).examples
        feed = Feed(examples, Collate(parts.tokenizer.pad_token_id), config.batch_size, config.seed)
        device, task = next(parts.model.parameters()).device, task_of(config.task, config.temperature, config.padding)
        batches = [to_device(b, device) for b in itertools.islice(feed.epoch(0), PROBED)]
        batches = batches if task.by_row else [Together(b) for b in batches]
        made, found = prepare(parts.model, made, batches, lambda m, b: task.total(m, b)[0] / task.weight(b), wanted)
        wanted = wanted if found is None else found
    attach.adapt(parts.model, made, wanted)
