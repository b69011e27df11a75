"""Twin-Merging: one shared expert, and a small low-rank twin of each model that a router adds back for each input.

Departures: a tensor of more than two dimensions is cut as a matrix, see `as_matrix`; running statistics have twins too.
The router's checkpoint is that of least loss on held-out training inputs, where the release takes the best on test
data; it has no biases before batch normalisation; and it picks a row's head, where the release takes the true task's.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import Paper, UserError, refuse_below, refuse_outside
from koinon.data.checkpoints import matches
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import features, needed, outputs, own_states, parts, rows, shared_states, taken, with_own
from koinon.merge._vectors import each
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.nn.branches import Branches
from koinon.nn.lowrank import CUTS, Stack, as_matrix
from koinon.nn.params import stream
from koinon.nn.router import Router, trained_router

Own = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class TwinMerging(Merge):
    """Knowledge modularisation and dynamic merging (Lu et al., algorithm 1); its model is a `Twin`."""

    paper: ClassVar = Paper(
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        2024,
        "https://arxiv.org/abs/2406.15479",
    )
    null: ClassVar = {"rank": 0.0, "scale": 0.5}
    quick: ClassVar = {"batch": 35, "epochs": 2}

    scale: float = 0.3
    """lambda of the shared expert theta* = theta_0 + lambda sum_t (theta_t - theta_0); at 0 there is no shared one."""
    rank: float = 0.1
    """r: share of each matrix's singular values (or elements, see ``compress``) that a twin keeps, rounded down.

    A vector is kept whole, except at 0, where nothing is.
    """
    compress: Literal["svd", "magnitude", "random"] = "svd"
    """Keep the largest singular values, the largest elements, or random ones, rescaled; these two save no memory."""
    skip: tuple[str, ...] = ()
    """Patterns (as of ``fnmatch``) of tensors without twins: they stay the shared expert's."""
    features: str = ""
    """Pattern of the module whose output, or input if ``:input`` follows, the router reads; empty: the head's input."""
    hard: bool = False
    """Give all weight to the likeliest model."""
    dropout: tuple[float, ...] = (0.5,)
    """Probability, for each of the router's two hidden layers or for both."""
    lr: float = 5e-4
    """Adam's step size for the router."""
    batch: int = 1024
    """Rows the router learns from at once; all, if there are fewer."""
    epochs: int = 50
    """Passes over the router's data."""
    holdout: float = 0.1
    """Share of each model's data that the router does not learn from, to choose its best epoch by."""
    seed: int = 0
    """Start of the random streams."""

    def merge(self, pool: Pool) -> "Twin":
        """Make the shared expert and the twins, and train the router on ``pool.data``; see `Merge.merge`."""
        refuse_outside(0, 1, rank=self.rank, holdout=self.holdout, dropout=self.dropout)
        refuse_below(0, lr=self.lr)
        refuse_below(1, epochs=self.epochs)
        dropout = each(self.dropout, ("first layer", "second layer"), "dropout")
        # 1. The shared expert theta*.
        shared = TaskArithmetic(scale=self.scale).merge(pool).eval().requires_grad_(False)
        # 2. Twins v_t = compress(theta_t - theta*).
        branches = Branches(shared, self._twins(pool, shared.state_dict()) if self.rank else {})
        # 3. The router learns to tell the tasks by features of the shared expert.
        data = needed(pool, "the router")
        read = {task: features(shared, self.features, its) for task, its in data.items()}
        router = trained_router(read, self.seed, dropout, self.holdout, self.lr, self.batch, self.epochs)
        twin = Twin(self, shared, branches, router, dict(zip(data, own_states(pool), strict=True)))
        twin.prove(taken(next(iter(data.values())), slice(0, 2)))
        return twin

    def _twins(self, pool: Pool, stars: Mapping[str, Tensor]) -> dict[str, Stack]:
        base, tuned = shared_states(pool)
        stacks = {}
        for name in itertools.chain(*parts(pool.base, base)):
            if matches(name, self.skip):
                continue
            kind = torch.promote_types(stars[name].dtype, torch.float32)
            vectors = [state[name].to(kind) - stars[name].to(kind) for state in tuned.values()]
            if as_matrix(vectors[0]).ndim > 1 and self.rank < 1:
                numbers = [stream(self.seed, "twin", task, name) for task in tuned]
                stacks[name] = CUTS[self.compress](vectors, self.rank, numbers)
            else:
                stacks[name] = Stack(vectors)
        return {name: stack.to(stars[name].dtype) for name, stack in stacks.items() if stack.numbers}


class Twin(nn.Module):
    """A merged model that is another one for each row: theta(x) = theta* + sum_t w_t(x) v_t. It only predicts.

    Called like the base it gives logits, [batch, ...]. If heads stay the tasks' own, a row has the one of its largest
    weight, and narrower logits are filled up with -inf to the widest.

    Args:
        method: its settings.
        shared: the shared expert theta*.
        branches: the twins v_t.
        router: from features of the shared expert to the tasks' logits.
        own: task to its own tensors, in the order of the weights.
    """

    def __init__(self, method: TwinMerging, shared: nn.Module, branches: Branches, router: Router, own: Own):
        super().__init__()
        self.method, self.tasks, self.names = method, tuple(own), tuple(next(iter(own.values())))
        self.shared, self.branches, self.router = shared, branches, router
        self.own = nn.ModuleList(nn.Module() for _ in own)
        for holder, state in zip(self.own, own.values(), strict=True):
            for name, value in state.items():
                holder.register_buffer(name.replace(".", "/"), value.clone())
        self.width = 0
        """Of the widest logits."""
        self.train(False)

    def train(self, mode: bool = True) -> "Twin":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def stored_numbers(self) -> int:
        """How many numbers the twins take."""
        return sum(value.numel() for value in self.branches.buffers())

    @property
    def stored_bytes(self) -> int:
        """How much memory the twins take."""
        return sum(value.nbytes for value in self.branches.buffers())

    def forward(self, inputs: Any = None, /, **named: Any) -> Float[Tensor, "batch ..."]:
        """Logits with routed weights."""
        given = named if inputs is None else inputs
        return self.with_weights(given, self.route(given))

    def route(self, inputs: Any) -> Float[Tensor, "batch task"]:
        """w = softmax(R(features of the shared expert)); each row sums to 1."""
        weights = self.router(features(self.shared, self.method.features, inputs)).softmax(1)
        return F.one_hot(weights.argmax(1), len(self.tasks)).to(weights) if self.method.hard else weights

    def with_weights(self, inputs: Any, weights: Float[Tensor, "batch task"]) -> Float[Tensor, "batch ..."]:
        """Logits with given weights, such as one-hot ones where the tasks are known; a UserError for another shape."""
        if weights.shape != (rows(inputs), len(self.tasks)):
            raise UserError(f"weights {list(weights.shape)}: give {[rows(inputs), len(self.tasks)]}, [batch, task]")
        if not self.names:
            return self._mixed(inputs, weights)
        head = weights.argmax(1)
        order = [(head == task).nonzero().flatten() for task in range(len(self.tasks))]
        some = [(task, its) for task, its in enumerate(order) if len(its)] or [(0, order[0])]
        found = [self._mixed(taken(inputs, its), weights[its], task) for task, its in some]
        filled = [F.pad(its, (0, self.width - its.shape[-1]), value=-math.inf) for its in found]
        return torch.cat(filled)[torch.cat(order).argsort()]

    def materialize(self, weights: Float[Tensor, " task"]) -> nn.Module:
        """One model of the base's class, theta* + sum_t w_t v_t, with the own tensors of the largest weight's task."""
        return with_own(self.shared, self.branches.mixed(self.shared, weights), self._own(int(weights.argmax())))

    @torch.no_grad()
    def prove(self, inputs: Any) -> None:
        """See how wide logits are, and that side branches give what merged weights give.

        Raises:
            UserError: they do not, as some module uses its tensors otherwise than by being called on the rows.
        """
        own, weights = self._own(0), torch.rand(rows(inputs), len(self.tasks), generator=stream(0, "prove"))
        heads = range(len(self.tasks) if self.names else 1)
        self.width = max(outputs(self.shared, inputs, self._own(head)).shape[-1] for head in heads)
        for number, (found, its) in enumerate(zip(self._mixed(inputs, weights), weights, strict=True)):
            row = taken(inputs, slice(number, number + 1))
            due = outputs(self.shared, row, self.branches.mixed(self.shared, its) | own)
            change = (due - outputs(self.shared, row, own)).abs().max()
            limit = 0.05 * change + 100 * torch.finfo(due.dtype).eps * due.abs().max()
            if not bool((found - due[0]).abs().max() <= limit):
                idle = sorted(set(self.branches.places) - self.branches.met) or ["the module that mixes rows"]
                raise UserError(f"side branches do not give what merged weights give: put {idle[0]} into `skip`")

    def _own(self, task: int) -> dict[str, Tensor]:
        return {name: getattr(self.own[task], name.replace(".", "/")) for name in self.names}

    def _mixed(self, inputs: Any, weights: Tensor, head: int = 0) -> Float[Tensor, "batch ..."]:
        with self.branches.mixing(self.shared, weights):
            return outputs(self.shared, inputs, self._own(head))
