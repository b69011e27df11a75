"""How the columns of a table become tensors: what is a category, what a number, and the encoder that reads both."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from koinon.core import UserError, pick
from koinon.nn.params import stream

try:
    import polars as pl
except ModuleNotFoundError:
    raise UserError("tables need polars: pip install 'koinon[tables]'") from None

FEW = 20
"""An integer column with at most this many different values is read as a category."""


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
    """Categories embedded, then numbers: the two parts of [batch, width], with one embedding matrix for all columns.

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

    def forward(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch embedded"], Float[Tensor, "batch number"]]:
        """``inputs`` is what `Schema.encode` gives, as tensors. Numbers stay apart: nobody needs their gradient."""
        codes: Int[Tensor, "batch column"] = inputs["categories"]
        # The gradient of index_select is a third as costly as that of an embedding lookup on a CPU.
        rows = self.embedding.index_select(0, (codes + self.offsets).flatten())
        return rows.view(len(codes), -1), inputs["numbers"]  # batch (column dim), batch number


def column_of(frame: pl.DataFrame, name: str) -> pl.Series:
    """The column, or an error that names the nearest one."""
    return frame[pick(name, frame.columns, "column")]


def fit_schema(
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
            numbers.append(scale(column.name, _numbers(column, missing, math.nan)[training]))
    if not (categories or numbers):
        raise UserError("no feature column: give the table at least one column that is neither a task nor the time")
    return Schema(tuple(categories), tuple(numbers), targets, missing)


def scale(name: str, values: NDArray[np.float64]) -> Number:
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
                f"column {column.name!r}: {first_text(column)} among numbers; correct it, "
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
    if column.null_count() == len(column):  # which CSV cannot tell from text
        column = column.cast(pl.Float64)
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise UserError(f"column {column.name!r}: {first_text(column)} where the model reads numbers")
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


def first_text(column: pl.Series) -> str:
    """The first value that is no number, and where."""
    if column.dtype != pl.String:
        return f"{column.dtype}"
    bad = column.cast(pl.Float64, strict=False).is_null() & column.is_not_null()
    row = int(bad.arg_max() or 0)
    return f"text ({column[row]!r} at row {row + 1})"
