"""TIES: trim each task vector to its largest elements, elect a sign for each element, average those that agree.

Departures: an element whose weighted sum is exactly 0 is elected +, where the paper's release takes the sign most
elements of the model have.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, refuse_outside
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk, Part
from koinon.merge._vectors import LOOKS, added, consensus, cut_below, cutoffs, each, kept


@dataclass(frozen=True)
class Ties(Blend):
    """Trim, elect sign and merge (Yadav et al., algorithm 1)."""

    paper: ClassVar = Paper(
        "TIES-Merging: Resolving Interference When Merging Models", 2023, "https://arxiv.org/abs/2306.01708"
    )
    null: ClassVar = {"density": (1.0,), "elect": False}

    density: tuple[float, ...] = (0.2,)
    """k: share of each task vector's elements that is kept, the largest; one for each model or one for all.

    Elements as large as the smallest one kept are all kept.
    """
    scale: float = 1.0
    """lambda: what the merged task vector is multiplied with."""
    weights: tuple[float, ...] = (1.0,)
    """One for each task vector, or one for all; the paper has no other than 1."""
    elect: bool = True
    """Drop the models whose sign is not the elected one."""
    mean: bool = True
    """Take the mean of the models that are left for an element; otherwise their sum."""
    scope: Literal["model", "tensor"] = "model"
    """What ``density`` is a share of: the whole task vector, or each tensor's part of it."""

    @property
    def measures_whole(self) -> bool:
        """See `Blend.measures_whole`."""
        return self.scope != "tensor"

    @property
    def passes(self) -> int:
        """See `Blend.passes`."""
        return 1 if all(its == 1 for its in self.density) else 1 + LOOKS

    def measure(self, part: Part) -> list[float]:
        """1. Trim: for each model the smallest magnitude that is kept."""
        density = each(self.density, part.models, "density")
        refuse_outside(0, 1, density=self.density)
        ranks = [[kept(its, part.count)] for its in density]
        # Nothing is below 0, so that a model kept whole needs no look.
        if self.passes == 1:
            return [0.0] * len(density)
        return [cut for (cut,) in cutoffs(part, ranks)]

    def blend(self, chunk: Chunk, found: list[float]) -> Float[Tensor, " n"]:
        """2. Elect the sign with the larger total. 3. Merge the elements of that sign."""
        trimmed = (cut_below(delta, cut) for delta, cut in zip(chunk.deltas, found, strict=True))
        weights = each(self.weights, list(chunk.tuned), "weights")
        return added(chunk, consensus(trimmed, weights, self.elect, self.mean), self.scale)
