"""AlphaEdit: writes facts as MEMIT does, but only along directions that ordinary text makes next to no use of.

Departures: the earlier keys are kept with each step, so that undoing a step forgets them too; the release adds them up
in the running program. A subject's key is the plain mean over beginnings; the release gives the bare prompt's half of
the weight (``keys="release"``). As in the release, the inverted matrix has 10 I added; the paper writes I.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, UserError, refuse_below
from koinon.data.facts import Fact
from koinon.edit._aims import Descent, contexts
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer, chosen
from koinon.edit._patches import Patch, Weights
from koinon.edit._spread import Beginnings, Keys, earlier, ridged, spread, window
from koinon.edit._statistics import ENOUGH, sampled
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM


@dataclass(frozen=True)
class Guarded(Patch):
    """Changed matrices, and the keys that each step wrote to, which the steps after it shall leave alone."""

    plain: ClassVar[bool] = True

    weights: Weights
    """The changes."""
    keys: tuple[Mapping[str, Float[Tensor, "into fact"]], ...]
    """Of each step, by the parameter's name."""

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return self.weights.length

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`."""
        return self.weights.attach(base)

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        self.weights.fit(base)

    def keeping(self, numbers: Sequence[int]) -> "Guarded":
        """See `Patch.keeping`: each step stands on those before it."""
        return Guarded(self.weights.keeping(numbers), self.keys[: len(numbers)])

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        keys = {f"keys|{n}|{name}": its for n, step in enumerate(self.keys) for name, its in step.items()}
        return self.weights.tensors() | keys

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        return self.weights.notes

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Guarded":
        """See `Patch.restore`."""
        keys: list[dict[str, Tensor]] = [{} for _ in range(int(notes["steps"]))]
        for key in [key for key in tensors if key.startswith("keys|")]:
            _, number, name = key.split("|")
            keys[int(number)][name] = tensors[key]
        rest = {key: its for key, its in tensors.items() if not key.startswith("keys|")}
        weights = Weights.restore(rest, notes)
        for step, written in zip(weights.steps, keys, strict=True):
            assert {name: len(its) for name, its in written.items()} == {
                n: len(its.right) for n, its in step.items()
            }, "keys that are not of the changed matrices"
        return cls(weights, tuple(keys))


@dataclass(frozen=True)
class Ready:
    """What AlphaEdit knows of a model before the first fact."""

    layers: list[int]
    before: Beginnings
    free: list[Float[Tensor, "into free"]]
    """Of each layer, an orthonormal basis of what P projects on."""


@dataclass(frozen=True)
class AlphaEdit(Edit):
    """Null-space constrained editing (Fang et al., 2025): W <- W + R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1."""

    paper: ClassVar = Paper(
        "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
        2024,
        "https://arxiv.org/abs/2410.02355",
    )
    family: ClassVar = "intrinsic"
    batch: ClassVar = True
    patch: ClassVar = Guarded
    null: ClassVar = {"steps": 1}
    quick: ClassVar = {
        "layer": 1,
        "spread": 1,
        "threshold": 0.2,
        "ridge": 0.1,
        "steps": 12,
        "rate": 0.5,
        "count": 2,
        "lengths": (4,),
        "enough": 0.9,
    }

    layer: Layer = "auto"
    """The last block that is changed, from 0; auto is the one whose FFN brings back most of what noise took away."""
    spread: int = 5
    """How many blocks are changed, up to that one; each takes an equal share of what is missing still."""
    threshold: float = 0.02
    """P keeps the directions whose mean square over ordinary keys, an eigenvalue of C, is below this."""
    relative: bool = False
    """Take ``threshold`` times the mean eigenvalue: the release's is for the size that keys have in a few models."""
    ridge: float = 10.0
    """Against large changes: the factor of I, L2 in the release."""
    steps: int = 25
    """Of Adam, for each fact's z; one fewer is taken, as in the release, whose last one only looks at the loss."""
    enough: float = 0.05
    """The loss at which the search for z ends."""
    rate: float = 0.1
    """Of Adam; the release has 0.1 for Llama and 0.5 for GPT."""
    bound: float = 0.75
    """How many times the norm of h, what the last block gives, the change of it may have."""
    decay: float = 0.5
    """Weight of ||delta|| / ||h||^2."""
    kl: float = 0.0625
    """Weight of D_KL: what the model says of the subject alone should stay as it was."""
    keys: Keys = "mean"
    """A subject's key: the mean over beginnings, or as in the release of the bare prompt's and each length's mean."""
    lengths: tuple[int, ...] = (10,)
    """Of the beginnings, in tokens."""
    count: int = 5
    """How many beginnings of each length are put before the prompt."""
    seed: int = 0
    """Of the beginnings, which the model says by itself."""

    def __post_init__(self) -> None:
        refuse_below(0, steps=self.steps, rate=self.rate, kl=self.kl, decay=self.decay, bound=self.bound)
        refuse_below(0, enough=self.enough, count=self.count)
        refuse_below(0, threshold=self.threshold, ridge=self.ridge)
        refuse_below(1, spread=self.spread, lengths=self.lengths)

    def prepare(self, lm: LM, material: Material) -> Ready:
        """Choose the layers, let the model write beginnings, and find where each layer's keys are next to nothing."""
        layers = window(chosen(lm, self.layer, material), self.spread)
        before = Beginnings(contexts(lm, self.count, self.lengths, self.seed), self.count, self.keys)
        return Ready(layers, before, [self.free(lm, lm.anatomy.block(its).falls, material) for its in layers])

    def free(self, lm: LM, falls: Projection, material: Material) -> Float[Tensor, "into free"]:
        """The eigenvectors of C below the threshold; P is their product with themselves.

        Raises:
            UserError: there is none.
        """
        moment, count = sampled(lm, falls, material, self.seed)
        if count < ENOUGH * len(moment):
            warnings.warn(
                f"{falls.name}: {count} tokens for {len(moment)} dimensions of its keys: what none of them shows may "
                "still be used by other texts: give a larger corpus",
                stacklevel=2,
            )
        values, vectors = torch.linalg.eigh(moment)
        shares = values / values.mean() if self.relative else values
        found = vectors[:, shares < self.threshold]
        if not found.shape[1]:
            raise UserError(
                f"threshold {self.threshold:g}: no direction of {falls.name} is below it, the least is {shares[0]:.2g}"
            )
        return found

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> Guarded:
        """All facts as one step more."""
        how = Descent(self.steps, self.rate, self.kl, self.decay, self.bound, self.enough)
        held = before if isinstance(before, Guarded) else Guarded(earlier(None, lm, ready.layers), ())
        names = [lm.anatomy.block(layer).falls.parameter for layer in ready.layers]

        def solve(place: int, keys: Float[Tensor, "into fact"]) -> Float[Tensor, "into fact"]:
            free = ready.free[place]
            # K beside K_p: both count in what is inverted, and only K is written to.
            every = torch.cat([keys, *(its[names[place]] for its in held.keys)], 1).to(free)
            return ridged(free @ (free.T @ every), every, self.ridge)[:, : keys.shape[1]]

        changes, written = spread(lm, facts, ready.layers, ready.before, how, solve)
        return Guarded(held.weights.plus(changes), (*held.keys, dict(zip(names, written, strict=True))))
