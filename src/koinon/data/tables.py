"""Tables of a person's own: columns to features and labels, splits that respect time, and an encoder."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from koinon.core import UserError, pick
from koinon.nn.params import stream
from koinon.nn.tasks import Task, distinct, parse_task

try:
    import polars as pl
except ModuleNotFoundError:
    raise UserError("tables need polars: pip install 'koinon[tables]'") from None

FEW = 20
"""An integer column with at most this many different values is read as a category."""
READERS: Mapping[str, Callable[[Path], pl.DataFrame]] = {
    ".csv": lambda path: pl.read_csv(path, infer_schema_length=None),
    ".tsv": lambda path: pl.read_csv(path, infer_schema_length=None, separator="\t"),
    ".parquet": pl.read_parquet,
    ".jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
}


@dataclass(frozen=True)
class Category:
    """A column of names: embedded."""

    name: str
    values: tuple[str, ...]
    """The values seen at least twice; code 0 stands for every other one, value i has code i + 1."""


@dataclass(frozen=True)
class Number:
    """A column of numbers: centred and scaled by the training part."""

    name: str
    mean: float
    std: float


@dataclass(frozen=True)
class Schema:
    """How columns become tensors; made from training rows, kept with the model."""

    categories: tuple[Category, ...]
    numbers: tuple[Number, ...]
    targets: tuple[Number, ...] = ()
    """The regression tasks' labels, which are learned centred and scaled."""
    missing: str = "refuse"
    """What a missing number is: ``"refuse"`` (an error) or ``"mean"`` (the training part's)."""

    @cached_property
    def sizes(self) -> list[int]:
        """Number of codes of each category."""
        return [len(category.values) + 1 for category in self.categories]

    def encode(self, frame: pl.DataFrame) -> dict[str, NDArray]:
        """``{"categories": int64 [rows, columns], "numbers": float32 [rows, columns]}``.

        Raises:
            UserError: a column is absent, or a number is text, missing or infinite.
        """
        codes = [_codes(column_of(frame, c.name), c.values) for c in self.categories]
        numbers = [(_numbers(column_of(frame, n.name), self.missing, n.mean) - n.mean) / n.std for n in self.numbers]
        return {
            "categories": np.stack(codes, 1) if codes else np.zeros((len(frame), 0), np.int64),
            "numbers": np.stack(numbers, 1).astype(np.float32) if numbers else np.zeros((len(frame), 0), np.float32),
        }

    def in_units(self, values: Mapping[str, NDArray]) -> dict[str, NDArray[np.float64]]:
        """Labels or predictions of each task, regressions in the units of the table again."""
        units = {target.name: target for target in self.targets}
        return {
            name: np.asarray(value, float) * units[name].std + units[name].mean
            if name in units
            else np.asarray(value, float)
            for name, value in values.items()
        }

    def describe(self) -> dict[str, Any]:
        """As plain data; `Schema.rebuild` is the way back."""
        return dataclasses.asdict(self)

    @staticmethod
    def rebuild(data: Mapping[str, Any]) -> "Schema":
        """The schema that `describe` described, also after a round trip through JSON."""
        return Schema(
            tuple(Category(c["name"], tuple(c["values"])) for c in data["categories"]),
            tuple(Number(**n) for n in data["numbers"]),
            tuple(Number(**n) for n in data["targets"]),
            data["missing"],
        )


class TableEncoder(nn.Module):
    """Categories embedded, then numbers: [batch, width], with one embedding matrix for all columns.

    Args:
        schema: the columns.
        dim: width of each category's embedding.
        seed: start of the random streams.
    """

    offsets: Tensor

    def __init__(self, schema: Schema, dim: int = 16, seed: int = 0):
        super().__init__()
        self.dim = dim
        self.width = dim * len(schema.categories) + len(schema.numbers)
        drawn = [
            torch.randn(size, dim, generator=stream(seed, "embedding", category.name)) / math.sqrt(dim)
            for category, size in zip(schema.categories, schema.sizes, strict=True)
        ]
        self.embedding = nn.Parameter(torch.cat(drawn) if drawn else torch.zeros(0, dim))
        starts = np.cumsum([0, *schema.sizes])[:-1] if schema.sizes else np.zeros(0)
        self.register_buffer("offsets", torch.tensor(starts, dtype=torch.long), persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
        """``inputs`` is what `Schema.encode` gives, as tensors."""
        codes: Int[Tensor, "batch column"] = inputs["categories"]
        # The gradient of index_select is a third as costly as that of an embedding lookup on a CPU.
        rows = self.embedding.index_select(0, (codes + self.offsets).flatten())
        embedded = rows.view(len(codes), -1)  # batch (column dim)
        return torch.cat([embedded, inputs["numbers"]], 1)


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
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind of table {path.suffix!r}: give {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        frame = READERS[path.suffix](path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from None
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
    labels = {task.name: _labels(frame, task) for task in tasks}
    chosen = list(features) or [name for name in frame.columns if name not in labels and name != time]
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
    targets = tuple(_scale(t.name, labels[t.name][part == 0]) for t in tasks if t.kind == "regression")
    schema = _fit_schema(frame.select(chosen), part == 0, named, targets, missing)
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


def column_of(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column, or an error that names the nearest one."""
    return frame[pick(name, frame.columns, "column")]


def _labels(frame: pl.DataFrame, task: Task) -> NDArray[np.float64]:
    column = column_of(frame, task.name)
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise UserError(f"task {task.name!r}: the labels are {_first_text(column)}; give numbers, empty where missing")
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
            if task.kind == "binary" and len(seen) < 2:
                raise UserError(
                    f"task {task.name!r}: one class only (all {seen[0]:g}) in the {where} part; "
                    "give both classes, more rows, or leave the task out"
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


def _fit_schema(
    frame: pl.DataFrame, training: NDArray[np.bool_], named: set[str], targets: tuple[Number, ...], missing: str
) -> Schema:
    categories, numbers = [], []
    for column in frame.iter_columns():
        if _is_category(column, named, training):
            known = column.filter(pl.Series(training)).cast(pl.String).drop_nulls().alias("value")
            counts = known.value_counts(name="times")  # the column's own name could be any
            values = counts.filter(pl.col("times") >= 2)["value"].sort().to_list()
            categories.append(Category(column.name, tuple(values)))
        else:
            numbers.append(_scale(column.name, _numbers(column, missing, math.nan)[training]))
    if not (categories or numbers):
        raise UserError("no feature column: give the table at least one column that is neither a task nor the time")
    return Schema(tuple(categories), tuple(numbers), targets, missing)


def _scale(name: str, values: NDArray[np.float64]) -> Number:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        raise UserError(f"column {name!r}: no value in the training part; leave it out")
    mean, std = float(known.mean()), float(known.std())
    # The deviation of a constant is rounding; divided by it, another value later would be enormous.
    return Number(name, mean, std if std > 1e-9 * abs(mean) else 1.0)


def _is_category(column: pl.Series, named: set[str], training: NDArray[np.bool_]) -> bool:
    if column.name in named or column.dtype in (pl.Boolean, pl.Categorical, pl.Enum):
        return True
    if column.dtype == pl.String:
        parses = column.cast(pl.Float64, strict=False).is_not_null().sum()
        if parses > 0.5 * (len(column) - column.null_count()):
            raise UserError(
                f"column {column.name!r}: {_first_text(column)} among numbers; correct it, "
                f"or read the column as names with --categories {column.name}"
            )
        return True
    if column.dtype.is_integer():
        return column.filter(pl.Series(training)).n_unique() <= FEW
    if not (column.dtype.is_numeric() or column.dtype.is_temporal()):
        raise UserError(f"column {column.name!r} holds {column.dtype}: give --features without it")
    return False


def _codes(column: pl.Series, values: tuple[str, ...]) -> NDArray[np.int64]:
    known = pl.Series(values, dtype=pl.String)
    text = column.cast(pl.String)
    return text.replace_strict(known, np.arange(1, len(values) + 1), default=0, return_dtype=pl.Int64).to_numpy()


def _numbers(column: pl.Series, missing: str, fill: float) -> NDArray[np.float64]:
    if column.dtype.is_temporal():
        column = column.to_physical()
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise UserError(f"column {column.name!r}: {_first_text(column)} where the model reads numbers")
    values = column.cast(pl.Float64).fill_null(math.nan).to_numpy()
    bad = np.isinf(values) if missing == "mean" else ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        what = "infinite" if np.isinf(values[row]) else "missing (empty or NaN)"
        raise UserError(
            f"column {column.name!r}: {what} at row {row + 1}, {int(bad.sum())} in all; "
            "fill them, leave the column out, or give --missing mean"
        )
    return np.where(np.isnan(values), fill, values)


def _first_text(column: pl.Series) -> str:
    """The first value that is no number, and where."""
    if column.dtype != pl.String:
        return f"{column.dtype}"
    bad = column.cast(pl.Float64, strict=False).is_null() & column.is_not_null()
    row = int(bad.arg_max() or 0)
    return f"text ({column[row]!r} at row {row + 1})"
