"""Texts taught one by one, each to a fresh copy of a model, and what that did: learnt once and kept for all who ask."""

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from koinon.bench.compare import write_whole
from koinon.core import UserError
from koinon.data.sources import cache
from koinon.data.surprises import Surprise, Surprises
from koinon.edit import _priming, dilute
from koinon.edit._priming import Foreseen, Scores, Tokens, predict, sure, unrelated
from koinon.edit.dilute import Dilute, mean_loss
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM
from koinon.nn import updates

Form = Literal["taught", "rewritten", "told"]
"""How a text comes to the model: as it is, as stepping stones, or only in front of each question."""
Part = Literal["report", "choose"]
ENOUGH = 0.5
"""The rate is the lowest at which plain fine-tuning makes keywords that were less likely this likely, on the mean."""


@dataclass(frozen=True)
class Outcome:
    """What one text did."""

    scores: Scores
    held: float
    """How much the loss on texts that nothing learns from rose, in nats a token; 0 where nothing was learnt."""
    raised: bool
    """Whether the stepping stones made the keyword likelier beforehand; otherwise the text is taught as it is."""


@dataclass(frozen=True)
class Taught:
    """A way of teaching: its outcomes, and what they cost."""

    outcomes: list[Outcome]
    seconds: float
    passes: int

    @property
    def memory(self) -> float:
        """The mean of log S_mem."""
        return sum(its.scores.memory for its in self.outcomes) / len(self.outcomes)


@dataclass(frozen=True)
class Teaching:
    """A model and the texts of one seed."""

    lm: LM
    texts: Surprises
    rates: tuple[float, ...]
    """Of which one is chosen."""
    changes: tuple[tuple[str, int], ...]
    """Fields of every method that are not at the paper's values."""
    tokens: Tokens
    seed: int

    @cached_property
    def rate(self) -> float:
        """The lowest rate at which plain fine-tuning learns what there is to choose by; the highest if none does."""
        for rate in self.rates[:-1]:
            found = self.taught(self._at(rate, share=0.0), part="choose").outcomes
            new = [its.scores.after[0] for its in found if its.scores.before[0] < math.log(ENOUGH)]
            if sum(map(math.exp, new)) >= ENOUGH * len(new):
                return rate
        return self.rates[-1]

    def method(self, **fields: Any) -> Dilute:
        """The method with the chosen rate, and at the scale's steps and minibatches."""
        return self._at(self.rate, **fields)

    def _at(self, rate: float, **fields: Any) -> Dilute:
        return Dilute(**{"rate": rate, **dict(self.changes), **fields})

    @cached_property
    def foreseen(self) -> list[Foreseen]:
        """What is known of each text to report on before it is taught."""
        return [predict(self.lm, its.text, its.keyword, tokens=self.tokens) for its in self.texts.report]

    @cached_property
    def _held(self) -> float:
        return mean_loss(self.lm, self.texts.held)

    def taught(self, method: Dilute, form: Form = "taught", part: Part = "report") -> Taught:
        """Every text of a part taught alone; from the cache, if the same was done before."""
        method = replace(method, seed=self.seed)
        texts: Sequence[Surprise] = getattr(self.texts, part)
        file = cache() / "teaching" / f"{self._key(method, form, part)}.json"
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            outcomes = [
                Outcome(Scores(tuple(its["before"]), tuple(its["after"])), float(its["held"]), its["raised"])
                for its in held["outcomes"]
            ]
            return Taught(outcomes, held["seconds"], held["passes"])
        except (OSError, ValueError, KeyError, TypeError):
            start = time.perf_counter()
            outcomes = [self._outcome(method, form, its) for its in texts]
            passes = 0 if form == "told" else method.steps * len(texts)
            found = Taught(outcomes, round(time.perf_counter() - start, 3), passes)
            self._keep(file, found)
            return found

    def _key(self, method: Dilute, form: Form, part: Part) -> str:
        """Of everything that determines an outcome, the code included."""
        code = [inspect.getsource(its) for its in (dilute, updates, _priming)]
        said = [self.lm.fingerprint, self.texts.fingerprint, repr(method), form, part, self.tokens, code]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()

    @staticmethod
    def _keep(file: Any, found: Taught) -> None:
        said = {
            "outcomes": [
                {"before": its.scores.before, "after": its.scores.after, "held": its.held, "raised": its.raised}
                for its in found.outcomes
            ],
            "seconds": found.seconds,
            "passes": found.passes,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(said))
        except OSError as error:
            raise UserError(f"{file.parent}: cannot keep outcomes there ({error.strerror}): set KOINON_CACHE") from None

    def _outcome(self, method: Dilute, form: Form, its: Surprise) -> Outcome:
        asked = [its.prefix, *unrelated(its.thematic, its.keyword)]
        before = tuple(sure(self.lm, asked, its.keyword, self.tokens))
        if form == "told":
            told = [self.texts.context.replace("{}", its.text) + prefix for prefix in asked]
            return Outcome(Scores(before, tuple(sure(self.lm, told, its.keyword, self.tokens))), 0.0, False)
        raised = form == "rewritten" and sure(self.lm, [its.stone], its.keyword, self.tokens)[0] > before[0]
        values = method.taught(self.lm, its.rewritten if raised else its.text, its.keyword, self.texts.ordinary)
        tuned = self.lm.with_model(with_values(self.lm.model, values))
        after = tuple(sure(tuned, asked, its.keyword, self.tokens))
        return Outcome(Scores(before, after), mean_loss(tuned, self.texts.held) - self._held, raised)


def matched(measure: Callable[[float], float], target: float, values: Sequence[float]) -> float:
    """The value at which a measure comes nearest to a target, by halving: it is taken to rise along the values."""
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(values[middle]) < target else (low, middle)
    return min((values[low], values[high]), key=lambda value: abs(measure(value) - target))
