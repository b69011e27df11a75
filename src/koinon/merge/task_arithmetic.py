"""Task arithmetic: the sum of the task vectors, scaled, is added to the base."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk
from koinon.merge._vectors import added, consensus, each, total_of


@dataclass(frozen=True)
class TaskArithmetic(Blend):
    """theta_0 + lambda sum_t (theta_t - theta_0) (Ilharco et al., section 2)."""

    paper: ClassVar = Paper("Editing Models with Task Arithmetic", 2022, "https://arxiv.org/abs/2212.04089")
    null: ClassVar = {"scale": 0.5}

    scale: float = 0.3
    """lambda; 1 / T gives the average of T models."""
    weights: tuple[float, ...] = (1.0,)
    """One for each task vector, or one for all."""
    normalize: bool = False
    """Divide the sum by that of the weights, which is no 0 then, before lambda."""

    def blend(self, chunk: Chunk, found: Any) -> Float[Tensor, " n"]:
        """See `Blend.blend`."""
        weights = each(self.weights, list(chunk.tuned), "weights")
        total = consensus(chunk.deltas, weights, elect=False, mean=False)
        if self.normalize:
            total /= total_of(weights, total.dtype)
        return added(chunk, total, self.scale)
