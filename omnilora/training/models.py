"""Models and tokenizers: from the Hub, a folder, a GGUF file or a package; with a head, added tokens, NF4."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnilora.core.attach import hub_of
from omnilora.core.full import Full
from omnilora.core.targets import own_sites
from omnilora.errors import BadValue, FileRefused, NeedsExtra, OmniloraError, UnknownName, nearest, need
from omnilora.io.reach import asked_for_model
from omnilora.plans.native import computes_bf16
from omnilora.training.config import TrainConfig
from omnilora.training.gguf_files import gguf_read_fast
from omnilora.training.quiet import quiet, quiet_imports

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = {"smollm2": "smollm2", "minilm": "minilm"}


@dataclass
class Loaded:
    """A model with what training must know about it.

    ``fresh``: patterns of layers that the checkpoint did not hold (a new head); they train and are saved with the
    adapter. ``added``: numbers of the tokens that were added.
    """

    model: Any
    tokenizer: Any
    labels: list[Any] | None = None
    fresh: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    def extra(self) -> dict[str, Any]:
        """Plain data that belongs to the adapter: label names, the fresh head, added tokens."""
        made: dict[str, Any] = {}
        if self.labels is not None:
            made["labels"] = list(self.labels)
        if self.fresh:
            made["fresh"] = [p.removeprefix("re:").replace("\\", "").removesuffix(".weight") for p in self.fresh]
        if self.added:
            made["tokens"] = {"tokens": list(self.tokens), "ids": list(self.added)}
        return made


def dtype_of(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype of a configuration; "auto": bf16 where the processor multiplies in it, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if computes_bf16() else torch.float32


def load_model(config: TrainConfig, labels: Sequence[Any] | None = None, say: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a configuration, in eval mode. See :func:`load_parts` for what else there is to know."""
    parts = load_parts(config, labels, say)
    return parts.model, parts.tokenizer


def load_parts(config: TrainConfig, labels: Sequence[Any] | None = None, say: bool = False) -> Loaded:
    """Load what ``config.model`` names, for ``config.task``.

    Args:
        labels: the classes, in order; needed for classification.
        say: a line on stderr before it begins.

    Raises:
        BadValue, FileRefused: there is no such model, or it does not do the task.
        HubError: the name is of the Hub, which cannot be reached.
        NeedsExtra: a package is missing.
    """
    source, options = _source(config.model)
    if say:
        print(f"loading {config.model} …", file=sys.stderr, flush=True)
    quiet_imports()
    transformers = need("transformers", "train")
    auto = {"causal-lm": transformers.AutoModelForCausalLM, "embedding": transformers.AutoModel,
            "classification": transformers.AutoModelForSequenceClassification}[config.task]  # fmt: skip
    chosen = labels if labels is not None else config.labels
    if config.task == "classification":
        if not chosen:
            raise BadValue("Classification needs its labels.", "Pass labels = […].")
        names = [str(x) for x in chosen]
        options |= {"num_labels": len(names), "problem_type": "single_label_classification",
                    "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}  # fmt: skip
    if config.device_map is not None:
        options["device_map"] = config.device_map
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    if "gguf_file" in options:
        need("gguf", "train")
    try:
        packed = gguf_read_fast() if "gguf_file" in options else nullcontext()
        with quiet(transformers), packed, asked_for_model(source, "local_files_only" in options):
            model, info = auto.from_pretrained(source, dtype=dtype_of(config.dtype, device), output_loading_info=True,
                                               **_gguf(options, transformers))  # fmt: skip
            given = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **given)
    except OmniloraError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, KeyError)) and "gguf_file" not in options:
            raise  # a damaged GGUF file fails anywhere in its readers
        raise BadValue(f"The model {config.model!r} cannot be loaded: {' '.join(str(error).split())[:300]}.",
                       "Give a Hub name, a folder, a .gguf file or package:smollm2.") from error  # fmt: skip
    if config.device_map is None and device == "cuda":
        model.to(need("accelerate", "train").PartialState().device)
    made = Loaded(model, tokenizer, list(chosen) if config.task == "classification" and chosen else None)
    missing = list(info["missing_keys"])
    if config.task == "embedding" and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None
        missing = [n for n in missing if not n.startswith("pooler.")]
    made.fresh = _fresh(model, missing, config)
    _pad(tokenizer, model)
    if config.tokens:
        made.tokens = list(config.tokens)
        made.added = add_tokens(model, tokenizer, config.tokens)
    if config.load_in_4bit:
        _nf4(model)
    model.eval()
    return made


def _source(name: str) -> tuple[str, dict[str, Any]]:
    if name.startswith("package:"):
        from omnilora.demo import sources

        key = name.removeprefix("package:")
        if key not in PACKAGES:
            raise UnknownName(f"No packaged model {key!r}.", nearest(key, PACKAGES))
        if key == "minilm":
            return str(sources.minilm()), {"local_files_only": True}
        folder, file = sources.smollm2()
        return str(folder), {"gguf_file": file, "local_files_only": True}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise BadValue(f"model = {name!r} does not exist.", "Give an existing .gguf file.")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    path = Path(name).expanduser()
    if path.is_dir():
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles and not any(p.suffix == ".safetensors" for p in path.iterdir()):
            raise FileRefused(f"{path} holds {pickles[0]}, a pickle.", "Pickles execute code; convert to safetensors.")
        return str(path), {"local_files_only": True}
    if name.startswith((".", "/", "~")):
        raise BadValue(f"model = {name!r} does not exist.", "Give an existing folder.")
    return name, {"use_safetensors": True}


def _gguf(options: dict[str, Any], transformers: Any) -> dict[str, Any]:
    """Packed GGUF layers would be no ``nn.Linear``: their weights are dequantized."""
    if "gguf_file" not in options:
        return options
    return {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}


def _fresh(model: nn.Module, missing: Sequence[str], config: TrainConfig) -> list[str]:
    """Patterns of parameters that were not in the checkpoint, made anew in fp32-exact, seeded numbers."""
    if not missing:
        return []
    if config.task != "classification":
        raise BadValue(f"{config.model} lacks {len(missing)} tensors of {type(model).__name__}: {sorted(missing)[:3]}.",
                       f"Is it a model for {config.task}?")  # fmt: skip
    known = dict(model.named_parameters())
    return [f"re:{name.replace('.', chr(92) + '.')}" for name in sorted(missing) if name in known]


def _pad(tokenizer: Any, model: Any) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadValue("The tokenizer has neither a padding nor an end token.", "Set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens and rows for them, each the mean of the old rows (the same wherever the base is loaded).

    Returns: the numbers of the new tokens.
    """
    known = [t for t in tokens if t in tokenizer.get_vocab()]
    if known:
        raise BadValue(f"The tokenizer already has {known[0]!r}.", "Name new tokens only.")
    tokenizer.add_tokens(list(tokens))
    ids = [tokenizer.convert_tokens_to_ids(t) for t in tokens]
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= old:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        for weight in {id(t.weight): t.weight for t in tables if t is not None}.values():
            weight[old:] = weight[:old].double().mean(0).to(weight.dtype)
    return ids


def _nf4(model: nn.Module) -> None:
    try:
        from omnilora.stores.nf4_layer import quantize
    except ImportError as error:
        raise NeedsExtra("load_in_4bit needs omnilora.stores.nf4_layer, which is not installed.",
                         "Load without it.") from error  # fmt: skip
    quantize(model)


def targets_for(parts: Loaded, targets: Sequence[str] | str | None, overrides: Mapping[str, Any] | None,
                unfreeze: Sequence[str] | None) -> tuple[Any, dict[str, Any], list[str] | None]:  # fmt: skip
    """(targets, overrides, unfreeze) that also train the fresh head and the rows of added tokens."""
    changes = dict(overrides or {})
    wanted = list(unfreeze or [])
    for pattern in parts.fresh:
        covered = {site.name for site, _ in own_sites(parts.model, wanted)}
        if not {site.name for site, _ in own_sites(parts.model, [pattern])} <= covered:
            wanted.append(pattern)
    free = wanted or None
    if not parts.added:
        return targets, changes, free
    table = parts.model.get_input_embeddings()
    path = next(n for n, m in parts.model.named_modules() if m is table)
    base = [targets] if isinstance(targets, str) else list(targets or ["all-linear"])
    return [path, *base], {path: {"method": Full(rows=tuple(parts.added))}, **changes}, free


def remember(model: nn.Module, adapter: str, extra: Mapping[str, Any]) -> None:
    """Keep plain data with an adapter: it is saved and loaded with it."""
    if extra:
        hub_of(model).values.setdefault("extra", {}).setdefault(adapter, {}).update(extra)


def load_trained(output: str | Path, *, adapter: bool = True, **changes: Any) -> tuple[Any, Any]:
    """The model and tokenizer of a finished run, with its adapter, from the folder that ``train`` wrote.

    Args:
        output: the folder with config.yaml and adapter/.
        adapter: False leaves the bare base.
        changes: fields of the configuration to change (model, dtype, device_map …).
    """
    from omnilora.core.files import load, load_file
    from omnilora.core.method import entries, method
    from omnilora.core.state import site_at
    from omnilora.training.encode import set_template

    home = Path(output)
    if not (home / "config.yaml").is_file():
        raise FileRefused(f"{home} is no folder of a run.", "It has no config.yaml.")
    config = TrainConfig.from_yaml(home / "config.yaml", resume=False, **changes)
    state = load_file(home / "adapter")
    model, tokenizer = load_model(config, state.extra.get("labels"))
    set_template(tokenizer, config.template)
    hold = None if state.carried or state.method not in entries() else method(state.method, **dict(state.hyper)).store
    if hold is not None:
        hold(model, [site_at(model, name, s) for name, s in state.sites.items()])
    if adapter:
        load(model, home / "adapter")
    return model.eval(), tokenizer
