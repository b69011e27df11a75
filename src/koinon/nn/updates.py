"""An optimiser around another one, which takes back a share of the entries of every update it makes."""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from koinon.core import UserError, pick
from koinon.nn.params import stream

Dropped = Literal["largest", "others", "random"]
"""Which entries of an update are taken back: the largest, all but the largest, or some at random."""
Within = Literal["model", "tensor"]
"""Among which entries the largest are looked for: all that the optimiser has, or one tensor's."""
SAMPLE = 50_000
"""How many numbers the search for a threshold begins with, if there are more than twice as many."""
PIECE = 1 << 20
"""How many entries of an update are looked at at a time, so that they are still at hand when they are put back."""
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
            update = Update([held[place] for place in part], [self._before[place] for place in part])
            for changed, dropped in zip(update.pieces, self._dropped(update, part[0])):
                for (now, before), here in zip(changed, dropped.split([its.numel() for its, _ in changed])):
                    torch.where(here.to(now.device).view_as(now), before, now, out=now)

    def _dropped(self, update: "Update", part: int) -> Iterator[Bool[Tensor, " piece"]]:
        numbers = stream(self.seed, "update", self.steps, part)
        size: Sizes = update
        if self.which == "random":
            size = Given(torch.rand(len(update), generator=numbers).to(update.device), update.lengths)
        found = (
            above(size, self.share, self.sample, numbers)
            if 0 < self.sample < len(size)
            else largest(size, count_of(self.share, len(size)))
        )
        return (~its for its in found) if self.which == "others" else found

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


class Given:
    """Numbers in pieces of given lengths."""

    def __init__(self, numbers: Float[Tensor, " n"], lengths: Sequence[int]):
        self.numbers, self.lengths, self.device = numbers, lengths, numbers.device

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Float[Tensor, " piece"]]:
        return iter(self.numbers.split(list(self.lengths)))

    def at(self, places: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Some of them, the places rising."""
        return self.numbers[places]


class Update:
    """How large the entries of an update are: found a piece at a time, as often as they are asked for, and never held.

    Args:
        now: the parameters.
        before: what they were.
    """

    def __init__(self, now: Sequence[Tensor], before: Sequence[Tensor]):
        self.device = now[0].device
        self._wide = reduce(torch.promote_types, (its.dtype for its in now), torch.float32)
        self._whole = list(zip(now, before))
        self.pieces: list[list[tuple[Tensor, Tensor]]] = []
        """Consecutive parts of parameters, each now and before."""
        room = 0
        for pair in self._whole:
            whole = not all(its.is_contiguous() for its in pair)  # a part of it would be a copy
            parts = [pair] if whole else zip(*(its.view(-1).split(PIECE) for its in pair))
            for part in parts:
                if room < part[0].numel():
                    self.pieces.append([])
                    room = PIECE
                self.pieces[-1].append((part[0], part[1]))
                room -= part[0].numel()
        self.lengths = [sum(its.numel() for its, _ in piece) for piece in self.pieces]

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[Float[Tensor, " piece"]]:
        room = torch.empty(max(self.lengths, default=0), dtype=self._wide, device=self.device)
        for piece, length in zip(self.pieces, self.lengths):
            found = room[:length]
            for (now, before), its in zip(piece, found.split([now.numel() for now, _ in piece])):
                torch.sub(self._exact(now), self._exact(before), out=its.view(now.shape))
            yield found.abs_()

    def at(self, places: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Some of them, the places rising."""
        ends = torch.tensor([0, *(now.numel() for now, _ in self._whole)]).cumsum(0)
        cuts = torch.searchsorted(places, ends.to(places.device)).tolist()
        found = []
        for (now, before), start, first, behind in zip(self._whole, ends.tolist(), cuts, cuts[1:]):
            its = places[first:behind].to(now.device) - start
            found.append(self._exact(now.reshape(-1)[its]) - self._exact(before.reshape(-1)[its]))
        return torch.cat(found).abs_()

    def _exact(self, numbers: Tensor) -> Tensor:
        """In the type in which differences are taken."""
        return numbers.to(self.device, self._wide)


Sizes = Given | Update


def largest(size: Sizes, count: int) -> Iterator[Bool[Tensor, " piece"]]:
    """Which are the so many largest, piece by piece; of equal ones the earlier."""
    if count == 0 or count == len(size):
        yield from (torch.full_like(piece, count > 0, dtype=torch.bool) for piece in size)
        return
    least, equal = kth_largest(size, count)
    for piece in size:
        numbers = _quick(piece)
        found = torch.as_tensor(numbers >= least)
        if equal is not None:
            same = numbers == least
            here = int(same.sum())
            if here > equal:
                found[torch.as_tensor(same).nonzero()[equal:, 0]] = False
            equal = max(0, equal - here)
        yield found


def kth_largest(size: Sizes, count: int) -> tuple[float, int | None]:
    """Exactly, and how many of those equal to it are among the so many largest; None for all of them.

    Of many numbers, only those that a sample cannot tell apart are put in order.
    """
    step = max(1, len(size) // SAMPLE)
    if step > 1:
        drawn = size.at(torch.arange(0, len(size), step, device=size.device))
        rank, doubt = count * len(drawn) // len(size), 3 * math.isqrt(len(drawn))
        high, low = (_kth(drawn, min(max(its, 1), len(drawn))) for its in (rank - doubt, rank + doubt))
        over, inside = 0, []
        for piece in size:
            numbers = _quick(piece)
            over += int((numbers > high).sum())
            inside.append(torch.as_tensor(numbers[(numbers >= low) & (numbers <= high)]))
        among = torch.cat(inside)
        if over < count <= over + len(among):
            return _with_equals(among, count - over)
    return _with_equals(torch.cat([its.clone() for its in size]), count)


def _with_equals(numbers: Float[Tensor, " n"], count: int) -> tuple[float, int | None]:
    least = _kth(numbers, count)
    more, equal = (int(its.sum()) for its in (numbers > least, numbers == least))
    return least, count - more if more + equal > count else None


def _kth(numbers: Float[Tensor, " n"], count: int) -> float:
    """The so-manieth largest; NumPy's partition takes a tenth of the time of torch's ``kthvalue``."""
    place = len(numbers) - count
    if numbers.device.type == "cpu":
        return float(np.partition(numbers.numpy(), place)[place])
    return float(numbers.kthvalue(place + 1).values)


def _quick(numbers: Float[Tensor, " n"]) -> Any:
    """In whose comparisons are quickest: NumPy's on the processor, whose operators read alike."""
    return numbers.numpy() if numbers.device.type == "cpu" else numbers


def above(size: Sizes, share: float, sample: int, numbers: torch.Generator) -> Iterator[Bool[Tensor, " piece"]]:
    """Which are at least as large as the threshold that the share of a sample reaches: about as many, not exactly.

    The sample is one number of each of as many equal stretches.
    """
    count = count_of(share, sample)
    inside = torch.rand(sample, dtype=torch.float64, generator=numbers)
    places = ((torch.arange(sample) + inside) * (len(size) / sample)).long().clamp_(max=len(size) - 1)
    least = _kth(size.at(places.to(size.device)), count) if count else math.inf
    return (torch.as_tensor(_quick(piece) >= least) for piece in size)
