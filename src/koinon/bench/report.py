"""Rows to something a person reads: table, sentences, Markdown, CSV, JSON, one HTML page with figures."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from koinon.bench.claims import metric_of
from koinon.bench.compare import in_order, read_cell, read_whole, write_whole
from koinon.bench.statistics import Interval, interval, paired
from koinon.core import UserError

COSTS = {
    "trained": "parameters",
    "active": "active",
    "samples_per_second": "samples/s",
    "stored_bytes": "stored bytes",
    "kept_bytes": "kept bytes",
    "row_bytes": "bytes after all",
    "peak_mb": "peak MB",
}
"""What a row may tell of its cost, and how it is headed."""


@dataclass(frozen=True)
class Report:
    """A finished, or partly finished, comparison.

    Args:
        recipe: its name.
        settings: what `Recipe.settings` gave; ``main`` is the metric to rank by, ``shown`` are further ones,
            ``baseline`` is the contestant that differences are taken to.
        rows: its cells.
    """

    recipe: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def labels(self) -> list[str]:
        """Contestants, best first by the main metric."""
        found = list(dict.fromkeys(row["label"] for row in self.rows))
        return sorted(found, key=lambda label: -self.value(label, self.settings["main"]).mean)

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds with a row."""
        return sorted({row["seed"] for row in self.rows})

    def value(self, label: str, metric: str) -> Interval:
        """Mean over seeds of a metric, with its interval."""
        return interval(metric_of(self.rows, label, metric))

    def difference(self, one: str, other: str, metric: str | None = None) -> Interval:
        """Paired difference of two contestants, by default on the main metric."""
        metric = metric or self.settings["main"]
        return paired(*(metric_of(self.rows, label, metric) for label in (one, other)))

    def cost(self, label: str, key: str) -> float | None:
        """Median over seeds of a cost."""
        values = [row["cost"][key] for row in self.rows if row["label"] == label and row["cost"].get(key) is not None]
        return median(values) if values else None

    @cached_property
    def costs(self) -> list[str]:
        """The keys of `COSTS` that the rows tell."""
        return [key for key in COSTS if any(row["cost"].get(key) is not None for row in self.rows)]

    @cached_property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells as text."""
        main, shown = self.settings["main"], self.settings["shown"]
        header = ["method", f"{main} (95 % interval)", f"minus {self.settings['baseline']}"]
        header += [*shown, *(COSTS[key] for key in self.costs)]
        body = []
        for label in self.labels:
            cells = [label, _with_interval(self.value(label, main)), self._against_baseline(label)]
            cells += [_figure(self.value(label, metric).mean) for metric in shown]
            cells += [_count(self.cost(label, key)) for key in self.costs]
            body.append(cells)
        return header, body

    @cached_property
    def every_metric(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells of all metrics, each the mean over seeds."""
        names = list(dict.fromkeys(name for row in self.rows for name in row["metrics"]))
        body = []
        for label in self.labels:
            measured = [metric_of(self.rows, label, name).values() for name in names]
            means = [fmean(its.value for its in values) if values else math.nan for values in measured]
            body.append([label, *map(_figure, means)])
        return ["method", *names], body

    def _against_baseline(self, label: str) -> str:
        baseline = self.settings["baseline"]
        if label == baseline or baseline not in self.labels:
            return "-"
        return _with_interval(self.difference(label, baseline), sign="+")

    @property
    def words(self) -> Mapping[str, str]:
        """What the recipe calls its baseline and what it chooses, where that is not as usual."""
        return self.settings.get("words", {})

    @cached_property
    def sentences(self) -> list[str]:
        """What the table supports, and what it does not."""
        main, baseline, bounds = self.settings["main"], self.settings["baseline"], self.settings.get("bounds", [])
        labels = [label for label in self.labels if label not in bounds] or self.labels
        best = labels[0]
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        said = [f"{best} has the highest {main}, {self.value(best, main).mean:.4f} over {seeds}."]
        beaten = [other for other in labels[1:] if self.difference(best, other).sign > 0]
        tied = [other for other in labels[1:] if other not in beaten]
        if beaten:
            said.append(f"The table supports that it is better than {_listed(beaten)}: those intervals exclude zero.")
        if tied:
            said.append(f"It does not support that it is better than {_listed(tied)}: those intervals hold zero.")
        if baseline in self.labels:
            plain = self.words.get("baseline", "the simplest sharing")
            gains = [label for label in labels if label != baseline and self.difference(label, baseline).sign > 0]
            said.append(
                f"Better than {baseline}, {plain}, beyond doubt: {_listed(gains)}."
                if gains
                else f"Nothing here is better than {baseline}, {plain}, beyond doubt."
            )
        known = [label for label in self.labels if label in bounds]
        if known:
            said.append(f"Bounds, which know or keep what the others do not: {_listed(known)}.")
        if "trees" in self.labels:
            networks = [label for label in self.labels if label != "trees"]
            ahead = [label for label in networks if self.difference(label, "trees").sign > 0]
            behind = [label for label in networks if self.difference(label, "trees").sign < 0]
            if len(behind) == len(networks):
                said.append("Gradient-boosted trees, one model a task, win over every network: take them.")
            elif not ahead:
                said.append(
                    "No network is better than gradient-boosted trees beyond doubt: they are the simpler choice."
                )
        if len(self.seeds) < 5:
            said.append("Fewer than five seeds: take the intervals as a first look.")
        return said

    @cached_property
    def notes(self) -> list[str]:
        """How it was run."""
        rows = self.settings["rows"]
        versions = {json.dumps([row["versions"], row["git"]], sort_keys=True) for row in self.rows}
        machines = {row["machine"] for row in self.rows}
        covered = {m: self.rows[0]["metrics"][m] for m in self.rows[0]["metrics"] if m.endswith(".coverage")}
        notes = [
            f"{self.settings['data']} at scale {self.settings['scale']}: {rows[0]:,} rows to train on, {rows[1]:,} to "
            f"choose on, {rows[2]:,} to report on, cut {self.settings['split']}.",
            f"{self.words.get('chosen', 'Learning rate and epoch')} are chosen on the validation part; intervals are "
            "95 % bootstrap over seeds and test groups, paired.",
        ]
        if self.settings["sparse"]:
            notes.append(f"Sparse tasks: {_listed(self.settings['sparse'])}.")
        if covered:
            parts = ", ".join(f"{name.removesuffix('.coverage')} {share:.0%}" for name, share in covered.items())
            notes.append(f"GAUC leaves out groups with one class; rows it covers: {parts}.")
        notes += self._at_the_edge()
        notes.append(f"Run on {_listed(sorted(machines))}.")
        if len(versions) > 1:
            notes.append(f"Careful: the rows come from {len(versions)} different versions of the software.")
        return notes

    def _at_the_edge(self) -> list[str]:
        """Who might have gained from a larger budget: most seeds chose the last epoch, or the largest rate."""
        budget = self.settings.get("budget")
        if budget is None:
            return []
        edges = (
            ("epoch", budget["epochs"], "the last epoch, and may not have finished learning"),
            ("rate", max(budget["rates"]), "the largest learning rate, and might do better with a larger one"),
        )
        notes = []
        for key, edge, words in edges:
            chose = {
                label: [row["cost"].get(key) for row in self.rows if row["label"] == label] for label in self.labels
            }
            who = [label for label, values in chose.items() if values.count(edge) > len(values) / 2]
            if who and len(budget["rates"]) > (key == "rate"):
                notes.append(f"Most seeds chose {words}: {_listed(who)}.")
        return notes

    @cached_property
    def meters(self) -> list[tuple[str, dict[str, float]]]:
        """Expert meters, for the contestants that have them: mean over seeds."""
        found = []
        for label in self.labels:
            names = sorted({name for row in self.rows if row["label"] == label for name in row["meters"]})
            if names:
                found.append((label, {name: self.value(label, name).mean for name in names}))
        return found

    def text(self, width: int | None = None) -> str:
        """For the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        header, body = self.table
        shown = len(self.settings["shown"])
        console = Console(
            file=io.StringIO(), width=width or max(Console().width, 120), markup=False, emoji=False, highlight=False
        )
        others = range(3, 3 + shown)
        first = [1, 2, *(place for place, key in enumerate(self.costs, 3 + shown) if key != "active")]
        for columns in (*_fitting(first, header, body, console.width), *_fitting(others, header, body, console.width)):
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for column in columns:
                table.add_column(header[column], justify="right" if column else "left", no_wrap=True)
            for cells in body:
                table.add_row(*(cells[column] for column in columns))
            console.print(table)
        console.print("\n".join([*self.sentences, "", *self.notes]))
        return console.file.getvalue()  # type: ignore[attr-defined]

    def markdown(self) -> str:
        """A table and the sentences."""
        header, body = self.table
        lines = [f"# {self.recipe} ({self.settings['scale']})", "", *[f"- {said}" for said in self.sentences], ""]
        lines += [*_markdown_table(header, body), "", *[f"- {note}" for note in self.notes]]
        lines += ["", "## Every metric", "", *_markdown_table(*self.every_metric)]
        if self.meters:
            names = sorted({name for _, meters in self.meters for name in meters})
            cells = [[label, *[f"{m[n]:.3f}" if n in m else "-" for n in names]] for label, m in self.meters]
            lines += ["", "## Expert meters", "", *_markdown_table(["method", *names], cells)]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line a cell, every metric, meter and cost a column."""
        records = [
            {"label": row["label"], "seed": row["seed"], "contestant": row["contestant"]}
            | row["metrics"]
            | row["meters"]
            | row["cost"]
            for row in self.rows
        ]
        columns = list(dict.fromkeys(key for record in records for key in record))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()

    def json(self) -> str:
        """For machines; the rows themselves are in rows.jsonl."""
        header, body = self.table
        content = {
            "recipe": self.recipe,
            "settings": self.settings,
            "table": [dict(zip(header, cells, strict=True)) for cells in body],
            "sentences": self.sentences,
            "notes": self.notes,
        }
        return json.dumps(content, indent=1)

    def write(self, folder: Path) -> Path:
        """Write report.md, .csv, .json, .html and rows.jsonl; returns the path of the HTML page."""
        from koinon.bench.figures import page

        contents = {
            "report.md": self.markdown(),
            "report.csv": self.csv(),
            "report.json": self.json(),
            "rows.jsonl": "".join(json.dumps(row) + "\n" for row in self.rows),
            "report.html": page(self),
        }
        for name, text in contents.items():
            write_whole(folder / name, text)
        return folder / "report.html"


def read_report(folder: Path) -> Report:
    """The report of the cells a folder holds; raises UserError if it holds none."""
    head = folder / "comparison.json"
    cells = sorted((folder / "cells").glob("*.json"))
    if not head.is_file() or not cells:
        raise UserError(f"{folder}: holds no finished cell of a comparison; give the folder of a `koinon compare`")
    content = read_whole(head)
    if not content.keys() >= {"recipe", "settings"}:
        raise UserError(f"{head}: damaged: delete it, and run the comparison again")
    return Report(content["recipe"], content["settings"], in_order(read_cell(cell) for cell in cells))


def _fitting(
    columns: Sequence[int], header: Sequence[str], body: Sequence[Sequence[str]], width: int
) -> list[list[int]]:
    """Columns in groups, in order, that fit beside the first, with which each begins; what never fits is on its own."""
    wide = [3 + max(len(cells[column]) for cells in (header, *body)) for column in range(len(header))]
    groups = [[0]]
    for column in columns:
        if len(groups[-1]) > 1 and sum(wide[its] for its in (*groups[-1], column)) > width + 1:
            groups.append([0])
        groups[-1].append(column)
    return groups


def _with_interval(value: Interval, sign: str = "") -> str:
    if math.isnan(value.low):
        return f"{value.mean:{sign}.4f}"
    return f"{value.mean:{sign}.4f} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *body)]
