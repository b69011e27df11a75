"""From what each row of a test part came to, to a row of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koinon.bench.compare import Row
from koinon.bench.statistics import Measured, Resampling


def per_task(values: NDArray, task: NDArray[np.int64], resampling: Resampling) -> list[Measured]:
    """The mean over each task's rows of a value, or the share of rows that are right."""
    return [share(values, task == its, resampling) for its in range(int(task.max()) + 1)]


def share(values: NDArray, among: NDArray[np.bool_], resampling: Resampling) -> Measured:
    """The same over some of the rows, on the test part and on each resampling of it."""
    counts = resampling.counts[:, among]
    return resampling.measured(counts @ values[among].astype(float) / counts.sum(1))


def over(one: Measured, other: Measured) -> Measured:
    """100 times a quotient."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value, *draws = 100 * np.array([one.value, *one.draws]) / np.array([other.value, *other.draws])
    return Measured(float(value), np.array(draws))


def _number(value: float, digits: int) -> float | None:
    """None where a metric has no value: JSON knows no NaN."""
    return round(float(value), digits) if np.isfinite(value) else None


def row(measured: Mapping[str, Measured], cost: Mapping[str, Any], shown: Sequence[str]) -> Row:
    """What a cell gives; resamplings are kept of the metrics that are shown, which keeps committed rows small."""
    return {
        "metrics": {name: _number(its.value, 6) for name, its in measured.items()},
        "draws": {name: [_number(value, 5) for value in measured[name].draws] for name in shown if name in measured},
        "meters": {},
        "cost": dict(cost),
    }
