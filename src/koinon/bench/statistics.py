"""Metrics with bootstrap draws over whole groups, and intervals of paired differences. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 100
"""Resamplings of the test part's groups; the same ones for every method and seed, so that differences are paired."""
FALLING = frozenset(
    {"rmse", "asr", "unmarked", "bits_per_byte", "priming", "held", "spearman", "collapse", "degradation"}
)
"""Parts of the names of metrics and meters of which less is better."""


@dataclass(frozen=True)
class Measured:
    """A metric on the test part, and on each resampling of its groups."""

    value: float
    draws: Array


def falls(metric: str) -> bool:
    """Whether less of a metric is better."""
    return not FALLING.isdisjoint(metric.split("."))


class Resampling:
    """The same resamplings for everything measured on one test part.

    Args:
        groups: a code a row for whom it belongs to, [rows]; each row stands alone if None.
        rows: number of rows.
        draws: how many resamplings.
        seed: of the resamplings.
    """

    def __init__(self, groups: NDArray[np.int64] | None, rows: int, draws: int = DRAWS, seed: int = 0):
        self.codes = np.arange(rows) if groups is None else np.unique(groups, return_inverse=True)[1]
        units = int(self.codes.max()) + 1
        rng = np.random.default_rng(seed)
        # Row 0 is the test part itself: each group counted once.
        drawn = rng.multinomial(units, np.full(units, 1 / units), size=draws)
        self.counts = np.concatenate([np.ones((1, units)), drawn])  # (1 + draws) unit

    def measured(self, values: Array) -> Measured:
        """From one value a resampling, the first being the test part itself."""
        return Measured(float(values[0]), values[1:])

    def auc(self, labels: Array, scores: Array) -> Measured:
        """Area under the ROC curve; rows with a NaN label are left out."""
        known = ~np.isnan(labels)
        labels, scores, codes = labels[known], scores[known], self.codes[known]
        order = np.argsort(scores, kind="stable")
        labels, scores, codes = labels[order], scores[order], codes[order]
        starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # ties count half
        values = []
        for chunk in np.array_split(self.counts, -(-self.counts.shape[0] * len(codes) // 20_000_000) or 1):
            weight = chunk[:, codes]
            positive = np.add.reduceat(weight * labels, starts, axis=1)
            negative = np.add.reduceat(weight * (1 - labels), starts, axis=1)
            below = np.cumsum(negative, 1) - negative
            with np.errstate(invalid="ignore"):
                values.append((positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1)))
        return self.measured(np.concatenate(values))

    def gauc(self, labels: Array, scores: Array) -> tuple[Measured, float]:
        """AUC within each group, averaged with the groups' sizes as weights; and the share of rows it covers.

        Groups with one class have no AUC and are left out; the share says how much that leaves.
        """
        known = ~np.isnan(labels)
        labels, scores, codes = labels[known], scores[known], self.codes[known]
        units = self.counts.shape[1]
        size = np.bincount(codes, minlength=units)
        positive = np.bincount(codes, labels, minlength=units)
        ranks = _ranks_within(codes, scores)
        above = np.bincount(codes, ranks * labels, minlength=units) - positive * (positive + 1) / 2
        both = (positive > 0) & (positive < size)
        pairs = np.where(both, positive * (size - positive), 1.0)
        weights = self.counts * np.where(both, size, 0)
        with np.errstate(invalid="ignore"):
            values = weights @ (above / pairs) / weights.sum(1)
        return self.measured(values), float(size[both].sum() / max(size.sum(), 1))

    def rmse(self, labels: Array, scores: Array) -> Measured:
        """Root of the mean squared error."""
        known = ~np.isnan(labels)
        units = self.counts.shape[1]
        error = np.bincount(self.codes[known], (labels - scores)[known] ** 2, minlength=units)
        size = np.bincount(self.codes[known], minlength=units)
        return self.measured(np.sqrt(self.counts @ error / (self.counts @ size)))


def _ranks_within(codes: NDArray, scores: Array) -> Array:
    """Rank of each row in its group by score, from 1; tied rows share the mean of their ranks."""
    order = np.lexsort((scores, codes))
    code, score = codes[order], scores[order]
    new_group = np.r_[True, code[1:] != code[:-1]]
    start_of_group = np.maximum.accumulate(np.where(new_group, np.arange(len(code)), 0))
    new_tie = new_group | np.r_[True, score[1:] != score[:-1]]
    tie = np.cumsum(new_tie) - 1
    place = np.arange(len(code)) - start_of_group + 1.0
    ranks = np.empty(len(codes))
    ranks[order] = (np.bincount(tie, place) / np.bincount(tie))[tie]
    return ranks


def mean_of(parts: Sequence[Measured]) -> Measured:
    """The mean of several metrics, resampling by resampling."""
    return Measured(float(np.mean([part.value for part in parts])), np.mean([part.draws for part in parts], axis=0))


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 above zero, -1 below, 0 if the interval holds zero."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Mapping[int, Measured], times: int = 4000, seed: int = 0) -> Interval:
    """Mean over seeds, with the interval over both seeds and test groups.

    Each bootstrap draw takes as many seeds as there are, with replacement, and one resampling of the test part.
    Without resamplings (a metric that has none) it is over seeds alone; one seed alone gives none at all (NaN). Without
    any value, the mean is NaN as well.

    Args:
        values: seed to metric (or to the paired difference of two methods' metrics).
        times: bootstrap draws.
        seed: of the draws.
    """
    if not values:  # a metric that this contestant does not have
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    mean = float(np.mean([value.value for value in values.values()]))
    has_draws = all(len(value.draws) for value in values.values())
    if len(values) < 2 and not has_draws:
        return Interval(mean, float("nan"), float("nan"))
    table = np.stack([value.draws if has_draws else np.array([value.value]) for value in values.values()])
    seeds = rng.integers(len(values), size=(times, len(values)))
    draws = rng.integers(table.shape[1], size=(times, 1))
    means = table[seeds, draws].mean(1)
    if np.isnan(means).all():
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.nanquantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def paired(one: Mapping[int, Measured], other: Mapping[int, Measured]) -> Interval:
    """`interval` of ``one - other`` over the seeds both have."""
    both = sorted(set(one) & set(other))
    return interval({s: Measured(one[s].value - other[s].value, one[s].draws - other[s].draws) for s in both})
