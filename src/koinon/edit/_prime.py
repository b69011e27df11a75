"""A person's own texts, each taught to a fresh copy of a model: what is remembered, and how far it spreads."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from koinon.bench.compare import read_whole, write_whole
from koinon.core import UserError
from koinon.data.newtexts import NewText, read_texts, read_themes
from koinon.data.outputs import refuse_read
from koinon.edit._compare import begin, cell_at, digest
from koinon.edit._folders import number
from koinon.edit._given import Opened, lines, warned
from koinon.edit._priming import Foreseen, Line, Scores, Tokens, predict, prefix_of, scores, stepped, unrelated
from koinon.edit.dilute import Dilute, mean_loss
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM
from koinon.lm.moments import own_texts
from koinon.terminal import Told, keeping, untold

HELD = 64
"""Ordinary texts that nothing learns from, at most; a fifth of them if they are few."""
RESULT = "primed.json"


@dataclass(frozen=True)
class Prime:
    """See how far new texts would spread in a model, and how far they do, with and without remedies.

    The model is read in float32 unless --dtype names another type, in which small steps may vanish.
    """

    opened: Opened
    texts: Path
    """JSON Lines: each with text, keyword, and thematic (beginnings that the keyword could follow) or theme."""
    out: Path | None = None
    """Folder for what teaching did. Run again to continue. Without it nothing is taught, only foretold."""
    themes: Path | None = None
    """A JSON object of themes, each a list of beginnings."""
    corpus: Path | None = None
    """Ordinary texts, one a line, that fill the minibatches; what the model says itself by default."""
    shares: tuple[float, ...] = (0.0, 0.08)
    """Of an update's largest entries that are dropped: one way of teaching each; 0 is plain fine-tuning."""
    steps: int = 20
    """Minibatches of each text."""
    size: int = 8
    """Texts of a minibatch, the new one among them."""
    rate: float = 5e-5
    """Of Adam."""
    tokens: Tokens = "first"
    """What counts of a keyword with several tokens: the first, or the product over all."""
    seed: int = 0
    """Of the ordinary texts' order."""
    known: Path | None = None
    """Folder of an earlier run on this model: its texts say how much priming is to be expected of these."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Foretell, teach each text in each way, measure, keep, and tell.

        Raises:
            UserError: whatever is wrong with model, texts or places; nothing is taught then.
        """
        ways = self._ways()
        if self.out is not None:
            refuse_read([self.out], [self.opened.model, self.texts, self.themes, self.corpus])
        texts = self._texts()
        lm = (replace(self.opened, dtype="float32") if self.opened.dtype == "auto" else self.opened).lm()
        expected = _lines(self.known, lm) if self.known else {}
        _check(lm, texts, self.tokens)
        foreseen = [predict(lm, its.text, its.keyword, tokens=self.tokens) for its in texts]
        head = {"model": self.opened.model, "texts": len(texts)}
        foretold = {
            f"foretold, {place} {its.keyword}": _plain(seen, expected)
            for place, (its, seen) in enumerate(zip(texts, foreseen, strict=True), start=1)
        }
        if self.out is None:
            return head | foretold
        with warned():
            ordinary, held = self._ordinary(lm)
            for its in texts:
                next(iter(ways.values())).others(its.keyword, ordinary)  # refused before a folder is made
            facts = digest(repr((texts, ordinary, held)))
            begin(self.out, head | {"fingerprint": lm.fingerprint, "facts": facts})
            with keeping():
                rows = self._taught(lm, texts, ways, ordinary, held, told)
        taught = _summed(rows)
        fitted = {way: asdict(line) for way, its in rows.items() if (line := _line(foreseen, its)) is not None}
        whole = {**head, "fingerprint": lm.fingerprint, "foretold": [asdict(its) for its in foreseen], "rows": rows,
                 "taught": taught, "lines": fitted}  # fmt: skip
        write_whole(self.out / RESULT, json.dumps(whole, indent=1))
        return {"out": str(self.out / RESULT), **head, **foretold, **{f"taught, {way}": taught[way] for way in taught}}

    def _ways(self) -> dict[str, Dilute]:
        """The ways of teaching, by name."""
        if not self.shares or self.steps < 1 or self.size < 1 or not 0 < self.rate < math.inf:
            raise UserError("give --shares, --steps and --size from 1, and a --rate above 0")
        found = {}
        for share in self.shares:
            if not 0 <= share <= 1:
                raise UserError(f"--shares {share:g}: give shares of an update's entries, from 0 to 1")
            found[f"share {share:g}"] = Dilute(
                share=share, steps=self.steps, size=self.size, rate=self.rate, seed=self.seed
            )
        return found

    def _texts(self) -> list[NewText]:
        found = read_texts(self.texts, read_themes(self.themes) if self.themes else None)
        try:
            for its in found:
                prefix_of(its.text, its.keyword)
                unrelated(its.thematic, its.keyword)
        except UserError as error:
            raise UserError(f"{self.texts}: {error}") from None
        return found

    def _ordinary(self, lm: LM) -> tuple[list[str], list[str]]:
        """Texts to fill minibatches with, and others that are only read."""
        every = lines(self.corpus) if self.corpus else own_texts(lm, seed=self.seed)
        kept = min(HELD, len(every) // 5)
        return every[: len(every) - kept], every[len(every) - kept :]

    def _taught(
        self, lm: LM, texts: Sequence[NewText], ways: Mapping[str, Dilute], ordinary: Sequence[str],
        held: Sequence[str], told: Told,
    ) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
        """By way of teaching, one row a text; those that are there already are read."""
        assert self.out is not None
        before = mean_loss(lm, held)
        cells = [*_cells(texts, ways)]
        rows: dict[str, list[dict[str, Any]]] = {}
        for done, (way, method, its, trained) in enumerate(cells):
            told(done, len(cells))
            file = cell_at(self.out, repr((method, its, trained, self.tokens)))
            if not file.exists():
                after = lm.with_model(with_values(lm.model, method.taught(lm, trained, its.keyword, ordinary)))
                found = scores(lm, after, prefix_of(its.text, its.keyword), its.keyword, its.thematic, self.tokens)
                write_whole(file, json.dumps({**asdict(found), "loss": number(mean_loss(after, held) - before)}))
            rows.setdefault(way, []).append(read_whole(file))
        told(len(cells), len(cells))
        return rows


def _cells(texts: Sequence[NewText], ways: Mapping[str, Dilute]) -> Iterator[tuple[str, Dilute, NewText, str]]:
    """Way, method, text, and what is trained on."""
    for way, method in ways.items():
        for its in texts:
            yield way, method, its, its.text
    if any(its.rewritten for its in texts):
        plain = replace(next(iter(ways.values())), share=0.0)
        for its in texts:
            yield "stepping stones", plain, its, its.rewritten or its.text


def _check(lm: LM, texts: Sequence[NewText], tokens: Tokens) -> None:
    """Refuse what cannot be scored: a rewriting that lost its keyword, or makes it no likelier."""
    for its in texts:
        if its.rewritten:
            stepped(lm, its.text, its.keyword, {its.text: its.rewritten}.__getitem__, tokens)


def _plain(seen: Foreseen, expected: Mapping[str, Line]) -> dict[str, Any]:
    """What is known of a text before it is taught."""
    found: dict[str, Any] = {"log P of the keyword": round(seen.logprob, 3), "loss a token": round(seen.loss, 3)}
    for way, line in expected.items():
        low, middle, high = line.band(seen.logprob)
        found[f"priming expected, {way}"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
    return found


def _scores(row: Mapping[str, Any]) -> Scores:
    return Scores(tuple(row["before"]), tuple(row["after"]))


def _summed(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over the texts, and beside the first way by how much less the others prime, a median over the texts."""
    first = [_scores(row).priming for row in next(iter(rows.values()))]
    found = {}
    for way, its in rows.items():
        each = [_scores(row) for row in its]
        means = {
            "remembered": sum(one.memory for one in each) / len(each),
            "primed": sum(one.priming for one in each) / len(each),
            "probability where it is said": sum(one.memory_change for one in each) / len(each),
            "probability elsewhere": sum(one.priming_change for one in each) / len(each),
            "loss on other texts": sum(row["loss"] or 0.0 for row in its) / len(its),
            "less priming than the first": median(
                1 - one.priming / plain if plain else 0.0 for one, plain in zip(each, first, strict=True)
            ),
        }
        found[way] = {name: round(value, 4) for name, value in means.items()}
    return found


def _line(foreseen: Sequence[Foreseen], rows: Sequence[Mapping[str, Any]]) -> Line | None:
    """Fitted to these texts; None where they are too few or too alike."""
    points = [seen.logprob for seen in foreseen]
    if len(points) < 3 or max(points) == min(points):
        return None
    return Line.fit(points, [_scores(row).priming for row in rows])


def _lines(folder: Path, lm: LM) -> dict[str, Line]:
    """What an earlier run found, by way of teaching.

    Raises:
        UserError: no such run, one of another model, or of fewer than three texts.
    """
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder}: holds no {RESULT}; give the --out of an earlier run")
    its = read_whole(folder / RESULT)
    if its.get("fingerprint") != lm.fingerprint:
        raise UserError(f"{folder}: its texts were taught to another model; give a run on this one")
    try:
        found = {str(way): Line(**line) for way, line in its["lines"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / RESULT}: damaged; run it again") from None
    if not found:
        raise UserError(f"{folder}: of fewer than three texts that differ no line is known; give more of them")
    return found
