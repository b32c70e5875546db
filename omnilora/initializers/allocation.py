"""Bits where they matter: one configuration for each matrix, the least cost under a budget — LQ-LoRA, arXiv:2311.12023.

    min Σ_m Σ_c cost[m, c] x[m, c]   with   Σ_c x[m, c] = 1,   Σ_m Σ_c bits[m, c] n_m x[m, c] ≤ budget · Σ_m n_m,   x binary
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
from torch import Tensor

from omnilora.errors import BadValue, need
from omnilora.stores.codecs import NormalFloat


def grid(size: Literal["small", "paper"]) -> list[NormalFloat]:
    """The configurations to choose from: 2, 3, 4 and 8 bits in blocks of 16 and 64; or the paper's 432."""
    if size == "small":
        return [NormalFloat(b, block, 8, 256) for b, block in product((2, 3, 4, 8), (16, 64))]
    if size == "paper":
        return [NormalFloat(b, block, b0, group, top) for b, b0, top, block, group in
                product((2, 3, 4, 8), (2, 3, 4, 8), ("bfloat16", "float16", "float32"), (16, 32, 64), (16, 64, 256))]  # fmt: skip
    raise BadValue(f"grid = {size!r}.", "Give 'small' or 'paper'.")


def allocate(cost: Tensor, bits: Tensor, numel: Tensor, budget: float, seconds: float = 60.0) -> list[int]:
    """The configuration (column) of every matrix (row).

    Args:
        cost, bits: (matrices, configurations); numel: (matrices,) weights.
        budget: mean bits a weight.

    Raises: :class:`BadValue` where even the smallest configurations exceed the budget or none is found in ``seconds``.
    """
    optimize = need("scipy.optimize", "quant")
    costs, used = cost.double().numpy(), (bits.double() * numel.double()[:, None]).numpy()
    total = float(numel.sum())
    least = used.min(1).sum() / total
    if not budget >= least - 1e-9:
        raise BadValue(f"budget = {budget!r} bits a weight.", f"The smallest configurations take {least:.3f}.")
    matrices, choices = costs.shape
    one_each = np.kron(np.eye(matrices), np.ones((1, choices)))
    scaled = costs / max(float(np.linalg.norm(costs)), 1e-300) * 1000
    found = optimize.milp(
        scaled.ravel(), integrality=np.ones(matrices * choices), bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(used.reshape(1, -1) / total, -np.inf, budget),
                     optimize.LinearConstraint(one_each, 1, 1)],
        options={"time_limit": seconds, "mip_rel_gap": 0.0})  # fmt: skip
    if found.x is None:
        raise BadValue(f"No allocation was found within {seconds:g} seconds.", "Use grid = 'small'.")
    chosen = found.x.reshape(matrices, choices).argmax(1)
    return [int(c) for c in chosen]
