"""Shared bottom: one network that all tasks read, and a tower for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper
from koinon.nn.experts import Bank, Parts, experts_of
from koinon.nn.tasks import Task, distinct
from koinon.share._contract import Share, Shared


@dataclass(frozen=True)
class SharedBottom(Share):
    """Hard parameter sharing: everything below the towers is common."""

    paper: ClassVar = Paper("Multitask Learning", 1997, "https://doi.org/10.1023/A:1007379606734")
    exempt: ClassVar = {"is_alive": "this is the baseline the others are compared with"}

    bottom: tuple[int, ...] = (64,)
    """Widths of the layers that all tasks share."""
    tower: tuple[int, ...] = (32,)
    """Widths of each task's hidden layers."""
    swish: bool = False
    """Normalise the bottom's output over the batch and use Swish instead of ReLU (HoME's expert)."""

    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> Shared:
        """See `Share.share`."""
        tasks = distinct(tasks)
        bottom = Bank(experts_of(1, ["shared"], 1), (width, *self.bottom), seed, "swish" if self.swish else "relu")
        return Shared(encoder, _Common(bottom, len(tasks)), tasks, (self.bottom[-1], *self.tower), seed)


class _Common(nn.Module):
    """Shows one bank's only output to every task."""

    def __init__(self, bottom: Bank, tasks: int):
        super().__init__()
        self.bottom, self.tasks = bottom, tasks

    def forward(self, v: Float[Tensor, "batch width"] | Parts) -> Float[Tensor, "batch task out"]:
        return self.bottom(v).expand(-1, self.tasks, -1).contiguous()
