"""Configurations from options, files and --set; models from configurations, with or without their weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnilora.cli.common import settings
from omnilora.errors import BadValue, FileRefused, OmniloraError, need


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``; objects are merged key by key."""
    out = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def configuration(file: Path | None, sets: Sequence[str] | None, **options: Any) -> Any:
    """A TrainConfig: the file's, then the options that were given, then --set."""
    from omnilora.training.config import TrainConfig

    made = TrainConfig() if file is None else TrainConfig.from_yaml(file)
    given = {k: v for k, v in options.items() if v is not None and v != []}
    return TrainConfig.from_dict(merged(merged(made.to_dict(), given), settings(sets)))


def adapter_folder(path: Path | None) -> Path | None:
    """The adapter's folder or file: ``path``, or ``path/adapter`` of a run's folder."""
    if path is None or path.is_file():
        return path
    if not path.is_dir():
        raise FileRefused(f"{path} does not exist.", "Give the folder of an adapter or of a run.")
    here = any((path / name).is_file() for name in ("omnilora.json", "adapter_config.json"))
    return path if here or not (path / "adapter").is_dir() else path / "adapter"


def for_adapter(adapter: Path | None, file: Path | None, sets: Sequence[str] | None, **options: Any) -> Any:
    """The configuration to use an adapter with: that of its run where it lies in one, unless a file is given."""
    folder = adapter_folder(adapter)
    if file is None and folder is not None and folder.name == "adapter" and (folder.parent / "config.yaml").is_file():
        file = folder.parent / "config.yaml"
    made = configuration(file, sets, **options)
    if file is None and not options.get("model") and "model" not in settings(sets):
        raise BadValue("There is no model.", "Give --model, or the folder of a run as --adapter.")
    return made.replace(resume=False, data=None, eval_data=None, best=None, patience=None, eval_every=None)


def loaded(config: Any, adapter: Path | None = None, check_base: bool = True, task: str | None = None) -> tuple[Any, Any, Any]:
    """(model in eval mode, tokenizer, configuration), with the adapter on it, its labels, tokens and template.

    Raises :class:`BadValue` where ``task`` is given and the adapter is of another, before the model is loaded.
    """
    from omnilora.core.files import load, load_file
    from omnilora.training.encode import set_template
    from omnilora.training.models import load_model

    folder = adapter_folder(adapter)
    if folder is not None:
        extra = load_file(folder).extra
        if extra.get("labels") is not None:
            config = config.replace(task="classification", labels=extra["labels"], packing=False)
        if extra.get("tokens"):
            config = config.replace(tokens=extra["tokens"]["tokens"])
    if task not in (None, config.task):
        data = f"--adapter {shlex.quote(str(adapter))}" if adapter is not None else f"--model {config.model} --task {config.task}"
        raise BadValue(f"{adapter or config.model} is of the task {config.task!r}, not {task!r}: it writes no text.",
                       f"Measure it: omnilora eval {data} --data test.jsonl")  # fmt: skip
    model, tokenizer = load_model(config, say=True)
    set_template(tokenizer, config.template)
    if folder is not None:
        load(model, folder, check_base=check_base)
    return model.eval(), tokenizer, config


def skeleton(config: Any) -> Any:
    """The model on the meta device, from its configuration alone: no weight is read. None where that cannot be."""
    if config.tokens:
        return None
    import torch

    from omnilora.io.reach import asked_for_model
    from omnilora.training import models
    from omnilora.training.quiet import quiet_imports

    quiet_imports()
    transformers = need("transformers", "train")
    source, options = models._source(config.model)
    options.pop("use_safetensors", None)
    auto = {"causal-lm": transformers.AutoModelForCausalLM, "embedding": transformers.AutoModel,
            "classification": transformers.AutoModelForSequenceClassification}[config.task]  # fmt: skip
    try:
        with asked_for_model(source, "local_files_only" in options):
            found = transformers.AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BadValue(f"The model {config.model!r} cannot be loaded: {' '.join(str(error).split())[:300]}.",
                       "Give a Hub name, a folder, a .gguf file or package:smollm2.") from error  # fmt: skip
    if config.labels:
        found.num_labels = len(config.labels)
    try:
        with torch.device("meta"):
            return auto.from_config(found, dtype=models.dtype_of(config.dtype))
    except OmniloraError:
        raise
    except (ValueError, NotImplementedError, RuntimeError):
        return None
