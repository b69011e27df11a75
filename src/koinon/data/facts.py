"""Facts: what edits, questions, lessons and triples are made of, and the sentences that say them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from koinon.core import UserError

Aspect = Literal["reliability", "generality", "locality", "portability"]
"""What an answer is evidence of: the edit itself, its other wordings, what must stay, and what follows from it."""


@dataclass(frozen=True)
class Fact:
    """One thing that is, or shall be, true: (subject, relation, object), with the words that ask for the object."""

    subject: str
    """Who or what it is about, as it is written in ``prompt``."""
    object: str
    """The answer."""
    prompt: str
    """A text that the object goes on from; ``{}`` stands for the subject."""
    relation: str = ""
    """The name of what the object is to the subject."""
    was: str = ""
    """The object until now, if there is one."""
    aliases: tuple[str, ...] = ()
    """Other names of the subject."""
    answers: tuple[str, ...] = ()
    """Other names of the object."""
    since: str = ""
    """First day of its being true, as ISO 8601 writes it (or a year); empty if not known."""
    until: str = ""
    """Last day of its being true; empty if it still is, or if not known."""
    source: str = ""
    """Who says so."""

    def __post_init__(self) -> None:
        for name in ("subject", "object", "prompt"):
            if not getattr(self, name).strip():
                raise UserError(f"a fact about {self.subject or self.prompt or '?'!r}: its {name} is empty")
        if self.prompt.count("{}") != 1:
            raise UserError(
                f"fact {self.prompt!r}: the prompt holds {{}} once, where the subject {self.subject!r} goes"
            )

    @property
    def question(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject)

    @property
    def place(self) -> tuple[int, int]:
        """Where in `question` the subject is: its first character, and the one behind its last."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


@dataclass(frozen=True)
class Probe:
    """A question that shows what an edit did."""

    prompt: str
    """What is asked; the answer goes on from it."""
    answer: str
    """What is right after the edit; of ``locality``, what is right anyhow (it is compared with the model before)."""
    aspect: Aspect
    """What the answer is evidence of."""
    kind: str = ""
    """Which evidence: rephrase, same relation, same subject, one hop, alias, inverse, ..."""
    answers: tuple[str, ...] = ()
    """Other names of the answer."""


@dataclass(frozen=True)
class Case:
    """A fact to be taught, and the probes that show what teaching it did."""

    fact: Fact
    """What is taught."""
    probes: tuple[Probe, ...] = ()
    """None of them asks what the edit says, word for word."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else a file said about it."""

    def of(self, aspect: Aspect) -> tuple[Probe, ...]:
        """The probes of one aspect; ``reliability`` is the fact's own question."""
        own = Probe(self.fact.question, self.fact.object, "reliability", "edit", self.fact.answers)
        found = tuple(probe for probe in self.probes if probe.aspect == aspect)
        return (own, *found) if aspect == "reliability" else found
