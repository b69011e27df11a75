"""A person's own table of triples, made into one that probes are drawn from: what is known, and how it is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from koinon.data.editformats import Say, fact_of
from koinon.data.factfiles import Own, question_of
from koinon.data.facts import Fact
from koinon.data.probes import FactTable, Templates, refuse_contradictions
from koinon.data.records import Record, read_records
from koinon.data.wordings import Wording, read_wordings


def read_table(path: Path | str, wordings: Path | str | None = None, say: Say | None = None) -> FactTable:
    """A table of triples (CSV, TSV, JSON Lines: ``subject``, ``relation``, ``object``, and `Fact`'s other fields).

    Args:
        path: the file.
        wordings: a file for `read_wordings`. Prompts in the table are wordings of their relations as well.
        say: is told what was decided or left out.

    Raises:
        UserError: whatever is wrong with a file, on one line with its place; a relation without a wording.
    """
    return Triples.read(Path(path), None if wordings is None else Path(wordings)).table(say=say)


@dataclass(frozen=True, eq=False)
class Triples:
    """The rows of a table, of which some may still lack words that ask for them."""

    path: Path
    rows: tuple[Record, ...]
    wordings: Mapping[str, Wording]
    """By relation; without the table's own prompts."""

    @classmethod
    def read(cls, path: Path, wordings: Path | None = None) -> "Triples":
        """See `read_table`."""
        return cls(path, tuple(read_records(path)), {} if wordings is None else read_wordings(wordings))

    @cached_property
    def templates(self) -> Templates:
        """By relation: the prompts of its wording, and behind them those in the table."""
        found = {relation: dict.fromkeys(its.prompts) for relation, its in self.wordings.items() if its.prompts}
        for row in self.rows:
            relation = row.text("relation")
            if prompt := row.text("prompt", "").strip():
                fact = fact_of(row, "prompt", prompt, row.text("subject"), object=row.text("object"))
                found.setdefault(relation, {})[fact.prompt] = None
        return {relation: tuple(its) for relation, its in found.items()}

    def table(self, facts: Sequence[Fact] = (), say: Say | None = None) -> FactTable:
        """What probes are drawn from.

        Args:
            facts: what is to be taught; its prompts are wordings of its relations as well.
            say: is told what was decided or left out.

        Raises:
            UserError: a relation without a wording, or a row that is no triple.
        """
        tell = say or (lambda sentence: None)
        templates = self._worded(facts)
        relations = {row.text("relation") for row in self.rows}
        read = Own(templates).read
        rows = (case.fact for row in self.rows for case in read(row, tell))
        known, doubled = refuse_contradictions(rows, many=relations)
        if doubled:
            tell(f"{self.path}: {len(doubled)} rows say what others say, the first: {doubled[0]}")
        table = FactTable(
            known,
            templates,
            {name: its.phrase for name, its in self.wordings.items() if its.phrase},
            {name: its.inverses for name, its in self.wordings.items() if its.inverses},
            {name for name, its in self.wordings.items() if its.symmetric},
        )
        for relation in sorted(table.several):
            if self._several(relation) is None:
                subject = next(key[0] for key, its in table.objects.items() if key[1] == relation and len(its) > 1)
                tell(
                    f"{self.path}: {relation!r} has subjects with several objects, such as {subject!r}: "
                    "a new one is asked for beside those that there are"
                )
        found = {its for its in table.several if self._several(its) is not False}
        return replace(table, many=found | {its for its in self.wordings if self._several(its)})

    def _worded(self, facts: Sequence[Fact]) -> Templates:
        """The templates, and where the table has none those of facts; every row can be asked for."""
        found = dict(self.templates)
        for fact in facts:
            made_up = fact.prompt == question_of(fact.relation)  # for want of a wording
            if fact.relation not in self.templates and not made_up:
                found[fact.relation] = tuple(dict.fromkeys((*found.get(fact.relation, ()), fact.prompt)))
        for row in self.rows:
            if (relation := row.text("relation")) not in found:
                raise row.wrong(
                    "relation", f"{relation!r} has no wording: give it one with --templates, or a column 'prompt'"
                )
        return found

    def _several(self, relation: str) -> bool | None:
        return self.wordings.get(relation, Wording()).several
