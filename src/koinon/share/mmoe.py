"""MMoE: all tasks share one set of experts, and each task has a gate that mixes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper
from koinon.nn.experts import Bank, Gates, Parts, experts_of, read
from koinon.nn.tasks import Task, distinct
from koinon.share._contract import Share, Shared


@dataclass(frozen=True)
class MMoE(Share):
    """Multi-gate mixture-of-experts (Ma et al., section 4.2)."""

    paper: ClassVar = Paper(
        "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
        2018,
        "https://doi.org/10.1145/3219819.3220007",
    )
    null: ClassVar = {"experts": 1}

    experts: int = 8
    """n: number of experts."""
    expert: tuple[int, ...] = (64,)
    """Widths of each expert's layers."""
    tower: tuple[int, ...] = (32,)
    """Widths of each task's hidden layers."""
    swish: bool = False
    """Normalise each expert's output over the batch and use Swish instead of ReLU (HoME's expert)."""

    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> Shared:
        """See `Share.share`."""
        tasks = distinct(tasks)
        names = experts_of(1, ["shared"], self.experts)
        readers = [f"task {task.name}" for task in tasks]
        trunk = _Mixture(
            Bank(names, (width, *self.expert), seed, "swish" if self.swish else "relu"),
            Gates(readers, names, [["shared"]] * len(tasks), width, seed),
        )
        return Shared(encoder, trunk, tasks, (self.expert[-1], *self.tower), seed)


class _Mixture(nn.Module):
    """y_k = sum_i g_k(x)_i f_i(x), with g_k = softmax(W_k x)."""

    def __init__(self, experts: Bank, gates: Gates):
        super().__init__()
        self.experts, self.gates = experts, gates

    def forward(self, v: Float[Tensor, "batch width"] | Parts) -> Float[Tensor, "batch task out"]:
        hidden, logits = read(v, self.experts, self.gates)
        return self.gates.after(logits, self.experts.after(hidden))
