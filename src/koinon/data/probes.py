"""Probes made from a table of facts: what an edit must also change, and what it must leave as it is."""

import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

from koinon.core import UserError
from koinon.data.facts import Aspect, Case, Fact, Probe

T = TypeVar("T")
K = TypeVar("K")
Templates = Mapping[str, Sequence[str]]
"""By relation: the prompts that ask for its object, ``{}`` standing for the subject. The first is taught."""
Key = tuple[str, str]
"""A subject and a relation."""
EXCEPTIONS = 3
"""A question that has to leave out more other answers than this is not asked."""


@dataclass(frozen=True)
class FactTable:
    """What is known, and how it is asked for: makes `Case`s whose probes an edit can be judged by.

    Facts that have ended (``until``) are not asked for.
    """

    known: Sequence[Fact]
    templates: Templates = field(default_factory=dict)
    """More prompts of a relation, for the rephrases, and for facts that are put together."""
    phrases: Mapping[str, str] = field(default_factory=dict)
    """By relation: the object in words, ``the country that {} is in``; of others it is ``the {relation} of {}``."""
    inverses: Templates = field(default_factory=dict)
    """By relation: prompts that ask for its subject, ``{}`` standing for the object."""
    symmetric: Collection[str] = ()
    """Relations that hold in both directions."""
    many: Collection[str] | None = None
    """Relations with several objects of a subject; by default those of which the table knows such a subject."""
    unknown: Collection[Key] = ()
    """Whose objects the model to be edited does not know: whether a fact leads there cannot be seen."""

    @cached_property
    def objects(self) -> Mapping[Key, list[Fact]]:
        """What holds now of a subject by a relation."""
        return _grouped(self._now, lambda fact: (fact.subject, fact.relation))

    @cached_property
    def subjects(self) -> Mapping[Key, list[Fact]]:
        """What holds now of an object by a relation."""
        return _grouped(self._now, lambda fact: (fact.object, fact.relation))

    @cached_property
    def several(self) -> frozenset[str]:
        """The relations in which a subject has several objects."""
        if self.many is not None:
            return frozenset(self.many)
        return frozenset(relation for (_, relation), facts in self.objects.items() if len(facts) > 1)

    def case(self, fact: Fact, count: int = 5, seed: int = 0) -> Case:
        """A fact to teach with up to ``count`` probes of each kind; see `cases`."""
        return self.cases([fact], count, seed)[0]

    def cases(self, facts: Sequence[Fact], count: int = 5, seed: int = 0) -> list[Case]:
        """Facts to teach together, each with its probes, none of which another of the facts answers differently.

        A fact that replaces one of the table gets this one's object as ``was``. The draw depends on the fact and the
        seed only.

        Raises:
            UserError: a fact without a relation.
        """
        for fact in facts:
            if not fact.relation:
                raise UserError(f"fact {fact.question!r} has no relation: probes are made from a table by relation")
        taught = {(fact.subject, fact.relation) for fact in facts}
        return [self._case(self._with_past(fact), taught, count, seed) for fact in facts]

    def moved(self, fact: Fact, other: Fact) -> str:
        """Why a known fact's answer may change with a fact that is taught; empty if it stays.

        It changes if it is about the same subject and relation, if the old or the new object leads to it or it to them,
        if it is about the old or new object by a relation that holds in both directions, or if it is about something
        that is linked to the subject.
        """
        if (other.subject, other.relation) == (fact.subject, fact.relation):
            return "it is about the same subject and relation"
        ends = [end for end in (fact.was, fact.object) if end]
        if other.subject == fact.subject:
            # What the old object leads to, or what leads to the old object, goes with it.
            if other.object in ends or (
                fact.was and self._linked(fact.was, other.object) | self._linked(other.object, fact.was)
            ):
                return "it follows from what the edit changes"
        elif other.subject in ends:
            if other.object == fact.subject or (other.relation == fact.relation and fact.relation in self.symmetric):
                return "it is the edit the other way round"
        elif other.relation == fact.relation:
            if self._linked(other.subject, fact.subject):
                return "its subject is linked to the edit's"
            if other.object == fact.object and fact.relation not in self._shared | self.several:
                return "the edit gives its object to another subject"
        return ""

    # How the probes are made.

    @cached_property
    def _now(self) -> list[Fact]:
        return [fact for fact in self.known if not fact.until and fact.relation]

    @cached_property
    def _of(self) -> Mapping[str, list[Fact]]:
        return _grouped(self._now, lambda fact: fact.subject)

    @cached_property
    def _by(self) -> Mapping[str, list[Key]]:
        """By relation: its subjects, each once."""
        return _grouped(self.objects, lambda key: key[1])

    @cached_property
    def _links(self) -> frozenset[Key]:
        return frozenset((fact.subject, fact.object) for fact in self._now)

    @cached_property
    def _shared(self) -> frozenset[str]:
        """The relations that give several subjects one object."""
        return frozenset(relation for (_, relation), facts in self.subjects.items() if len(facts) > 1)

    def _linked(self, subject: str, object: str) -> bool:
        return (subject, object) in self._links

    def _with_past(self, fact: Fact) -> Fact:
        now = self.objects.get((fact.subject, fact.relation), [])
        aliases = dict.fromkeys(
            (*fact.aliases, *(alias for its in self._of.get(fact.subject, []) for alias in its.aliases))
        )
        fact = dataclasses.replace(fact, aliases=tuple(aliases))
        if fact.was or len(now) != 1 or now[0].object == fact.object or fact.relation in self.several:
            return fact
        return dataclasses.replace(fact, was=now[0].object)

    def _case(self, fact: Fact, taught: set[Key], count: int, seed: int) -> Case:
        kinds = (self._rephrases, self._same_subject, self._same_relation, self._others, self._hops, self._aliases,
                 self._inverses)  # fmt: skip
        asked = {_plain(fact.question)}
        probes: list[Probe] = []
        for kind in kinds:
            # A draw of its own for each kind: one more probe of one kind leaves the others as they are.
            draw = random.Random(f"{seed} {kind.__name__} {fact.question} {fact.object}")
            before = len(probes)
            for probe in kind(fact, taught, draw):
                if len(probes) - before == count:
                    break
                if (prompt := _plain(probe.prompt)) not in asked:
                    asked.add(prompt)
                    probes.append(probe)
        return Case(fact, tuple(probes))

    def _rephrases(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """The relation's other wordings."""
        for template in _drawn(self.templates.get(fact.relation, ()), draw):
            if not _gives_away(template, fact):
                yield _right(fact, template.replace("{}", fact.subject), "generality", "rephrase")

    def _same_subject(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """What else is known of the subject."""
        keys = dict.fromkeys((its.subject, its.relation) for its in self._of.get(fact.subject, []))
        for key in _drawn(list(keys), draw):
            if key not in taught and not any(self.moved(fact, its) for its in self.objects[key]):
                yield _stays(self.objects[key], "same subject")

    def _same_relation(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """Other subjects of the relation; first those whose object is the one that goes."""
        near = [(its.subject, its.relation) for its in self.subjects.get((fact.was, fact.relation), [])]
        for key in itertools.chain(_drawn(near, draw), _drawn(self._by.get(fact.relation, []), draw)):
            facts = self.objects[key]
            if key not in taught and not any(self.moved(fact, its) for its in facts):
                yield _stays(facts, "same relation")

    def _others(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """The other objects of a subject that may have several: they must stay."""
        if fact.relation not in self.several:
            return
        others = [
            its
            for its in self.objects.get((fact.subject, fact.relation), [])
            if its.object not in (fact.object, fact.was, *fact.answers)
        ]
        if others:
            yield dataclasses.replace(
                _stays(others, "other object"), prompt=_except([fact.object], fact.prompt, fact.subject)
            )

    def _hops(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """What is known of the new object, asked by way of the subject; if the old object gives another answer."""
        if fact.relation in self.several or fact.object == fact.subject:
            return
        phrase = self.phrases.get(fact.relation, "the " + fact.relation.replace("_", " ") + " of {}")
        keys = dict.fromkeys((its.subject, its.relation) for its in self._of.get(fact.object, []))
        for key in _drawn(list(keys), draw):
            facts = self.objects[key]
            old = {its.object for its in self.objects.get((fact.was, key[1]), [])}
            if key in taught or key in self.unknown:
                continue
            if any(its.object in old or its.object == fact.subject for its in facts):
                continue
            prompt = facts[0].prompt.replace("{}", phrase.replace("{}", fact.subject))
            prompt = prompt[:1].upper() + prompt[1:] if facts[0].prompt.startswith("{}") else prompt
            if not says(prompt, (facts[0].object, *facts[0].answers)):
                yield dataclasses.replace(_stays(facts, "one hop"), prompt=prompt, aspect="portability")

    def _aliases(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """The subject's other names, but for those that are another subject's."""
        for alias in _drawn(fact.aliases, draw):
            if alias.strip() and alias not in self._of and not says(alias, (fact.object, *fact.answers)):
                yield _right(fact, fact.prompt.replace("{}", alias), "portability", "alias")

    def _inverses(self, fact: Fact, taught: set[Key], draw: random.Random) -> Iterator[Probe]:
        """The subject asked for by the object; other subjects that are as right are left out by name."""
        both = fact.relation in self.symmetric
        templates = (fact.prompt,) if both else self.inverses.get(fact.relation, ())
        right = [its.subject for its in self.subjects.get((fact.object, fact.relation), [])]
        right += [its.object for its in self.objects.get((fact.object, fact.relation), [])] if both else []
        others = [its for its in dict.fromkeys(right) if its not in (fact.subject, *fact.aliases)]
        if fact.object == fact.subject or len(others) > EXCEPTIONS:
            return
        for template in templates:
            prompt = _except(others, template, fact.object)
            if not says(prompt, (fact.subject, *fact.aliases)):
                yield Probe(prompt, fact.subject, "portability", "inverse", fact.aliases)


def refuse_overlap(cases: Sequence[Case], table: FactTable | None = None) -> None:
    """Check that no probe of cases taught together asks what an edit says, or gives its answer away.

    Raises:
        UserError: the first probe that does, and why.
    """
    for number, probe, why in overlaps(cases, table):
        raise UserError(
            f"case {number + 1} ({cases[number].fact.question!r}): its {probe.aspect} probe {probe.prompt!r} is no "
            f"evidence: {why}: leave it out"
        )


def drop_overlap(cases: Sequence[Case], table: FactTable | None = None) -> tuple[list[Case], Mapping[str, int]]:
    """The cases without the probes that `refuse_overlap` refuses, and how many these are by the reason."""
    found = list(overlaps(cases, table))
    bad = {(number, id(probe)) for number, probe, _ in found}
    kept = [
        dataclasses.replace(case, probes=tuple(probe for probe in case.probes if (number, id(probe)) not in bad))
        for number, case in enumerate(cases)
    ]
    return kept, dict(Counter(why for _, _, why in found))


def overlaps(cases: Sequence[Case], table: FactTable | None = None) -> Iterator[tuple[int, Probe, str]]:
    """Every probe that is no evidence: the number of its case, from 0, the probe, and why.

    A table lets it see as well which known facts change with an edit.
    """
    edits: dict[str, set[int]] = {}
    for number, case in enumerate(cases):
        prompts = (case.fact.prompt, *(table.templates.get(case.fact.relation, ()) if table else ()))
        for prompt in prompts:
            edits.setdefault(_plain(prompt.replace("{}", case.fact.subject)), set()).add(number)
    asked = _grouped(table.known, lambda fact: _plain(fact.question)) if table else {}
    taught = {(case.fact.subject, case.fact.relation) for case in cases if case.fact.relation}
    for number, case in enumerate(cases):
        for probe in case.probes:
            why = _overlap(case, probe, edits, number)
            if not why and table and probe.aspect == "locality":
                facts = asked.get(_plain(probe.prompt), [])
                why = next((why for its in facts if (why := table.moved(case.fact, its))), "")
                why = why or next(("another case teaches it" for f in facts if (f.subject, f.relation) in taught), "")
            if why:
                yield number, probe, why


def _overlap(case: Case, probe: Probe, edits: Mapping[str, set[int]], number: int) -> str:
    fact, prompt = case.fact, _plain(probe.prompt)
    if prompt == _plain(fact.question):
        return "it repeats the edit's own question"
    if probe.aspect == "generality" and says(probe.prompt.replace(fact.subject, " "), (fact.object, *fact.answers)):
        return "it contains the answer"
    if probe.aspect != "locality":
        return ""
    if taught := edits.get(prompt):
        return "it is about the same subject and relation" if number in taught else "another case teaches it"
    if any(other.aspect in ("generality", "portability") and _plain(other.prompt) == prompt for other in case.probes):
        return "the same question is to be answered anew"
    if any(prompt == _plain(fact.prompt.replace("{}", alias)) for alias in fact.aliases):
        return "it is about the same subject and relation"
    asks_old = fact.was and _same(probe.answer, fact.was) and probe.kind != "other object"
    if asks_old and says(probe.prompt, (fact.subject, *fact.aliases)):
        return "it asks the subject for the answer that the edit replaces"
    return ""


def refuse_contradictions(facts: Iterable[Fact], many: Collection[str] = ()) -> tuple[list[Fact], list[str]]:
    """The facts without those said twice, and a sentence for each of these.

    Args:
        facts: to be taught together.
        many: relations in which a subject may have several objects.

    Raises:
        UserError: two facts give one question (or one subject and relation) different answers at the same time.
    """
    kept: list[Fact] = []
    said: list[str] = []
    places: dict[tuple[str, str], list[tuple[int, Fact]]] = {}
    for number, fact in enumerate(facts, start=1):
        keys = [("", _plain(fact.question)), *([(_plain(fact.subject), fact.relation)] if fact.relation else [])]
        earlier = {n: f for key in keys for n, f in places.get(key, []) if _at_once(f, fact)}
        same = next((n for n, f in earlier.items() if _meant_alike(f, fact)), None)
        if same is not None:
            said.append(f"fact {number} ({fact.question!r}: {fact.object!r}) says what fact {same} says: left out")
            continue
        if earlier and fact.relation not in many:
            before, other = next(iter(earlier.items()))
            raise UserError(
                f"facts {before} and {number} contradict each other: {other.question!r} is {other.object!r}, and "
                f"{fact.question!r} is {fact.object!r}: "
                "leave one out, or give each a time, as since and until and in a prompt of its own"
            )
        kept.append(fact)
        for key in keys:
            places.setdefault(key, []).append((number, fact))
    return kept, said


def _at_once(a: Fact, b: Fact) -> bool:
    """Whether there may be a day on which both are true."""

    def over(ends: str, starts: str) -> bool:
        length = min(len(ends), len(starts))  # as far as both say
        return ends[:length] < starts[:length]

    return not (over(a.until, b.since) or over(b.until, a.since))


def _meant_alike(a: Fact, b: Fact) -> bool:
    return any(_same(x, y) for x in (a.object, *a.answers) for y in (b.object, *b.answers))


def _grouped(values: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    found: dict[K, list[T]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def _drawn(values: Sequence[T], draw: random.Random) -> Iterator[T]:
    """The values in an order drawn step by step: a few of many cost no more than a few."""
    moved: dict[int, int] = {}
    for place in range(len(values)):
        other = draw.randrange(place, len(values))
        yield values[moved.get(other, other)]
        moved[other] = moved.get(place, place)


def _right(fact: Fact, prompt: str, aspect: Aspect, kind: str) -> Probe:
    return Probe(prompt, fact.object, aspect, kind, fact.answers)


def _stays(facts: Sequence[Fact], kind: str) -> Probe:
    """Known facts of one subject and relation, as one question."""
    names = dict.fromkeys(name for fact in facts for name in (fact.object, *fact.answers))
    answer, *answers = names
    return Probe(facts[0].question, answer, "locality", kind, tuple(answers))


def _except(names: Sequence[str], template: str, filled: str) -> str:
    """The question for something else than these."""
    if not names:
        return template.replace("{}", filled)
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"Apart from {listed}, {(template[:1].lower() + template[1:]).replace('{}', filled)}"


def _gives_away(template: str, fact: Fact) -> bool:
    return says(template.replace("{}", " "), (fact.object, *fact.answers))


def says(text: str, names: Iterable[str]) -> bool:
    """Whether one of the names is in the text, as words of its own, in small letters or large ones."""
    return any(word(name.strip(), re.IGNORECASE).search(text) for name in names if name.strip())


@lru_cache
def word(name: str, flags: int = 0) -> re.Pattern[str]:
    """Finds a name where no letter or digit touches it."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", flags)


def _plain(text: str) -> str:
    """What two prompts have in common that differ in blanks and letter case only."""
    return " ".join(text.casefold().split())


def _same(a: str, b: str) -> bool:
    return _plain(a) == _plain(b)
