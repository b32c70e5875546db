"""A posterior on disk, beside its adapter: ``posterior.json`` and ``posterior.safetensors``, read within bounds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as encode

from omnilora.core.files import read_json, read_tensors, write_folder
from omnilora.errors import FileRefused
from omnilora.posthoc.kronecker import Block, Side
from omnilora.posthoc.laplace import Posterior

FORMAT = 1
PARTS = ("G.U", "G.l", "K.U", "K.l")
NUMBERS = ("lam", "sq_norm", "log_likelihood")


def save_posterior(posterior: Posterior, path: str | os.PathLike[str], adapter: str = "") -> Path:
    """Write the folder ``path``; ``adapter``: the content hash of the adapter's state that it belongs to."""
    tensors = {}
    for name, block in posterior.blocks.items():
        for part, t in zip(PARTS, (block.G.U, block.G.l, block.K.U, block.K.l)):
            tensors[f"{name}:{part}"] = t.float().cpu().contiguous()
    said = {"format": FORMAT, "adapter": adapter, "blocks": list(posterior.blocks), "rows": posterior.rows,
            "lam": posterior.lam, "sq_norm": posterior.sq_norm, "log_likelihood": posterior.log_likelihood}  # fmt: skip
    text = json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_folder(path, {"posterior.json": text.encode(), "posterior.safetensors": encode(tensors)})


def load_posterior(path: str | os.PathLike[str], adapter: str = "") -> Posterior:
    """Read what :func:`save_posterior` wrote.

    Raises: :class:`FileRefused` where the files are damaged, or were made for another adapter than ``adapter``.
    """
    folder = Path(path)
    said = read_json(folder / "posterior.json")
    if said.get("format") != FORMAT:
        raise FileRefused(f"{folder} has format {said.get('format')!r}, not {FORMAT}.", "Fit the posterior again.")
    if adapter and said.get("adapter") != adapter:
        raise FileRefused(f"{folder} was fitted to another adapter.", "Fit it again, or give its adapter.")
    names, rows = said.get("blocks"), said.get("rows")
    good = isinstance(names, list) and names and all(isinstance(n, str) for n in names) and isinstance(rows, int)
    if not good or not all(_number(said.get(n)) for n in NUMBERS) or said["lam"] <= 0:
        raise FileRefused(f"{folder}/posterior.json has a field of another kind.", "The file is damaged.")
    tensors = read_tensors(folder / "posterior.safetensors")
    if set(tensors) != {f"{n}:{part}" for n in names for part in PARTS}:
        raise FileRefused(f"{folder}: tensors and names differ.", "The file is damaged.")
    blocks = {n: Block(_side(n, "G", tensors), _side(n, "K", tensors)) for n in names}
    return Posterior(blocks, said["sq_norm"], said["log_likelihood"], rows, said["lam"])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _side(name: str, side: str, tensors: dict[str, torch.Tensor]) -> Side:
    U, l = tensors[f"{name}:{side}.U"], tensors[f"{name}:{side}.l"]
    shaped = U.dim() == 2 and l.dim() == 1 and l.shape[0] == U.shape[1] <= U.shape[0]
    if not shaped or not bool(torch.isfinite(U).all() and torch.isfinite(l).all() and (l >= 0).all()):
        raise FileRefused(f"{name}: {side} is no eigendecomposition.", "The file is damaged.")
    return Side(U.double(), l.double())
