"""What an edit did: reliability, generality, locality, portability and fluency, measured in one place for everyone."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from koinon.bench.statistics import Interval, Resampling, interval
from koinon.bench.statistics import Measured as Resampled
from koinon.data.facts import Aspect, Case, Probe
from koinon.lm.language import LM, Said

ASPECTS: tuple[Aspect, ...] = ("reliability", "generality", "locality", "portability")
WAYS = ("exact", "teacher", "sampled")
"""How an answer is looked at, see `Answered`."""
RESAMPLINGS = 1000
"""Of the cases, for intervals."""
WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:-\w+)*|'\w+|[^\w\s]")
"""A number, a word (what follows its apostrophe is another), or a punctuation mark."""


@dataclass(frozen=True)
class Answered:
    """One probe before and after. What is right may have several names, which are compared token by token as written.

    Of locality the first name alone counts: what is compared is what the model says in its place.
    """

    probe: Probe
    before: Said
    """By the model without the edits."""
    after: Said
    """By the edited model."""
    others: tuple[tuple[Said, Said], ...] = ()
    """Before and after of each other name of the answer."""

    @property
    def unedited(self) -> "Answered":
        """The model without the edits in both places."""
        return replace(self, after=self.before, others=tuple((before, before) for before, _ in self.others))

    @property
    def changed(self) -> bool:
        """Whether another token is the likeliest at any place of the answer."""
        return self.before.best != self.after.best

    @property
    def teacher(self) -> float:
        """EasyEdit's score: the share of the answer's tokens that are the likeliest behind the right ones before them.

        Of several names, the best one's. Of locality: the share of the answer's places where the likeliest token is the
        one it was before.
        """
        if self.probe.aspect != "locality":
            return max(its.hits for its in self._names)
        return sum(a == b for a, b in zip(self.before.best, self.after.best)) / len(self.after.best)

    @property
    def exact(self) -> float:
        """Whether greedy decoding says the whole answer, by any name; of locality, whether no token of it changed."""
        if self.probe.aspect != "locality":
            return float(any(its.exact for its in self._names))
        return float(self.before.best == self.after.best)

    @property
    def sampled(self) -> float:
        """How often an answer drawn from the model is right; of locality, how much is left of how often it was.

        Names add up, but for one that begins with another: whoever says it has said that one.
        """
        if self.probe.aspect != "locality":
            return _chance(self._names)
        return min(1.0, _chance([self.after]) / max(_chance([self.before]), 1e-30))

    @property
    def _names(self) -> list[Said]:
        return [self.after, *(after for _, after in self.others)]


def _chance(names: Sequence[Said]) -> float:
    total, last = 0.0, None
    for its in sorted(names, key=lambda name: name.tokens):  # one that begins with another comes right behind it
        if last is None or its.tokens[: len(last)] != last:
            total, last = total + math.exp(its.logprob), its.tokens
    return total


class Remembered:
    """A model that is asked the same again and again, in one comparison: what it said is kept."""

    def __init__(self, lm: LM):
        self.lm = lm
        self._said: dict[tuple[str, str], Said] = {}

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Said]:
        """See `LM.score`."""
        asked = list(zip(prompts, answers, strict=True))
        new = [its for its in dict.fromkeys(asked) if its not in self._said]
        self._said.update(zip(new, self.lm.score([its for its, _ in new], [its for _, its in new]), strict=True))
        return [self._said[its] for its in asked]


def answered(before: LM | Remembered, after: LM, probes: Sequence[Probe]) -> list[Answered]:
    """Every probe asked of both; then, by the other names of what is right, those that have some."""
    prompts, answers = [probe.prompt for probe in probes], [probe.answer for probe in probes]
    first, then = before.score(prompts, answers), after.score(prompts, answers)
    names = [_others(probe) for probe in probes]
    prompts = [probe.prompt for probe, its in zip(probes, names, strict=True) for _ in its]
    answers = [name for its in names for name in its]
    others = zip(before.score(prompts, answers), after.score(prompts, answers), strict=True) if prompts else iter(())
    return [
        Answered(probe, old, new, tuple(next(others) for _ in its))
        for probe, old, new, its in zip(probes, first, then, names, strict=True)
    ]


def _others(probe: Probe) -> list[str]:
    if probe.aspect == "locality":
        return []
    names = dict.fromkeys(its.strip() for its in probe.answers)
    return [its for its in names if its and its != probe.answer.strip()]


@dataclass(frozen=True)
class Measured:
    """What an edit did to the probes of one case; a score is a mean over probes, and absent where there is none."""

    case: Case
    answered: tuple[Answered, ...]

    @property
    def unedited(self) -> "Measured":
        """What the same probes say of the model without the edits."""
        return replace(self, answered=tuple(its.unedited for its in self.answered))

    def score(self, aspect: Aspect, how: str = "exact", kind: str | None = None) -> float | None:
        """The mean over the probes of an aspect, and of a kind of it if that is given.

        Args:
            aspect: which probes.
            how: "teacher", "exact" or "sampled", as in `Answered`.
            kind: see `Probe.kind`.
        """
        mine = [its for its in self.answered if its.probe.aspect == aspect and kind in (None, its.probe.kind)]
        return sum(getattr(its, how) for its in mine) / len(mine) if mine else None


def measure(before: LM | Remembered, after: LM, cases: Sequence[Case]) -> list[Measured]:
    """The scores of each case, all asked of the same edited model: what later edits did to earlier ones is seen."""
    probes = [[probe for aspect in ASPECTS for probe in case.of(aspect)] for case in cases]
    found = iter(answered(before, after, [probe for its in probes for probe in its]))
    return [Measured(case, tuple(next(found) for _ in its)) for case, its in zip(cases, probes, strict=True)]


def means(found: Sequence[Measured], how: str = "exact") -> Mapping[str, float]:
    """The mean over cases of each aspect that has probes."""
    scores = {aspect: [its.score(aspect, how) for its in found] for aspect in ASPECTS}
    known = {aspect: [its for its in values if its is not None] for aspect, values in scores.items()}
    return {aspect: sum(values) / len(values) for aspect, values in known.items() if values}


def intervals(found: Sequence[Measured], how: str = "exact", kind: str | None = None) -> Mapping[str, Interval]:
    """`means` with 95 % bootstrap intervals over the cases; one case alone has no width to tell (NaN)."""
    given: dict[str, Interval] = {}
    for aspect in ASPECTS:
        scores = [score for its in found if (score := its.score(aspect, how, kind)) is not None]
        if scores:
            counts = Resampling(None, len(scores), RESAMPLINGS).counts
            values = counts @ np.array(scores) / counts.sum(1)
            draws = values[1:] if len(scores) > 1 else np.array([])
            given[aspect] = interval({0: Resampled(float(values[0]), draws)})
    return given


def perplexity(lm: LM, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """What a model makes of texts that go on from prompts: e to the mean negative log-probability of their tokens.

    With the base model and what the edited one said, it tells fluent text from gibberish, which entropy does not.
    """
    asked = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text.strip()]
    said = lm.score(*map(list, zip(*asked))) if asked else []
    count = sum(len(its.tokens) for its in said)
    return math.exp(-sum(its.logprob for its in said) / count) if count else math.nan


def fluency(texts: Sequence[str]) -> float:
    """Weighted entropy of pairs and triples of words, in bits, as KnowEdit has it; repeating one word is 0.

    Punctuation marks are words of their own, as NLTK's, which KnowEdit takes, sets them apart.

    Args:
        texts: what a model said; the mean over them is given.
    """
    found = [
        sum(weight * _entropy(WORD.findall(text), size) for size, weight in ((2, 2 / 3), (3, 4 / 3))) / 2
        for text in texts
    ]
    return sum(found) / len(found) if found else 0.0


def _entropy(words: Sequence[str], size: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(size)))).values()
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts) if total else 0.0
