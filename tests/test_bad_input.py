"""What a person can get wrong is one line that says what, where and what would be right; and nothing is touched."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import made
import polars as pl
import pytest

from koinon.cli import main
from koinon.data import sources

BINARY = ("--tasks", "like", "hate")


class Wrong(NamedTuple):
    """A command that must fail: its words, what it says, and how the folder is made wrong beforehand."""

    words: tuple
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None


def share(*words: object, table: str = "ratings.csv", tasks=BINARY, out: str = "model", method: str = "mmoe") -> tuple:
    return ("share", method, "--table", table, *tasks, "--out", out, *made.QUICK, *words)


def compare(*words: object, table: str = "ratings.csv", tasks=BINARY, out: str = "out") -> tuple:
    run = ("--scale", "tiny", "--methods", "shared_bottom", "--jobs", "1", "--seeds", "1")
    return ("compare", "share", "--table", table, *tasks, "--out", out, *run, *words)


def predict(*words: object, table: str = "ratings.csv", out: str = "scores.csv") -> tuple:
    return ("share", "predict", "model", "--table", table, "--out", out, *words)


def written(content: str | bytes, name: str = "ratings.csv") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def with_columns(name: str = "ratings.csv", **columns: pl.Expr) -> Callable[[Path], object]:
    return lambda folder: made.frame().with_columns(**columns).write_csv(folder / name)


def at_row_8(value: object, column: str) -> Callable[[Path], object]:
    """One cell of a column replaced by a value."""
    old = pl.col(column).cast(pl.String) if isinstance(value, str) else pl.col(column)
    return with_columns(**{column: pl.when(pl.col("when") == 7).then(pl.lit(value)).otherwise(old)})


def model(folder: Path) -> None:
    """A kept model beside the table."""
    main(
        ["share", "mmoe", "--table", str(folder / "ratings.csv"), "--out", str(folder / "model"), *BINARY, *made.QUICK]
    )


def finished(folder: Path) -> None:
    """A comparison with one finished cell."""
    words = compare(table=str(folder / "ratings.csv"), out=str(folder / "out"))
    main([str(word) for word in words])


def damaged_cell(folder: Path) -> None:
    finished(folder)
    (cell,) = (folder / "out" / "cells").iterdir()
    cell.write_text(cell.read_text()[:50])


HEADER = ",".join(made.frame(1).columns) + "\n"
CSV = made.frame().write_csv()
TABLES = {
    "missing": Wrong(share(table="absent.csv"), ("absent.csv", "no such file")),
    "a folder": Wrong(share(table="folder.csv"), ("folder.csv",), lambda folder: (folder / "folder.csv").mkdir()),
    "0 bytes": Wrong(share(), ("ratings.csv", "empty"), written("")),
    "blank lines": Wrong(share(), ("ratings.csv", "empty"), written("\n\n")),
    "header only": Wrong(share(), ("ratings.csv", "no rows"), written(HEADER)),
    "header only to compare": Wrong(compare(), ("ratings.csv", "no rows"), written(HEADER)),
    "one row": Wrong(share(), ("'hate'", "no label"), written(CSV[: CSV.index("\n", len(HEADER)) + 1])),
    "two rows": Wrong(share(), ("no label", "validation"), written("like,hate,x\n1,0,3\n0,1,4\n")),
    "another ending": Wrong(share(table="t.xlsx"), ("t.xlsx", "'.xlsx'", ".csv", ".parquet"), written(CSV, "t.xlsx")),
    "no ending": Wrong(share(table="ratings"), ("unknown kind", ".csv"), written(CSV, "ratings")),
    "semicolons": Wrong(share(), ("'like'", "like;hate"), written(CSV.replace(",", ";"))),
    "not a parquet": Wrong(share(table="t.parquet"), ("t.parquet", "cannot be read"), written(CSV, "t.parquet")),
    "not JSON lines": Wrong(share(table="t.jsonl"), ("t.jsonl", "cannot be read"), written(CSV, "t.jsonl")),
    "bytes": Wrong(share(), ("ratings.csv", "cannot be read"), written(bytes(range(256)) * 9)),
    "latin 1": Wrong(share(), ("utf-8",), written(CSV.replace("Bern", "Zürich").encode("latin-1"))),
    "a longer row": Wrong(share(), ("ratings.csv", "more fields"), written(CSV + "1," * 30 + "1\n")),
    "two columns of one name": Wrong(share(), ("two columns", "'like'"), written(CSV.replace("x0", "like", 1))),
    "nested": Wrong(
        share(table="t.jsonl"),
        ("'x'", "--features"),
        written('{"like":1,"hate":0,"x":[1]}\n{"like":0,"hate":1,"x":[2]}\n' * 50, "t.jsonl"),
    ),
    "a label column of lists": Wrong(
        share(table="t.jsonl", tasks=("--tasks", "x")), ("'x'", "numbers"), written('{"x":[1],"y":2}\n' * 50, "t.jsonl")
    ),
}
TASKS = {
    "unknown column": Wrong(share(tasks=("--tasks", "liek")), ("'liek'", "did you mean 'like'")),
    "no task": Wrong(share(tasks=("--tasks",)), ("no task",)),
    "named twice": Wrong(share(tasks=("--tasks", "like", "like:b")), ("'like'", "twice")),
    "no name": Wrong(share(tasks=("--tasks", ":x")), ("':x'", "no name", "NAME:GROUP=KIND")),
    "empty": Wrong(share(tasks=("--tasks", "")), ("no name",)),
    "unknown kind": Wrong(share(tasks=("--tasks", "like=foo")), ("'foo'", "binary", "regression")),
    "near kind": Wrong(share(tasks=("--tasks", "like=regresion")), ("'regression'",)),
    "one class": Wrong(share(tasks=("--tasks", "c")), ("'c'", "one class only (all 1)"), with_columns(c=pl.lit(1))),
    "one class in the test part": Wrong(
        share("--time", "when", tasks=("--tasks", "c")),
        ("'c'", "one class only", "test part"),
        with_columns(c=(pl.col("when") < 350).cast(pl.Int8) * pl.col("like")),
    ),
    "one value": Wrong(
        share(tasks=("--tasks", "c=regression")), ("'c'", "one value only (all 1.5)"), with_columns(c=pl.lit(1.5))
    ),
    "no label": Wrong(share(tasks=("--tasks", "c")), ("'c'", "no label"), with_columns(c=pl.lit(None))),
    "text": Wrong(share(tasks=("--tasks", "city")), ("'city'", "text", "row 1", "numbers")),
    "text in one row": Wrong(share(), ("'like'", "'maybe' at row 8"), at_row_8("maybe", "like")),
    "infinite": Wrong(
        share(tasks=("--tasks", "stars=regression")), ("'stars'", "infinite", "row 8"), at_row_8(math.inf, "stars")
    ),
    "infinite binary": Wrong(share(), ("'hate'", "infinite", "row 8"), at_row_8(-math.inf, "hate")),
    "other numbers": Wrong(share(tasks=("--tasks", "stars")), ("0 or 1", "row 1", "stars=regression")),
    "a name for averages": Wrong(
        share(tasks=("--tasks", "mean", "like")), ("'mean'", "average", "rename"), with_columns(mean=pl.col("hate"))
    ),
    "in a comparison": Wrong(compare(tasks=("--tasks", "liek")), ("'liek'", "'like'")),
}
COLUMNS = {
    "unknown group": Wrong(share("--group", "user"), ("'user'", "'user_id'")),
    "unknown time": Wrong(share("--time", "whne"), ("'whne'", "'when'")),
    "unknown feature": Wrong(share("--features", "x0", "citty"), ("'citty'", "'city'")),
    "unknown category": Wrong(share("--categories", "citty"), ("'citty'", "'city'")),
    "NaN": Wrong(share(), ("'x0'", "missing", "row 8", "--missing mean"), at_row_8(math.nan, "x0")),
    "empty": Wrong(share(), ("'x0'", "missing", "row 8", "--missing mean"), at_row_8(None, "x0")),
    "infinite": Wrong(share("--missing", "mean"), ("'x0'", "infinite", "row 8"), at_row_8(math.inf, "x0")),
    "text among numbers": Wrong(share(), ("'x0'", "'oops' at row 8", "--categories x0"), at_row_8("oops", "x0")),
    "a task as a feature": Wrong(share("--features", "x0", "like"), ("'like'", "cannot be a feature")),
    "no feature left": Wrong(
        share(), ("no feature column",), lambda folder: made.frame()["like", "hate"].write_csv(folder / "ratings.csv")
    ),
    "only the time left": Wrong(
        share("--time", "when"),
        ("no feature column",),
        lambda folder: made.frame()["like", "hate", "when"].write_csv(folder / "ratings.csv"),
    ),
    "time of words": Wrong(share("--time", "city"), ("'city'", "does not parse", "row 1", "2024-12-31")),
    "time with one word": Wrong(
        share("--time", "d"),
        ("'d'", "does not parse", "row 8", "'soon'"),
        with_columns(d=pl.when(pl.col("when") == 7).then(pl.lit("soon")).otherwise(pl.lit("2024-12-31"))),
    ),
    "time with holes": Wrong(share("--time", "hate2"), ("'hate2'", "empty"), with_columns(hate2=pl.col("hate"))),
    "time of lists": Wrong(
        share("--time", "d", table="t.jsonl"),
        ("'d'", "numbers or dates"),
        written('{"like":1,"hate":0,"x":1,"d":[1]}\n' * 50, "t.jsonl"),
    ),
    "groups without both classes": Wrong(
        share("--group", "when"), ("'when'", "both classes", "--group"), lambda folder: None
    ),
    "nothing known in training": Wrong(
        share("--time", "when", "--missing", "mean"),
        ("'z'", "no value in the training part"),
        with_columns(z=pl.when(pl.col("when") > 390).then(pl.col("x0"))),
    ),
}
OPTIONS = {
    "no seeds": Wrong(compare("--seeds", "0"), ("--seeds", "from 1")),
    "negative seeds": Wrong(compare("--seeds", "-2"), ("--seeds", "from 1")),
    "no jobs": Wrong(compare("--jobs", "0"), ("--jobs", "from 1")),
    "seeds of text": Wrong(compare("--seeds", "many"), ("--seeds", "'many'")),
    "unknown contestant": Wrong(compare("--methods", "mmo"), ("'mmo'", "'mmoe'")),
    "unknown backend": Wrong(compare("--backend", "dsk"), ("'dsk'", "'dask'")),
    "unknown scale": Wrong(compare("--scale", "tinny"), ("'tinny'", "'tiny'")),
    "own method that is absent": Wrong(compare("--own", "mine.py"), ("mine.py", "no such file")),
    "own method without a method": Wrong(
        compare("--own", "nothing.py"), ("nothing.py", "exactly one method"), written("x = 1\n", "nothing.py")
    ),
    "unknown method": Wrong(share(method="mmo"), ("'mmo'", "'mmoe'")),
    "unknown field": Wrong(share("--expertz", "3"), ("--expertz", "--expert")),
    "field of text": Wrong(share("--experts", "many"), ("--experts", "'many'")),
    "no epochs": Wrong(share("--epochs", "0"), ("--epochs", "from 1")),
    "no batch": Wrong(share("--batch", "0"), ("--batch", "from 3")),
    "no embedding": Wrong(share("--embedding", "-1"), ("--embedding", "from 1")),
    "negative rate": Wrong(share("--rates", "-1"), ("--rates", "between 0 and 1")),
    "NaN for a rate": Wrong(share("--rates", "nan"), ("--rates", "between 0 and 1")),
    "no rate": Wrong(share("--rates"), ("--rates", "one or more")),
    "no experts": Wrong(share("--experts", "0"), ("no expert",)),
    "no layer": Wrong(share("--expert"), ("layers", "at least one")),
    "empty layer": Wrong(share("--tower", "0"), ("layers", "each from 1")),
    "negative layer": Wrong(share("--expert", "-3"), ("layers", "each from 1")),
    "HoME without experts": Wrong(
        share("--shared", "0", "--per-group", "0", "--specific", "0", method="home"), ("no expert",)
    ),
    "HoME with negative gates": Wrong(share("--meta-feature-gates", "-1", method="home"), ("layers",)),
    "PLE without levels": Wrong(share("--levels", "0", method="ple"), ("at least one level",)),
    "PLE without layers": Wrong(share("--expert", method="ple"), ("at least one layer",)),
    "PLE without experts": Wrong(share("--shared", "0", "--specific", "0", method="ple"), ("no expert",)),
}
FOLDERS = {
    "out is a file": Wrong(share(out="ratings.csv"), ("ratings.csv", "exists already")),
    "out below a file": Wrong(share(out="ratings.csv/x/model"), ("ratings.csv/x/model", "cannot be written")),
    "out of a comparison is a file": Wrong(compare(out="ratings.csv"), ("ratings.csv", "cannot keep results")),
    "out of a comparison below a file": Wrong(compare(out="ratings.csv/x"), ("ratings.csv", "cannot keep results")),
    "damaged cell": Wrong(compare(), ("out/cells/", "damaged", "delete it"), damaged_cell),
    "damaged cell to report": Wrong(("report", "out"), ("out/cells/", "damaged", "delete it"), damaged_cell),
    "damaged head": Wrong(
        ("report", "out"),
        ("out/comparison.json", "damaged"),
        lambda folder: (finished(folder), (folder / "out" / "comparison.json").write_text("{}")),
    ),
    "damaged head to go on": Wrong(
        compare(),
        ("out/comparison.json", "damaged"),
        lambda folder: (finished(folder), (folder / "out" / "comparison.json").write_text("[")),
    ),
    "report of nothing": Wrong(("report", "absent"), ("absent", "no finished cell", "koinon compare")),
    "report of a file": Wrong(("report", "ratings.csv"), ("ratings.csv", "no finished cell")),
    "report of another folder": Wrong(("report", "."), ("no finished cell",)),
}
PREDICTIONS = {
    "no model": Wrong(predict(), ("model", "no model kept")),
    "a model that is a file": Wrong(predict(), ("model", "damaged, or not a model"), written("x", "model")),
    "another folder": Wrong(predict(), ("model", "no model kept"), lambda folder: (folder / "model").mkdir()),
    "missing table": Wrong(predict(table="absent.csv"), ("absent.csv", "no such file"), model),
    "missing column": Wrong(
        predict(table="few.csv"),
        ("'city'",),
        lambda folder: (model(folder), made.frame().drop("city").write_csv(folder / "few.csv")),
    ),
    "renamed column": Wrong(
        predict(table="few.csv"),
        ("'x1'", "did you mean 'x1a'"),
        lambda folder: (model(folder), made.frame().rename({"x1": "x1a"}).write_csv(folder / "few.csv")),
    ),
    "text for a number": Wrong(
        predict(table="odd.csv"),
        ("'x0'", "text ('oops' at row 1)"),
        lambda folder: (model(folder), made.frame().with_columns(x0=pl.lit("oops")).write_csv(folder / "odd.csv")),
    ),
    "missing number": Wrong(
        predict(table="odd.csv"),
        ("'x0'", "missing", "row 1"),
        lambda folder: (model(folder), made.frame().with_columns(x0=pl.lit(None)).write_csv(folder / "odd.csv")),
    ),
    "another ending": Wrong(predict(out="scores.xlsx"), ("scores.xlsx", ".csv or .parquet"), model),
    "out in no folder": Wrong(predict(out="absent/scores.csv"), ("absent/scores.csv", "no folder absent"), model),
    "out below a file": Wrong(predict(out="ratings.csv/scores.csv"), ("cannot be written", "ratings.csv"), model),
    "out is a folder": Wrong(predict(out="model.csv"), ("model.csv", "cannot be written"), lambda folder: (
        model(folder), (folder / "model.csv").mkdir())),
}  # fmt: skip
CASES = {
    f"{group}: {name}": wrong
    for group, cases in {
        "table": TABLES, "task": TASKS, "column": COLUMNS, "option": OPTIONS, "folder": FOLDERS, "predict": PREDICTIONS,
    }.items()
    for name, wrong in cases.items()
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the made table, which is the working folder."""
    made.table(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("wrong", CASES.values(), ids=CASES)
def test_one_line_says_it_and_nothing_is_touched(capsys, here, wrong):
    wrong.prepare(here)
    capsys.readouterr()
    before = made.held(here)
    made.assert_one_line(made.say(capsys, *wrong.words), *wrong.says)
    assert made.held(here) == before


@pytest.mark.parametrize("words", [("data", "get", "movielens"), ("compare", "share", "--scale", "tiny", "--out", "o")])
def test_a_truncated_data_package_is_refused(capsys, here, monkeypatch, words):
    monkeypatch.setenv("KOINON_CACHE", str(here / "cache"))
    (here / "cache").mkdir()
    sources.path_of("movielens").write_bytes(b"PK\x03\x04, and no more")
    before = made.held(here)
    said = made.say(capsys, *words)
    made.assert_one_line(said, str(here / "cache"), "not the file pinned", "17 bytes, 2,130,151 expected", "delete it")
    assert made.held(here) == before


def test_a_cache_that_cannot_be_made_is_named(capsys, here, monkeypatch):
    monkeypatch.setenv("KOINON_CACHE", str(here / "ratings.csv" / "cache"))
    before = made.held(here)
    made.assert_one_line(made.say(capsys, "data", "get", "movielens"), "cannot keep data", "KOINON_CACHE")
    assert made.held(here) == before


def test_a_download_that_fails_leaves_nothing(capsys, here, monkeypatch):
    """pip is told of an index that is an empty folder, so that nothing is asked of a network."""
    for name, value in {"KOINON_CACHE": here / "cache", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": here}.items():
        monkeypatch.setenv(name, str(value))
    said = made.say(capsys, "data", "get", "movielens")
    made.assert_one_line(said, "recbole 1.2.1 could not be fetched", "try again with a network", str(here / "cache"))
    assert list((here / "cache").iterdir()) == []


# What is odd and works.

ODD = {
    "a byte order mark": written(
        b"\xef\xbb\xbf" + made.frame().select("like", "hate", "x0", "city").write_csv().encode()
    ),
    "Windows line endings": written(CSV.replace("\n", "\r\n")),
    "no newline at the end": written(CSV.rstrip("\n")),
    "boolean labels": with_columns(like=pl.col("like") == 1),
    "labels as 0.0 and 1.0": with_columns(like=pl.col("like").cast(pl.Float64)),
    "a column of nothing": with_columns(z=pl.lit(None)),
    "a column of one value": with_columns(z=pl.lit(3.5)),
    "a date": with_columns(z=pl.from_epoch(pl.col("when") * 86_400)),
    "quoted commas": with_columns(city=pl.col("city") + ", EU"),
    "very large numbers": with_columns(x0=pl.col("x0") * 1e30),
    "very small numbers": with_columns(x0=pl.col("x0") * 1e-30),
    "names that are paths": with_columns(city=pl.lit("../../") + pl.col("city")),
}
ODD_NAMES = ["λίκε", "a/b", "a.b", "a b", "../up", "L" * 3_000, "🎉", "<b>bold</b>", "task", "x,y", "[red]", "model"]


@pytest.mark.parametrize("prepare", ODD.values(), ids=ODD)
def test_odd_tables_work(capsys, here, prepare):
    prepare(here)
    assert made.say(capsys, *share()).code == 0
    assert made.say(capsys, *predict()).code == 0
    assert len((here / "scores.csv").read_text().splitlines()) == 401


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: name[:12])
def test_odd_names_work_to_the_end(capsys, here, name):
    """As a task, and as a feature of the same model; and in a comparison's report."""
    made.frame().rename({"like": name, "x0": name + "2"}).write_csv(here / "ratings.csv")
    before = set(os.listdir(here.parent))
    assert made.say(capsys, *share(tasks=("--tasks", name, "hate"))).code == 0
    said = made.say(capsys, *predict())
    assert said.code == 0
    assert pl.read_csv(here / "scores.csv").columns == [name, "hate"]
    assert set(os.listdir(here.parent)) == before


def test_odd_names_reach_the_report(capsys, here):
    made.frame().rename({"like": "<i>[red]λ", "x0": "$x^2$", "hate": "$_{a"}).write_csv(here / "ratings.csv")
    said = made.say(capsys, *compare(tasks=("--tasks", "<i>[red]λ:a", "$_{a:b")))
    assert said.code == 0
    assert "<i>[red]λ.auc" in said.out
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert "<i>" not in page
    assert "&lt;i&gt;[red]λ" in page


def test_people_without_a_name_are_one_group(capsys, here):
    with_columns(user_id=pl.when(pl.col("user_id") > 2).then(pl.col("user_id")))(here)
    assert made.say(capsys, *share("--group", "user_id")).code == 0


def test_missing_numbers_can_be_filled(capsys, here):
    at_row_8(None, "x0")(here)
    assert made.say(capsys, *share("--missing", "mean")).code == 0
    assert made.say(capsys, *predict()).code == 0


def test_a_feature_named_twice_counts_once(capsys, here):
    assert made.say(capsys, *share("--features", "x0", "x0", "x1")).code == 0


def test_an_ending_in_capitals_is_an_ending(capsys, here):
    (here / "ratings.csv").rename(here / "RATINGS.CSV")
    assert made.say(capsys, *share(table="RATINGS.CSV")).code == 0
