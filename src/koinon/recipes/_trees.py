"""What people would pick for a table instead: gradient-boosted trees, one model a task."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from koinon.bench.statistics import Resampling
from koinon.core import UserError
from koinon.data.tables import Rows, World
from koinon.nn.tasks import Task
from koinon.share._tables import Budget

try:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.model_selection import KFold, StratifiedKFold
    from sklearn.preprocessing import TargetEncoder
except ModuleNotFoundError:
    raise UserError("comparing with trees needs scikit-learn: pip install 'koinon[tables]'") from None

BINS = 255
"""Most values of a category that scikit-learn's trees split on; larger ones become target means."""


@dataclass(frozen=True)
class BoostedTrees:
    """scikit-learn's histogram gradient boosting, each task alone.

    For every task, learning rate and number of trees are chosen on the validation part. Categories with more than
    255 values are encoded by their mean label, cross-fitted on the training part.
    """

    trees: int = 200
    """Most trees."""
    rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Learning rates to choose from, as many as the networks have."""

    def predict(self, world: World, budget: Budget, seed: int) -> tuple[dict[str, NDArray], dict[str, float | None]]:
        """Predictions for the test part in the table's units, and what they cost."""
        start = time.perf_counter()
        rates = self.rates[: len(budget.rates)]
        predictions = {task.name: self._one(world, task, rates, seed) for task in world.tasks}
        seconds = time.perf_counter() - start
        return world.schema.in_units(predictions), {"trained": None, "active": None, "seconds": round(seconds, 3)}

    def _one(self, world: World, task: Task, rates: tuple[float, ...], seed: int) -> NDArray:
        known = {part: ~np.isnan(rows.labels[task.name]) for part, rows in _parts(world)}
        labels = {part: rows.labels[task.name][known[part]] for part, rows in _parts(world)}
        codes, numbers = (
            {part: rows.inputs[kind] for part, rows in _parts(world)} for kind in ("categories", "numbers")
        )
        large = np.array([size > BINS for size in world.schema.sizes], dtype=bool)
        binary = task.kind == "binary"
        folds = (StratifiedKFold if binary else KFold)(5, shuffle=True, random_state=seed)
        encoder = TargetEncoder(target_type="binary" if binary else "continuous", cv=folds)

        def features(part: str, of: NDArray) -> NDArray:
            means = np.zeros((int(of.sum()), 0))
            if large.any():
                wide = codes[part][of][:, large]
                means = encoder.fit_transform(wide, labels[part]) if part == "train" else encoder.transform(wide)
            return np.concatenate([codes[part][of][:, ~large], means, numbers[part][of]], 1)

        train, valid = features("train", known["train"]), features("valid", known["valid"])
        test = features("test", np.ones(len(world.test), dtype=bool))
        judge = Resampling(None, len(labels["valid"]), draws=0)
        best, chosen = -np.inf, np.zeros(len(test))
        for rate in rates:
            kind = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
            model = kind(
                learning_rate=rate,
                max_iter=self.trees,
                early_stopping=False,
                categorical_features=list(range(int((~large).sum()))),
                random_state=seed,
            ).fit(train, labels["train"])
            for on_valid, on_test in zip(_staged(model, valid), _staged(model, test), strict=True):
                truth = labels["valid"].astype(float)
                value = judge.auc(truth, on_valid).value if binary else -judge.rmse(truth, on_valid).value
                if value > best:
                    best, chosen = value, on_test
        return chosen


def _parts(world: World) -> list[tuple[str, Rows]]:
    return [("train", world.train), ("valid", world.valid), ("test", world.test)]


def _staged(model, features: NDArray):
    """Predictions with 5, 10, 15, ... trees."""
    classes = hasattr(model, "staged_predict_proba")
    staged = model.staged_predict_proba(features) if classes else model.staged_predict(features)
    for trees, values in enumerate(staged, start=1):
        if trees % 5 == 0:
            yield values[:, 1] if classes else values
