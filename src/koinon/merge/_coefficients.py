"""Merging with learned coefficients: theta_0 + m o sum_t lambda_t tau_t, and the entropy that lambda descends."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import UserError
from koinon.merge._contract import Pool
from koinon.merge._live import Predict, State, entropy, outputs, parts, quietly, shared_states, shuffled
from koinon.merge.average import weighted_mean
from koinon.nn.params import stream


@dataclass(frozen=True)
class Vectors:
    """A pool's task vectors, tensor by tensor."""

    base: State
    """theta_0: the parameters that are merged, a tied one once."""
    tau: State
    """Of each of them the task vectors, [task, n], in the tasks' order."""
    rest: State
    """The mean of all other floating-point tensors, such as running means and variances, which a mask could make
    negative: no coefficient and no mask is put on them."""

    def merged(
        self, lam: Float[Tensor, "tensor_or_1 task"], mask: State | None = None
    ) -> dict[str, Float[Tensor, "..."]]:
        """theta_0 + m o sum_t lambda_t tau_t, with gradients to ``lam`` and ``mask``, in the base's own types.

        Args:
            lam: a row for each tensor, or one for all.
            mask: [n] for each tensor; without one all of each vector counts.
        """
        state = dict(self.rest)
        for (name, base), row in zip(self.base.items(), lam.expand(len(self.base), -1).unbind(), strict=True):
            tau = self.tau[name]
            start, row = base.flatten().to(tau.dtype), row.to(tau.dtype)
            if mask is None:
                theta = torch.addmv(start, tau.T, row)  # n
            else:
                theta = torch.addcmul(start, mask[name].to(tau.dtype), tau.T @ row)
            state[name] = theta.view(base.shape).to(base.dtype)
        return state

    def coefficients(self, init: float, per: Literal["tensor", "task"]) -> Float[Tensor, "tensor_or_1 task"]:
        """lambda at its start, asking for gradients: a row for each tensor, or one for all."""
        first = next(iter(self.tau.values()))
        rows = len(self.base) if per == "tensor" else 1
        return first.new_full((rows, len(first)), init, dtype=self.kind, requires_grad=True)

    @property
    def kind(self) -> torch.dtype:
        """What is computed in: float32, or float64 where a tensor is."""
        return reduce(torch.promote_types, (its.dtype for its in self.tau.values()))


def task_vectors(pool: Pool) -> Vectors:
    """tau_t = theta_t - theta_0 of all parameters that are shared.

    Raises:
        UserError: no model, models that do not fit each other, or no parameter to merge.
    """
    base, tuned = shared_states(pool)
    names, others = parts(pool.base, base)
    if not names:
        raise UserError("nothing to merge: every parameter of the base stays a task's own")
    tau = {}
    for name in names:
        kind = torch.promote_types(base[name].dtype, torch.float32)
        rows = [(state[name].to(kind) - base[name]).flatten() for state in tuned.values()]
        tau[name] = torch.stack(rows)  # task n
    ones = [1.0] * len(tuned)
    rest = {name: weighted_mean([its[name] for its in tuned.values()], ones, True).to(base[name]) for name in others}
    return Vectors({name: base[name] for name in names}, tau, rest)


def predictor(pool: Pool) -> Predict:
    """What each task's own model says with merged weights in the place of its own, which keeps the heads it has."""
    models = {task: quietly(module) for task, module in pool.tuned.items()}
    return lambda state, task, inputs: outputs(models[task], inputs, state)


def batches(data: Mapping[str, Any], batch: int, seed: int, purpose: str) -> Iterator[dict[str, Any]]:
    """For ever a batch of every task, each task's drawn from a stream of its own.

    Raises:
        UserError: a batch without rows.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: give 1 row or more")
    streams = {task: shuffled(inputs, batch, stream(seed, purpose, task)) for task, inputs in data.items()}
    while True:
        yield {task: next(its) for task, its in streams.items()}


def uncertainty(predict: Predict, state: State, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
    """sum_t of the mean entropy of the predictions for a task's rows."""
    return torch.stack([entropy(predict(state, task, inputs)) for task, inputs in batch.items()]).sum()


def descend(optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""]) -> None:
    """One step on the optimizer's own tensors; no other tensor gets a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=[its for group in optimizer.param_groups for its in group["params"]])
    optimizer.step()


@torch.enable_grad()
def tuned(
    vectors: Vectors,
    predict: Predict,
    lam: Float[Tensor, "tensor_or_1 task"],
    drawn: Iterator[Mapping[str, Any]],
    steps: int,
    rate: float,
    mask: State | None = None,
) -> Float[Tensor, "tensor_or_1 task"]:
    """lambda after so many steps of Adam on the entropy (AdaMerging, section 3); changes ``lam`` itself."""
    optimizer = torch.optim.Adam([lam], lr=rate)
    for _ in range(steps):
        descend(optimizer, uncertainty(predict, vectors.merged(lam, mask), next(drawn)))
    return lam.detach()
