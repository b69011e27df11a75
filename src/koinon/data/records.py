"""Records of a person's file, one after the other: JSON Lines, JSON and CSV as named values, and the line of each."""

import csv
import difflib
import itertools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from koinon.core import UserError

LINE_LIMIT = 16 * 2**20
"""Bytes; a longer line holds something else than a record."""
FILE_LIMIT = 2**30
"""Bytes of a JSON file, which is read as a whole; JSON Lines may be as long as they like."""
BLANK = re.compile(r"[ \t\n\r]*")
MARK = b"\xef\xbb\xbf"
"""The byte order mark that some editors put before UTF-8."""


@dataclass(frozen=True)
class Record:
    """Named values, and where they stand."""

    path: Path
    line: int
    """From 1."""
    values: Mapping[str, Any]
    within: str = ""
    """For a record in a record: how one gets there."""
    cells: bool = False
    """Of a table: every value is a text, lists are separated by ``|``, and an empty cell is no value."""

    def wrong(self, name: str, says: str) -> UserError:
        """The error about one of the values."""
        return UserError(f"{self.path}:{self.line}: field {self.within + name!r}: {says}")

    def unknown(self, name: str, known: Sequence[str]) -> UserError:
        """The error about a value that nothing asks for."""
        near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
        there = f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(known)}"
        return self.wrong(short(name, 80), f"is unknown: {there}")

    def text(self, name: str, otherwise: str | None = None) -> str:
        """One value as text; an integer counts as one.

        Raises:
            UserError: it is absent or empty and ``otherwise`` is None; or it is something else than a text.
        """
        value = self.values.get(name)
        if value is None or value == "":
            if otherwise is None:
                if name in self.values:
                    raise self.wrong(name, "is empty: give a text")
                raise self.wrong(name, f"is missing among {shown(', '.join(self.values))}: give it")
            return otherwise
        if otherwise is None and isinstance(value, str) and not value.strip():
            raise self.wrong(name, "is blank: give a text")
        return self.as_text(name, value)

    def as_text(self, name: str, value: object) -> str:
        """A value found under a name, if it is a text."""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.wrong(name, f"{shown(value)} is {kind_of(value)}: give a text")
        text = str(value)
        if not writable(text):
            raise self.wrong(name, "half of a surrogate pair, which is no character: correct it")
        return text

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty if it is absent."""
        value = self.values.get(name)
        if self.cells:
            return tuple(its.strip() for its in self.text(name, "").split("|") if its.strip())
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.wrong(name, f"{shown(value)} is {kind_of(value)}: give a list of texts")
        return tuple(self.as_text(f"{name}[{number}]", its) for number, its in enumerate(value))

    def records(self, name: str) -> list["Record"]:
        """A list of records; empty if it is absent."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, f"{shown(value)} is {kind_of(value)}: give a list of objects")
        return [self.inner(f"{name}[{number}]", its) for number, its in enumerate(value)]

    def inner(self, name: str, value: object) -> "Record":
        """A record in this one."""
        if not isinstance(value, dict):
            raise self.wrong(name, f"{shown(value)} is {kind_of(value)}: give an object")
        return Record(self.path, self.line, value, f"{self.within}{name}.")


def read_object(path: Path, example: str) -> Record:
    """The one JSON object that a file holds.

    Raises:
        UserError: it holds something else; the example is what would be right.
    """
    record, *others = itertools.islice(read_records(path), 2)
    if others or record.cells:
        raise UserError(f"{path}: give one JSON object, such as {example}")
    return record


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, whose layout is told by its first character: ``{``, ``[``, or the head of a table.

    A line is read when it is asked for; only a JSON list is read as a whole.

    Raises:
        UserError: no such file, nothing in it, not UTF-8, not JSON or not a table, a name twice, NaN, or too long.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            first = _start(file, path)
            if first == "[":
                yield from _listed(path, _whole(path))
            elif first == "{":
                yield from _objects(path, file)
            else:
                yield from _rows(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    kinds = {
        bool: "true or false",
        str: "a text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def shown(value: object) -> str:
    """A value in a few words, on one line."""
    return repr(short(value, 80)) if isinstance(value, str) else short(reprlib.repr(value), 80)


def short(text: str, length: int) -> str:
    """Cut where it is too long."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def writable(text: str) -> bool:
    """False for texts that hold half a surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _start(file: BinaryIO, path: Path) -> str:
    """The first character that is not blank; the file is left behind its byte order mark, if it has one."""
    head = file.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16: save it as UTF-8")
    begin = len(MARK) if head.startswith(MARK) else 0
    file.seek(begin)
    while part := file.read(65536):
        if found := part.lstrip(b" \t\r\n"):
            file.seek(begin)
            return chr(found[0])
    raise UserError(f"{path}: is empty: give JSON Lines, a JSON list, or a table with a head")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line with its number, its end included."""
    for number in itertools.count(1):
        line = file.readline(LINE_LIMIT + 1)
        if not line:
            return
        if len(line) > LINE_LIMIT:
            raise UserError(f"{path}:{number}: is longer than {LINE_LIMIT:,} bytes: give one record a line")
        yield number, _decoded(path, line, number)


def _decoded(path: Path, content: bytes, number: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8: save it as UTF-8") from None


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(FILE_LIMIT + 1)
    if len(content) > FILE_LIMIT:
        raise UserError(f"{path}: is longer than {FILE_LIMIT:,} bytes: give JSON Lines, which are read line by line")
    return _decoded(path, content.removeprefix(MARK), 1)


class _Wrong(ValueError):
    """What a file may not hold although JSON reads it."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Wrong(f"the name {shown(twice)} is there twice: leave one out")
    return names


def _finite(word: str) -> Any:
    raise _Wrong(f"{word} is no JSON: give a number, or null")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite)


def _value(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value that starts there, on that line, and where it ends."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = line + text.count("\n", start, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        raise UserError(f"{path}:{at}: is no JSON at character {column}: {error.msg}") from None
    except _Wrong as error:
        raise UserError(f"{path}:{line}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: lists in lists too deep to be read: give flat records") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}:{line}: {short(str(error), 80)}: give a shorter number") from None


def _record(path: Path, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{path}:{line}: {shown(value)} is {kind_of(value)}: a record is an object")
    return Record(path, line, value)


def _objects(path: Path, file: BinaryIO) -> Iterator[Record]:
    """JSON Lines; or one object that goes over several lines, which is then all there is."""
    begin = file.tell()
    some = False
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        start = len(line) - len(line.lstrip())
        try:
            value, end = _value(path, line, start, number)
        except UserError:
            if some or path.suffix.lower() in (".jsonl", ".ndjson"):
                raise
            break
        if line[end:].strip():
            raise UserError(f"{path}:{number}: more behind the object: JSON Lines hold one object a line")
        some = True
        yield _record(path, number, value)
    if not some:
        file.seek(begin)
        text = _whole(path)
        start = _behind_blank(text, 0)
        line_number = 1 + text.count("\n", 0, start)
        value, end = _value(path, text, start, line_number)
        if (rest := _behind_blank(text, end)) < len(text):
            line_number = 1 + text.count("\n", 0, rest)
            raise UserError(f"{path}:{line_number}: more behind the object: give JSON Lines, or a JSON list")
        yield _record(path, line_number, value)


def _behind_blank(text: str, start: int) -> int:
    found = BLANK.match(text, start)
    assert found is not None
    return found.end()


def _listed(path: Path, text: str) -> Iterator[Record]:
    """The objects of a JSON list."""
    at = _behind_blank(text, 0) + 1  # behind the bracket
    line, counted = 1, 0
    for number in itertools.count():
        at = _behind_blank(text, at)
        line, counted = line + text.count("\n", counted, at), at
        sign = text[at : at + 1]
        if sign == "]" and number == 0:
            raise UserError(f"{path}:{line}: is an empty list: give at least one record")
        if number and sign in (",", "]"):
            at = _behind_blank(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
            if sign == "]":
                if at < len(text):
                    raise UserError(f"{path}:{line}: more behind the end of the list: leave it out")
                return
        elif number or not sign:
            raise UserError(f"{path}:{line}: the list does not go on with a comma or end with a bracket")
        value, at = _value(path, text, at, line)
        yield _record(path, line, value)


def _rows(path: Path, file: BinaryIO) -> Iterator[Record]:
    """A table with a head, its columns separated by comma, tab or semicolon, whichever the head has most of."""
    numbered = _lines(path, file)
    above, head = next((number - 1, line) for number, line in numbered if line.strip())
    separator = max(",\t;", key=head.count)
    reader = csv.reader(itertools.chain([head], (line for _, line in numbered)), delimiter=separator, strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"{path}:{above + 1}: two columns of one name, or one without: name each once")
        read = reader.line_num
        for row in reader:
            read, line = reader.line_num, above + read + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}:{line}: {len(cells)} cells under {len(names)} names: give each row as many, "
                    f"and quotes around a cell that holds {separator!r}"
                )
            yield Record(path, line, {name: its for name, its in zip(names, cells) if its}, cells=True)
    except csv.Error as error:
        line = above + max(reader.line_num, 1)
        raise UserError(f"{path}:{line}: cannot be read as a table with columns: {error}") from None
