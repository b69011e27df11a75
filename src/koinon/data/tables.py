"""Tables of a person's own: read, checked, and cut into parts in a way that respects time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from koinon.core import UserError, pick
from koinon.data.schema import Schema, column_of, first_text, fit_schema, scale
from koinon.nn.tasks import Task, distinct, parse_task

try:
    import polars as pl
except ModuleNotFoundError:
    raise UserError("tables need polars: pip install 'koinon[tables]'") from None

READERS: Mapping[str, Callable[[Path], pl.DataFrame]] = {
    ".csv": lambda path: pl.read_csv(path, infer_schema_length=None),
    ".tsv": lambda path: pl.read_csv(path, infer_schema_length=None, separator="\t"),
    ".parquet": pl.read_parquet,
    ".jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
}


@dataclass(frozen=True)
class Rows:
    """Examples as arrays, the first dimension being rows."""

    inputs: Mapping[str, NDArray]
    labels: Mapping[str, NDArray[np.float32]]
    """Task name to labels, regressions centred and scaled; NaN marks a missing one."""
    groups: NDArray[np.int64] | None = None
    """A code for whom each row belongs to, for metrics within groups."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and labels as tensors of their own."""
        inputs, labels = ({k: torch.tensor(v) for k, v in part.items()} for part in (self.inputs, self.labels))
        return inputs, labels


@dataclass(frozen=True)
class World:
    """Tasks on one table, cut into the parts to train on, to choose on, and to report."""

    tasks: tuple[Task, ...]
    schema: Schema
    train: Rows
    valid: Rows
    test: Rows
    split: str
    """How the parts were cut, in words."""

    @cached_property
    def sparse(self) -> tuple[str, ...]:
        """The tasks whose rarer class (or labels) in training is under a quarter of the richest task's."""
        counts = {}
        for task in self.tasks:
            labels = self.train.labels[task.name]
            known = labels[~np.isnan(labels)]
            positive = int(known.sum()) if task.kind == "binary" else len(known)
            counts[task.name] = min(positive, len(known) - positive) if task.kind == "binary" else positive
        return tuple(name for name, count in counts.items() if count < max(counts.values()) / 4)


@dataclass(frozen=True)
class TableFile:
    """A table of a person's own and what its columns mean."""

    table: Path
    """CSV, TSV, Parquet or JSON Lines file with one row an example."""
    tasks: tuple[str, ...]
    """Label columns as NAME, NAME:GROUP or NAME:GROUP=regression; empty cells are missing labels."""
    group: str | None = None
    """Column that tells whose row it is: metrics within groups (GAUC), and the cut by each one's time."""
    time: str | None = None
    """Column to cut by: the last tenth is the test part. Without it the cut is random."""
    features: tuple[str, ...] = ()
    """Columns to use; all but tasks and time if none is named."""
    categories: tuple[str, ...] = ()
    """Columns of numbers that are names (ids, codes), not quantities."""
    missing: Literal["refuse", "mean"] = "refuse"
    """What to do with a missing number among the features."""

    def world(self) -> World:
        """Read and cut the table; raises UserError for whatever is wrong with it."""
        tasks = [parse_task(text) for text in self.tasks]
        return table_world(
            read_table(self.table), tasks, self.group, self.time, self.features, self.categories, self.missing
        )


def read_table(path: Path) -> pl.DataFrame:
    """Read CSV, TSV, Parquet or JSON Lines, by the file's ending.

    Raises:
        UserError: no such file, another ending, not readable as what it says, or no rows.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"{path}: unknown kind of table {path.suffix!r}: give {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        frame = READERS[kind](path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from None
    for name in frame.columns:
        first, again, _ = name.rpartition("_duplicated_")  # what polars makes of a repeated name
        if again and first in frame.columns:
            raise UserError(f"{path}: two columns are named {first!r}: rename one")
    if len(frame) == 0:
        raise UserError(f"{path}: has no rows")
    return frame


def table_world(
    frame: pl.DataFrame,
    tasks: Sequence[Task],
    group: str | None = None,
    time: str | None = None,
    features: Iterable[str] = (),
    categories: Iterable[str] = (),
    missing: str = "refuse",
    hide: Mapping[str, float] | None = None,
    seed: int = 0,
) -> World:
    """Cut a table 80/10/10 and read it for the given tasks.

    Args:
        frame: one row an example.
        tasks: each is a column of labels; missing ones are allowed.
        group: the column telling whose row it is; with ``time`` each group is cut by its own time.
        time: the column to cut by; without it the cut is random.
        features: the columns to use; all but tasks and time if empty.
        categories: integer columns to read as names rather than numbers.
        missing: see `Schema`.
        hide: share of a task's labels to hide outside the test part.
        seed: of the random cut and of what is hidden.

    Raises:
        UserError: a column that is not there or not usable, or a task with one class only in some part.
    """
    tasks = distinct(tasks)
    for task in tasks:
        if task.name in ("mean", "sparse"):
            raise UserError(f"task {task.name!r}: that name stands for an average over tasks: rename the column")
    labels = {task.name: _labels(frame, task) for task in tasks}
    chosen = list(dict.fromkeys(features)) or [name for name in frame.columns if name not in labels and name != time]
    for name in chosen:
        column_of(frame, name)
        if name in labels:
            raise UserError(f"column {name!r} is a task and cannot be a feature as well")
    for name in categories:
        pick(name, frame.columns, "column")
    named = {*categories, *([group] if group else [])}
    codes = None if group is None else _group_codes(column_of(frame, group))
    part, words = _cut(len(frame), codes, None if time is None else _times(column_of(frame, time)), seed)
    shuffle = np.random.default_rng(seed)
    for name, share in (hide or {}).items():
        labels[name] = np.where((shuffle.random(len(frame)) < share) & (part < 2), np.nan, labels[name])
    _check_classes(tasks, labels, part)
    if codes is not None:
        _check_groups(tasks, labels, part, codes, str(group))
    targets = tuple(scale(t.name, labels[t.name][part == 0]) for t in tasks if t.kind == "regression")
    schema = fit_schema(frame.select(chosen), part == 0, named, targets, missing)
    for target in targets:
        labels[target.name] = (labels[target.name] - target.mean) / target.std
    inputs = schema.encode(frame)
    train, valid, test = (
        Rows(
            {k: v[part == p] for k, v in inputs.items()},
            {k: v[part == p].astype(np.float32) for k, v in labels.items()},
            None if codes is None else codes[part == p],
        )
        for p in range(3)
    )
    return World(tasks, schema, train, valid, test, words)


def _labels(frame: pl.DataFrame, task: Task) -> NDArray[np.float64]:
    column = column_of(frame, task.name)
    if column.null_count() == len(column):
        raise UserError(f"task {task.name!r}: no label at all, every cell is empty")
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise UserError(f"task {task.name!r}: the labels are {first_text(column)}; give numbers, empty where missing")
    values = column.cast(pl.Float64).to_numpy().copy()
    if np.isinf(values).any():
        raise UserError(f"task {task.name!r}: infinite label at row {int(np.isinf(values).argmax()) + 1}")
    odd = ~np.isnan(values) & (values != 0) & (values != 1)
    if task.kind == "binary" and odd.any():
        row = int(odd.argmax())
        raise UserError(
            f"task {task.name!r}: a binary label is 0 or 1, row {row + 1} has {values[row]:g}; "
            f"write {task.name}=regression to predict the number"
        )
    return values


def _check_classes(tasks: Sequence[Task], labels: Mapping[str, NDArray], part: NDArray) -> None:
    for task in tasks:
        for p, where in enumerate(("training", "validation", "test")):
            seen = np.unique(labels[task.name][(part == p) & ~np.isnan(labels[task.name])])
            if len(seen) == 0:
                raise UserError(f"task {task.name!r}: no label in the {where} part")
            if len(seen) < 2:
                what = "one class only" if task.kind == "binary" else "one value only"
                raise UserError(
                    f"task {task.name!r}: {what} (all {seen[0]:g}) in the {where} part; "
                    "give different ones, more rows, or leave the task out"
                )


def _check_groups(
    tasks: Sequence[Task], labels: Mapping[str, NDArray], part: NDArray, codes: NDArray[np.int64], group: str
) -> None:
    for task in tasks:
        for p, where in ((1, "validation"), (2, "test")):
            its = (part == p) & ~np.isnan(labels[task.name])
            size, positive = np.bincount(codes[its]), np.bincount(codes[its], labels[task.name][its])
            if task.kind == "binary" and not ((positive > 0) & (positive < size)).any():
                raise UserError(
                    f"group column {group!r}: no group has both classes of {task.name!r} in the {where} part, so that "
                    "metrics within groups have no value; give more rows, larger groups, or no --group"
                )


def _cut(rows: int, groups: NDArray | None, times: NDArray | None, seed: int) -> tuple[NDArray[np.int64], str]:
    """0, 1 or 2 for each row: train, valid, test."""
    if times is None:
        place = np.random.default_rng(seed).permutation(rows) / rows
        words = "at random 80/10/10 (no time column: scores may look better than they will be)"
    elif groups is None:
        place = _rank(times, np.zeros(rows, np.int64))
        words = "by time 80/10/10"
    else:
        place = _rank(times, groups)
        words = "by each group's own time 80/10/10"
    return np.digitize(place, [0.8, 0.9]), words


def _rank(times: NDArray, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row's place in its group by time, from 0 up to under 1; ties keep the table's order."""
    order = np.lexsort((times, groups))
    sizes = np.bincount(groups)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(len(times))
    place[order] = (np.arange(len(times)) - starts[groups[order]]) / sizes[groups[order]]
    return place


def _times(column: pl.Series) -> NDArray:
    if column.null_count():
        row = int(column.is_null().arg_max() or 0)
        raise UserError(f"time column {column.name!r}: empty at row {row + 1}")
    if column.dtype == pl.String:
        try:
            parsed = column.str.to_datetime(strict=False)
        except pl.exceptions.ComputeError:  # no format fits any value
            parsed = pl.Series([None] * len(column), dtype=pl.Datetime)
        if parsed.null_count():
            row = int(parsed.is_null().arg_max() or 0)
            raise UserError(
                f"time column {column.name!r} does not parse at row {row + 1} ({column[row]!r}): "
                "give numbers or dates as 2024-12-31 or 2024-12-31T23:59:59"
            )
        column = parsed
    if not (column.dtype.is_numeric() or column.dtype.is_temporal()):
        raise UserError(f"time column {column.name!r} holds {column.dtype}: give numbers or dates")
    return column.to_physical().to_numpy()


def _group_codes(column: pl.Series) -> NDArray[np.int64]:
    return column.cast(pl.String).fill_null("").rank("dense").to_numpy().astype(np.int64) - 1
