"""How well probabilities tell: accuracy, ECE, NLL, Brier score, and the reliability diagram."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from omnilora.errors import NeedsExtra, need

Bins = list[tuple[float, float, int]]  # (mean confidence, accuracy, rows) of each bin that has rows


def reliability(p: Tensor, y: Tensor, bins: int = 15) -> Bins:
    """Rows by the confidence max_k p_k in ``bins`` equal intervals of (0, 1]."""
    sure, best = p.max(-1)
    right = (best == y).to(p.dtype)
    at = (sure * bins).ceil().clamp(1, bins).long() - 1
    held = [at == b for b in range(bins)]
    return [(float(sure[h].mean()), float(right[h].mean()), int(h.sum())) for h in held if h.any()]


def scores(p: Tensor, y: Tensor, bins: int = 15) -> dict[str, float]:
    """accuracy; ece = Σ_b (n_b/N) |accuracy_b − confidence_b|; nll = −mean log p_y; brier = mean ‖p − e_y‖²."""
    p = p.double()
    ece = sum(n * abs(right - sure) for sure, right, n in reliability(p, y, bins)) / len(y)
    truth = torch.nn.functional.one_hot(y, p.shape[-1]).to(p.dtype)
    return {
        "accuracy": float((p.argmax(-1) == y).double().mean()),
        "ece": ece,
        "nll": float(-p[torch.arange(len(y)), y].clamp_min(1e-300).log().mean()),
        "brier": float((p - truth).square().sum(-1).mean()),
    }


def diagram(curves: dict[str, Bins], path: Path) -> str:
    """A reliability diagram as PNG; what comes back is its path, or why there is none."""
    try:
        figure = need("matplotlib.figure", "plots").Figure(figsize=(5, 5))
    except NeedsExtra as error:
        return str(error)
    axes = figure.add_subplot()
    axes.plot((0, 1), (0, 1), "k:", linewidth=1)
    for name, points in curves.items():
        axes.plot([c for c, _, _ in points], [a for _, a, _ in points], "o-", markersize=4, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return str(path)
