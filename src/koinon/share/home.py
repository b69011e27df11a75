"""HoME: normalised experts on two levels, per category and per task, with gates that keep sparse tasks learning.

Departures: feature gates are one per expert group on both levels, and their low-rank factors start so that the gate is
the identity; the paper leaves both open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper
from koinon.nn.experts import Bank, Expert, Gates, Parts, experts_of, joined, mixed, read
from koinon.nn.tasks import Task, distinct
from koinon.share._contract import Share, Shared


@dataclass(frozen=True)
class HoME(Share):
    """Hierarchy of multi-gate experts (Wang et al., section 3)."""

    paper: ClassVar = Paper(
        "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou",
        2024,
        "https://arxiv.org/abs/2408.05430",
    )
    null: ClassVar = {
        "shared": 1,
        "per_group": 0,
        "specific": 0,
        "meta": False,
        "meta_feature_gates": 0,
        "task_feature_gates": 0,
        "self_gate": False,
        "swish": False,
    }

    shared: int = 2
    """Experts all tasks read, on each level."""
    per_group: int = 2
    """Experts of each category, on each level."""
    specific: int = 1
    """Experts of each task, on the task level."""
    expert: tuple[int, ...] = (64,)
    """Widths of each expert's layers."""
    tower: tuple[int, ...] = (32,)
    """Widths of each task's hidden layers."""
    meta: bool = True
    """Have the meta level; without it the task level reads the encoder (and ``per_group`` experts sit there only)."""
    hierarchy: bool = True
    """Mask: keep a task from the experts of other categories."""
    meta_feature_gates: int = 2
    """L on the meta level: low-rank gates summed into one feature gate; 0 for none."""
    task_feature_gates: int = 2
    """L on the task level."""
    self_gate: bool = True
    """Add a residual path from each category's and each task's own experts."""
    swish: bool = True
    """Expert(x) = Swish(BatchNorm(MLP(x))); otherwise ReLU(MLP(x))."""

    def share(self, encoder: nn.Module, tasks: Sequence[Task], width: int, seed: int = 0) -> Shared:
        """See `Share.share`; a category is a task's ``group``."""
        tasks = distinct(tasks)
        levels: list[nn.Module] = []
        if self.meta:
            levels.append(_MetaLevel(self, tasks, width, seed))
            width = self.expert[-1]
        levels.append(_TaskLevel(self, tasks, width, seed))
        return Shared(encoder, nn.Sequential(*levels), tasks, (self.expert[-1], *self.tower), seed)


class _MetaLevel(nn.Module):
    """Level 1: z_shared from all experts, z_c from the shared ones and category c's; all read the encoder's vector."""

    def __init__(self, home: HoME, tasks: Sequence[Task], width: int, seed: int):
        super().__init__()
        groups = [f"group {name}" for name in _categories(tasks)]
        owners = [(["shared"], home.shared), (groups, home.per_group)]
        self.experts = _OwnedExperts(home, 1, owners, width, home.meta_feature_gates, seed)
        names = self.experts.names
        sees = [["shared", group] if home.hierarchy else ["shared", *groups] for group in groups]
        self.shared_gate = Gates(["meta shared"], names, [["shared", *groups]], width, seed)
        self.group_gates = Gates(groups, names, sees, width, seed)
        self.self_gates = _self_gates(groups, names, width, seed) if home.self_gate and home.per_group else None

    def forward(self, v: Float[Tensor, "batch width"] | Parts) -> Float[Tensor, "batch state out"]:
        """Gives z_shared, then z_c for each category."""
        v = joined(v)
        experts = self.experts(v)
        z_shared, z_group, *z_self = _mixed(v, experts, self.shared_gate, self.group_gates, self.self_gates)
        return torch.cat([z_shared, sum(z_self, z_group)], 1)


class _TaskLevel(nn.Module):
    """Level 2: each task mixes shared experts on z_shared, and its category's and its own experts on z_c."""

    def __init__(self, home: HoME, tasks: Sequence[Task], width: int, seed: int):
        super().__init__()
        level = 2 if home.meta else 1
        categories = _categories(tasks)
        groups, own = [f"group {name}" for name in categories], [f"task {task.name}" for task in tasks]
        owners = [(["shared"], home.shared), (groups, home.per_group), (own, home.specific)]
        self.category = [categories.index(task.group) for task in tasks]
        self.experts = _OwnedExperts(home, level, owners, width, home.task_feature_gates, seed)
        names = self.experts.names
        sees = [
            ["shared", *([groups[c]] if home.hierarchy else groups), task]
            for c, task in zip(self.category, own, strict=True)
        ]
        gate_width = 2 * width if home.meta else width
        self.gates = Gates(own, names, sees, gate_width, seed)
        self.self_gates = _self_gates(own, names, gate_width, seed) if home.self_gate and home.specific else None

    def forward(
        self, z: Float[Tensor, "batch width"] | Float[Tensor, "batch state width"] | Parts
    ) -> Float[Tensor, "batch task out"]:
        z = joined(z)
        if z.ndim == 3:
            z_shared, z_group = z[:, :1], z[:, 1:]
            z_task = z_group[:, self.category]  # batch task width
            experts = self.experts(torch.cat([z_shared, z_group, z_task], 1))
            x = torch.cat([z_task, z_shared.expand_as(z_task)], 2)
        else:  # no meta level: everything reads the encoder's vector
            experts, x = self.experts(z), z
        out, *own = _mixed(x, experts, self.gates, self.self_gates)
        return sum(own, out)


class _OwnedExperts(nn.Module):
    """The experts of several owners, each owner's behind one feature gate."""

    def __init__(
        self, home: HoME, level: int, owners: list[tuple[list[str], int]], width: int, feature_gates: int, seed: int
    ):
        super().__init__()
        activation = "swish" if home.swish else "relu"
        parts = [experts_of(level, who, each) for who, each in owners]
        self.names = [name for names in parts for name in names]
        self.sizes = [len(who) for who, _ in owners]
        everyone = [owner for who, _ in owners for owner in who]
        self.feature_gates = _FeatureGates(level, everyone, width, feature_gates, seed) if feature_gates else None
        self.banks = nn.ModuleList(Bank(names, (width, *home.expert), seed, activation) for names in parts)

    def forward(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch owner width"]
    ) -> Float[Tensor, "batch expert out"]:
        if self.feature_gates is not None:
            x = self.feature_gates(x)
        inputs = [x] * len(self.banks) if x.ndim == 2 else x.split(self.sizes, 1)
        return torch.cat([bank(part) for bank, part in zip(self.banks, inputs, strict=True)], 1)


class _FeatureGates(nn.Module):
    """x * FG(x), with FG(x) = sum_l w_l(x) 2 sigmoid(x B_l A_l), a gate in (0, 2) for each owner."""

    def __init__(self, level: int, owners: list[str], width: int, count: int, seed: int):
        super().__init__()
        names = [("feature gate", level, owner, index) for owner in owners for index in range(count)]
        rank = max(width // count, 1)
        self.down = Bank(names, (width, rank), seed, last="linear", bias=False)  # B_l
        self.up = Bank(names, (rank, width), seed, last="linear", bias=False)  # A_l
        self.mix = Bank([("feature gate", level, owner) for owner in owners], (width, count), seed, last="linear")
        nn.init.zeros_(self.down.weights[0])  # FG = 1 before training

    def forward(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch owner width"]
    ) -> Float[Tensor, "batch owner width"]:
        down, mix = read(x, self.down, self.mix)
        weights = 2 * mix.softmax(-1)  # batch owner l
        gates = self.up(down).sigmoid().view(*weights.shape, -1)  # batch owner l width
        return (weights.unsqueeze(3) * gates).sum(2) * (x if x.ndim == 3 else x.unsqueeze(1))


def _categories(tasks: Sequence[Task]) -> list[str]:
    return list(dict.fromkeys(task.group for task in tasks))


def _mixed(x: Tensor, experts: Float[Tensor, "batch expert out"], *gates: Gates | None) -> list[Tensor]:
    """The experts mixed by each of the gates, which all read ``x``; those that are switched off give nothing."""
    on = [one for one in gates if one is not None]
    return list(mixed(experts, on, read(x, *on)).split([len(one.readers) for one in on], 1))


def _self_gates(readers: list[str], experts: list[Expert], width: int, seed: int) -> Gates:
    """sg over the reader's own experts: a sigmoid if there is one, otherwise a softmax."""
    own = sum(expert.owner == readers[0] for expert in experts)
    squash = "sigmoid" if own == 1 else "softmax"
    return Gates([f"self {r}" for r in readers], experts, [[r] for r in readers], width, seed, squash)
