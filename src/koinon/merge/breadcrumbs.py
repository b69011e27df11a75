"""Breadcrumbs: cut both the largest and the smallest elements of each task vector, then add the vectors up."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, UserError, refuse_outside
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk, Part
from koinon.merge._vectors import LOOKS, added, consensus, cut_below, cutoffs, each


@dataclass(frozen=True)
class Breadcrumbs(Blend):
    """Model breadcrumbs (Davari and Belilovsky, section 3): a band of magnitudes is kept."""

    paper: ClassVar = Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        2023,
        "https://arxiv.org/abs/2312.06795",
    )
    null: ClassVar = {"density": 1.0, "outliers": 0.0, "scale": 0.5}

    density: float = 0.1
    """Share of each tensor's elements that is kept, below the outliers."""
    outliers: float = 0.01
    """gamma: share of each tensor's elements, the largest, that is cut."""
    scale: float = 0.3
    """lambda: what the merged task vector is multiplied with."""
    weights: tuple[float, ...] = (1.0,)
    """One for each task vector, or one for all."""
    elect: bool = False
    """Elect a sign for each element and drop the models that have another, as TIES does."""
    mean: bool = False
    """Take the mean of the models that are left for an element; otherwise their sum."""

    @property
    def passes(self) -> int:
        """See `Blend.passes`."""
        return 1 + LOOKS

    def measure(self, part: Part) -> list[tuple[float, float]]:
        """For each model the band of magnitudes: from the smallest one kept to the smallest outlier (not kept)."""
        refuse_outside(0, 1, density=self.density, outliers=self.outliers)
        if self.density + self.outliers > 1 + 1e-9:
            raise UserError(f"density {self.density:g} and outliers {self.outliers:g} are more than all there is")
        cut = int(self.outliers * part.count)
        last = min(part.count, cut + int(self.density * part.count))
        edges = cutoffs(part, [[cut, last]] * len(part.models))
        return [(low, high) for high, low in edges]

    def blend(self, chunk: Chunk, found: list[tuple[float, float]]) -> Float[Tensor, " n"]:
        """1. Mask both ends. 2. Merge the rest."""
        masked = (
            cut_below(delta, low) - cut_below(delta, high)
            for delta, (low, high) in zip(chunk.deltas, found, strict=True)
        )
        weights = each(self.weights, list(chunk.tuned), "weights")
        return added(chunk, consensus(masked, weights, self.elect, self.mean), self.scale)
