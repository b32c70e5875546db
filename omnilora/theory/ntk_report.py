"""What ``omnilora apply --method lora_ntk`` studies and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnilora.errors import BadValue
from omnilora.theory.ntk import rank_bound, study, sufficient_rank
from omnilora.training.losses import model_inputs

_VALUES = re.compile(r"(query|value|q_proj|v_proj|q_lin|v_lin)\.weight$")


def study_job(job: Any, lam: float, rows: int, seeds: int, matrices: str, loss: str) -> Mapping[str, Any]:
    """Class logits of ``rows`` examples at the chosen matrices: the bound, the optimum, and where each rank ends."""
    if job.config.task != "classification":
        raise BadValue(f"task = {job.config.task!r}.", "Linearization needs few outputs: use --task classification.")
    if loss != "cross-entropy":
        raise BadValue(f"loss = {loss!r}.", "Labels are classes: use cross-entropy; squares is for Python.")
    batches = job.batches(rows, batch_size=1)
    model = job.model.double().eval()
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    if matrices == "last":
        chosen = [n for n in names if _VALUES.search(n)][-2:]
    else:
        chosen = [n for n in names if re.search(matrices, n)]
    if not chosen:
        raise BadValue(f"matrices = {matrices!r} names no matrix.", f"For instance {names[-3:]}.")

    def outputs(call: Any, batch: Any) -> Tensor:
        return call(**model_inputs(model, batch)).logits

    y = torch.cat([b["labels"] for b in batches])
    found = study(model, chosen, batches, y, lam, loss, seeds=seeds, outputs=outputs)
    n, k = found.inputs, found.outputs
    report: dict[str, Any] = {
        "matrices": chosen, "inputs": n, "outputs": k, "rank_bound": rank_bound(n, k), "sufficient_rank": sufficient_rank(n, k),
        "optimum": found.optimum, "certified_gap": found.certified_gap,
        "optimum_rank": found.optimum_rank, "bound_holds": found.bound_holds,
        "distance_of_the_network_from_its_linearization": found.gap}  # fmt: skip
    for rank, values in found.objectives.items():
        report[f"rank_{rank}_objectives"] = list(values)
        report[f"rank_{rank}_reaches_the_optimum"] = found.reaches(rank)
    return report
