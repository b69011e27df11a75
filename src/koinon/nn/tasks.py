"""What is predicted: tasks, their losses with missing labels, and predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import UserError, pick


@dataclass(frozen=True)
class Kind:
    """How tasks of one kind are learned and read."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """Loss of each example from output and label, both [batch]."""
    predict: Callable[[Tensor], Tensor]
    """From the network's output to what is reported."""


KINDS: Mapping[str, Kind] = {
    "binary": Kind(lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="none"), torch.sigmoid),
    "regression": Kind(lambda out, y: F.mse_loss(out, y, reduction="none"), lambda out: out),
}


@dataclass(frozen=True)
class Task:
    """One thing to predict from the shared input."""

    name: str
    kind: str = "binary"
    """``"binary"`` (the network's output is a logit) or ``"regression"``."""
    group: str = "all"
    """Category of related tasks, known beforehand."""
    weight: float = 1.0
    """Factor of the task's loss in the sum."""

    def __post_init__(self):
        pick(self.kind, KINDS, f"kind of task {self.name!r}")


def parse_task(text: str) -> Task:
    """``NAME``, ``NAME:GROUP``, ``NAME=KIND`` or ``NAME:GROUP=KIND`` as a task."""
    rest, _, kind = text.partition("=")
    name, _, group = rest.partition(":")
    if not name:
        raise UserError(f"task {text!r} has no name: write NAME:GROUP=KIND, as in like:positive or stars=regression")
    return Task(name, kind or "binary", group or "all")


def distinct(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks as a tuple; raises UserError if there is none or a name occurs twice."""
    if not tasks:
        raise UserError("no task given: name at least one")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task {name!r} is named twice: give each task once")
    return tuple(tasks)


def task_loss(
    tasks: Sequence[Task], outputs: Mapping[str, Float[Tensor, " batch"]], labels: Mapping[str, Float[Tensor, " batch"]]
) -> Float[Tensor, ""]:
    """Weighted sum over tasks of the mean loss on the examples that have a label; NaN marks a missing one.

    A task without any label in the batch adds exactly 0 and no gradient.
    """
    total = torch.zeros(())
    for task in tasks:
        out, label = outputs[task.name], labels[task.name]
        known = ~torch.isnan(label)
        # Masked before the loss as well: NaN times 0 would be NaN in the gradient.
        loss = KINDS[task.kind].loss(out, torch.where(known, label, 0.0)) * known
        total = total.to(loss) + task.weight * loss.sum() / known.sum().clamp(min=1)
    return total


def shared_loss(model: nn.Module, batch: tuple[Any, Mapping[str, Tensor]]) -> Float[Tensor, ""]:
    """`task_loss` of a model that knows its ``tasks``, on a batch ``(inputs, labels)``; give this to `train`."""
    inputs, labels = batch
    inside = getattr(model, "module", model)  # a wrapper for several devices keeps the model there
    return task_loss(inside.tasks, model(inputs), labels)  # type: ignore[arg-type]
