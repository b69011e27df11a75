"""Single task: a network of its own for every task; nothing is shared."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper
from koinon.nn.experts import Bank, experts_of, joined
from koinon.nn.tasks import Task, distinct
from koinon.share._contract import Share, Shared


@dataclass(frozen=True)
class SingleTask(Share):
    """As many networks as tasks, each with its own copy of the encoder, trained side by side."""

    paper: ClassVar = Paper("Multitask Learning", 1997, "https://doi.org/10.1023/A:1007379606734")
    exempt: ClassVar = {
        "null_equals_baseline": "no setting makes it share; with one task it is the baseline, which an oracle checks",
    }

    bottom: tuple[int, ...] = (64,)
    """Widths of the layers between encoder and tower, for each task."""
    tower: tuple[int, ...] = (32,)
    """Widths of each task's hidden layers."""
    swish: bool = False
    """Normalise the bottom's output over the batch and use Swish instead of ReLU (HoME's expert)."""

    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> Shared:
        """See `Share.share`."""
        tasks = distinct(tasks)
        owners = [f"task {task.name}" for task in tasks]
        bottoms = Bank(experts_of(1, owners, 1), (width, *self.bottom), seed, "swish" if self.swish else "relu")
        return Shared(_Copies(encoder, len(tasks)), bottoms, tasks, (self.bottom[-1], *self.tower), seed)


class _Copies(nn.Module):
    """One encoder a task, all starting equal."""

    def __init__(self, encoder: nn.Module, tasks: int):
        super().__init__()
        self.encoders = nn.ModuleList(copy.deepcopy(encoder) for _ in range(tasks))

    def forward(self, inputs: Any) -> Float[Tensor, "batch task width"]:
        return torch.stack([joined(encoder(inputs)) for encoder in self.encoders], 1)
