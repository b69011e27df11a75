"""What serves rows of all tasks: a model a task with a router before them, or one model with routed twins."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.merge._live import features
from koinon.merge.twin import Twin
from koinon.nn.router import Router
from koinon.recipes._experts import in_batches


@dataclass(frozen=True)
class Reading:
    """How rows meet models."""

    prompt: Callable[[Tensor], Tensor]
    """What a router may see of the rows."""
    answer: Callable[[Tensor, Tensor], Tensor]
    """From a model's logits for rows, and the rows, to an answer for each, [rows]."""
    size: int = 1024
    """Rows that run at once."""


CLASSES = Reading(lambda rows: rows, lambda logits, rows: logits.argmax(1))
"""A router sees the whole row, and the answer is a class."""


class Served(ABC):
    """Something that answers for rows of all tasks."""

    stored: int
    """Numbers that are kept: weights, heads, twins and router."""
    active: int
    """Numbers that one row meets."""

    @abstractmethod
    def told(self, rows: Float[Tensor, "rows ..."], task: int) -> Tensor:
        """Answers, [rows], for rows known to be this task's."""

    @abstractmethod
    def routed(self, rows: Tensor, truth: Int64[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Tasks and answers, [rows] each. Only an oracle looks at the truth."""


class Switched(Served):
    """A model for each task, and a router that picks one by the features of a reader.

    Args:
        models: one a task; statically merged ones differ in their heads only.
        reader: whose features the router reads.
        router: trained on them; None if nothing is to be routed.
        stored: see `Served`.
        reading: see `Reading`.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        reader: nn.Module,
        router: Router | None,
        stored: int,
        reading: Reading = CLASSES,
    ):
        self.models, self.reader, self.router, self.stored, self.reading = models, reader, router, stored, reading
        self.active = numbers(models[0]) + (numbers(router) if router else 0)

    def told(self, rows: Tensor, task: int) -> Tensor:
        return in_batches(lambda part: self.reading.answer(self.models[task](part), part), rows, size=self.reading.size)

    def routed(self, rows: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        assert self.router is not None
        router = self.router
        prompts = self.reading.prompt(rows)
        task = in_batches(lambda part: router(features(self.reader, "", part)).argmax(1), prompts)
        return task, by_task(self.told, rows, task)


class Twofold(Served):
    """A `Twin`, with its router or with the truth in its place.

    Args:
        twin: the merged model.
        oracle: whether the truth is in the router's place.
        trunk: numbers of the shared expert without its head.
        heads: numbers of all heads.
        reading: see `Reading`.
    """

    def __init__(self, twin: Twin, oracle: bool, trunk: int, heads: int, reading: Reading = CLASSES):
        self.twin, self.oracle, self.reading = twin, oracle, reading
        self.active = trunk + twin.stored_numbers + numbers(twin.router)
        self.stored = self.active + heads

    def told(self, rows: Tensor, task: int) -> Tensor:
        weight = F.one_hot(torch.tensor(task), len(self.twin.tasks)).float()
        return in_batches(lambda part: self._mixed(part, weight.expand(len(part), -1)), rows, size=self.reading.size)

    def routed(self, rows: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if self.oracle:
            return truth, by_task(self.told, rows, truth)
        weights = in_batches(self.twin.route, self.reading.prompt(rows))
        return weights.argmax(1), in_batches(self._mixed, rows, weights, size=self.reading.size)

    def _mixed(self, rows: Tensor, weights: Tensor) -> Tensor:
        return self.reading.answer(self.twin.with_weights(rows, weights), rows)


def by_task(told: Callable[[Tensor, int], Tensor], rows: Float[Tensor, "rows ..."], task: Tensor) -> Tensor:
    """Answers, [rows], for rows of mixed tasks, asked for task by task."""
    order = [(task == number).nonzero().flatten() for number in task.unique()]
    found = [told(rows[its], int(task[its[0]])) for its in order]
    return torch.cat(found)[torch.cat(order).argsort()]


def numbers(module: nn.Module) -> int:
    """How many a module holds."""
    return sum(value.numel() for value in module.state_dict().values())
