"""Facts in several layers: what is missing at the last of them is shared among those up to it (MEMIT, section 4.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._aims import Descent, aim, at_subjects
from koinon.edit._patches import LowRank, Patch, Weights, finite
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM

Keys = Literal["mean", "release"]
"""A subject's key: the mean behind all beginnings, or the mean of the bare prompt's and of each length's mean."""


@dataclass(frozen=True)
class Beginnings:
    """What stands before prompts."""

    texts: list[str]
    """The empty one first, then as many of each length."""
    count: int
    """Of each length."""
    keys: Keys

    def key(self, seen: Float[Tensor, "fact before into"]) -> Float[Tensor, "fact into"]:
        """One key for each fact."""
        if self.keys == "mean" or not self.count:
            return seen.mean(1)
        return torch.stack([seen[:, 0], *(its.mean(1) for its in seen[:, 1:].split(self.count, 1))]).mean(0)


def window(last: int, count: int) -> list[int]:
    """The numbers of so many blocks up to one; fewer at the bottom.

    Raises:
        UserError: none.
    """
    if count < 1:
        raise UserError(f"spread {count}: give 1 or more layers")
    return list(range(max(0, last + 1 - count), last + 1))


def spread(
    lm: LM,
    facts: Sequence[Fact],
    layers: Sequence[int],
    before: Beginnings,
    how: Descent,
    solve: Callable[[int, Float[Tensor, "into fact"]], Float[Tensor, "into fact"]],
) -> tuple[dict[str, LowRank], list[Float[Tensor, "into fact"]]]:
    """The change of each layer, and the keys it was made for.

    Args:
        lm: the model.
        facts: all are written together.
        layers: numbers of blocks, rising.
        before: of the prompts.
        how: the aims are looked for.
        solve: from a place in ``layers`` and the keys there to the directions that they are written along.
    """
    # 1. What the last block should give at each subject, so that the model answers as taught.
    last = lm.anatomy.block(layers[-1]).module
    aims = torch.stack([aim(lm, fact, last, before.texts, how) for fact in facts])  # fact width
    names = [lm.anatomy.block(layer).falls.parameter for layer in layers]
    start = {name: lm.model.get_parameter(name).detach().clone() for name in names}
    changed = lm.with_model(with_values(lm.model, start))
    blocks = [changed.anatomy.block(layer) for layer in layers]
    changes, written = {}, []
    for place, block in enumerate(blocks):
        # 2. The keys, and what is missing now that the layers below are changed; each layer takes an equal share.
        into, out = at_subjects(changed, facts, before.texts, block.falls.module, blocks[-1].module)
        keys = before.key(into).T  # into fact
        rest = (aims - out[:, 0]).T / (len(blocks) - place)  # width fact
        # 3. The change that gives the keys their share.
        change = LowRank(rest, solve(place, keys).to(rest))
        finite({block.falls.parameter: change.left, f"{block.falls.parameter} (keys)": change.right})
        with torch.no_grad():
            block.falls.weight.copy_(change.on(block.falls.weight))
        changes[block.falls.parameter] = change
        written.append(keys)
    return changes, written


def earlier(before: Patch | None, lm: LM, layers: Sequence[int]) -> Weights:
    """The steps until now; none if there is no edit yet."""
    ways = [lm.anatomy.block(layer).falls for layer in layers]
    return (
        before if isinstance(before, Weights) else Weights((), frozenset(its.parameter for its in ways if its.turned))
    )


def ridged(moved: Float[Tensor, "into n"], keys: Float[Tensor, "into n"], ridge: float) -> Float[Tensor, "into n"]:
    """V (K^T V + ridge I)^-1, in float64: directions along which a write of R changes what K brings out by nearly R.

    With V = C^-1 K it is (ridge C + K K^T)^-1 K, and with V = P K it is (P K K^T + ridge I)^-1 P K, in the size of the
    facts instead of the layer's.

    Raises:
        UserError: without a ridge, keys that are not independent.
    """
    gram = keys.to(moved).T @ moved
    gram = (gram + gram.T) / 2 + ridge * torch.eye(len(gram)).to(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal() ** 2 / gram.diagonal()
    if int(failed) or float(pivots.min()) < 1e-10:
        number = int(failed) - 1 if int(failed) else int(pivots.argmin())
        raise UserError(
            f"fact {number + 1} of {len(gram)} has the same key as those before it, as facts about one subject have: "
            "give a ridge above 0, or leave one out"
        )
    return torch.cholesky_solve(moved.T.contiguous(), factor).T
