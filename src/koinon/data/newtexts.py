"""New texts in a person's file, each with the keyword it teaches, and beginnings that the keyword could follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from koinon.core import UserError
from koinon.data.records import Record, read_object, read_records, shown

FIELDS = ("text", "keyword", "theme", "thematic", "rewritten")


@dataclass(frozen=True)
class NewText:
    """One text to be taught."""

    text: str
    keyword: str
    """A word or a name in the text, behind its beginning."""
    thematic: tuple[str, ...]
    """X_T: beginnings that a keyword of this kind could follow and that have nothing to do with the text."""
    rewritten: str = ""
    """The text as stepping stones, to be taught in its place; empty if there is none."""


def read_texts(path: Path, themes: Mapping[str, tuple[str, ...]] | None = None) -> list[NewText]:
    """The texts in a file of JSON Lines, a JSON list, or a table with a head.

    Args:
        path: of the file; a text has ``text``, ``keyword``, and ``thematic`` (a list) or ``theme`` (a name).
        themes: name to beginnings, see `read_themes`.

    Raises:
        UserError: whatever is wrong with the file, on one line with its place.
    """
    found = []
    for record in read_records(path):
        for name in record.values:
            if name not in FIELDS:
                raise record.unknown(name, FIELDS)
        text, keyword = record.text("text").strip(), record.text("keyword").strip()
        its = NewText(text, keyword, _thematic(record, themes or {}), record.text("rewritten", "").strip())
        if its in found:
            raise record.wrong("text", f"{shown(text)} is there already: leave one of them out")
        found.append(its)
    if not found:
        raise UserError(f"{path}: holds no text: give at least one record")
    return found


def read_themes(path: Path) -> dict[str, tuple[str, ...]]:
    """A JSON object of themes, each a list of beginnings.

    Raises:
        UserError: the file is something else, or a theme is empty.
    """
    record = read_object(path, '{"colours": ["The sky is", "Her dress was"]}')
    found = {name: _beginnings(record, name) for name in record.values}
    for name, its in found.items():
        if not its:
            raise record.wrong(name, "has no beginnings: give a list of texts")
    return found


def _thematic(record: Record, themes: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if own := _beginnings(record, "thematic"):
        return own
    theme = record.text("theme", "")
    if not theme:
        raise record.wrong("thematic", "is missing, and so is 'theme': give beginnings that the keyword could follow")
    if theme not in themes:
        there = f"there is: {', '.join(themes)}" if themes else "give --themes, a JSON object of themes"
        raise record.wrong("theme", f"{shown(theme)} is not known: {there}")
    return themes[theme]


def _beginnings(record: Record, name: str) -> tuple[str, ...]:
    found = record.texts(name)
    if not all(its.strip() for its in found):
        raise record.wrong(name, "holds an empty beginning: give texts")
    return found
