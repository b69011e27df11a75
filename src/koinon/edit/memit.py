"""MEMIT: writes many facts at once, as a least-squares change in each of several FFNs, against what they hold already.

Departures: a subject's key is the plain mean over beginnings, as in the paper; the release gives the bare prompt's half
of the weight (``keys="release"``). C is drawn towards its diagonal as far as its sample is small.

EMMET (Gupta et al., 2024), ROME for a batch with a constraint for each fact, is ``weight=0`` and ``spread=1``: its
K (K^T C^-1 K)^-1 is where lambda goes to 0. Its release adds 0.1 I to K^T (10000 C)^-1 K, which is ``weight=1000``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, refuse_below
from koinon.data.facts import Fact
from koinon.edit._aims import Descent, contexts
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer, chosen
from koinon.edit._patches import Patch, Weights
from koinon.edit._spread import Beginnings, Keys, earlier, ridged, spread, window
from koinon.edit._statistics import covariance, factored, solved
from koinon.lm.language import LM


@dataclass(frozen=True)
class Ready:
    """What MEMIT knows of a model before the first fact."""

    layers: list[int]
    before: Beginnings
    factors: list[Float[Tensor, "into into"]]
    """Of C, the second moment of each layer's keys."""


@dataclass(frozen=True)
class Memit(Edit):
    """Mass-editing memory in a transformer (Meng et al., 2023): W <- W + R K^T (lambda C + K K^T)^-1 (equation 14)."""

    paper: ClassVar = Paper("Mass-Editing Memory in a Transformer", 2022, "https://arxiv.org/abs/2210.07229")
    family: ClassVar = "intrinsic"
    batch: ClassVar = True
    null: ClassVar = {"steps": 1}
    quick: ClassVar = {"layer": 1, "spread": 1, "weight": 1.0, "steps": 12, "count": 2, "lengths": (4,), "enough": 0.9}

    layer: Layer = "auto"
    """The last block that is changed, from 0; auto is the one whose FFN brings back most of what noise took away."""
    spread: int = 5
    """How many blocks are changed, up to that one; each takes an equal share of what is missing still."""
    weight: float = 15_000.0
    """lambda: what the layers hold already counts as much as so many facts; 0 meets the new ones exactly (EMMET)."""
    steps: int = 25
    """Of Adam, for each fact's z; one fewer is taken, as in the release, whose last one only looks at the loss."""
    rate: float = 0.5
    """Of Adam."""
    kl: float = 0.0625
    """Weight of D_KL: what the model says of the subject alone should stay as it was."""
    decay: float = 0.5
    """Weight of ||delta|| / ||h||^2."""
    bound: float = 0.75
    """How many times the norm of h, what the last block gives, the change of it may have."""
    enough: float = 0.05
    """The loss at which the search for z ends."""
    keys: Keys = "mean"
    """A subject's key: the mean over beginnings, or as in the release of the bare prompt's and each length's mean."""
    count: int = 5
    """How many beginnings of each length are put before the prompt."""
    lengths: tuple[int, ...] = (10,)
    """Of the beginnings, in tokens."""
    seed: int = 0
    """Of the beginnings, which the model says by itself."""

    def __post_init__(self) -> None:
        refuse_below(0, steps=self.steps, rate=self.rate, kl=self.kl, decay=self.decay, bound=self.bound)
        refuse_below(0, enough=self.enough, count=self.count)
        refuse_below(0, weight=self.weight)
        refuse_below(1, spread=self.spread, lengths=self.lengths)

    def prepare(self, lm: LM, material: Material) -> Ready:
        """Choose the layers, let the model write beginnings, and take the second moment of each layer's keys."""
        layers = window(chosen(lm, self.layer, material), self.spread)
        before = Beginnings(contexts(lm, self.count, self.lengths, self.seed), self.count, self.keys)
        moments = (covariance(lm, lm.anatomy.block(layer).falls, material, self.seed) for layer in layers)
        return Ready(layers, before, [factored(its) for its in moments])

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> Weights:
        """All facts as one step more."""
        how = Descent(self.steps, self.rate, self.kl, self.decay, self.bound, self.enough)

        def solve(place: int, keys: Float[Tensor, "into fact"]) -> Float[Tensor, "into fact"]:
            return ridged(solved(ready.factors[place], keys), keys, self.weight)  # (lambda C + K K^T)^-1 K

        changes, _ = spread(lm, facts, ready.layers, ready.before, how, solve)
        return earlier(before, lm, ready.layers).plus(changes)
