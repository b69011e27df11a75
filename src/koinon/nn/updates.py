"""An optimiser around another one, which takes back a share of the entries of every update it makes."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from koinon.core import UserError, pick
from koinon.nn.params import stream

Dropped = Literal["largest", "others", "random"]
"""Which entries of an update are taken back: the largest, all but the largest, or some at random."""
Within = Literal["model", "tensor"]
"""Among which entries the largest are looked for: all that the optimiser has, or one tensor's."""
SAMPLE = 20_000
"""How many numbers the search for a threshold begins with, if there are more than twice as many."""
KEY = "filtered"
"""Where a saved state holds what this wrapper adds to the optimiser's own."""


class Filtered(torch.optim.Optimizer):
    """The optimiser's own steps, of which the entries in question are put back to the bit to what they were.

    The update is what the optimiser did to the parameters, all of it: decoupled weight decay as well. What the
    optimiser remembers is left as it is, so that momentum brings a dropped entry up again in later steps. In Adam's
    first step all entries with a gradient are about equally large: which are the largest is then a matter of rounding.

    It stands where an optimiser does: in a loop, under a scheduler, in a Trainer. Where processes hold shards of the
    parameters, each filters its own.

    Args:
        optimizer: of torch; its groups and state are shared, so step it through this object only.
        share: of the entries, from 0 to 1; their number is rounded up. "others" keeps as many as "largest" drops, so
            that the two add up to the whole update.
        which: see `Dropped`. Of equal entries, those of earlier parameters, and earlier in them, count as larger.
        per: see `Within`.
        every: how many steps make up one update.
        sample: entries that the threshold is estimated from, drawn anew each time; 0 for all, which is exact.
        seed: of random entries and samples.

    Raises:
        UserError: a share that is none, or a count below its least.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        share: float = 0.08,
        which: Dropped = "largest",
        per: Within = "model",
        every: int = 1,
        sample: int = 0,
        seed: int = 0,
    ):
        if not 0 <= share <= 1:
            raise UserError(f"share {share}: give the share of an update's entries, from 0 to 1")
        if every < 1 or sample < 0:
            raise UserError(f"every {every}, sample {sample}: at least 1 step is filtered, and no sample is below 0")
        pick(which, ("largest", "others", "random"), "kind of entries")
        pick(per, ("model", "tensor"), "range of an update")
        self.optimizer, self.share, self.which, self.per = optimizer, share, which, per
        self.every, self.sample, self.seed = every, sample, seed
        self.steps = 0
        """How many were made."""
        self._before: list[Tensor] = []
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._hold()

    def _hold(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        if self.param_groups is not self.optimizer.param_groups:  # torch fills in its own list first
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        if self._before:
            self._before += [its.detach().clone() for its in self.parameters[len(self._before) :]]

    @property
    def parameters(self) -> list[Tensor]:
        """All that are stepped, group by group."""
        return [its for group in self.param_groups for its in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimiser, and then back with what is filtered; gives what the optimiser gave."""
        drops = self.share < 1 if self.which == "others" else self.share > 0
        if drops and not self._before:
            self._before = [its.detach().clone() for its in self.parameters]
        with torch.enable_grad():
            given = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if self._before and self.steps % self.every == 0:
            self._filter()
            self._before = []
        return given

    def _filter(self) -> None:
        held = self.parameters
        parts = [range(len(held))] if self.per == "model" else [range(place, place + 1) for place in range(len(held))]
        for part in parts:
            counts = [held[place].numel() for place in part]
            wide = reduce(torch.promote_types, (held[place].dtype for place in part), torch.float32)
            sizes = torch.empty(sum(counts), dtype=wide, device=held[part[0]].device)
            for place, its in zip(part, sizes.split(counts)):
                its.view_as(held[place]).copy_(held[place]).sub_(self._before[place].to(its.device))
            dropped = self._dropped(sizes.abs_(), part[0]).split(counts)
            for place, its in zip(part, dropped):
                here = its.to(held[place].device).view_as(held[place])
                torch.where(here, self._before[place], held[place], out=held[place])

    def _dropped(self, size: Float[Tensor, " n"], part: int) -> Bool[Tensor, " n"]:
        numbers = stream(self.seed, "update", self.steps, part)
        if self.which == "random":
            size = torch.rand(len(size), generator=numbers).to(size.device)
        found = (
            above(size, self.share, self.sample, numbers)
            if 0 < self.sample < len(size)
            else largest(size, count_of(self.share, len(size)))
        )
        return ~found if self.which == "others" else found

    def __getstate__(self) -> dict[str, Any]:
        """All of it: torch's own would leave the wrapped optimiser behind."""
        return dict(vars(self))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's own, and how far this is; within ``every`` steps, also what the parameters were."""
        own = {"steps": self.steps, "before": [its.clone() for its in self._before]}
        return {**self.optimizer.state_dict(), KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, also from one of the optimiser alone."""
        state = dict(state_dict)
        own = state.pop(KEY, {"steps": 0, "before": []})
        self.optimizer.load_state_dict(state)
        self._hold()
        self.steps = int(own["steps"])
        self._before = [old.to(its).clone() for old, its in zip(own["before"], self.parameters)]


def count_of(share: float, entries: int) -> int:
    """The share of so many entries, rounded up; 0.07 of 100 is 7, whatever binary fractions make of it."""
    return math.ceil(Fraction(repr(float(share))) * entries)


def largest(size: Float[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Which are the so many largest; of equal ones the earlier."""
    if count == 0 or count == len(size):
        return torch.full_like(size, count > 0, dtype=torch.bool)
    least = kth_largest(size, count)
    found = size > least
    rest = count - int(found.sum())
    found[(size == least).nonzero()[:rest, 0]] = True
    return found


def kth_largest(size: Float[Tensor, " n"], count: int) -> Float[Tensor, ""]:
    """Exactly; of many numbers, only those that a sample cannot tell apart are put in order."""
    drawn = size[:: max(1, len(size) // SAMPLE)]
    if len(drawn) < len(size):
        rank, doubt = count * len(drawn) // len(size), 3 * math.isqrt(len(drawn))
        high, low = (
            drawn.kthvalue(min(max(len(drawn) - its, 1), len(drawn))).values for its in (rank - doubt, rank + doubt)
        )
        over = int((size > high).sum())
        inside = size[(size >= low) & (size <= high)]
        if over < count <= over + len(inside):
            return inside.kthvalue(len(inside) - (count - over) + 1).values
    return size.kthvalue(len(size) - count + 1).values


def above(size: Float[Tensor, " n"], share: float, sample: int, numbers: torch.Generator) -> Bool[Tensor, " n"]:
    """Which are at least as large as the threshold that the share of a sample reaches: about as many, not exactly."""
    drawn = size[torch.randint(len(size), (sample,), generator=numbers).to(size.device)]
    count = count_of(share, sample)
    if count == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    return size >= drawn.kthvalue(sample - count + 1).values
