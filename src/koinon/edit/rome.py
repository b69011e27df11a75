"""ROME: writes a fact as a rank-one change into one FFN, from the subject's key to a value that makes the model say it.

Departures: the same mean key k* stands in the numerator and the denominator, as in the paper's equation 2; its release
has the bare prompt's key in the denominator (``keys="release"``), which breaks models in long sequences of edits
(R-ROME, Gupta et al., 2024). C is drawn towards its diagonal as far as its sample is small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, refuse_below
from koinon.data.facts import Fact
from koinon.edit._aims import Descent, aim, contexts, keys, values
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer, chosen
from koinon.edit._patches import LowRank, Patch, Weights, finite
from koinon.edit._statistics import covariance, factored, solved
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM


@dataclass(frozen=True)
class Ready:
    """What ROME knows of a model before the first fact."""

    layer: int
    before: list[str]
    """Beginnings of a prompt, the empty one first."""
    factor: Float[Tensor, "into into"] | None
    """Of C, the second moment of the layer's keys."""


@dataclass(frozen=True)
class Rome(Edit):
    """Rank-one model editing (Meng et al., 2022): W <- W + (v* - W k*) (C^-1 k*)^T / ((C^-1 k*)^T k*)."""

    paper: ClassVar = Paper(
        "Locating and Editing Factual Associations in GPT", 2022, "https://arxiv.org/abs/2202.05262"
    )
    family: ClassVar = "intrinsic"
    null: ClassVar = {"steps": 1, "count": 0}
    quick: ClassVar = {"layer": 1, "steps": 14, "count": 2, "decay": 0.001, "bound": 1.5, "enough": 3.0}

    layer: Layer = "auto"
    """The block whose FFN is changed, from 0; auto is the one whose FFN brings back most of what noise took away."""
    steps: int = 20
    """Of Adam, for v*; one fewer is taken, as in the release, whose last one only looks at the loss."""
    rate: float = 0.5
    """Of Adam, for v*."""
    kl: float = 0.0625
    """Weight of D_KL: what the model says of the subject alone should stay as it was (equation 4)."""
    decay: float = 0.5
    """Weight of ||delta|| / ||v||^2; the release has 0.5 for GPT and 0.001 for Llama."""
    bound: float = 4.0
    """How many times the norm of v the change of it may have."""
    enough: float = 0.05
    """The loss at which the search for v* ends."""
    whiten: bool = True
    """Use C; otherwise the identity takes its place."""
    keys: Literal["mean", "release"] = "mean"
    """k* in the denominator: the mean over beginnings, or the bare prompt's as in the release."""
    count: int = 10
    """How many beginnings of each length are put before the prompt."""
    lengths: tuple[int, ...] = (5, 10)
    """Of the beginnings, in tokens."""
    seed: int = 0
    """Of the beginnings, which the model says by itself."""

    def __post_init__(self) -> None:
        refuse_below(0, steps=self.steps, rate=self.rate, kl=self.kl, decay=self.decay, bound=self.bound)
        refuse_below(0, enough=self.enough, count=self.count)
        refuse_below(1, lengths=self.lengths)

    def prepare(self, lm: LM, material: Material) -> Ready:
        """Choose the layer, let the model write beginnings, and take the second moment of the layer's keys."""
        layer = chosen(lm, self.layer, material)
        falls = lm.anatomy.block(layer).falls
        factor = factored(covariance(lm, falls, material, self.seed)) if self.whiten else None
        return Ready(layer, contexts(lm, self.count, self.lengths, self.seed), factor)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> Weights:
        """One fact as one step more."""
        (fact,) = facts
        falls = lm.anatomy.block(ready.layer).falls
        # 1. k*: the mean of the subject's keys behind each beginning.
        found = keys(lm, facts, falls.module, ready.before)[0]  # before into
        key = found.mean(0)
        # 2. v*: what the FFN should give there.
        how = Descent(self.steps, self.rate, self.kl, self.decay, self.bound, self.enough)
        value = aim(lm, fact, falls.module, ready.before, how)
        # 3. The smallest change, weighed by C, that takes k* to v*.
        direction = key if ready.factor is None else solved(ready.factor, key[:, None])[:, 0].to(key)
        bare = found[0] if self.keys == "release" else key
        now = values(lm, facts, falls.module)[0] if self.keys == "release" else _through(falls, key)
        change = LowRank(((value - now) / (direction @ bare))[:, None], direction[:, None])
        finite({falls.parameter: change.left, f"{falls.parameter} (key)": change.right})
        known = (
            before if isinstance(before, Weights) else Weights((), frozenset({falls.parameter} if falls.turned else ()))
        )
        return known.plus({falls.parameter: change})


def _through(falls: Projection, key: Float[Tensor, " into"]) -> Float[Tensor, " width"]:
    """W k, with the bias if there is one."""
    bias = getattr(falls.module, "bias", None)
    product = falls.weight.detach().float() @ key
    return product if bias is None else product + bias.detach().float()
