"""Random streams that do not touch the global one, and counts of parameters."""

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def stream(seed: int, *words: object) -> torch.Generator:
    """A random stream of its own for each ``(seed, *words)``.

    Parameters drawn from streams named after what they are start equal in every network that has them,
    whatever else the network holds: comparisons are paired, and adding a layer shifts nothing.
    """
    digest = hashlib.blake2b(repr((seed, *words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def xavier(out: int, width: int, generator: torch.Generator) -> Float[Tensor, "out width"]:
    """A weight matrix drawn uniformly as Glorot and Bengio (2010) ask: variance ``2 / (width + out)``."""
    bound = math.sqrt(6 / (width + out))
    return (torch.rand(out, width, generator=generator) * 2 - 1) * bound


def trained(module: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
