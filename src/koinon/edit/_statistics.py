"""What methods that write into an FFN need to know of its keys: E[k k^T], from texts."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.data.sources import cache
from koinon.edit._edited import Material
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM
from koinon.lm.moments import own_texts, second_moment, shrunk

ENOUGH = 10
"""Tokens for each dimension, below which a sample is said to be small."""


def covariance(lm: LM, projection: Projection, material: Material, seed: int) -> Float[Tensor, "into into"]:
    """C = E[k k^T] of the layer's keys, in float64: from the material's corpus, or from what the model says by itself.

    Warns:
        UserWarning: fewer tokens than ten for each dimension; it says how far C was drawn towards its diagonal.
    """
    moment, count = sampled(lm, projection, material, seed)
    found, share = shrunk(moment, count)
    if count < ENOUGH * len(moment):
        warnings.warn(
            f"{projection.name}: {count} tokens for {len(moment)} dimensions of its keys; their second moment is drawn "
            f"{share:.0%} of the way to its diagonal: give a larger corpus",
            stacklevel=2,
        )
    return found


def sampled(lm: LM, projection: Projection, material: Material, seed: int) -> tuple[Float[Tensor, "into into"], int]:
    """The second moment as the sample has it, and how many tokens that was of."""
    texts = material.corpus or own_texts(lm, seed=seed)
    return second_moment(lm, projection, texts, cache() / "moments")


def factored(moment: Float[Tensor, "into into"]) -> Float[Tensor, "into into"]:
    """The Cholesky factor of C: taken once for all facts, as it costs more than all else that is solved."""
    return torch.linalg.cholesky(moment)


def solved(factor: Float[Tensor, "into into"], keys: Float[Tensor, "into n"]) -> Float[Tensor, "into n"]:
    """C^-1 k, in float64, by the factor of C."""
    return torch.cholesky_solve(keys.to(factor), factor)
