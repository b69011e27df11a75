"""Side memories at one projection: changes of its matrix, of which one answers a sequence whose prompt excites it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import UserError, build, refuse_below
from koinon.edit._memories import Memory, ends, put
from koinon.edit._patches import Patch, expect_matrix
from koinon.lm.language import LM
from koinon.nn.taskvectors import merged

Over = Literal["mean", "max", "last"]
MERGED = -1
"""In place of the number of a shard."""


@dataclass(frozen=True)
class Excitement:
    """Delta_act: how much of what a projection gives a memory would change."""

    over: Over
    """The prompt's tokens: their mean, the most, or the last one."""
    balanced: bool
    """Count each token by the length of what goes into the projection, so that none outweighs the others by that."""

    def of(
        self,
        into: Float[Tensor, "text time into"],
        delta: Float[Tensor, "out into"],
        prompt: Bool[Tensor, "text time"],
        moved: Float[Tensor, "text time out"] | None = None,
    ) -> Float[Tensor, " text"]:
        """||A(x) (W_v' - W_v)^T|| of each token, or its ratio to ||A(x)||, over the tokens of each prompt.

        ``moved`` is that product, if it is known.
        """
        each = (F.linear(into, delta.to(into.dtype)) if moved is None else moved).float().norm(dim=-1)
        if self.balanced:
            each = each / into.float().norm(dim=-1).clamp(min=1e-12)
        if self.over == "max":
            return each.masked_fill(~prompt, 0).amax(1)
        if self.over == "last":
            return each.gather(1, ends(prompt)[:, None])[:, 0]
        return (each * prompt).sum(1) / prompt.sum(1)


@dataclass(frozen=True)
class Asking:
    """How memories are asked, and how several become one."""

    retrieve: bool
    """Ask each; otherwise all as one."""
    ratio: float
    """epsilon is so many times what excites a memory."""
    quantile: float
    """Which of its edits: 0 is the one that excites it least."""
    excitement: Excitement
    trim: float
    """Share of each that is kept when several are merged."""
    elect: bool
    """Elect a sign for each entry."""
    past: float
    """Weight of what was merged before, out of 1."""

    def merged(self, sides: Sequence["Side"]) -> Float[Tensor, "out into"]:
        """W_v' - W_v of several memories as one; of a single one as it was."""
        if len(sides) == 1:
            return sides[0].delta
        old = sum(its.shard == MERGED for its in sides)
        new = len(sides) - old
        past = self.past if old and new else float(not new)
        weights = [past / old if its.shard == MERGED else (1 - past) / new for its in sides]
        return merged([its.delta for its in sides], weights, self.trim, self.elect)


@dataclass(frozen=True)
class Side:
    """One memory."""

    delta: Float[Tensor, "out into"]
    """W_v' - W_v."""
    scores: tuple[float, ...]
    """How much each of its edits excited it when it was learnt, or when it was merged."""
    steps: tuple[int, ...]
    """The numbers of its edits."""
    shard: int = MERGED
    """Which shard it is."""

    def firing(self, asking: Asking) -> int:
        """How many of its edits excite it beyond its level."""
        return sum(score > self.level(asking) for score in self.scores)

    def level(self, asking: Asking) -> float:
        """epsilon: a prompt that excites it more is its own."""
        return asking.ratio * float(torch.tensor(self.scores).quantile(asking.quantile))


@dataclass(frozen=True)
class SideMemory(Patch):
    """All side memories; the steps that share one are taken away together."""

    name: str
    """Of the projection."""
    sides: tuple[Side, ...]
    """As they are trained and merged."""
    questions: tuple[str, ...]
    """Of the steps."""
    asking: Asking

    def kept(self, base: LM) -> tuple[Side, ...]:
        """The memories that are asked."""
        return self.sides if self.asking.retrieve else (self.merged(base, self.sides),)

    def merged(self, base: LM, sides: Sequence[Side]) -> Side:
        """Several of its memories as one, whose edits are asked anew how much they excite it; a single one as it was.

        What a shard was excited by says nothing of the merged one: by its level edits would be lost.
        """
        if len(sides) == 1:
            return sides[0]
        delta = self.asking.merged(sides)
        steps = tuple(step for its in sides for step in its.steps)
        return Side(delta, tuple(self._excites(base, delta, steps)), steps)

    def closed(self, base: LM, size: int, count: int) -> "SideMemory":
        """With its open shards merged, if there are so many, the last with so many edits; as it is otherwise.

        Warns:
            UserWarning: edits that do not excite the merged memory enough.
        """
        fresh = [its for its in self.sides if its.shard != MERGED]
        if len(fresh) < count or len(fresh[-1].steps) < size:
            return self
        old = [its for its in self.sides if its.shard == MERGED]
        apart = self.asking.retrieve
        one = replace(self.merged(base, fresh if apart else self.sides), shard=MERGED)
        if (firing := one.firing(self.asking)) < len(one.steps):
            said = f"merged, {firing} of {len(one.steps)} edits still fire: a lower ratio or quantile lets more do so"
            warnings.warn(said, stacklevel=2)
        return replace(self, sides=(*old, one) if apart else (one,))

    @torch.no_grad()
    def _excites(self, base: LM, delta: Tensor, steps: Sequence[int]) -> Iterator[float]:
        """Delta_act of the questions of some steps."""
        site = base.model.get_submodule(self.name)
        for part in base._batches(base.encode([self.questions[step] for step in steps])):
            into = base.seen({"it": site}, part, "in")["it"]
            yield from self.asking.excitement.of(into, delta.to(into), part.prompt).tolist()

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return len(self.questions)

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`."""
        return put(base, self.name, self._module(base))

    def _module(self, base: LM) -> "Sides":
        kept = self.kept(base)
        return Sides([its.delta for its in kept], [its.level(self.asking) for its in kept], self.asking.excitement)

    def route(self, base: LM, prompts: Sequence[str]) -> list[int]:
        """Which memory answers each prompt, by its number in `kept`; -1 is the model without edits.

        Of its own `questions` it tells which edits still fire.
        """
        memory = self._module(base)
        lm = put(base, self.name, memory)
        found: list[int] = []
        with torch.no_grad():
            for part in lm._batches(lm.encode(prompts)):
                lm.logits(part)
                assert memory.route is not None
                found += memory.route.tolist()
        return found

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        for its in self.sides:
            out, into = its.delta.shape
            expect_matrix(base, self.name, (out, into))

    def keeping(self, numbers: Sequence[int]) -> "SideMemory":
        """See `Patch.keeping`."""
        new = {old: place for place, old in enumerate(numbers)}
        sides = []
        for its in self.sides:
            mine = [step for step in its.steps if step in new]
            if mine and len(mine) < len(its.steps):
                rest = ", ".join(str(step) for step in its.steps if step not in new)
                raise UserError(f"steps {rest} share a side memory with step {mine[0]}: undo all of its steps or none")
            if mine:
                sides.append(replace(its, steps=tuple(new[step] for step in mine)))
        return replace(self, sides=tuple(sides), questions=tuple(self.questions[number] for number in numbers))

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        return {f"side {number}": its.delta for number, its in enumerate(self.sides)}

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        sides = [{"scores": its.scores, "steps": its.steps, "shard": its.shard} for its in self.sides]
        return {"name": self.name, "sides": sides, "questions": self.questions, "asking": asdict(self.asking)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "SideMemory":
        """See `Patch.restore`."""
        sides = tuple(
            Side(tensors[f"side {number}"], tuple(its["scores"]), tuple(its["steps"]), int(its["shard"]))
            for number, its in enumerate(notes["sides"])
        )
        numbers = sorted(number for its in sides for number in its.steps)
        assert numbers == list(range(len(notes["questions"]))), "steps that are in no side, or in two"
        for its in sides:
            assert len(its.scores) == len(its.steps), "a step without a score"
            refuse_below(0, scores=its.scores)
        excitement = build(Excitement, notes["asking"]["excitement"])
        asking = build(Asking, {**notes["asking"], "excitement": excitement})
        return cls(str(notes["name"]), sides, tuple(notes["questions"]), asking)


class Sides(Memory):
    """The side memories as part of a model: what excites none of them is answered by the model alone, to the bit."""

    def __init__(self, deltas: Sequence[Float[Tensor, "out into"]], levels: Sequence[float], excitement: Excitement):
        super().__init__()
        self.deltas = nn.Parameter(torch.stack(list(deltas)), requires_grad=False)
        self.levels = nn.Parameter(torch.tensor(list(levels)), requires_grad=False)
        self.excitement = excitement
        self.route: Tensor | None = None
        """Which memory answers each sequence, -1 for none; decided in the first pass over it."""

    def first(self, into: Tensor, out: Tensor, prompt: Bool[Tensor, "text time"]) -> Tensor:
        """Ask the memory that is excited most of those that are excited beyond their level."""
        scores = torch.stack([self.excitement.of(into, delta, prompt) for delta in self.deltas])  # memory text
        above = scores > self.levels[:, None]
        best = scores.where(above, -torch.inf).argmax(0)
        self.route = best.where(above.any(0), -1)
        return self.later(into, out)

    def later(self, into: Tensor, out: Tensor) -> Tensor:
        """The memory's matrix in place of the model's, in the sequences that are its own."""
        assert self.route is not None
        changed = out
        for number in self.route.unique().tolist():
            if number >= 0:
                rows = self.route == number
                changed = out.clone() if changed is out else changed
                changed[rows] = out[rows] + F.linear(into[rows], self.deltas[number].to(into.dtype))
        return changed
