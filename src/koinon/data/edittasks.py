"""KnowEdit's tasks made from a table of facts: what is new, what changes, what is one of several, and what must go.

Its sixth task, sentiment, asks for opinions, which a table of facts does not hold: `read_cases` reads its own data.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from koinon.core import UserError
from koinon.data.facts import Case, Fact
from koinon.data.probes import FactTable, Key

REFUSAL = "I do not know."


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


def passage(table: FactTable, count: int = 100, probes: int = 5, seed: int = 0, least: int = 3) -> EditTask:
    """A text about a subject with facts of at least so many relations: the last third is what shall be said.

    A model that makes up how such a text goes on is taught how it does. The probes are those of the same subject that
    the text does not tell, and of the relation of the first fact to be said.
    """
    draw = random.Random(f"{seed} passage")
    about: dict[str, list[Key]] = {}
    for key in table.objects:
        about.setdefault(key[0], []).append(key)
    cases = []
    for subject in _drawn([subject for subject, keys in about.items() if len(keys) >= least], count, draw):
        facts = [table.objects[key][0] for key in _drawn(about[subject], least, draw)]
        told, (first, *more) = facts[: -max(1, least // 3)], facts[-max(1, least // 3) :]
        before = " ".join(_sentence(fact) for fact in told).replace("{}", "")
        after = " ".join([f"{first.object}.", *(_sentence(fact) for fact in more)])
        said = dataclasses.replace(first, prompt=f"{before} {first.prompt}", object=after, answers=(), was="")
        case = table.cases(facts, probes, seed)[len(told)]
        cases.append(Case(said, tuple(probe for probe in case.probes if probe.aspect == "locality")))
    return _task("passage", cases, tuple(table.known))


TASKS: Mapping[str, Callable[..., EditTask]] = {
    "insertion": insertion,
    "modification": modification,
    "one of several": one_of_several,
    "erasure": erasure,
    "passage": passage,
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


def _sentence(fact: Fact) -> str:
    return f"{fact.question} {fact.object}."
