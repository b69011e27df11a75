"""Meters for the three ways in which experts go wrong: collapse, degradation, underfitting."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from koinon.nn.experts import Gates
from koinon.nn.train import evaluating


@torch.no_grad()
def expert_health(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Read every gate of a model (in evaluation mode) while it predicts.

    Args:
        model: any model with `Gates` in it; one without gives an empty result.
        batches: inputs, one batch after another.

    Returns:
        ``collapse``: the largest share of exact zeros in an expert's output (0 is healthy);
        ``spread``: the largest over the smallest standard deviation of experts mixed by one gate (1 is healthy);
        ``degradation``: the largest part of a shared expert's use that one reader takes, rescaled so that 0 is
        an even share and 1 is sole ownership;
        ``underfitting.NAME``: the gate mass a task gives its own experts over their number's fair share
        (1 is even use, 0 is ignoring them). A meter that no gate of the model has is left out.
    """
    seen = {module: _Seen() for module in model.modules() if isinstance(module, Gates)}
    hooks = [gates.given.register_forward_hook(partial(_note, totals)) for gates, totals in seen.items()]
    try:
        with evaluating(model):
            for inputs in batches:
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    meters: dict[str, float] = {}
    for gates, totals in seen.items():
        for name, value in _meters(gates, totals).items():
            worst = min if name.startswith("underfitting") else max
            meters[name] = worst(value, meters.get(name, value))
    return meters


class _Seen:
    """Running sums over batches of what one set of gates mixed."""

    def __init__(self):
        self.rows: int = 0
        self.mass: Any = 0.0
        self.zeros: Any = 0.0
        self.sum: Any = 0.0
        self.squares: Any = 0.0

    def add(self, weights: Tensor, values: Tensor) -> None:
        values = values.double()
        self.rows += len(values)
        self.mass = self.mass + weights.double().sum(0)  # reader expert
        self.zeros = self.zeros + (values == 0).double().mean(2).sum(0)  # expert
        self.sum = self.sum + values.mean(2).sum(0)
        self.squares = self.squares + (values**2).mean(2).sum(0)


def _note(seen: _Seen, _given: nn.Module, args: tuple[Tensor, Tensor], _output: Tensor) -> None:
    seen.add(*args)


def _meters(gates: Gates, seen: _Seen) -> Mapping[str, float]:
    mass = seen.mass / seen.rows  # reader expert
    std = (seen.squares / seen.rows - (seen.sum / seen.rows) ** 2).clamp(min=0).sqrt()
    meters = {
        "collapse": float((seen.zeros / seen.rows).max()),
        "spread": float(std.max() / std.min().clamp(min=1e-12)),
    }
    owners = [expert.owner for expert in gates.experts]
    shared = [i for i, owner in enumerate(owners) if owner == "shared"]
    readers = len(gates.readers)
    if shared and readers > 1:
        largest = mass[:, shared].amax(0) / mass[:, shared].sum(0).clamp(min=1e-12)
        meters["degradation"] = float(((largest - 1 / readers) / (1 - 1 / readers)).max())
    visible = gates.seen.shape[1]
    for reader, row in zip(gates.readers, mass, strict=True):
        own = [i for i, owner in enumerate(owners) if owner == reader]
        if reader.startswith("task ") and 0 < len(own) < visible:
            meters[f"underfitting.{reader[5:]}"] = float(row[own].sum()) * visible / len(own)
    return meters
