"""DARE: drop elements of each task vector at random and rescale the others, then add the vectors up.

Departures: a drop probability is a multiple of 1/65536, and the rescaling is by the one that was used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from koinon.core import Paper, refuse_outside
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk, Part
from koinon.merge._vectors import added, consensus, each

STEPS = 1 << 16
"""Of a drop probability."""
HELD = 1 << 27
"""Draws that are held between two looks at a tensor, in bits: 16 MiB; those of a larger tensor are drawn again."""
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes to the type of whole numbers."""


@dataclass(frozen=True)
class Found:
    """What is known of a tensor before it is blended."""

    factors: list[float]
    """Of each model."""
    drawn: Mapping[int, Sequence[NDArray[np.uint8]]]
    """Chunk to the packed draws of each model, where they are held."""


@dataclass(frozen=True)
class Dare(Blend):
    """Drop and rescale (Yu et al., section 3.3), before task arithmetic or, with ``elect``, before TIES' election."""

    paper: ClassVar = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        2023,
        "https://arxiv.org/abs/2311.03099",
    )
    null: ClassVar = {"density": (1.0,), "scale": 0.5}
    quick: ClassVar = {"density": (0.5,)}

    density: tuple[float, ...] = (0.1,)
    """1 - p: share of elements kept; one for each model or one for all."""
    scale: float = 0.3
    """lambda: what the merged task vector is multiplied with."""
    weights: tuple[float, ...] = (1.0,)
    """One for each task vector, or one for all."""
    rescale: Literal["density", "mass", "none"] = "density"
    """Multiply what is kept by 1 / (1 - p), by the tensor's sum of |tau| over that of the kept ones, or not at all."""
    elect: bool = False
    """Elect a sign for each element and drop the models that have another, as TIES does."""
    mean: bool = False
    """Take the mean of the models that are left for an element; otherwise their sum."""
    seed: int = 0
    """Start of the random streams."""

    @property
    def passes(self) -> int:
        """See `Blend.passes`."""
        return 2 if self.rescale == "mass" else 1

    def measure(self, part: Part) -> Found:
        """What each model's kept elements are multiplied with."""
        refuse_outside(0, 1, density=self.density)
        density = [round(its * STEPS) / STEPS for its in each(self.density, part.models, "density")]
        if self.rescale == "density":
            return Found([1 / its if its else 0.0 for its in density], {})
        if self.rescale == "none":
            return Found([1.0] * len(density), {})
        drawn: dict[int, list[NDArray[np.uint8]]] = {}
        hold = part.count * len(density) <= HELD

        def mass(chunk: Chunk) -> list[tuple[float, float]]:
            kept = self._kept(chunk, {})
            if hold:
                drawn[chunk.number] = [np.packbits(its) for its in kept]
            return [_totals(tau, its) for tau, its in zip(chunk.deltas, kept, strict=True)]

        sums = torch.tensor(part.look(mass), dtype=torch.float64).view(-1, len(density), 2)  # chunk model (all, kept)
        return Found([float(whole / left) if left > 0 else 1.0 for whole, left in sums.sum(0)], drawn)

    def blend(self, chunk: Chunk, found: Found) -> Float[Tensor, " n"]:
        """1. Drop with probability p. 2. Rescale. 3. Merge."""
        kept = self._kept(chunk, found.drawn)
        dropped = (
            _masked(tau, its).mul_(factor) for tau, its, factor in zip(chunk.deltas, kept, found.factors, strict=True)
        )
        weights = each(self.weights, list(chunk.tuned), "weights")
        return added(chunk, consensus(dropped, weights, self.elect, self.mean), self.scale)

    def _kept(self, chunk: Chunk, drawn: Mapping[int, Sequence[NDArray[np.uint8]]]) -> list[NDArray[np.bool_]]:
        """Which elements of each model are kept."""
        count = next(iter(chunk.tuned.values())).numel()
        if chunk.number in drawn:
            return [np.unpackbits(its, count=count).view(np.bool_) for its in drawn[chunk.number]]
        density = each(self.density, list(chunk.tuned), "density")
        return [
            _stay(chunk.random(self.seed, model), round(its * STEPS), count)
            for model, its in zip(chunk.tuned, density, strict=True)
        ]


def _stay(random: np.random.Generator, chance: int, count: int) -> NDArray[np.bool_]:
    """True with a chance of ``chance`` in `STEPS`: one byte decides, but where it is the chance's own, a second one."""
    if chance == STEPS:
        return np.ones(count, np.bool_)
    high, low = divmod(chance, 256)
    first = _bytes(random, count)
    stays = first < high
    if low:
        open = np.flatnonzero(first == high)
        stays[open] = _bytes(random, len(open)) < low
    return stays


def _bytes(random: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Random ones; unlike ``random_raw`` this lets other threads go on."""
    return random.integers(1 << 64, size=-(-count // 8), dtype=np.uint64).view(np.uint8)[:count]


def _masked(vector: Float[Tensor, " n"], kept: NDArray[np.bool_]) -> Float[Tensor, " n"]:
    """The vector with 0 for what is not kept, also where it is not finite: all its bits are cleared."""
    word = WORDS[vector.element_size()]
    bits = np.negative(kept.view(np.int8)).astype(f"i{vector.element_size()}")  # all of them, or none
    return torch.from_numpy(bits).bitwise_and_(vector.view(word)).view(vector.dtype)


def _totals(vector: Float[Tensor, " n"], kept: NDArray[np.bool_]) -> tuple[float, float]:
    """Sums of the finite magnitudes, which take the vector's place: of all, and of those that are kept."""
    sizes = vector.abs_().to(torch.promote_types(vector.dtype, torch.float32))
    whole = float(sizes.sum())
    if not math.isfinite(whole):
        sizes = torch.where(sizes.isfinite(), sizes, 0).double()
        whole = float(sizes.sum())
    return whole, float(torch.dot(sizes, torch.from_numpy(kept.view(np.int8)).to(sizes)))
