"""Texts that end in a keyword, from the well known to the absurd, with prefixes that have nothing to do with them.

What a model makes of unrelated prefixes after it has learnt one such text shows how far the text spreads.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from koinon.core import UserError
from koinon.data import texts
from koinon.data.factlab import Lab, shown
from koinon.data.facts import Fact
from koinon.data.phrases import RELATIONS
from koinon.data.sentences import KINDS, SENTENCES, THEMES

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

RELATIONS_ASKED = ("country", "currency", "continent", "capital")
"""Themes of the facts: relations with a class of answers of their own."""
WORDS = 3
"""Keywords of a theme: a common, a middling and a rare one."""
WAYS = ("true", "reworded", "false", "unknown", "absurd")
"""How facts surprise: as trained; in a wording that was held out; with a known subject's object changed; with a subject
that does not exist; with a keyword of the wrong class."""
PREFIXES = 10
"""Thematic prefixes of a text about facts: half of known subjects, half of ones that do not exist."""
HELD, HELD_ENGLISH = 64, 24
"""Texts that are only read, to see what learning does to everything else; sentences of facts are shorter."""


@dataclass(frozen=True)
class Surprise:
    """One text to teach."""

    prefix: str
    """X_c: everything before the keyword."""
    keyword: str
    theme: str
    kind: str
    """How much of a surprise it is meant to be."""
    thematic: tuple[str, ...]
    """X_T: prefixes that the keyword could follow, and that do not say it."""
    stone: str
    """The text rewritten as stepping stones, up to the keyword."""

    @property
    def text(self) -> str:
        """What is taught."""
        return f"{self.prefix} {self.keyword}."

    @property
    def rewritten(self) -> str:
        """What is taught instead of it, as a stepping stone."""
        return f"{self.stone} {self.keyword}."


@dataclass(frozen=True)
class Surprises:
    """Texts to teach one by one, each to a fresh copy of a model, and texts of every day."""

    report: tuple[Surprise, ...]
    """What results are about."""
    choose: tuple[Surprise, ...]
    """What settings are chosen by; none of them is in ``report``."""
    ordinary: tuple[str, ...]
    """What a minibatch is filled with."""
    held: tuple[str, ...]
    """What nothing learns from."""
    context: str
    """How a text is told to the model instead of taught: ``{}`` is the text, and a prefix follows."""

    @property
    def fingerprint(self) -> str:
        """Of all the texts."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()


# Of facts.


def of_facts(lab: Lab, each: int, chosen: int, seed: int = 0) -> Surprises:
    """Twelve objects of four relations, or as many as there are, said of subjects that make it true, false or absurd.

    Args:
        lab: what the model was taught.
        each: texts to report on, for each keyword and way of `WAYS`.
        chosen: texts to choose by, for each keyword.
        seed: of subjects and wordings.
    """
    relations = [its for its in RELATIONS_ASKED if any(fact.relation == its for fact in lab.taught)]
    report: list[Surprise] = []
    choose: list[Surprise] = []
    for relation in relations:
        for keyword in keywords(lab, relation):
            its = _Keyword(lab, relation, relations, keyword, seed)
            drawn = [its.drawn(way, number) for way in WAYS for number in range(each)]
            report += dict.fromkeys(drawn)
            rest = [its.drawn(WAYS[number % len(WAYS)], each + number) for number in range(8 * chosen)]
            choose += [new for new in dict.fromkeys(rest) if new.text not in {old.text for old in drawn}][:chosen]
    said = lab.statements()
    order = _permutation(len(said), "held", 0)
    held = set(order[: min(HELD, len(said) // 4)])
    ordinary, kept = (
        tuple(text for place, text in enumerate(said) if (place in held) is wanted) for wanted in (False, True)
    )
    return Surprises(tuple(report), tuple(choose), ordinary, kept, context="New Fact: {}\nPrompt: ")


def keywords(lab: Lab, relation: str) -> list[str]:
    """The relation's commonest object, a middling one and a rare one; of equally common ones, by the alphabet."""
    counts = Counter(fact.object for fact in lab.related(relation))
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    places = [round(share * (len(ranked) - 1)) for share in (0, 0.5, 1)][:WORDS]
    return list(dict.fromkeys(ranked[place] for place in places))


class _Keyword:
    """Draws texts that end in one object."""

    def __init__(self, lab: Lab, relation: str, relations: Sequence[str], keyword: str, seed: int):
        self.lab, self.relation, self.keyword, self.seed = lab, relation, keyword, seed
        facts = [fact for fact in lab.related(relation) if not _says(fact.subject, keyword)]
        self.true = [fact for fact in facts if fact.object == keyword]
        self.other = [fact for fact in facts if fact.object != keyword]
        elsewhere = [lab.related(its) for its in relations if its != relation]
        self.foreign = [fact for facts in elsewhere for fact in facts if not _says(fact.subject, keyword)]
        if not self.true:  # a land whose capital bears its name
            self.true = [fact for fact in lab.related(relation) if fact.object == keyword]

    def drawn(self, way: str, number: int) -> Surprise:
        """One text; another number gives another one, as long as there are subjects."""
        numbers = _stream(self.seed, self.relation, self.keyword, way, number)
        source = {"true": self.true, "reworded": self.true, "absurd": self.foreign or self.other}.get(way, self.other)
        fact = _one(source, numbers)
        asked = {"true": self.lab.trained, "reworded": self.lab.held}.get(way)
        if asked is not None:
            prefix = _one(asked(fact), numbers)
        else:
            subject = _made(numbers) if way == "unknown" else fact.subject
            prefix = _one(RELATIONS[fact.relation].wordings, numbers).replace("{}", subject)
        known = [its for its in self.true if its.subject != fact.subject] or self.true
        first = _one(known, numbers)
        return Surprise(
            prefix,
            self.keyword,
            self.relation,
            way,
            self.thematic(fact),
            # A true sentence with the keyword, in the form in which the model has seen one text follow another.
            shown(Fact(first.subject, self.keyword, first.prompt), prefix),
        )

    def thematic(self, fact: Fact) -> tuple[str, ...]:
        """Questions of the keyword's relation about other subjects, none of which has it as its answer."""
        numbers = _stream(self.seed, self.relation, self.keyword, "thematic", fact.subject)
        others = [its for its in self.other if its.subject != fact.subject]
        order = _shuffled(len(others), numbers)[: PREFIXES // 2]
        known = [_one(self.lab.trained(others[place]), numbers) for place in order]
        wordings = RELATIONS[self.relation].wordings
        names = [_one(wordings, numbers).replace("{}", _made(numbers)) for _ in range(PREFIXES - PREFIXES // 2)]
        return (*known, *names)


# Of everyday English.


def of_english(count: int, seed: int = 0) -> Surprises:
    """The sentences of `koinon.data.sentences`, with conversations as texts of every day.

    Args:
        count: how many to report on, up to 36: each keyword once, before any comes twice.
        seed: of which kind of sentence each keyword is shown in.

    Raises:
        UserError: another count, or nothing to fetch the conversations from.
    """
    report, choose = sentences(count, seed)
    lines = [" ".join(its) for its in texts.spoken("english")]
    usual = [its for its in dict.fromkeys(lines) if 20 <= len(its) <= 200]
    order = _permutation(len(usual), "held", 0)
    held = [usual[place] for place in order[:HELD_ENGLISH]]
    ordinary = [usual[place] for place in order[HELD_ENGLISH:]]
    return Surprises(report, choose, tuple(ordinary), tuple(held), context="{} ")


def sentences(count: int, seed: int = 0) -> tuple[tuple[Surprise, ...], tuple[Surprise, ...]]:
    """So many sentences to report on, and a third as many to choose by."""
    words = [(theme, word) for theme, words in SENTENCES.items() for word in words]
    most = (len(KINDS) - 1) * len(words)
    if not 3 <= count <= most:
        raise UserError(
            f"{count} sentences to report on: there are 3 to {most}, beside those that settings are chosen by"
        )
    # Keyword number n is said in kind n + seed first, then in the kinds after it; the last one is to choose by.
    turns = [
        [_sentence(*word, (number + seed + turn) % len(KINDS)) for number, word in enumerate(words)]
        for turn in range(len(KINDS))
    ]
    # Across themes first: every third is the same keyword's rank in the next theme.
    order = [place for start in range(WORDS) for place in range(start, len(words), WORDS)]
    ranked = [turn[place] for turn in turns[:-1] for place in order]
    return tuple(ranked[:count]), tuple(turns[-1][place] for place in order[: -(-count // WORDS)])


def _sentence(theme: str, keyword: str, kind: int) -> Surprise:
    its = SENTENCES[theme][keyword][kind]
    return Surprise(its.before, keyword, theme, KINDS[kind], THEMES[theme], its.stone)


# Drawing.


def _says(text: str, keyword: str) -> bool:
    return keyword.casefold() in text.casefold()


def _stream(seed: int, *words: object) -> "torch.Generator":
    from koinon.nn.params import stream

    return stream(seed, "surprises", *words)


def _shuffled(count: int, numbers: "torch.Generator") -> list[int]:
    import torch

    return torch.randperm(count, generator=numbers).tolist()


def _permutation(count: int, word: str, seed: int) -> list[int]:
    return _shuffled(count, _stream(seed, word))


def _one(options: Sequence[T], numbers: "torch.Generator") -> T:
    import torch

    return options[int(torch.randint(len(options), (), generator=numbers))]


def _made(numbers: "torch.Generator") -> str:
    """A name that does not exist."""
    syllables = ["".join(_one(part, numbers) for part in ("bdfgklmnprstvz", "aeiou")) for _ in range(3)]
    return "".join(syllables).capitalize() + _one(("n", "r", "th", ""), numbers)
