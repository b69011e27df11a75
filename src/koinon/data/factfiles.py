"""Facts in a person's file: koinon's own JSON Lines, tables of triples, and the data of other editors."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from datetime import date
from pathlib import Path
from typing import Any, get_args

from koinon.bench.compare import write_whole
from koinon.core import UserError, pick
from koinon.data.editformats import FOREIGN, Kind, Say, TeachesNothing, fact_of
from koinon.data.facts import Aspect, Case, Fact, Probe
from koinon.data.probes import Templates
from koinon.data.records import LINE_LIMIT, Record, read_records, shown, writable
from koinon.data.wordings import read_wordings

FACT = [field.name for field in fields(Fact)]
LISTS = ("aliases", "answers")
PROBE = [field.name for field in fields(Probe)]
KNOWN = (*FACT, "probes", "notes")
KINDS = ("koinon", *FOREIGN)
"""What the records of a file may be."""


def read_cases(
    path: Path,
    kind: str | None = None,
    templates: Templates | None = None,
    first: int | None = None,
    say: Say | None = None,
) -> list[Case]:
    """The cases in a file of JSON Lines, one JSON list or object, or a table with a head (CSV, TSV).

    Args:
        path: the file. Its layout is told by its content; only of damaged JSON Lines, by its ending.
        kind: what the records are, one of `KINDS`; by default told by the fields of the first.
        templates: prompts by relation, for facts without one; a relation without any asks ``{} relation``.
        first: read at most so many cases, and no further than needed.
        say: is told what was decided or left out. Without it, a record that teaches nothing is an error.

    Raises:
        UserError: whatever is wrong with the file, on one line with its place.
    """
    if first is not None and first < 1:
        raise UserError(f"first {first} cases: give a number from 1")
    tell = _once(say or _nobody)
    own = Kind((("subject",), ("object",)), Own(templates or {}).read)
    known = {"koinon": own, **FOREIGN}
    chosen = None if kind is None else known[pick(kind, KINDS, "kind of facts")]
    cases: list[Case] = []
    for record in read_records(path):
        chosen = chosen or _kind_of(record, known)
        try:
            cases += chosen.read(record, tell)
        except TeachesNothing as error:
            if say is None:
                raise
            say(f"{error}; left out")
        if first is not None and len(cases) >= first:
            break
    if not cases:
        raise UserError(f"{path}: holds no fact to teach: give at least one record (a table has its head in line 1)")
    return cases[:first]


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    """Write koinon's own JSON Lines; `read_cases` gives back equal cases.

    Raises:
        UserError: no case, one that would not come back equal, or the file cannot be written.
    """
    lines = []
    for number, case in enumerate(cases, start=1):
        values = _filled(case.fact)
        values |= {"probes": [_filled(probe) for probe in case.probes]} if case.probes else {}
        values |= {"notes": dict(case.notes)} if case.notes else {}
        line = json.dumps(values, ensure_ascii=False)
        back = Own({}).read(Record(path, number, json.loads(line)), _nobody)
        if back != [case] or len(line.encode()) >= LINE_LIMIT:
            raise UserError(f"{path}:{number}: {shown(case.fact.question)} would not be read as it is: correct it")
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: no case to write")
    try:
        write_whole(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read_templates(path: Path) -> dict[str, tuple[str, ...]]:
    """The prompts of `read_wordings`, by relation; of those that have some."""
    return {relation: its.prompts for relation, its in read_wordings(path).items() if its.prompts}


def question_of(relation: str) -> str:
    """The prompt that asks for the object of a relation that has no template."""
    return "{} " + relation.replace("_", " ").replace("{}", " ").strip()


def _nobody(sentence: str) -> None:
    """Who is told where nobody wants to know."""


def _once(say: Say) -> Say:
    said: set[str] = set()

    def new(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    return new


def _kind_of(record: Record, known: Mapping[str, Kind]) -> Kind:
    for kind in known.values():
        if all(any(name in record.values for name in names) for names in kind.marks):
            return kind
    raise UserError(
        f"{record.path}:{record.line}: no kind of facts has the fields {shown(', '.join(record.values))}: "
        f"call them subject, object and prompt (or relation), or give data of {', '.join(FOREIGN)} as it is published"
    )


def _filled(value: Fact | Probe) -> dict[str, Any]:
    """The fields that say something."""
    found = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
    return {name: its for name, (its, default) in found.items() if default is MISSING or its != default}


class Own:
    """Reads koinon's own records: the fields of `Fact`, and in JSON probes and notes; or rows of a table of triples."""

    def __init__(self, templates: Templates):
        self.templates = templates
        self.others: set[str] = set()
        """Columns of a table that are no fields, and not misspelt."""

    def read(self, record: Record, say: Say) -> list[Case]:
        notes = self._noted(record)
        says: dict[str, Any] = {name: record.text(name, "") for name in FACT if name not in LISTS}
        says |= {name: record.texts(name) for name in LISTS}
        subject, says["object"] = record.text("subject"), record.text("object")
        _check_days(record, says["since"], says["until"])
        probes = [_probe(its) for its in record.records("probes")]
        del says["subject"]
        prompt, relation = says.pop("prompt"), says["relation"].strip()
        if not prompt.strip():
            if not relation:
                raise record.wrong("prompt", "is missing, and so is 'relation': give one of them")
            if relation not in self.templates:
                say(f"relation {relation!r} has no template: asked as {question_of(relation)!r}")
            prompt, *others = self.templates.get(relation) or (question_of(relation),)
            probes += [
                Probe(its.replace("{}", subject), says["object"], "generality", "rephrase", says["answers"])
                for its in others
            ]
        return [Case(fact_of(record, "prompt", prompt, subject, **says), tuple(probes), notes)]

    def _noted(self, record: Record) -> dict[str, str]:
        """The notes; of a table, the columns that are no fields, unless they look like one."""
        if not record.cells:
            for name in record.values:
                if name not in KNOWN:
                    raise record.unknown(name, KNOWN)
            return dict(_notes(record))
        if "probes" in record.values:
            raise record.wrong("probes", "cannot stand in a table: give JSON Lines")
        notes = {name: record.text(name) for name in record.values if name not in FACT}
        for name in notes:
            if name not in self.others and name not in KNOWN:
                if difflib.get_close_matches(name[:80], KNOWN, n=1, cutoff=0.8):
                    raise record.unknown(name, KNOWN)
                self.others.add(name)
        return notes


def _notes(record: Record) -> Iterator[tuple[str, str]]:
    if (value := record.values.get("notes")) is None:
        return
    inner = record.inner("notes", value)
    for name, its in inner.values.items():
        if not writable(name):
            raise record.wrong("notes", "half of a surrogate pair in a name, which is no character: correct it")
        yield name, inner.as_text(name, its)


def _probe(record: Record) -> Probe:
    for name in record.values:
        if name not in PROBE:
            raise record.unknown(name, PROBE)
    aspects: dict[str, Aspect] = {aspect: aspect for aspect in get_args(Aspect)}
    if (aspect := record.text("aspect")) not in aspects:
        raise record.wrong("aspect", f"{shown(aspect)} is no aspect: give one of {', '.join(aspects)}")
    prompt, answer, kind = record.text("prompt"), record.text("answer"), record.text("kind", "")
    return Probe(prompt, answer, aspects[aspect], kind, record.texts("answers"))


def _check_days(record: Record, since: str, until: str) -> None:
    for name, day in (("since", since), ("until", until)):
        if day and not _is_day(day):
            raise record.wrong(name, f"{shown(day)} is no day: write 2024-12-31, 2024-12 or 2024")
    length = min(len(since), len(until), 10)
    # Years before 0 and after 9999 are not compared.
    if length and all(re.match(r"\d{4}(?!\d)", day) for day in (since, until)) and until[:length] < since[:length]:
        raise record.wrong("until", f"{until!r} is before since {since!r}: exchange them")


def _is_day(day: str) -> bool:
    if re.fullmatch(r"\d{4}(-\d\d){0,2}", day, re.ASCII) is None:
        return re.fullmatch(r"(-\d{4,}|\d{5,})(-\d\d){0,2}", day, re.ASCII) is not None
    try:
        date.fromisoformat(f"{day}-01-01"[:10])
    except ValueError:
        return False
    return True
