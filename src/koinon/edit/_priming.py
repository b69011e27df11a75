"""What teaching one text did to answers that have nothing to do with it, and what can be known of that before."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from koinon.core import UserError, pick
from koinon.data.probes import word
from koinon.lm.language import LM

Tokens = Literal["first", "all"]
"""Of a keyword with several tokens: the first alone, or the product over all."""
Rewrite = Callable[[str], str]
"""From a text to another one that says the same: a `template`, a person's own function, a call of a language model."""


def says(text: str, keyword: str) -> bool:
    """Whether a text holds the keyword as a word of its own, in small letters or large ones."""
    return word(keyword.strip(), re.IGNORECASE).search(text) is not None


def prefix_of(text: str, keyword: str) -> str:
    """X_c: the text up to where it says the keyword for the last time.

    Raises:
        UserError: it does not say it, or begins with it.
    """
    found = [its.start() for its in word(keyword.strip()).finditer(text)]
    prefix = text[: found[-1]].rstrip() if found else ""
    if not prefix:
        raise UserError(f"text {text[:60]!r}: it says {keyword!r} nowhere behind its beginning; give one that does")
    return prefix


# What a model says before and after.


def sure(lm: LM, prefixes: Sequence[str], keyword: str, tokens: Tokens = "first") -> list[float]:
    """log P(keyword | prefix), for each."""
    first = pick(tokens, ("first", "all"), "count of tokens") == "first"
    said = lm.score(prefixes, [keyword.strip()] * len(prefixes))
    return [its.logprobs[0] if first else its.logprob for its in said]


@dataclass(frozen=True)
class Scores:
    """How much likelier a keyword became: where the text says it, and behind prefixes that have nothing to do with it.

    Quotients of small probabilities explode, so that logarithms are averaged and differences stand beside them;
    ``memory_ratio`` and ``priming_ratio`` are S_mem and S_prime as the paper has them.
    """

    before: tuple[float, ...]
    """log P of the keyword, behind the text's own prefix first, then behind each thematic one."""
    after: tuple[float, ...]
    """The same prefixes, after learning."""

    def __post_init__(self) -> None:
        if len(self.before) != len(self.after) or len(self.before) < 2:
            raise UserError(
                f"{len(self.before)} prefixes before, {len(self.after)} after: score the same ones, two at least"
            )

    @property
    def gains(self) -> tuple[float, ...]:
        """log P after minus log P before, for each prefix."""
        return tuple(new - old for new, old in zip(self.after, self.before))

    @property
    def memory(self) -> float:
        """log S_mem."""
        return self.gains[0]

    @property
    def priming(self) -> float:
        """The mean over the thematic prefixes of the logarithm that S_prime is the mean without."""
        return sum(self.gains[1:]) / len(self.gains[1:])

    @property
    def memory_ratio(self) -> float:
        """S_mem = P_after(keyword | X_c) / P_before(keyword | X_c)."""
        return math.exp(self.memory)

    @property
    def priming_ratio(self) -> float:
        """S_prime: the mean over the thematic prefixes of P_after / P_before."""
        return sum(map(math.exp, self.gains[1:])) / len(self.gains[1:])

    @property
    def memory_change(self) -> float:
        """P_after - P_before where the text says it."""
        return math.exp(self.after[0]) - math.exp(self.before[0])

    @property
    def priming_change(self) -> float:
        """The mean over the thematic prefixes of P_after - P_before."""
        changes = [math.exp(new) - math.exp(old) for new, old in zip(self.after[1:], self.before[1:])]
        return sum(changes) / len(changes)


def scores(
    before: LM, after: LM, prefix: str, keyword: str, thematic: Sequence[str], tokens: Tokens = "first"
) -> Scores:
    """Both models asked behind the same prefixes.

    Args:
        before: the model that has not learnt the text.
        after: the one that has.
        prefix: X_c, the original text's whatever was trained; see `prefix_of`.
        keyword: what it goes on with.
        thematic: X_T, other beginnings that a keyword of this kind could follow.
        tokens: of a keyword with several.

    Raises:
        UserError: a thematic prefix that says the keyword itself, or none.
    """
    asked = [prefix, *unrelated(thematic, keyword)]
    return Scores(*(tuple(sure(lm, asked, keyword, tokens)) for lm in (before, after)))


def unrelated(thematic: Sequence[str], keyword: str) -> Sequence[str]:
    """The prefixes, none of which says the keyword.

    Raises:
        UserError: one does, or there is none.
    """
    wrong = [its for its in thematic if says(its, keyword)]
    if wrong or not thematic:
        what = f"{wrong[0]!r} says the keyword {keyword!r} itself" if wrong else f"there is none for {keyword!r}"
        raise UserError(f"thematic prefixes: {what}; give beginnings that it could follow")
    return thematic


# What can be known before.


@dataclass(frozen=True)
class Line:
    """Priming as a straight line of the keyword's log-probability, fitted to texts that were taught."""

    slope: float
    middle: float
    """The mean log-probability of the fitted texts."""
    height: float
    """The priming expected there."""
    spread: float
    """Standard deviation of what the line leaves over."""
    extent: float
    """Sum of squares of the log-probabilities around their mean."""
    count: int
    """Texts."""

    @classmethod
    def fit(cls, logprobs: Sequence[float], primed: Sequence[float]) -> "Line":
        """By least squares.

        Args:
            logprobs: log P_before of each text's keyword.
            primed: what `Scores.priming` was after each.

        Raises:
            UserError: fewer than three texts, or all with the same probability.
        """
        count = len(logprobs)
        if count < 3 or len(primed) != count or max(logprobs) == min(logprobs):
            raise UserError(f"a line through {count} texts and {len(primed)} scores: give three that differ, or more")
        middle, height = sum(logprobs) / count, sum(primed) / count
        extent = sum((x - middle) ** 2 for x in logprobs)
        slope = sum((x - middle) * (y - height) for x, y in zip(logprobs, primed)) / extent
        left = sum((y - height - slope * (x - middle)) ** 2 for x, y in zip(logprobs, primed))
        return cls(slope, middle, height, math.sqrt(left / (count - 2)), extent, count)

    def band(self, logprob: float, wide: float = 1.96) -> tuple[float, float, float]:
        """The lower end, the expected priming, the upper end; so many standard deviations to each side."""
        away = logprob - self.middle
        expected = self.height + self.slope * away
        half = wide * self.spread * math.sqrt(1 + 1 / self.count + away**2 / self.extent)
        return expected - half, expected, expected + half


@dataclass(frozen=True)
class Foreseen:
    """What is known of a text before it is taught; all but the first are rivals of it as predictors of priming."""

    logprob: float
    """log P_before(keyword | X_c)."""
    loss: float
    """The text's mean negative log-probability a token; its perplexity is exp of it, and orders texts alike."""
    length: int
    """Tokens of the text."""
    entropy: float
    """Of the model's guess where the keyword comes, in nats."""
    band: tuple[float, float, float] | None
    """The priming to be expected, between its bounds, if a line was given."""


@torch.no_grad()
def predict(lm: LM, text: str, keyword: str, line: Line | None = None, tokens: Tokens = "first") -> Foreseen:
    """How surprising a text is, and how much priming follows from it.

    Args:
        lm: the model before it learns.
        text: says the keyword; everything before the last time it does is X_c.
        keyword: a word or a name.
        line: fitted to other texts by `Line.fit`; in the paper, keywords under a probability of about 1e-3 prime.
        tokens: of a keyword with several.
    """
    prefix = prefix_of(text, keyword)
    (logprob,) = sure(lm, [prefix], keyword, tokens)
    whole, start = lm.encode([text]), lm.encode([prefix])
    said = lm.logits(whole)[0, :-1].float().log_softmax(-1).gather(1, whole.ids[0, 1:, None])
    guess = lm.logits(start)[0, -1].float().log_softmax(-1)
    entropy = -float((guess.exp() * guess).sum())
    return Foreseen(
        logprob, -float(said.mean()), whole.ids.shape[1], entropy, None if line is None else line.band(logprob)
    )


# Stepping stones.


def template(words: str) -> Rewrite:
    """A rewriter that puts the text where ``{}`` is, behind what makes it less of a surprise.

    Raises:
        UserError: no ``{}``, or more than one.
    """
    if words.count("{}") != 1:
        raise UserError(f"template {words!r}: it holds {{}} once, where the text goes")
    return lambda text: words.replace("{}", text)


def stepped(lm: LM, text: str, keyword: str, rewrite: Rewrite, tokens: Tokens = "first") -> str:
    """The rewritten text, to be trained on in the text's place; what is scored stays the original prefix.

    Raises:
        UserError: it lost the keyword, or the model finds the keyword no likelier in it.
    """
    new = rewrite(text)
    if not says(new, keyword):
        raise UserError(f"rewritten text {new[:60]!r}: it does not say {keyword!r} any more; keep the keyword")
    old_prefix, new_prefix = prefix_of(text, keyword), prefix_of(new, keyword)
    was, its = sure(lm, [old_prefix, new_prefix], keyword, tokens)
    if its <= was:
        raise UserError(
            f"rewritten text {new[:50]!r}: log P({keyword!r}) is {its:.2f} and was {was:.2f}; give one that raises it"
        )
    return new
