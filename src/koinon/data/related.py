"""Made tasks whose relatedness is known, after section 3.2 of the MMoE paper: shared weight vectors, sines, noise."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from koinon.data.tables import World, table_world
from koinon.nn.tasks import Task

RATES = (0.4, 0.2, 0.05, 0.1, 0.02, 0.005)
"""Share of positives of each task; the first half is category a, the rest category b."""


def related(rows: int = 60_000, features: int = 64, within: float = 0.9, across: float = 0.0, seed: int = 0) -> World:
    """Six binary tasks in two categories.

    Task t scores w_t.x + sum_m sin(a_m w_t.x + b_m) + noise on standard normal x, and is 1 for the highest share
    ``RATES[t]`` of scores. It should help a task to share with those of its category and not with the others.

    Args:
        rows: number of examples.
        features: length of x.
        within: cosine of the weight vectors of two tasks of one category.
        across: cosine of two categories' mean weight vectors.
        seed: of weights, features and noise.
    """
    rng = np.random.default_rng(seed)
    weights = task_weights(features, within, across, rng)
    x = rng.standard_normal((rows, features))
    project = x @ weights.T  # rows task
    rates, phases = rng.uniform(1, 4, 3), rng.uniform(0, 2 * np.pi, 3)
    score = project + 0.5 * sum(np.sin(a * project + b) for a, b in zip(rates, phases, strict=True))
    score += 0.3 * rng.standard_normal(score.shape)
    tasks = [Task(f"{'ab'[t // 3]}{t % 3 + 1}", group="ab"[t // 3]) for t in range(len(RATES))]
    labels = {
        task.name: (score[:, t] > np.quantile(score[:, t], 1 - RATES[t])).astype(np.int8)
        for t, task in enumerate(tasks)
    }
    frame = pl.DataFrame({f"x{i}": x[:, i] for i in range(features)} | labels)
    return table_world(frame, tasks, seed=seed)


def task_weights(features: int, within: float, across: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Unit vectors [6, features] with the given cosines, from orthonormal directions."""
    basis = np.linalg.qr(rng.standard_normal((features, 2 + len(RATES))))[0].T
    first = basis[0]
    second = across * first + np.sqrt(1 - across**2) * basis[1]
    own, common = np.sqrt(1 - within), np.sqrt(within)
    return np.stack([common * (first, second)[t // 3] + own * basis[2 + t] for t in range(len(RATES))])
