"""Comparisons: no cell is repeated, lost or mixed with others; parallel is equal to the bit; reports say what holds."""

import csv
import gc
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest

from koinon import core
from koinon.bench.compare import Cells, Recipe, compare, write_whole
from koinon.bench.figures import figures, page
from koinon.bench.report import Report, read_report
from koinon.bench.statistics import falls
from koinon.core import UserError
from koinon.data.tables import TableFile
from koinon.recipes.share import SCALES, Network, ShareRecipe, _parameters

# The engine, with a recipe that trains nothing.


@dataclass(frozen=True)
class Drawn(Recipe):
    """Contestants are numbers; a cell is drawn around its contestant, and notes in a folder that it was run."""

    log: str
    labels: tuple[str, ...] = ("low", "high")
    content: str = "first"
    breaks: tuple[str, int] | None = None
    name = "made-drawn"
    seeds = 2

    def prepare(self) -> float:
        return 10.0

    def settings(self, world: float) -> Mapping[str, Any]:
        shown = {"main": "mean.score", "shown": ["mean.score", "a.auc"], "baseline": "low", "sparse": []}
        run = {"content": self.content, "scale": "tiny", "rows": [8, 1, 1], "split": "by hand"}
        return {"data": "drawn", **run, **shown}

    def contestants(self, world: float) -> Mapping[str, float]:
        return {label: world + place for place, label in enumerate(self.labels)}

    def cell(self, world: float, contestant: float, seed: int) -> dict[str, Any]:
        label = self.labels[round(contestant - world)]
        os.close(tempfile.mkstemp(prefix=f"{label} {seed} ", dir=self.log)[0])
        if (label, seed) == self.breaks:
            raise RuntimeError("broken on purpose")
        draws = contestant + np.random.default_rng(seed).normal(0, 0.1, 20)
        return {
            "metrics": {"mean.score": contestant + seed / 100, "a.auc": 0.5},
            "draws": {"mean.score": draws.tolist(), "a.auc": [0.5] * 20},
            "meters": {},
            "cost": {"trained": 3, "active": 2, "samples": 5, "passes": 1, "seconds": 0.1, "samples_per_second": 50},
        }


@pytest.fixture
def drawn(tmp_path):
    (tmp_path / "log").mkdir()
    return Drawn(str(tmp_path / "log"))


def ran(recipe: Drawn) -> list[str]:
    """Which cells were run, each as often as it was."""
    return sorted(name.rsplit(" ", 1)[0] for name in os.listdir(recipe.log))


def run(recipe: Drawn, folder: Path, seeds=range(2), **options) -> list[dict[str, Any]]:
    return compare(recipe, recipe.prepare(), seeds, folder, **{"jobs": 1} | options)


def results(rows) -> list[tuple]:
    """What must not depend on how a row was made."""
    return [(row["label"], row["contestant"], row["seed"], row["metrics"], row["draws"], row["meters"]) for row in rows]


def test_every_cell_is_run_once_and_rows_are_by_seed_and_label(drawn, tmp_path):
    told = []
    rows = run(drawn, tmp_path / "out", progress=lambda done, total, row: told.append((done, total, row)))
    assert [(row["label"], row["seed"]) for row in rows] == [("high", 0), ("low", 0), ("high", 1), ("low", 1)]
    assert ran(drawn) == ["high 0", "high 1", "low 0", "low 1"]
    assert [(done, total) for done, total, _ in told] == [(done, 4) for done in range(5)]
    assert sorted((row for _, _, row in told[1:]), key=rows_order) == rows


def test_a_second_run_repeats_nothing_and_gives_the_same_rows(drawn, tmp_path):
    first = run(drawn, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(drawn, tmp_path / "out") == first
    assert len(ran(drawn)) == 4
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_more_seeds_and_contestants_run_only_the_new_cells(drawn, tmp_path):
    run(drawn, tmp_path / "out", seeds=[0], labels=["low"])
    run(drawn, tmp_path / "out", seeds=[0, 1], labels=["low"])
    assert ran(drawn) == ["low 0", "low 1"]
    more = replace(drawn, labels=("low", "high", "higher"))
    assert len(run(more, tmp_path / "out")) == 6
    assert ran(drawn) == sorted(f"{label} {seed}" for label in more.labels for seed in range(2))


def test_another_setting_of_a_contestant_is_another_cell(tmp_path):
    cells = Cells(tmp_path / "out", "made", {})
    row = {"label": "x", "contestant": "X(1)", "seed": 0, "metrics": {}, "draws": {}, "meters": {}, "cost": {}}
    cells.keep(row | {"versions": {}, "git": None, "machine": ""})
    assert cells.find("x", "X(1)", 0) is not None
    assert cells.find("x", "X(2)", 0) is None
    assert cells.find("x", "X(1)", 1) is None


def test_labels_that_look_alike_as_file_names_are_kept_apart(drawn, tmp_path):
    recipe = replace(drawn, labels=("a b", "a_b", "a-b", "ä b"))
    rows = run(recipe, tmp_path / "out", seeds=[0])
    assert [row["label"] for row in rows] == sorted(recipe.labels)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4


def test_what_was_finished_before_a_failure_is_kept(drawn, tmp_path):
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(replace(drawn, breaks=("high", 1)), tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3
    assert len(run(drawn, tmp_path / "out")) == 4
    assert ran(drawn) == ["high 0", "high 1", "high 1", "low 0", "low 1"]  # only the broken one twice


def test_a_stop_between_two_rows_is_quiet(drawn, tmp_path, recwarn):
    """joblib would advise to ask for less."""

    def stops(done: int, total: int, row: object) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(drawn, tmp_path / "out", seeds=range(40), jobs=2, progress=stops)
    gc.collect()  # what is not ended by then ends here
    assert not [its for its in recwarn if "tasks" in str(its.message)]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    (tmp_path / "kept.json").write_text("old")

    def fail(descriptor):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    for name in ("new.json", "kept.json"):
        with pytest.raises(type(failure)):
            write_whole(tmp_path / name, "new")
    assert made.held(tmp_path).keys() == {"kept.json"}
    assert (tmp_path / "kept.json").read_text() == "old"


def test_a_leftover_of_a_killed_process_is_ignored(drawn, tmp_path):
    """Killed while writing: the half file has a name that no cell has."""
    rows = run(drawn, tmp_path / "out")
    cell = next((tmp_path / "out" / "cells").iterdir())
    half = cell.with_name(f".{cell.name}.12345")
    half.write_text(cell.read_text()[:40])
    cell.unlink()
    assert results(run(drawn, tmp_path / "out")) == results(rows)
    assert len(ran(drawn)) == 5
    assert results(read_report(tmp_path / "out").rows) == results(rows)


def rows_order(row):
    return row["seed"], row["label"]


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not an object": lambda text: "[]",
    "an empty object": lambda text: "{}",
    "without cost": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "cost"}),
    "binary": lambda text: "\x00\x01",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cell_is_named(drawn, tmp_path, damage):
    run(drawn, tmp_path / "out")
    cell = next((tmp_path / "out" / "cells").iterdir())
    cell.write_text(damage(cell.read_text()))
    before = made.held(tmp_path)
    for use in (lambda: run(drawn, tmp_path / "out"), lambda: read_report(tmp_path / "out")):
        with pytest.raises(UserError, match=re.escape(str(cell))) as caught:
            use()
        assert "damaged" in str(caught.value)
        assert "delete it" in str(caught.value)
    assert made.held(tmp_path) == before


def test_a_cell_in_the_wrong_place_is_named(drawn, tmp_path):
    run(drawn, tmp_path / "out")
    one, other = sorted((tmp_path / "out" / "cells").iterdir())[:2]
    one.write_text(other.read_text())
    with pytest.raises(UserError, match=re.escape(str(one))):
        run(drawn, tmp_path / "out")


def test_rows_of_other_settings_are_not_mixed(drawn, tmp_path):
    run(drawn, tmp_path / "out")
    before = made.held(tmp_path)
    with pytest.raises(UserError, match=r"content: 'first' there, 'second' now.*another --out"):
        run(replace(drawn, content="second"), tmp_path / "out")
    with pytest.raises(UserError, match="recipe: 'made-drawn' there"):
        Cells(tmp_path / "out", "other", {})
    assert made.held(tmp_path) == before


def test_an_unknown_contestant_or_backend_leaves_nothing(drawn, tmp_path, monkeypatch):
    for options, word in (({"labels": ["hihg"]}, "'high'"), ({"backend": "dsk"}, "'dask'")):
        with pytest.raises(UserError, match=word):
            run(drawn, tmp_path / "out", **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("dask", "ray"):
        with pytest.raises(UserError, match=f"--backend {backend} needs"):
            run(drawn, tmp_path / "out", backend=backend)
    assert not (tmp_path / "out").exists()


def test_rows_tell_cost_versions_source_and_machine(drawn, tmp_path):
    row = run(drawn, tmp_path / "out", seeds=[0], labels=["low"])[0]
    assert row["contestant"] == "10.0"
    assert row["cost"].keys() >= {"trained", "active", "samples", "passes", "seconds", "cell_seconds", "peak_mb"}
    assert row["cost"]["peak_mb"] > 10
    assert row["cost"]["cell_seconds"] >= 0
    assert row["versions"].keys() == {"python", "koinon", "torch", "numpy"}
    assert row["git"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", row["git"])
    assert "cores" in row["machine"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["when"])


# The command, with networks and trees on a made table.


def arguments(folder: Path, out: str = "out", table: Path | None = None) -> list[object]:
    """Two networks, two seeds, one process."""
    table = table or made.table(folder)
    said = ["compare", "share", "--table", table, *made.TASKS, *made.COLUMNS, "--scale", "tiny", "--out", folder / out]
    return [*said, "--methods", "shared_bottom", "mmoe", "--seeds", "2", "--jobs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison of two networks and trees, in one process."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = ShareRecipe("ratings", "tiny", table_file(made.table(folder)))
    world = recipe.prepare()
    rows = compare(recipe, world, range(2), folder / "out", ["shared_bottom", "mmoe", "trees"], jobs=1)
    report = Report(recipe.name, json.loads(json.dumps(recipe.settings(world))), rows)
    report.write(folder / "out")
    return folder, report


def table_file(path: Path) -> TableFile:
    return TableFile(path, made.TASKS[1:], group="user_id", time="when")


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_command_runs_each_cell_once_on_a_world_prepared_once(capsys, tmp_path, monkeypatch):
    counted: list[tuple] = []
    prepare, cell = ShareRecipe.prepare, ShareRecipe.cell
    monkeypatch.setattr(ShareRecipe, "prepare", lambda self: counted.append(("prepare",)) or prepare(self))

    def count(self, world, contestant, seed):
        counted.append(("cell", repr(contestant), seed))
        return cell(self, world, contestant, seed)

    monkeypatch.setattr(ShareRecipe, "cell", count)
    said = made.say(capsys, *arguments(tmp_path))
    assert said.code == 0
    assert counted.count(("prepare",)) == 1
    assert len(counted) == 5
    assert len(set(counted)) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cells", "comparison.json", "report.csv", "report.html", "report.json", "report.md", "rows.jsonl",
    ]  # fmt: skip
    assert "4/4" in said.err
    assert "report: " in said.err

    before = made.held(tmp_path)
    again = made.say(capsys, *arguments(tmp_path), "--json")
    assert len(counted) == 6  # the table is read again, no cell is run
    assert made.held(tmp_path) == before
    assert json.loads(again.out)["recipe"] == "share-ratings"
    assert "4/4 cells are there already" in again.err
    told = made.say(capsys, "report", tmp_path / "out")
    assert told.out == said.out
    assert json.loads(made.say(capsys, "report", tmp_path / "out", "--json").out) == json.loads(again.out)
    assert made.held(tmp_path) == before


def test_a_killed_comparison_goes_on_without_repeating_or_losing_a_cell(capsys, tmp_path):
    """SIGKILL in the middle, to the whole group: nothing has a chance to tidy up."""
    table = made.table(tmp_path)
    first = [*arguments(tmp_path, table=table), "--seeds", "40"]
    process = made.start(made.command(*first))
    cells = tmp_path / "out" / "cells"
    try:
        assert made.waited(lambda: list(cells.glob("*.json")) or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    survived = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 0 < len(survived) < 80
    found = [json.loads(path.read_text()) for path in survived]
    seeds = 1 + max(row["seed"] for row in found)
    assert made.say(capsys, *arguments(tmp_path, table=table), "--seeds", seeds).code == 0
    assert all(path.stat().st_mtime_ns == when for path, when in survived.items())
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 2 * seeds
    assert all(row in rows for row in found)


def test_every_way_to_run_gives_the_same_rows(finished, tmp_path, capsys):
    """Here, in two processes, and in a dask cluster: equal to the bit."""
    folder, report = finished
    expected = results(row for row in report.rows if row["label"] != "trees")
    for backend, jobs in (("loky", 2), ("dask", 1)):
        said = made.say(
            capsys,
            *arguments(tmp_path, backend, folder / "ratings.csv"), "--jobs", jobs, "--backend", backend
        )  # fmt: skip
        assert said.code == 0
        assert json.dumps(results(read_rows(tmp_path / backend))) == json.dumps(expected)


def test_other_settings_under_the_same_folder_are_refused(capsys, tmp_path, finished):
    folder, _ = finished
    out = folder / "out"
    before = made.held(folder)
    same = ["compare", "share", *made.TASKS, *made.COLUMNS, "--out", out, "--jobs", "1", "--methods", "mmoe"]
    other = made.table(tmp_path, seed=1)
    made.assert_one_line(made.say(capsys, *same, "--table", other, "--scale", "tiny"), str(out), "content", "--out")
    table = folder / "ratings.csv"
    said = made.say(capsys, *same, "--table", table, "--scale", "demo")
    made.assert_one_line(said, "scale", "'tiny' there", "'demo' now")
    assert made.held(folder) == before


def test_rows_of_networks_and_trees_tell_their_cost(finished):
    _, report = finished
    for row in report.rows:
        cost = row["cost"]
        if row["label"] == "trees":
            assert (cost["trained"], cost["active"]) == (None, None)
            assert row["contestant"].startswith("Trees(trees=BoostedTrees(")
        else:
            assert 0 < cost["active"] <= cost["trained"]
            assert cost["samples"] == 2 * 320  # epochs times training rows
            assert cost["passes"] == 2 * 2  # batches of at most 256
            assert cost["rate"] == 0.01
            assert cost["epoch"] in (1, 2)
            assert row["contestant"].startswith("Network(method=")
        assert cost["seconds"] > 0
        assert cost["peak_mb"] > 0
        assert row["metrics"].keys() >= {"like.auc", "like.gauc", "like.coverage", "stars.rmse", "stars.r2"}
        assert row["draws"].keys() == {report.settings["main"], *report.settings["shown"]}


@pytest.mark.parametrize("scale", ["demo", "small"])
def test_contestants_have_the_parameters_of_home(finished, scale):
    """Above the encoder; at scale tiny one more unit a layer is more than that."""
    folder, _ = finished
    recipe = ShareRecipe("ratings", scale, table_file(folder / "ratings.csv"))
    world = recipe.prepare()
    embedding = SCALES[scale].budget.embedding
    sizes = {
        label: _parameters(entered.method, world, embedding)
        for label, entered in recipe.contestants(world).items()
        if isinstance(entered, Network)
    }
    for label in ("single_task", "shared_bottom", "mmoe", "ple"):
        assert sizes[label] == pytest.approx(sizes["home"], rel=0.03), label


def test_a_method_of_ones_own_takes_part(capsys, tmp_path, monkeypatch):
    """A file anywhere, even of a name that Python has taken; its class travels to another process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (core.PACKAGE / "share" / "mmoe.py").read_text(encoding="utf-8")
    own = tmp_path / "json.py"
    own.write_text(text.replace("class MMoE", "class Entered").replace("(64,)", "(8,)"), encoding="utf-8")
    said = made.say(
        capsys, *arguments(tmp_path), "--own", own, "--methods", "shared_bottom", own, "--jobs", "2", "--seeds", "1"
    )
    assert said.code == 0
    assert {row["label"] for row in read_rows(tmp_path / "out")} == {"shared_bottom", str(own)}
    assert "Entered(experts=8, expert=(8,)" in (tmp_path / "out" / "rows.jsonl").read_text()
    missing = [*arguments(tmp_path), "--own", tmp_path / "nowhere.py"]
    made.assert_one_line(made.say(capsys, *missing), "nowhere.py", "no such file")


# Reports.


def test_what_a_contestant_does_not_have_is_a_dash():
    """In none of its rows, or in each of them without a value."""
    rows = [
        {
            "label": label,
            "seed": seed,
            "metrics": {"main": 1.0, "void": None} | more,
            "draws": {},
            "meters": {},
            "cost": {},
        }
        for seed in (0, 1)
        for label, more in (("one", {"other": 0.5}), ("two", {}))
    ]
    report = Report("x", {"main": "main", "shown": ["other", "void"], "baseline": "one"}, rows)
    assert [cells[3:] for cells in report.table[1]] == [["0.5000", "-"], ["-", "-"]]
    assert report.every_metric == (["method", "main", "void", "other"],
                                   [["one", "1.0000", "-", "0.5000"], ["two", "1.0000", "-", "-"]])  # fmt: skip


def test_the_html_page_needs_no_other_file(finished):
    text = (finished[0] / "out" / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") >= 4
    inside = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    inside = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inside)
    assert re.findall(r"\w+://\S+", inside) == []
    assert re.findall(r"<(?:script|link|img|iframe|object|embed)\b", inside) == []
    assert re.findall(r"url\((?!#)", inside) == []
    assert re.findall(r"@import", inside) == []
    for label in ("shared_bottom", "mmoe", "trees"):
        assert label in text


def test_the_page_escapes_what_a_table_brings():
    report = report_of({"low": [1, 2], "<script>alert(1)</script>": [2, 3]})
    text = page(report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_every_file_tells_the_same(finished):
    folder, report = finished
    out = folder / "out"
    with (out / "report.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["label"], int(line["seed"])) for line in lines] == [(r["label"], r["seed"]) for r in report.rows]
    assert float(lines[0]["mean.score"]) == report.rows[0]["metrics"]["mean.score"]
    content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in content["table"]] == report.labels
    markdown = (out / "report.md").read_text(encoding="utf-8")
    for sentence in report.sentences:
        assert sentence in content["sentences"]
        assert sentence in markdown
    assert len(read_rows(out)) == 6
    assert [row["label"] for row in read_rows(out)[:3]] == ["mmoe", "shared_bottom", "trees"]


def test_rows_are_strict_json(finished):
    """A metric without a value is null: other languages' parsers know no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    out = finished[0] / "out"
    for line in [*(out / "rows.jsonl").read_text().splitlines(), (out / "report.json").read_text()]:
        json.loads(line, parse_constant=refuse)


def test_a_report_of_some_cells_compares_the_seeds_both_have(drawn, tmp_path):
    run(drawn, tmp_path / "out", seeds=[0, 1, 2], labels=["low"])
    run(drawn, tmp_path / "out", seeds=[2, 3], labels=["high"])
    report = read_report(tmp_path / "out")
    assert report.seeds == [0, 1, 2, 3]
    assert report.difference("high", "low").mean == pytest.approx(1.0)
    report.write(tmp_path / "out")
    alone = Report(report.recipe, report.settings, [row for row in report.rows if row["label"] == "high"])
    assert alone.table[1][0][2] == "-"  # there is no baseline to compare with
    assert alone.text()


def test_costs_that_nobody_tells_are_not_shown():
    report = report_of({"low": [0.1, 0.2], "high": [0.3, 0.4]})
    rows = [row | {"cost": {"peak_mb": 7.0}} for row in report.rows]
    untimed = Report(report.recipe, report.settings, rows)
    assert untimed.table[0][-1] == "peak MB"
    assert not {"parameters", "active", "samples/s"} & set(untimed.table[0])
    assert "peak MB" in untimed.text()
    assert "speed" not in figures(untimed)
    timed = Report(report.recipe, report.settings, [rows[0] | {"cost": {"samples_per_second": 3}}, *rows[1:]])
    assert timed.table[0][-2:] == ["samples/s", "peak MB"]
    assert {cells[-2] for cells in timed.table[1]} == {"3", "-"}
    assert "speed" in figures(timed)


def test_the_best_of_a_metric_is_the_least_where_less_is_better():
    assert falls("asr.mean")
    assert falls("alone.bits_per_byte")
    assert not falls("mean.gauc")
    assert not falls("told.normalised")
    report = report_of({"low": [0.1, 0.2], "high": [0.3, 0.4]})
    for metric, best in (("told.accuracy", "high"), ("asr.transfer", "low")):
        rows = [row | {"metrics": row["metrics"] | {metric: row["metrics"]["mean.score"]}} for row in report.rows]
        drawn = figures(Report(report.recipe, {**report.settings, "shown": [metric]}, rows))["tasks"][1]
        words = [word for word in re.findall(r">([^<>]+)</text>", drawn) if word in ("low", "high", "best", "0.2000")]
        assert words[:2] == ["high", "low"]  # from above, by the main metric; the cells as well
        assert words[2:] == (["best", "0.2000"] if best == "high" else ["0.2000", "best"])


@pytest.mark.parametrize("width", [60, 120, 400])
def test_a_narrow_terminal_gets_more_tables_and_no_shortened_words(drawn, tmp_path, width):
    run(drawn, tmp_path / "out", seeds=[0, 1], labels=["low", "high"])
    report = read_report(tmp_path / "out")
    shown = [f"alone.modification.a_metric_{number}" for number in range(6)]
    rows = [row | {"metrics": row["metrics"] | dict.fromkeys(shown, 0.25)} for row in report.rows]
    wide = Report(report.recipe, {**report.settings, "shown": shown}, rows)
    table = wide.text(width).split("has the highest")[0]
    assert "…" not in table
    for word in ["low", "high", *shown]:
        assert word in table
    assert max(map(len, table.splitlines()[:-1])) <= max(width, 60)


def report_of(values: Mapping[str, list[float]], spread: float = 0.001) -> Report:
    """A report of made rows: for each contestant a score a seed, with resamplings around it."""
    shift = np.random.default_rng(0).normal(0, spread, 50)  # the same for all: differences are paired
    rows = [
        {
            "label": label,
            "contestant": f"{label}()",
            "seed": seed,
            "metrics": {"mean.score": value, "a.auc": value},
            "draws": {"mean.score": (value + shift).tolist(), "a.auc": (value + shift).tolist()},
            "meters": {},
            "cost": {"trained": 10, "active": 5, "samples_per_second": 100, "peak_mb": 50.0},
            "versions": {"koinon": "0"},
            "git": None,
            "machine": "a machine",
        }
        for label, scores in values.items()
        for seed, value in enumerate(scores)
    ]
    settings = {"data": "d", "scale": "tiny", "rows": [8, 1, 1], "split": "by hand", "sparse": [], "main": "mean.score"}
    return Report("made", settings | {"shown": ["a.auc"], "baseline": "shared_bottom"}, rows)


FIVE = [0.0, 0.01, 0.02, 0.01, 0.0]


def above(by: float) -> list[float]:
    return [0.7 + by + value for value in FIVE]


UNSURE = [0.7 + value for value in (0.06, -0.05, 0.05, -0.05, 0.0)]
SENTENCES = {
    "trees win over every network": (
        {"shared_bottom": above(0), "home": above(0.05), "trees": above(0.1)},
        ["trees has the highest mean.score", "win over every network: take them"],
        ["simpler choice", "first look"],
    ),
    "no network beats trees": (
        {"shared_bottom": above(0), "home": UNSURE, "trees": UNSURE},
        ["No network is better than gradient-boosted trees beyond doubt"],
        ["win over every network"],
    ),
    "a network beats trees": (
        {"shared_bottom": above(0), "home": above(0.1), "trees": above(0.05)},
        ["home has the highest mean.score, 0.8080 over 5 seeds", "better than trees and shared_bottom: those"],
        ["gradient-boosted", "does not support"],
    ),
    "nothing beats the baseline": (
        {"shared_bottom": above(0.1), "home": above(0.05), "mmoe": above(0)},
        ["shared_bottom has the highest", "Nothing here is better than shared_bottom"],
        ["gradient-boosted"],
    ),
    "the best is not supported": (
        {"shared_bottom": UNSURE[::-1], "home": [value + 0.001 for value in UNSURE]},
        ["home has the highest", "does not support that it is better than shared_bottom", "Nothing here is better"],
        ["The table supports"],
    ),
    "better than the baseline": (
        {"shared_bottom": above(0), "home": above(0.1), "mmoe": above(0.05)},
        ["Better than shared_bottom, the simplest sharing, beyond doubt: home and mmoe."],
        ["Nothing here"],
    ),
    "few seeds": ({"shared_bottom": above(0)[:2], "home": above(0.1)[:2]}, ["Fewer than five seeds"], []),
    "one contestant": ({"home": above(0)}, ["home has the highest"], ["shared_bottom", "support"]),
}


@pytest.mark.parametrize(("values", "said", "unsaid"), SENTENCES.values(), ids=SENTENCES)
def test_sentences_say_what_the_intervals_support(values, said, unsaid):
    text = " ".join(report_of(values).sentences)
    for words in said:
        assert words in text
    for words in unsaid:
        assert words not in text


def test_bounds_do_not_compete_and_a_recipe_has_words_of_its_own():
    report = report_of({"shared_bottom": above(0), "home": above(0.1), "told": above(0.2)})
    words = {"baseline": "the plainest", "chosen": "Widths"}
    report = replace(report, settings=report.settings | {"bounds": ["told"], "words": words})
    text = " ".join([*report.sentences, *report.notes])
    assert text.startswith("home has the highest")
    assert "Better than shared_bottom, the plainest, beyond doubt: home." in text
    assert "do not: told." in text
    assert "Widths are chosen on the validation part" in text


def test_rows_of_different_versions_are_pointed_out():
    report = report_of({"shared_bottom": above(0)})
    assert not any("Careful" in note for note in report.notes)
    mixed = [row | {"git": str(row["seed"])} for row in report.rows]
    assert any("Careful: the rows come from 5 different versions" in n for n in replace(report, rows=mixed).notes)
