"""RegMean: for each linear layer the weights whose outputs are nearest to all models' outputs on their own inputs.

Departures: a Gram matrix is the mean over a model's rows, not their sum, so that no model counts more for having more
data. All that is no weight of an ``nn.Linear`` which the model calls is averaged, as the paper does with what is no
linear layer: biases, normalisation, embeddings and what is tied to them, convolutions, and the projections inside
``nn.MultiheadAttention``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper, UserError, refuse_below, refuse_outside
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import needed, outputs, parts, quietly, rows, shared_states, taken, with_weights
from koinon.merge.average import weighted_mean

ROWS = 256
"""How many are run at a time."""


@dataclass(frozen=True)
class RegMean(Merge):
    """W = (sum_t G_t)^-1 sum_t G_t W_t (Jin et al., section 3), with G_t = X_t^T X_t."""

    paper: ClassVar = Paper(
        "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023, "https://arxiv.org/abs/2212.09849"
    )
    null: ClassVar = {"ridge": 1e9}

    shrink: float = 0.9
    """alpha, from 0 to 1: what the elements of G_t off the diagonal are multiplied with."""
    ridge: float = 1e-6
    """Added to the diagonal of each G_t, so that a feature that no model sees is averaged."""

    def __post_init__(self) -> None:
        refuse_outside(0, 1, shrink=self.shrink)
        refuse_below(0, ridge=self.ridge)

    @torch.no_grad()
    def merge(self, pool: Pool) -> nn.Module:
        """See `Merge.merge`."""
        base, tuned = shared_states(pool)
        names, others = parts(pool.base, base)
        data = needed(pool, "RegMean")
        grams = [inner_products(pool.tuned[task], inputs) for task, inputs in data.items()]
        state = {}
        for name in names + others:
            values = [its[name] for its in tuned.values()]
            if all(name in its for its in grams):
                state[name] = self._regression(name, values, [its[name] for its in grams])
            else:
                state[name] = weighted_mean(values, [1.0] * len(values), normalize=True)
        return with_weights(pool.base, state)

    def _regression(self, name: str, weights: list[Tensor], grams: list[Tensor]) -> Float[Tensor, "out width"]:
        total, target = torch.zeros_like(grams[0]), torch.zeros_like(weights[0].T, dtype=torch.float64)
        for weight, gram in zip(weights, grams, strict=True):
            own = self.shrink * gram + torch.diag((1 - self.shrink) * gram.diagonal() + self.ridge)  # width width
            total += own
            target += own @ weight.double().T  # width out
        result, wrong = torch.linalg.solve_ex(total, target)
        if wrong or not result.isfinite().all():
            raise UserError(f"{name}: the inputs of its layer leave it undetermined; give a ridge above 0")
        return result.T


def inner_products(module: nn.Module, inputs: Any) -> dict[str, Float[Tensor, "width width"]]:
    """X^T X of the inputs of each linear layer, a mean over all rows, by the name of the layer's weight."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str):
        def add(_layer: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            x = next(iter((*args, *named.values())))
            x = x.reshape(-1, x.shape[-1]).double()  # row width
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    module = quietly(module)
    with _hooked(module, hook):
        for start in range(0, rows(inputs), ROWS):
            outputs(module, taken(inputs, slice(start, start + ROWS)))
    return {name: total / counts[name] for name, total in sums.items()}


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """The one place that knows which layers are linear."""
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(hook(f"{name}.weight".lstrip(".")), with_kwargs=True)
        for name, layer in linear.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
