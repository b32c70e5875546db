"""What ``omnilora apply --method lora_construct`` reports and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from omnilora.core.attach import disabled
from omnilora.core.files import save
from omnilora.core.run import trainable
from omnilora.errors import BadValue
from omnilora.theory.difference import construct


def construct_pair(job: Any, target: str | None, tolerance: float, rank: int | None) -> Mapping[str, Any]:
    """Build the adapter from ``job``'s model to ``target``, compare outputs on token ids, save it."""
    from omnilora.training.applying import write_json
    from omnilora.training.models import load_parts

    if not target:
        raise BadValue("hyper.target is not given.", "Pass --set hyper.target= the folder or name of the other model.")
    model = job.model
    other = load_parts(job.config.replace(model=target), job.labels).model.to(job.device).eval()
    model.eval()
    reports = construct(model, other, tolerance, rank, job.targets)
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0)).to(job.device)
    with torch.no_grad():
        goal, reached = _output(other, ids), _output(model, ids)
        with disabled(model):
            base = _output(model, ids)
    folder = save(model, job.home / "adapter")
    write_json(job.home / "sites.json", {r.name: asdict(r) for r in reports})
    ranks = [r.rank for r in reports]
    return {"sites": len(reports), "largest_rank": max(ranks), "mean_rank": sum(ranks) / len(ranks),
            "largest_site_error": max(r.error for r in reports), "parameters": sum(t.numel() for t in trainable(model)),
            "output_change_of_target": _gap(base, goal), "output_error_of_adapter": _gap(reached, goal),
            "adapter": str(folder)}  # fmt: skip


def _output(model: Any, ids: Tensor) -> Tensor:
    made = model(input_ids=ids)
    found = made.logits if "logits" in made else made.last_hidden_state
    return found.float()


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
