"""The command line: every command works, errors are one line, help and lists are light, Ctrl-C keeps what is done."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import made
import pytest

from koinon import core
from koinon.cli import COMMANDS
from koinon.data import sources
from koinon.lm import shelf
from koinon.systems import SYSTEMS

HELP = [
    *([name] for name in COMMANDS if name != "compare"),
    ["share", "mmoe"],
    ["share", "predict"],
    ["compare", "share"],
    ["compare", "share", "--table", "x.csv"],
]
JSON = {
    "list": ["list", "--json"],
    "list of a capability": ["list", "share", "--json"],
    "show": ["show", "share.home", "--json"],
    "ledger": ["ledger", "--json"],
    "ledger of a system": ["ledger", "36", "--json"],
    "data": ["data", "--json"],
    "check": ["check", "share.shared_bottom", "--json"],
}
UNKNOWN = {
    "command": (["lst"], ["'lst'", "'list'"]),
    "method": (["show", "share.hom"], ["'share.hom'", "'share.home'"]),
    "method of a capability": (["share", "mmo"], ["'mmo'", "'mmoe'"]),
    "method to check": (["check", "share.pel"], ["'share.pel'", "'share.ple'"]),
    "file to check": (["check", "nowhere.py"], ["nowhere.py", "no such file"]),
    "capability": (["list", "shar"], ["'shar'", "'share'"]),
    "comparison": (["compare", "shar"], ["'shar'", "'share'"]),
    "option": (["list", "--jsn"], ["--jsn", "--json"]),
    "option beside missing ones": (["share", "mmoe", "--tabel", "x.csv"], ["'--tabel'", "'--table'"]),
    "data set": (["compare", "share", "--data", "movielen"], ["'movielen'", "'movielens'"]),
    "data source": (["data", "get", "movielen"], ["'movielen'", "'movielens'"]),
    "verb of data": (["data", "gte"], ["'gte'", "'get'"]),
    "scale": (["compare", "share", "--scale", "tinny"], ["'tinny'", "'tiny'"]),
    "system": (["ledger", "99"], ["99", "1 to 81"]),
    "number": (["ledger", "x"], ["'x'"]),
}
MISSING = {
    "method": (["show"], ["METHOD"]),
    "method to check": (["check"], ["METHOD"]),
    "folder": (["report"], ["FOLDER"]),
    "model": (["share", "predict", "--table", "x.csv"], ["MODEL", "--out"]),
    "all of a job": (["share", "home"], ["--table", "--tasks", "--out", "koinon share home --help"]),
    "tasks": (["compare", "share", "--table", "x.csv"], ["--tasks"]),
    "value": (["compare", "share", "--table"], ["--table"]),
    "name": (["data", "get"], ["movielens"]),
}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command_and_method(capsys, arguments):
    said = made.say(capsys, *arguments)
    assert said.code == 0
    for name in [*COMMANDS, *core.capabilities()]:
        assert f"  {name}" in said.out
    assert all(name.split(".")[1] in said.out for name in core.names())


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_every_command_tells_its_options(capsys, arguments):
    said = made.say(capsys, *arguments, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: koinon {arguments[0]}")
    assert said.err == ""


@pytest.mark.parametrize("name", ["compare", "share"])
def test_a_command_that_needs_a_word_lists_the_words(capsys, name):
    assert "usage: koinon" in made.say(capsys, name).out


def test_version(capsys):
    assert made.say(capsys, "--version").out.startswith("koinon 0.")


def test_list_names_every_method_with_its_mechanism(capsys):
    rows = json.loads(made.say(capsys, "list", "--json").out)
    assert [row["name"] for row in rows] == core.names()
    assert all(": " in row["summary"] for row in rows)
    assert all(name in made.say(capsys, "list").out for name in core.names())


def test_show_tells_settings_and_systems(capsys):
    text = made.say(capsys, "show", "share.home").out
    for word in ("HoME", "https://", "meta_feature_gates", "part of system"):
        assert word in text
    facts = json.loads(made.say(capsys, "show", "share.home", "--json").out)
    assert {field["name"]: field["default"] for field in facts["fields"]}["expert"] == "(64,)"
    assert all(field["meaning"] for field in facts["fields"])


def test_ledger_has_81_systems_and_one_systems_claims(capsys):
    assert len(json.loads(made.say(capsys, "ledger", "--json").out)) == len(SYSTEMS) == 81
    with_claims = next(system for system in SYSTEMS if system.claims)
    (row,) = json.loads(made.say(capsys, "ledger", with_claims.number, "--json").out)
    assert [claim["says"] for claim in row["claims"]] == [claim.says for claim in with_claims.claims]
    assert {claim["state"] for claim in row["claims"]} <= {"held", "not held", "untested"}
    assert "claim" in made.say(capsys, "ledger", with_claims.number).out


def test_data_tells_licence_and_place(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path))
    rows = {row["name"]: row for row in json.loads(made.say(capsys, "data", "--json").out)}
    assert rows.keys() == {*sources.SOURCES, *shelf.MODELS}
    assert "research" in rows["movielens"]["licence"]
    assert not any(row["here"] for row in rows.values())
    assert list(tmp_path.iterdir()) == []
    assert "movielens" in made.say(capsys, "data").out


@pytest.mark.parametrize("arguments", JSON.values(), ids=JSON)
def test_json_is_json(capsys, arguments, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # check puts the working folder there

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    said = made.say(capsys, *arguments)
    assert said.code == 0
    assert json.loads(said.out, parse_constant=refuse)


def test_check_finds_a_dead_field_in_ones_own_file(capsys, tmp_path, monkeypatch):
    """The file lies outside the working folder, as a path that a person types may."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (core.PACKAGE / "share" / "shared_bottom.py").read_text(encoding="utf-8")
    text = text.replace("class SharedBottom", "class Deadened")
    dead = '    dead: int = 1\n    """Does nothing."""\n    swish: bool'
    (tmp_path / "deadened.py").write_text(text.replace("    swish: bool", dead), encoding="utf-8")
    said = made.say(capsys, "check", tmp_path / "deadened.py", "--json")
    failed = {row["check"]: row["result"] for row in json.loads(said.out) if row["result"].startswith("FAILED")}
    assert list(failed) == ["dead_is_live"]
    assert "turning dead to 2 changes nothing" in failed["dead_is_live"]
    assert said.code == 1
    assert "Deadened" in made.say(capsys, "show", tmp_path / "deadened.py", "--json").out


@pytest.mark.parametrize(("arguments", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_is_one_line_with_the_near_match(capsys, arguments, words):
    made.assert_one_line(made.say(capsys, *arguments), *words)


@pytest.mark.parametrize(("arguments", "words"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_one_line(capsys, arguments, words):
    made.assert_one_line(made.say(capsys, *arguments), *words)


@pytest.mark.parametrize("width", ["30", "80", "200"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(MISSING["all of a job"]), (UNKNOWN["option"]), (UNKNOWN["option beside missing ones"])],
    ids=["missing", "unknown", "both"],
)
def test_the_line_depends_on_no_terminal(capsys, monkeypatch, arguments, words, encoding, width):
    """tyro draws its boxes in the terminal's width and alphabet; the line is read off them."""
    monkeypatch.setenv("COLUMNS", width)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out):
        said = made.say(capsys, *arguments)
    made.assert_one_line(said, *words)
    for drawn in ("──", "--- ", "│", "For full helptext", "(required)"):
        assert drawn not in said.err


def test_help_and_lists_import_no_torch():
    """A person waits for these; torch alone takes seconds."""
    program = """
        import sys
        import koinon.core
        assert not {"torch", "numpy", "polars"} & set(sys.modules), "core is heavy"
        from koinon.cli import main
        for words in (["--help"], ["list"], ["list", "share", "--json"], ["share"], ["compare"], ["ledger"], ["data"]):
            main(words)
            assert not {"torch", "polars", "sklearn"} & set(sys.modules), words
        try:
            main(["lst"])
        except SystemExit as end:
            assert end.code == 2
        assert "torch" not in sys.modules, "an unknown command"
    """
    program = "\n".join(line.removeprefix("        ") for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    process = made.start(made.command("ledger", "--json"))
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in err
    assert "Error" not in err


@pytest.mark.parametrize("finished", [1, 6], ids="{} cells".format)
def test_ctrl_c_keeps_whole_cells_and_a_second_run_goes_on(finished, capsys, tmp_path):
    """The signal goes to the whole group, as a terminal sends it: while a worker still imports, and while both run."""
    out = tmp_path / "runs"
    arguments = ["compare", "share", "--table", made.table(tmp_path), *made.TASKS, *made.COLUMNS, "--scale", "tiny"]
    arguments += ["--methods", "shared_bottom", "mmoe", "--out", out]
    process = made.start(made.command(*arguments, "--seeds", 40, "--jobs", 2))
    try:
        assert made.waited(lambda: len(list(out.glob("cells/*.json"))) >= finished or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, stderr
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if "/80 " not in line]  # how far it has come
    assert lines == ["koinon: stopped; what was finished is kept"]
    cells = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert 0 < len(cells) < 80
    assert all(json.loads(path.read_text())["metrics"] for path in cells)
    assert sorted(path.name for path in out.iterdir()) == ["cells", "comparison.json"]
    assert {path.suffix for path in (out / "cells").iterdir()} == {".json"}
    seeds = 1 + max(json.loads(path.read_text())["seed"] for path in cells)
    assert made.say(capsys, *arguments, "--seeds", seeds, "--jobs", 1).code == 0
    assert all(path.stat().st_mtime_ns == when for path, when in cells.items())
    assert len(list(Path(out).glob("cells/*.json"))) == 2 * seeds
