"""What every way of sharing does on a table: train, choose on the validation part, measure."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from koinon.bench.statistics import Measured, Resampling, mean_of
from koinon.core import UserError
from koinon.data.schema import TableEncoder
from koinon.data.tables import Rows, World
from koinon.nn.tasks import shared_loss
from koinon.nn.train import Batches, Cost, predict, train
from koinon.share._contract import Share, Shared
from koinon.terminal import Told, untold


@dataclass(frozen=True)
class Budget:
    """What each contestant may spend; the same for all."""

    epochs: int = 10
    """Most passes over the training part, for each learning rate."""
    patience: int = 2
    """Stop a learning rate after this many epochs without a better validation score."""
    batch: int = 1024
    """Examples a step."""
    rates: tuple[float, ...] = (0.003,)
    """Learning rates to choose from on the validation part."""
    embedding: int = 16
    """Width of each category's embedding."""


@dataclass(frozen=True)
class Chosen:
    """The network that scored best on the validation part, and what finding it cost."""

    model: Shared
    rate: float
    epoch: int
    score: float
    cost: Cost


def choose(
    method: Share,
    world: World,
    budget: Budget,
    seed: int,
    told: Told = untold,
) -> Chosen:
    """Train with each learning rate and keep the epoch with the best validation score.

    ``told`` hears how many epochs are done, of how many at most.
    """
    inputs, labels = world.train.tensors()
    valid = {name: torch.tensor(value) for name, value in world.valid.inputs.items()}
    best: Chosen | None = None
    spent = Cost()
    for turn, rate in enumerate(budget.rates):
        encoder = TableEncoder(world.schema, budget.embedding, seed)
        model = method.share(encoder, world.tasks, encoder.width, seed)
        cost, top, top_epoch = Cost(), -np.inf, 0
        for cost in train(model, Batches(inputs, labels, budget.batch, seed), shared_loss, budget.epochs, rate):
            score = quality(world, world.valid, predict_rows(model, world, valid))
            if score > top:
                top, top_epoch = score, cost.epochs
                if best is None or score > best.score:
                    best = Chosen(copy.deepcopy(model), rate, cost.epochs, score, spent)
            told(turn * budget.epochs + cost.epochs, len(budget.rates) * budget.epochs)
            if cost.epochs - top_epoch >= budget.patience:
                break
        spent = Cost(*(a + b for a, b in zip(vars(spent).values(), vars(cost).values(), strict=True)))
    if best is None:
        raise UserError(f"no learning rate of {budget.rates} gives finite predictions: give smaller ones with --rates")
    return replace(best, cost=spent)


def predict_rows(model: Shared, world: World, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Probabilities, or values in the table's units, for each task."""
    return world.schema.in_units({name: value.numpy() for name, value in predict(model, inputs).items()})


def measure(
    world: World, rows: Rows, predictions: Mapping[str, np.ndarray], resampling: Resampling
) -> dict[str, Measured]:
    """Every metric of the predictions.

    ``TASK.auc``, ``TASK.gauc`` and its ``TASK.coverage`` for a binary task (the latter two with groups),
    ``TASK.rmse`` and ``TASK.r2`` for a regression; ``mean.*`` over all tasks of the kind and ``sparse.*`` over the
    sparse ones; ``mean.score`` over all tasks, each by its main metric (GAUC, or AUC without groups, or R2).
    """
    labels = world.schema.in_units(rows.labels)
    metrics: dict[str, Measured] = {}
    for task in world.tasks:
        truth, scores = labels[task.name], predictions[task.name]
        if task.kind == "binary":
            metrics[f"{task.name}.auc"] = resampling.auc(truth, scores)
            if rows.groups is not None:
                metrics[f"{task.name}.gauc"], coverage = resampling.gauc(truth, scores)
                metrics[f"{task.name}.coverage"] = Measured(coverage, np.array([]))
        else:
            metrics[f"{task.name}.rmse"] = rmse = resampling.rmse(truth, scores)
            around_mean = resampling.rmse(truth, np.full(len(truth), np.nanmean(truth)))
            metrics[f"{task.name}.r2"] = Measured(
                1 - (rmse.value / around_mean.value) ** 2, 1 - (rmse.draws / around_mean.draws) ** 2
            )
    for kind in ("auc", "gauc", "r2"):
        for part, names in (("mean", [task.name for task in world.tasks]), ("sparse", world.sparse)):
            found = [metrics[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in metrics]
            if found:
                metrics[f"{part}.{kind}"] = mean_of(found)
    metrics["mean.score"] = mean_of([metrics[f"{task.name}.{main_metric(world, [task])}"] for task in world.tasks])
    return metrics


def main_metric(world: World, tasks: Sequence) -> str:
    """``gauc``, ``auc`` or ``r2`` where one suits all the tasks, otherwise ``score``."""
    binary = "auc" if world.test.groups is None else "gauc"
    kinds = {binary if task.kind == "binary" else "r2" for task in tasks}
    return kinds.pop() if len(kinds) == 1 else "score"


def quality(world: World, rows: Rows, predictions: Mapping[str, np.ndarray]) -> float:
    """``mean.score`` of the predictions: what is chosen by, on the validation part."""
    return measure(world, rows, predictions, Resampling(rows.groups, len(rows), draws=0))["mean.score"].value
