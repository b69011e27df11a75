"""One network for several tasks: ``share(encoder, tasks, width)`` puts experts, gates and towers on an encoder."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Method
from koinon.nn.experts import Bank
from koinon.nn.tasks import Task, distinct


@dataclass(frozen=True)
class Share(Method):
    """A way of sharing one network among tasks."""

    @abstractmethod
    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> "Shared":
        """Put the method's parts on a copy of ``encoder``.

        Args:
            encoder: any module whose output is [batch, width], or a tuple of parts of it side by side; it is
                copied, not changed.
            tasks: what to predict.
            width: size of the encoder's output vector.
            seed: start of the random streams that draw the new parameters.

        Raises:
            UserError: no task, or two of one name.
        """


class Shared(nn.Module):
    """A network for several tasks: encoder, then the method's trunk, then one tower a task.

    Args:
        encoder: inputs to [batch, width], or a tuple of parts of it; copied.
        trunk: what the encoder gives to one vector a task, [batch, task, trunk width].
        tasks: what to predict, in the order of the trunk's output.
        tower: widths of each tower's hidden layers, after the trunk width.
        seed: start of the random streams.
    """

    def __init__(self, encoder: nn.Module, trunk: nn.Module, tasks: Sequence[Task], tower: Sequence[int], seed: int):
        super().__init__()
        self.tasks = distinct(tasks)
        self.encoder = copy.deepcopy(encoder)
        self.trunk = trunk
        self.towers = Bank([f"tower {task.name}" for task in tasks], (*tower, 1), seed, last="linear")

    def forward(self, inputs: Any) -> dict[str, Float[Tensor, " batch"]]:
        """One output a task: a logit for a binary one, the value for a regression."""
        out = self.towers(self.trunk(self.encoder(inputs))).squeeze(-1)  # batch task
        return dict(zip([task.name for task in self.tasks], out.unbind(1), strict=True))
