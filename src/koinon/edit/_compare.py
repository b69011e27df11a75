"""The same facts taught in several ways to one model: cells that are kept as they finish, a table, and a page."""

import ast
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from koinon.bench.compare import read_whole, write_whole
from koinon.core import UserError, build, load, names, pick
from koinon.data.facts import Case
from koinon.data.outputs import refuse_read, refuse_taken
from koinon.edit._contract import Edit, Editor
from koinon.edit._edited import Material
from koinon.edit._given import Given, Opened, warned
from koinon.edit._measures import ASPECTS, Measured, Remembered, fluency, measure, perplexity
from koinon.edit._scores import Scored, room, scored
from koinon.terminal import Told, keeping, untold

HEAD = "comparison.json"
OUTSIDE_BRACKETS = re.compile(r",(?![^(\[]*[)\]])")
"""A comma between settings, and not between the parts of one."""


@dataclass(frozen=True)
class Compare:
    """Teach the same facts in several ways, and compare what each did, on your own model."""

    opened: Opened
    given: Given
    out: Path
    """Folder for finished cells and the report. Run again to continue."""
    methods: tuple[str, ...]
    """As `koinon list edit` names them, with settings if you like: rome finetune:layer=1,steps=50."""
    ways: tuple[Literal["single", "sequential", "batch"], ...] = ("single",)
    """Each fact alone; one after the other, judged after the last; or all at once, by the methods that can."""
    sequential: bool = False
    """Both: single and sequential."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Run what is missing, and tell the table."""
        ways = tuple(dict.fromkeys((*self.ways, *(("sequential",) if self.sequential else ()))))
        with warned(), keeping():
            return compare(self.opened, self.given, self.methods, ways, self.out, told)


def compare(
    opened: Opened, given: Given, methods: Sequence[str], ways: Sequence[str], out: Path, told: Told
) -> dict[str, Any]:
    """Run the cells that are missing in a folder, write its report, and give the table.

    Raises:
        UserError: no such method, or a folder of another comparison.
    """
    known = [name.split(".")[1] for name in names("edit")]
    contestants = {word: _method(word, known) for word in methods}
    cells = [
        (word, way)
        for way in ways
        for word, method in contestants.items()
        if way in ("single", "sequential") or method.batch
    ]
    if not cells:
        why = "none of the methods learns a batch" if contestants else "give one method or more"
        raise UserError(f"--methods {' '.join(methods)}: nothing to compare: {why}")
    refuse_read([out], [opened.model, *given.files])
    lm = opened.lm()
    cases = given.cases(lm)
    material = given.material(cases)
    said = (cases, material.corpus, material.cases, material.unrelated)
    head = {"base": opened.model, "fingerprint": lm.fingerprint, "facts": digest(repr(said))}
    refuse_other(out, head)
    rows = []
    failed = {}
    plain = Remembered(lm)
    for number, (word, way) in enumerate(cells):
        told(number, len(cells))
        method = contestants[word]
        file = cell_at(out, f"{method!r} {way}")
        if not file.exists():
            try:
                row = {
                    "method": word,
                    "settings": repr(method),
                    "way": way,
                    **_cell(method, plain, cases, material, way),
                }
            except UserError as error:
                failed[f"{word}, {way}"] = str(error)
                continue
            begin(out, head)  # not before something is finished
            write_whole(file, json.dumps(row, indent=1))
        rows.append(read_whole(file) | {"method": word})
    told(len(cells), len(cells))
    return _tell(out, head, rows, failed, len(cases))


def measured(folder: Path, aspect: str) -> dict[str, tuple[float, float]]:
    """By method: the interval of a score in a folder's cells, of its worst way."""
    found: dict[str, tuple[float, float]] = {}
    for file in sorted((folder / "cells").glob("*.json")):
        row = read_whole(file)
        its = row.get("scores", {}).get(aspect)
        if its:
            mean, low, high = its["exact"]
            low, high = (mean if low is None else low), (mean if high is None else high)
            name = str(row["method"]).partition(":")[0]
            found[name] = min((low, high), found.get(name, (low, high)))
    if not found:
        raise UserError(f"{folder}: holds no {aspect} that was measured; give the folder of a `koinon edit compare`")
    return found


def _method(word: str, known: Sequence[str]) -> Edit:
    """``rome`` or ``rome:layer=1,lengths=(5,10)``: values as Python writes them, words also without quotes."""
    name, _, settings = word.partition(":")
    kind = load(name if "." in name else f"edit.{pick(name, known, 'method of edit')}")
    if not issubclass(kind, Edit):
        raise UserError(f"{name}: is no method of edit")
    found = {}
    for part in filter(None, OUTSIDE_BRACKETS.split(settings)):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{word}: {part!r} sets nothing; write {name}:field=value")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    try:
        return build(kind, found)
    except UserError as error:
        raise UserError(f"{word}: {error}") from None


def begin(out: Path, head: Mapping[str, Any]) -> None:
    """Make the folder of a comparison, if it is not there."""
    refuse_other(out, head)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / HEAD).exists():
            write_whole(out / HEAD, json.dumps(head, indent=1))
        (out / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def refuse_other(out: Path, head: Mapping[str, Any]) -> None:
    """Raise UserError if the folder is of another comparison, or cannot be one's."""
    if not out.exists():
        refuse_taken(out)
    elif not (out / HEAD).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"{out}: holds something else; give a new folder, or that of the same comparison")
    else:
        there, both = read_whole(out / HEAD), ("fingerprint", "facts")
        if [there.get(key) for key in both] != [head[key] for key in both]:
            raise UserError(f"{out}: a comparison on another model or other facts; give a new folder")


def cell_at(out: Path, said: str) -> Path:
    """The file of a cell in a folder, by all that determines it."""
    return out / "cells" / f"{digest(said, 8)}.json"


def digest(said: str, size: int = 16) -> str:
    """Of a text, in so many bytes."""
    return hashlib.blake2b(said.encode(), digest_size=size).hexdigest()


def _cell(method: Edit, plain: Remembered, cases: Sequence[Case], material: Material, way: str) -> dict[str, Any]:
    start = time.perf_counter()
    editor = method.on(plain.lm, material)
    prepared = time.perf_counter() - start
    found, learning = _ways(editor, plain, cases)[way]()
    return {"scores": found.plain(), "seconds": {"preparing": prepared, "a fact": learning / len(cases)}}


def _ways(editor: Editor, plain: Remembered, cases: Sequence[Case]) -> Mapping[str, Callable[[], tuple[Scored, float]]]:
    """How facts are taught: each alone, one after the other, or at once; the scores, and seconds of learning."""
    lm = plain.lm

    def single() -> tuple[Scored, float]:
        seconds, found, said = 0.0, list[Measured](), list[str]()
        prompts = [case.fact.question for case in cases]
        tokens = room(lm, prompts)
        for case in cases:
            start = time.perf_counter()
            edited = editor.edit([case.fact]).lm
            seconds += time.perf_counter() - start
            found += measure(plain, edited, [case])
            said += edited.generate([case.fact.question], tokens, sample=True)
        before = lm.generate(prompts, tokens, sample=True)
        writing = (fluency(before), fluency(said))
        return Scored(found, lm, writing, (perplexity(lm, prompts, before), perplexity(lm, prompts, said))), seconds

    def together(groups: Sequence[Sequence[Case]]) -> tuple[Scored, float]:
        start = time.perf_counter()
        edited = editor.edit([])
        for group in groups:
            edited = editor.edit([case.fact for case in group], edited)
        seconds = time.perf_counter() - start
        return scored(lm, edited.lm, measure(plain, edited.lm, cases)), seconds

    return {
        "single": single,
        "sequential": lambda: together([[case] for case in cases]),
        "batch": lambda: together([cases]),
    }


def _tell(
    out: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str], count: int
) -> dict[str, Any]:
    """Write the report, and give what a person or a machine reads of it."""
    from koinon.edit._report import comparison

    if not rows:
        raise UserError(
            f"{out}: nothing could be taught: {'; '.join(f'{name}: {why}' for name, why in failed.items())}"
        )
    write_whole(out / "report.json", json.dumps({**head, "rows": rows, "failed": failed}, indent=1))
    write_whole(out / "report.html", comparison(rows, failed, head, count))
    table = {f"{row['method']}, {row['way']}": dict(_cells(row)) for row in rows}
    return {"report": str(out / "report.html"), "facts": count, **table, **({"failed": failed} if failed else {})}


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for aspect in ASPECTS:
        if aspect in row["scores"]:
            yield aspect, row["scores"][aspect]["exact"]
    yield "fluency", row["scores"]["fluency"]["now"]
    yield "seconds a fact", round(row["seconds"]["a fact"], 3)
