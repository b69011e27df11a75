"""IKE: changes no weight; puts the new fact, and examples of how such facts are used and not used, before every prompt.

The result is an `LM` with a router, whose model is the base itself: use `LM.score` and `LM.generate`; the plain model
that is in it knows no edit. The fact stands before prompts that have nothing to do with it as well, as published; what
these are answered suffers.

Departures: what is alike is told by the cosine of the texts' words and pieces of words, weighed by how rare they are,
in place of all-MiniLM's vectors, so that nothing is looked at inside any model. Of several facts, the one nearest to
the prompt is told. Examples are left out, the least alike first, if the model has too few places. A stop ends the fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from koinon.core import Paper, UserError, refuse_below
from koinon.data.factlab import shown
from koinon.data.facts import Case, Fact
from koinon.edit._contract import Edit
from koinon.edit._demonstrations import Alike, Context, Told, demonstration
from koinon.edit._edited import Material
from koinon.edit._patches import Patch
from koinon.lm.language import LM

KINDS = ("copy", "update", "retain")
"""Of examples."""


@dataclass(frozen=True)
class Ready:
    """Where examples come from."""

    cases: Sequence[Case]
    alike: Alike


@dataclass(frozen=True)
class Ike(Edit):
    """In-context knowledge editing (Zheng et al., 2023)."""

    paper: ClassVar = Paper(
        "Can We Edit Factual Knowledge by In-Context Learning?", 2023, "https://arxiv.org/abs/2305.12740"
    )
    family: ClassVar = "external"
    patch: ClassVar = Context
    needs_subject: ClassVar = False
    black_box: ClassVar = True
    null: ClassVar = {"least": 2.0}
    quick: ClassVar = {"count": 1, "kinds": (0, 1, 0), "least": 0.4}

    exempt: ClassVar = {
        "makes_the_answer_likelier": "it takes a model that has learnt to answer from its prompt; the checks' has not",
    }

    count: int = 32
    """k: how many examples, at most; those of the cases that are most alike."""
    kinds: tuple[int, int, int] = (1, 3, 4)
    """How often copy, update and retain, in proportion; EasyEdit takes what is nearest, whichever kind it is."""
    least: float = 0.0
    """A fact that is less alike to the prompt is not told; at 0 there is one before every prompt, as published."""

    def __post_init__(self) -> None:
        refuse_below(0, count=self.count, kinds=self.kinds, least=self.least)
        if not any(self.kinds):
            raise UserError(f"kinds {self.kinds}: give how often copy, update and retain, such as (1, 3, 4)")

    def prepare(self, lm: LM, material: Material) -> Ready:
        """Count words."""
        return Ready(material.cases, Alike([case.fact.question for case in material.cases]))

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> Context:
        """Look for examples, and write all down."""
        known = before.facts if isinstance(before, Context) else ()
        told = [Told(fact.question, shown(fact, ""), self.examples(fact, ready)) for fact in facts]
        return Context((*known, *told), self.least)

    def examples(self, fact: Fact, ready: Ready) -> tuple[str, ...]:
        """The most alike last, right before the new fact."""
        others = [case for case in ready.cases if case.fact.question != fact.question]
        if not others or not self.count:
            return ()
        alike = ready.alike([fact.question], [case.fact.question for case in others])[0]
        nearest = alike.argsort(descending=True, stable=True)[: self.count].tolist()
        kinds = self.order(len(nearest))
        found = [demonstration(others[place], kind) for place, kind in zip(nearest, kinds)]
        return tuple(reversed(found))

    def order(self, count: int) -> list[str]:
        """The kinds of the nearest examples on: at each place the one that is furthest behind its share."""
        found: list[str] = []
        for place in range(1, count + 1):
            behind = [share * place / sum(self.kinds) - found.count(kind) for kind, share in zip(KINDS, self.kinds)]
            found.append(KINDS[behind.index(max(behind))])
        return found
