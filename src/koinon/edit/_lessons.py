"""Edits to train on, drawn from facts with probes: what is taught, another wording of it, and what must stay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from koinon.core import UserError
from koinon.data.facts import Case, Fact
from koinon.edit._edited import Material

T = TypeVar("T")


@dataclass(frozen=True)
class Lesson:
    """One edit of a kind that the facts to come are of."""

    fact: Fact
    """What is taught."""
    reworded: str
    """A prompt that the same answer belongs to."""
    elsewhere: tuple[str, str]
    """A prompt with its answer that the edit must leave alone."""


class Lessons:
    """Lessons without end.

    A fact that has a relation is taught with an object drawn from those of its relation: what is learnt then is how to
    edit, not the facts of the cases, which the model may hold already.

    Args:
        material: its cases; what must stay is a case's probes of locality, or what is unrelated, or another case.
        numbers: a random stream.

    Raises:
        UserError: fewer than two cases.
    """

    def __init__(self, material: Material, numbers: torch.Generator):
        self.cases, self.numbers = tuple(material.cases), numbers
        if len(self.cases) < 2:
            raise UserError(
                f"{len(self.cases)} cases to train on: at least 2 are needed, with other wordings and what must stay"
            )
        self.unrelated = tuple((prompt, "") for prompt in material.unrelated)
        self.objects: dict[str, list[str]] = {}
        for case in self.cases:
            its = self.objects.setdefault(case.fact.relation, [])
            if case.fact.object not in its:
                its.append(case.fact.object)

    def take(self, count: int) -> list[Lesson]:
        """The next ones; each case is drawn with equal probability."""
        return [self.of(self.cases[self._below(len(self.cases))]) for _ in range(count)]

    def of(self, case: Case) -> Lesson:
        """A lesson of a case."""
        fact = case.fact
        if fact.relation:
            fact = replace(fact, object=self._one(self.objects[fact.relation]))
        wordings = [probe.prompt for probe in case.of("generality")] or [fact.question]
        return Lesson(fact, self._one(wordings), self._elsewhere(case))

    def _elsewhere(self, case: Case) -> tuple[str, str]:
        found = [(probe.prompt, probe.answer) for probe in case.of("locality")] or list(self.unrelated)
        if not found:
            others = [its.fact for its in self.cases if its.fact.question != case.fact.question]
            found = [(fact.question, fact.object) for fact in others or [case.fact]]
        return self._one(found)

    def _one(self, options: Sequence[T]) -> T:
        return options[self._below(len(options))]

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.numbers))
