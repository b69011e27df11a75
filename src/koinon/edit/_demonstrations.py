"""Words before a prompt: facts told in the text itself, examples of how they are used, and which of them are alike."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import build, refuse_below
from koinon.data.factlab import shown
from koinon.data.facts import Case
from koinon.edit._patches import Patch
from koinon.lm.language import LM, joint

SPARE = 32
"""Tokens of the model's places that are left for the answer, or a quarter of them if that is less."""
PIECE = 3
"""Letters of a piece of a word."""


class Alike:
    """How alike texts are: the cosine of what words, and pieces of words, they have; what many have counts little.

    Args:
        texts: what the counts come from.
    """

    def __init__(self, texts: Sequence[str]):
        counts = Counter(piece for text in texts for piece in dict.fromkeys(_pieces(text)))
        self.places = {piece: place for place, piece in enumerate(counts)}
        self.weights = [1 + math.log((1 + len(texts)) / (1 + count)) for count in counts.values()]

    def __call__(self, one: Sequence[str], other: Sequence[str]) -> Float[Tensor, "n m"]:
        """From 0 to 1; rounded, so that what is equally alike stays so, whatever the order of the sums."""
        return (self._vectors(one) @ self._vectors(other).T).round(decimals=5)

    def _vectors(self, texts: Sequence[str]) -> Float[Tensor, "text piece"]:
        found = torch.zeros(len(texts), len(self.places))
        for row, text in enumerate(texts):
            for piece, count in Counter(_pieces(text)).items():
                if piece in self.places:
                    found[row, self.places[piece]] = count * self.weights[self.places[piece]]
        return torch.nn.functional.normalize(found)


def _pieces(text: str) -> list[str]:
    """Its words, and their pieces, in small letters."""
    words = "".join(its if its.isalnum() else " " for its in text.lower()).split()
    bounded = [f"<{word}>" for word in words]
    return bounded + [word[start : start + PIECE] for word in bounded for start in range(len(word) - PIECE + 1)]


def demonstration(case: Case, kind: str) -> str:
    """A new fact and a prompt that is answered as it should be.

    Args:
        case: the fact, with its probes; where the probe is missing, the prompt is the fact's own.
        kind: "copy" asks the fact's own question, "update" another wording of it, "retain" what it does not change.
    """
    aspect = {"copy": "reliability", "update": "generality", "retain": "locality"}[kind]
    probe = (case.of(aspect) or case.of("reliability"))[0]  # type: ignore[arg-type]
    return f"{shown(case.fact, probe.prompt)}{joint(probe.prompt, probe.answer)}\n\n"


@dataclass(frozen=True)
class Told:
    """A fact in words, and the examples that go before it, the least alike first."""

    question: str
    words: str
    """The fact, and what stands before a prompt."""
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Router:
    """Puts the nearest fact before each prompt, and as many examples before that as the model has places for."""

    base: LM
    facts: tuple[Told, ...]
    least: float
    """A fact that is less alike is not told."""

    def __call__(self, prompts: Sequence[str]) -> list[tuple[LM, str]]:
        """The base always, and what it is asked."""
        if not prompts:
            return []
        questions = [its.question for its in self.facts]
        alike, nearest = Alike(questions)(prompts, questions).max(1)
        return [
            (self.base, self.context(self.facts[place], prompt) if its >= self.least else prompt)
            for prompt, place, its in zip(prompts, nearest.tolist(), alike.tolist())
        ]

    def context(self, fact: Told, prompt: str) -> str:
        """Examples, the fact, the prompt."""
        limit = self.base.limit
        room = limit - min(SPARE, limit // 4) if limit < math.inf else limit
        last = fact.words + prompt
        for start in range(len(fact.examples) + 1):
            found = "".join(fact.examples[start:]) + last
            if len(self.base.tokenizer(found)["input_ids"]) <= room:
                break
        return found


@dataclass(frozen=True)
class Context(Patch):
    """Facts in words; there are no tensors."""

    single: ClassVar[bool] = True

    facts: tuple[Told, ...]
    least: float

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return len(self.facts)

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`: the base's model with a router before it."""
        return replace(base, router=Router(base, self.facts, self.least))

    def keeping(self, numbers: Sequence[int]) -> "Context":
        """See `Patch.keeping`: any step can be taken away alone."""
        return replace(self, facts=tuple(self.facts[number] for number in numbers))

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        return {}

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        facts = [{"question": its.question, "words": its.words, "examples": list(its.examples)} for its in self.facts]
        return {"facts": facts, "least": self.least}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Context":
        """See `Patch.restore`."""
        facts = [build(Told, {**its, "examples": tuple(its["examples"])}) for its in notes["facts"]]
        refuse_below(0, least=notes["least"])
        return cls(tuple(facts), notes["least"])
