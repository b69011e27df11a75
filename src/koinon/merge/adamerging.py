"""AdaMerging: learn how much of each task vector to add, tensor by tensor, so that unlabelled predictions are sure.

Departures: coefficients are not clamped to [0, 1], as the paper's release does and the paper does not say. There is no
AdaMerging++, which starts from vectors that TIES has trimmed. Running means and variances are averaged.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from koinon.core import Paper, refuse_below
from koinon.merge._coefficients import batches, predictor, task_vectors, tuned
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import needed, with_weights


@dataclass(frozen=True)
class AdaMerging(Merge):
    """theta_0 + sum_t lambda_t tau_t (Yang et al., section 3), with lambda from entropy minimisation."""

    paper: ClassVar = Paper(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2023, "https://arxiv.org/abs/2310.02575"
    )
    null: ClassVar = {"steps": 0, "init": 0.5}
    quick: ClassVar = {"steps": 20}

    per: Literal["tensor", "task"] = "tensor"
    """What has a coefficient lambda: each tensor of each task ("layer-wise"), or each task ("task-wise")."""
    init: float = 0.3
    """lambda before the first step."""
    steps: int = 500
    """Of Adam; 500 in the paper's release."""
    rate: float = 1e-3
    """Learning rate of Adam."""
    batch: int = 16
    """Rows of each task in a step."""
    seed: int = 0
    """Start of the random streams that the batches are drawn from."""

    def merge(self, pool: Pool) -> nn.Module:
        """See `Merge.merge`."""
        refuse_below(0, steps=self.steps, rate=self.rate)
        vectors = task_vectors(pool)
        drawn = batches(needed(pool, "AdaMerging"), self.batch, self.seed, "coefficients")
        lam = vectors.coefficients(self.init, self.per)  # tensor task
        lam = tuned(vectors, predictor(pool), lam, drawn, self.steps, self.rate)
        return with_weights(pool.base, vectors.merged(lam))
