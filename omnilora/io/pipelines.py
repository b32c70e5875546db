"""Folders of diffusers' models and pipelines as modules, for the names and shapes of their layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnilora.core.files import read_json
from omnilora.errors import FileRefused, need
from omnilora.io.names import PARTS


def is_diffusers(path: Path) -> bool:
    """Whether a folder holds a pipeline, or one of its models."""
    if (path / "model_index.json").is_file():
        return True
    config = path / "config.json"
    return config.is_file() and b'"_class_name"' in config.read_bytes()[: 1 << 20]


def shapes_of(path: Path, weights: bool = False) -> nn.Module:
    """The model in a folder; of a pipeline a module that holds its parts by name. On the meta device unless ``weights``."""
    if not (path / "model_index.json").is_file():
        return _model(path, weights)
    children = {c for _, homes in PARTS.values() for c in homes}
    parts = {p.name: _model(p, weights) for p in sorted(path.iterdir()) if p.name in children and (p / "config.json").is_file()}
    if not parts:
        raise FileRefused(f"{path} holds no model of a pipeline.", f"Looked for {', '.join(sorted(children))}.")
    return nn.ModuleDict(parts)


def _model(path: Path, weights: bool) -> nn.Module:
    said = read_json(path / "config.json")
    name = said.get("_class_name")
    if name is None:
        transformers: Any = need("transformers", "train")
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        cls = getattr(transformers, str((config.architectures or ["AutoModel"])[0]), transformers.AutoModel)
        if weights:
            return cls.from_pretrained(path, local_files_only=True).eval()
        with torch.device("meta"):
            return cls(config) if cls is not transformers.AutoModel else cls.from_config(config)
    diffusers: Any = need("diffusers", "diffusers")
    cls = getattr(diffusers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        raise FileRefused(f"{path}: diffusers has no model {json.dumps(name)}.", "Update diffusers.")
    if weights:
        return cls.from_pretrained(path, local_files_only=True).eval()
    with torch.device("meta"):
        return cls.from_config(said)
