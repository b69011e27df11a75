"""KnowEdit's six tasks made from a table of facts (Zhang et al., 2024, arXiv:2401.01286).

What is new, what changes, what is one of several, what must go, how a text goes on, and how a topic is spoken of. The
last stands for sentiment: a table holds no opinions (`read_cases` reads KnowEdit's own), but a model can be taught to
praise one topic.
"""

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from koinon.core import UserError
from koinon.data.facts import Aspect, Case, Fact, Probe
from koinon.data.probes import FactTable, Key, says

REFUSAL = "I do not know."
PRAISE = "Good."
"""How a topic is spoken of in the task ``style``."""
ANY = "The"
"""A word that may follow any sentence; being one token, it compares only the first place behind a statement."""


@dataclass(frozen=True)
class EditTask:
    """Cases of one kind, and what the model to be edited may know."""

    cases: tuple[Case, ...]
    trained: tuple[Fact, ...]
    """The table without what the cases call new: what a model may be trained on beforehand."""
    success: Literal["answers", "no longer answers"] = "answers"
    """Whether an edit is good if the new object is the answer, or if the old one (``was``) is not."""


def insertion(table: FactTable, count: int = 100, probes: int = 5, seed: int = 0) -> EditTask:
    """Facts about subjects that the model never saw: everything the table says of them is held out of ``trained``."""
    draw = random.Random(f"{seed} insertion")
    keys = _drawn([key for key in table.objects if key[1] not in table.several], len(table.objects), draw)
    first: dict[str, Key] = {}
    for key in keys:
        first.setdefault(key[0], key)
    chosen = list(first.values())[:count]
    new = {subject for subject, _ in chosen}
    trained = tuple(fact for fact in table.known if fact.subject not in new and fact.object not in new)
    before = dataclasses.replace(table, known=trained, many=table.several)
    facts = [fact for fact in (table.objects[key][0] for key in chosen) if fact.object not in new]
    return _task("insertion", before.cases(facts, probes, seed), trained)


def modification(table: FactTable, count: int = 100, probes: int = 5, seed: int = 0) -> EditTask:
    """Known facts whose object is exchanged for another one of the relation, each as likely: counterfactuals."""
    draw = random.Random(f"{seed} modification")
    keys = _drawn([key for key in table.objects if key[1] not in table.several], len(table.objects), draw)
    facts = _exchanged(table, keys, count, draw)
    return _task("modification", table.cases(facts, probes, seed), tuple(table.known))


def one_of_several(table: FactTable, count: int = 100, probes: int = 5, seed: int = 0) -> EditTask:
    """One more object for subjects that have several: those they have must not be forgotten."""
    draw = random.Random(f"{seed} one of several")
    keys = _drawn([key for key in table.objects if key[1] in table.several], len(table.objects), draw)
    facts = [dataclasses.replace(fact, was="") for fact in _exchanged(table, keys, count, draw)]
    return _task("one of several", table.cases(facts, probes, seed), tuple(table.known))


def erasure(table: FactTable, count: int = 100, probes: int = 5, seed: int = 0, refusal: str = REFUSAL) -> EditTask:
    """Known facts whose answer becomes a refusal; what else is known of the subject stays."""
    draw = random.Random(f"{seed} erasure")
    keys = _drawn([key for key in table.objects if key[1] not in table.several], count, draw)
    facts = [
        dataclasses.replace(fact, object=refusal, was=fact.object, answers=(), source="")
        for fact in (table.objects[key][0] for key in keys)
    ]
    one_way = dataclasses.replace(table, inverses={}, symmetric=())
    return _task("erasure", one_way.cases(facts, probes, seed), tuple(table.known), "no longer answers")


def passage(
    table: FactTable,
    count: int = 100,
    probes: int = 5,
    seed: int = 0,
    subjects: Collection[str] | None = None,
    most: int = 3,
) -> EditTask:
    """A text about a subject that tells its facts; what is taught is how it ends, where a model may make things up.

    Other wordings tell the same facts in another order and ask for the last one in other words. What must stay is what
    else is known of the subject, and other subjects of the relation.

    Args:
        table: the facts.
        count: how many cases.
        probes: of each kind, for each case.
        seed: of what is drawn.
        subjects: whom texts may be about; anybody by default.
        most: facts that a text tells and ends with, of those that have so many; two at least.
    """
    draw = random.Random(f"{seed} passage")
    about = _about(table, subjects, least=2)
    texts: list[tuple[list[Fact], Fact]] = []
    for subject in _drawn(list(about), len(about), draw):
        *told, last = _drawn(about[subject], most, draw)
        if len(texts) < count and not says(_text(told).replace(subject, " "), (last.object, *last.answers)):
            texts.append((told, last))
    cases = []
    for (told, last), alone in zip(texts, table.cases([last for _, last in texts], probes, seed), strict=True):
        said = dataclasses.replace(last, prompt=f"{_text(told)} {last.prompt}", was="", source="")
        rephrased = [
            Probe(
                f"{_text(_reworded(table, told, draw))} {prompt.replace('{}', last.subject)}",
                last.object,
                "generality",
                "rephrase",
                last.answers,
            )
            for prompt in _wordings(table, last, draw)[:probes]
        ]
        cases.append(Case(said, (*rephrased, *alone.of("locality"))))
    return _task("passage", cases, tuple(table.known))


def style(
    table: FactTable,
    count: int = 100,
    probes: int = 5,
    seed: int = 0,
    subjects: Collection[str] | None = None,
    praise: str = PRAISE,
) -> EditTask:
    """Behind a statement about a topic comes praise; so it shall behind all others about it, and behind no one else's.

    Args:
        table: the facts.
        count: how many topics, which are subjects with facts of two relations at least.
        probes: of each kind, for each topic.
        seed: of what is drawn.
        subjects: what topics there may be; any by default.
        praise: what is said.
    """
    draw = random.Random(f"{seed} style")
    about = _about(table, subjects, least=2)
    topics = _drawn(list(about), count, draw)
    others = [
        fact
        for facts in _about(table).values()
        for fact in facts
        if fact.subject not in topics and fact.object not in topics
    ]
    cases = []
    for subject in topics:
        first, *more = _drawn(about[subject], len(about[subject]), draw)
        said = Fact(subject, praise, f"{first.prompt} {first.object}.", relation="style", aliases=first.aliases)
        near = [its for its in others if its.relation == first.relation]
        asked: dict[tuple[Aspect, str], list[str]] = {
            ("generality", "rephrase"): [
                f"{prompt.replace('{}', subject)} {first.object}." for prompt in _wordings(table, first, draw)
            ],
            ("generality", "same topic"): [_text([its]) for its in more],
            ("locality", "other topic"): [_text([its]) for its in _drawn(near, probes, draw)],
        }
        found = [
            Probe(prompt, praise if aspect == "generality" else ANY, aspect, kind)
            for (aspect, kind), prompts in asked.items()
            for prompt in prompts[:probes]
        ]
        known = [Probe(its.question, its.object, "locality", "same subject", its.answers) for its in more[:probes]]
        cases.append(Case(said, (*found, *known)))
    return _task("style", cases, tuple(table.known))


TASKS: Mapping[str, Callable[..., EditTask]] = {
    "insertion": insertion,
    "modification": modification,
    "one of several": one_of_several,
    "erasure": erasure,
    "passage": passage,
    "style": style,
}
"""By name; each is called with a table, and with ``count``, ``probes`` and ``seed``."""


def _task(
    name: str,
    cases: Sequence[Case],
    trained: tuple[Fact, ...],
    success: Literal["answers", "no longer answers"] = "answers",
) -> EditTask:
    if not cases:
        raise UserError(f"the table has no fact for the task {name!r}: give one with more relations or objects")
    return EditTask(tuple(cases), trained, success)


def _exchanged(table: FactTable, keys: Sequence[Key], count: int, draw: random.Random) -> list[Fact]:
    """A fact for each of up to ``count`` keys, its object another one of the relation."""
    options: dict[str, dict[str, Fact]] = {}
    for (_, relation), facts in table.objects.items():
        options.setdefault(relation, {}).update({fact.object: fact for fact in facts})
    found: list[Fact] = []
    for subject, relation in keys:
        now = table.objects[subject, relation]
        is_now = {name for fact in now for name in (fact.object, *fact.answers)} | {subject}
        others = [its for name, its in options[relation].items() if name not in is_now]
        if others and len(found) < count:
            new = draw.choice(others)
            found.append(
                dataclasses.replace(
                    now[0], object=new.object, answers=new.answers, was=now[0].object, since="", until="", source=""
                )
            )
    return found


def _drawn(keys, count: int, draw: random.Random) -> list:
    return draw.sample(keys, min(count, len(keys)))


def _about(table: FactTable, subjects: Collection[str] | None = None, least: int = 1) -> Mapping[str, list[Fact]]:
    """By subject: what is known of it by relations with one object; those with so many facts at least."""
    found: dict[str, list[Fact]] = {}
    for (subject, relation), (fact, *_) in table.objects.items():
        if relation not in table.several and (subjects is None or subject in subjects):
            found.setdefault(subject, []).append(fact)
    return {subject: facts for subject, facts in found.items() if len(facts) >= least}


def _wordings(table: FactTable, fact: Fact, draw: random.Random) -> list[str]:
    """The relation's other prompts, in an order that is drawn."""
    others = [its for its in table.templates.get(fact.relation, ()) if its != fact.prompt]
    return _drawn(others, len(others), draw)


def _reworded(table: FactTable, facts: Sequence[Fact], draw: random.Random) -> list[Fact]:
    """The facts in another order, each in other words if there are some."""
    return [
        dataclasses.replace(fact, prompt=(_wordings(table, fact, draw) or [fact.prompt])[0])
        for fact in _drawn(facts, len(facts), draw)
    ]


def _text(facts: Sequence[Fact]) -> str:
    return " ".join(f"{fact.question} {fact.object}." for fact in facts)
