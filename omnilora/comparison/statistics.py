"""Intervals: over seeds by Student's t, over test rows by the bootstrap (scipy), both paired against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from omnilora.errors import need

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """``mean`` with a 95 % interval; low and high are None where one value gives none. ``p``: two-sided, of mean = 0."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a metric over seeds, mean ± t·s/√n."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    stats = need("scipy.stats", "compare")
    wide = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - wide, mean + wide)


def paired_seeds(ours: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean difference over seeds, with the interval and p of the paired t-test."""
    gaps = np.subtract(ours, baseline)
    if len(gaps) < 2:
        return Interval(float(gaps.mean()))
    if np.ptp(gaps) == 0:  # no spread: the test is undefined unless the difference is zero
        same = float(gaps[0])
        return Interval(same, same, same, 1.0 if same == 0 else None)
    test = need("scipy.stats", "compare").ttest_rel(ours, baseline)
    low, high = test.confidence_interval(LEVEL)
    return Interval(float(gaps.mean()), float(low), float(high), float(test.pvalue))


def paired_rows(ours: np.ndarray, baseline: np.ndarray, weight: np.ndarray) -> Interval:
    """The difference Σ(ours − baseline)/Σweight over test rows, with the percentile interval of resampled rows.

    Args:
        ours, baseline: (rows,) sums of the metric a row, averaged over seeds.
        weight: (rows,) what each row counts.
    """
    gaps, mean = ours - baseline, float((ours - baseline).sum() / weight.sum())
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return Interval(mean, mean, mean) if np.ptp(gaps) == 0 else Interval(mean)
    stats = need("scipy.stats", "compare")
    found = stats.bootstrap((gaps, weight), lambda g, w, axis: g.sum(axis) / w.sum(axis), paired=True, vectorized=True,
                            n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
                            random_state=np.random.default_rng(0))  # fmt: skip
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def adjusted(ps: Sequence[float | None]) -> list[float | None]:
    """p after Benjamini and Hochberg, over those that exist."""
    there = [i for i, p in enumerate(ps) if p is not None]
    out: list[float | None] = [None] * len(ps)
    if there:
        made = need("scipy.stats", "compare").false_discovery_control([ps[i] for i in there])
        for i, q in zip(there, made, strict=True):
            out[i] = float(q)
    return out


def verdict(seeds: Interval, q: float | None, rows: Interval, lower_is_better: bool) -> str:
    """"better" or "worse" than the baseline where seeds (after adjustment) and test rows agree; else "not told apart"."""
    clear = q is not None and q < 1 - LEVEL and rows.excludes_zero() and seeds.mean * rows.mean > 0
    if not clear:
        return "not told apart"
    return "better" if (seeds.mean < 0) == lower_is_better else "worse"
