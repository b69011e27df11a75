"""PLE: shared and task-specific experts, each task gated over both, extracted level by level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper, UserError
from koinon.nn.experts import Bank, Gates, Parts, experts_of, mixed, read
from koinon.nn.tasks import Task, distinct
from koinon.share._contract import Share, Shared


@dataclass(frozen=True)
class PLE(Share):
    """Progressive layered extraction (Tang et al., section 4.3); one level is CGC (section 4.2)."""

    paper: ClassVar = Paper(
        "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized "
        "Recommendations",
        2020,
        "https://doi.org/10.1145/3383313.3412236",
    )
    null: ClassVar = {"levels": 1, "shared": 1, "specific": 0}

    levels: int = 2
    """N: number of extraction networks."""
    shared: int = 2
    """m_s: shared experts a level."""
    specific: int = 1
    """m_k: experts of each task, a level."""
    expert: tuple[int, ...] = (64,)
    """Widths of each expert's layers."""
    tower: tuple[int, ...] = (32,)
    """Widths of each task's hidden layers."""
    swish: bool = False
    """Normalise each expert's output over the batch and use Swish instead of ReLU (HoME's expert)."""

    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> Shared:
        """See `Share.share`."""
        tasks = distinct(tasks)
        if self.levels < 1 or not self.expert:
            raise UserError("PLE has at least one level, and its experts at least one layer")
        widths = [width] + [self.expert[-1]] * (self.levels - 1)
        trunk = nn.Sequential(
            *(
                _Extraction(self, tasks, width, level, last=level == self.levels, seed=seed)
                for level, width in enumerate(widths, start=1)
            )
        )
        return Shared(encoder, trunk, tasks, (self.expert[-1], *self.tower), seed)


class _Extraction(nn.Module):
    """One level. Its input is the encoder's vector, or the level below's: the shared vector, then each task's."""

    def __init__(self, ple: PLE, tasks: Sequence[Task], width: int, level: int, last: bool, seed: int):
        super().__init__()
        owners = [f"task {task.name}" for task in tasks]
        shared, own = experts_of(level, ["shared"], ple.shared), experts_of(level, owners, ple.specific)
        activation = "swish" if ple.swish else "relu"
        self.shared = Bank(shared, (width, *ple.expert), seed, activation)
        self.specific = Bank(own, (width, *ple.expert), seed, activation)
        sees = [["shared", owner] for owner in owners]
        self.task_gates = Gates(owners, shared + own, sees, width, seed)
        self.shared_gate = None if last else Gates([f"level {level}"], shared + own, [["shared", *owners]], width, seed)

    def forward(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch state width"] | Parts
    ) -> Float[Tensor, "batch state out"]:
        gates = [self.task_gates] if self.shared_gate is None else [self.shared_gate, self.task_gates]
        if isinstance(x, tuple) or x.ndim == 2:
            shared, specific, *logits = read(x, self.shared, self.specific, *gates)
        else:
            state, states = x.split([1, x.shape[1] - 1], 1)
            shared, *logits = read(state.squeeze(1), self.shared, *gates[:-1])
            specific, task_logits = read(states, self.specific, self.task_gates)
            logits.append(task_logits)
        experts = torch.cat([self.shared.after(shared), self.specific.after(specific)], 1)  # batch expert out
        return mixed(experts, gates, logits)
