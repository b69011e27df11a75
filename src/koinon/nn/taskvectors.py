"""Several changes of one tensor made into one: trimmed, with elected signs, averaged; all of them in memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def largest(vector: Float[Tensor, "..."], density: float) -> Float[Tensor, "..."]:
    """The vector with only its largest elements by magnitude, that share of them rounded down, and 0 elsewhere."""
    count = int(density * vector.numel())
    if count >= vector.numel():
        return vector
    places = vector.abs().flatten().topk(count).indices
    kept = torch.zeros_like(vector).flatten()
    kept[places] = vector.flatten()[places]
    return kept.view_as(vector)


def merged(
    vectors: Sequence[Float[Tensor, "..."]],
    weights: Sequence[float],
    density: float = 1.0,
    elect: bool = True,
) -> Float[Tensor, "..."]:
    """The weighted mean of changes of one tensor; with a density and an election it is TIES (Yadav et al., 2023).

    Args:
        vectors: changes, all of one shape.
        weights: one for each.
        density: share of each that is kept, the largest elements.
        elect: elect a sign for each element, that of the weighted sum (+ for 0), and take the mean over the vectors
            that have it; otherwise over all, those that are 0 there included.
    """
    shares = torch.tensor(list(weights), dtype=torch.float32, device=vectors[0].device)
    shares = shares.view(-1, *[1] * vectors[0].ndim)
    stack = torch.stack([largest(vector.float(), density) for vector in vectors])
    weighted = stack * shares
    if not elect:
        return (weighted.sum(0) / shares.sum(0)).to(vectors[0].dtype)
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == sign
    total = (agree * shares).sum(0)
    return ((weighted * agree).sum(0) / torch.where(total == 0, 1.0, total)).to(vectors[0].dtype)
