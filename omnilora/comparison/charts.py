"""The pictures of a report, as SVG text that needs nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from omnilora.comparison.results import Results
from omnilora.errors import need

GREY, BLUE, RED = "#9aa3ad", "#1f6feb", "#c4432b"
NAMED = 14  # labels written into a picture before it becomes unreadable


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    need("matplotlib", "compare").use("svg")
    pyplot = need("matplotlib.pyplot", "compare")
    pyplot.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False,
                            "axes.spines.right": False, "svg.hashsalt": "omnilora"})  # fmt: skip
    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    need("matplotlib.pyplot", "compare").close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def front(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """Which points no other beats in both: a smaller first number, and a better second one."""
    kept, best = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1] if lower else -points[i][1])):
        score = points[i][1] if lower else -points[i][1]
        if score < best:
            kept.append(i)
            best = score
    return kept


def pareto(results: Results) -> str:
    """Quality against size and against time, with the intervals over seeds and the front."""
    lines = [x for x in results.lines if x["complete"]]
    figure, axes = _axes(11, 4.6, 1, 2)
    sides = (("parameters", "trained parameters", "log"), ("step_seconds", "seconds an update", "linear"))
    for ax, (key, name, scale) in zip(axes[0], sides, strict=True):
        there = [x for x in lines if x[key]]
        points = [(float(x[key]), float(x["test"]["mean"])) for x in there]
        best = front(points, results.lower_is_better)
        for i, (x, y) in enumerate(points):
            test, on = there[i]["test"], i in best
            colour = RED if there[i]["label"] == results.baseline else BLUE if on else GREY
            if test["low"] is not None:
                ax.plot([x, x], [test["low"], test["high"]], color=colour, lw=0.8, alpha=0.5)
            ax.plot([x], [y], "o", ms=5, color=colour)
        named = set(best) | {i for i, x in enumerate(there) if x["label"] == results.baseline}
        named |= set(range(len(there))) if len(there) <= NAMED else set()
        for i in named:
            ax.annotate(there[i]["label"], points[i], xytext=(4, 4), textcoords="offset points", fontsize=8)
        ax.plot([points[i][0] for i in best], [points[i][1] for i in best], color=BLUE, lw=0.8, ls="--")
        if points:
            ys = [y for _, y in points]
            room = 0.15 * (max(ys) - min(ys) or 1.0)
            ax.set_ylim(min(ys) - room, max(ys) + room)
        ax.set(xscale=scale, xlabel=name, ylabel=f"test {results.metric}")
    return _svg(figure)


def curves(results: Results) -> str:
    """The training loss of each, mean over seeds, with the baseline behind it."""
    lines = [x for x in results.lines if x["losses"]]
    columns = min(5, max(1, len(lines)))
    rows = max(1, math.ceil(len(lines) / columns))
    figure, axes = _axes(2.3 * columns, 1.7 * rows, rows, columns)
    base = next((x for x in lines if x["label"] == results.baseline), None)
    flat = [ax for row in axes for ax in row]
    top = max((_smooth(x["losses"])[0] for x in lines), default=1.0)
    for ax, x in zip(flat, lines, strict=False):
        if base is not None:
            ax.plot(_smooth(base["losses"]), color=RED, lw=0.8, alpha=0.6)
        ax.plot(_smooth(x["losses"]), color=BLUE, lw=1.1)
        ax.set_title(x["label"], fontsize=8)
        ax.set_ylim(0, top * 1.05)
        ax.tick_params(labelsize=6)
    for ax in flat[len(lines) :]:
        ax.set_axis_off()
    return _svg(figure)


def rates(results: Results) -> str:
    """Validation metric over the grid of learning rates."""
    lines = [x for x in results.lines if len(x["rates"]) > 1]
    columns = min(5, max(1, len(lines)))
    rows = max(1, math.ceil(len(lines) / columns))
    figure, axes = _axes(2.3 * columns, 1.5 * rows, rows, columns)
    flat = [ax for row in axes for ax in row]
    every = [v for x in lines for _, v in x["rates"] if v is not None and math.isfinite(v)]
    for ax, x in zip(flat, lines, strict=False):
        there = [(r, v) for r, v in x["rates"] if v is not None]
        ax.plot([r for r, _ in there], [v for _, v in there], "o-", color=BLUE, ms=3, lw=1)
        for r, v in there:
            if r == x["rate"]:
                ax.plot([r], [v], "o", color=RED, ms=4)
        ax.set_xscale("log")
        ax.set_title(x["label"], fontsize=8)
        ax.tick_params(labelsize=6, which="both")
        if every and max(every) < 10 * (sorted(every)[len(every) // 2] + 1e-9):
            ax.set_ylim(min(every), max(every))
    for ax in flat[len(lines) :]:
        ax.set_axis_off()
    return _svg(figure)


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """An exponential mean, without its bias towards zero."""
    out, mean = [], 0.0
    for i, v in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * v
        out.append(mean / (1 - keep**i))
    return out
