"""Average: the mean of the models' weights, or a weighted one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk
from koinon.merge._vectors import each, total_of


@dataclass(frozen=True)
class Average(Blend):
    """Uniform or weighted weight averaging (Wortsman et al., section 2: the uniform soup)."""

    paper: ClassVar = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference"
        " time",
        2022,
        "https://arxiv.org/abs/2203.05482",
    )
    exempt: ClassVar = {"is_alive": "this is the baseline the others are compared with"}
    needs_base: ClassVar = False

    weights: tuple[float, ...] = (1.0,)
    """w_t: one for each model, or one for all."""
    normalize: bool = True
    """Divide by the sum of the weights."""

    def blend(self, chunk: Chunk, found: Any) -> Float[Tensor, " n"]:
        """See `Blend.blend`."""
        weights = each(self.weights, list(chunk.tuned), "weights")
        return weighted_mean(list(chunk.tuned.values()), weights, self.normalize)


def weighted_mean(values: Sequence[Float[Tensor, " n"]], weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_t w_t theta_t, divided by sum_t w_t if asked for; summed in float32 or better."""
    kind = torch.promote_types(values[0].dtype, torch.float32)
    coefficients = torch.tensor(weights, dtype=kind)
    divisor = total_of(weights, kind) if normalize else None
    total = torch.zeros_like(values[0], dtype=kind)
    for value, coefficient in zip(values, coefficients, strict=True):
        total.addcmul_(value, coefficient)
    return total if divisor is None else total / divisor
