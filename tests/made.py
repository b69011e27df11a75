"""Made tables, the command line called from a test, and what a folder holds: shared by the end-to-end tests."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from koinon.cli import main

TASKS = ("--tasks", "like:positive", "hate:negative", "stars:positive=regression")
"""Two binary tasks, one with missing labels, and a regression."""
COLUMNS = ("--group", "user_id", "--time", "when")
QUICK = ("--epochs", "1", "--embedding", "2")
"""For `koinon share METHOD`: a model in a tenth of a second."""


def frame(rows: int = 400, seed: int = 0) -> pl.DataFrame:
    """A table of 20 people's ratings that follow three numbers; every third label of ``hate`` is missing."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 3))
    score = x @ np.array([1.0, -0.5, 0.2])
    like, hate = (score + rng.normal(0, 0.5, rows) > 0), (score + rng.normal(0, 0.5, rows) < -0.2)
    return pl.DataFrame(
        {
            "user_id": np.arange(rows) % 20,
            "when": np.arange(rows),
            "city": rng.choice(["Athens", "Bern", "Cork"], rows),
            "x0": x[:, 0],
            "x1": x[:, 1],
            "x2": x[:, 2],
            "like": like.astype(int),
            "hate": [int(h) if row % 3 else None for row, h in enumerate(hate)],
            "stars": 30 + 10 * score,
        }
    )


def table(folder: Path, name: str = "ratings.csv", rows: int = 400, seed: int = 0) -> Path:
    """The made table as a CSV file."""
    frame(rows, seed).write_csv(folder / name)
    return folder / name


class Said(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def say(capsys, *arguments: object) -> Said:
    """Run a command in this process; an exception that is no exit goes through, as a person's traceback would."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return Said(code, out, err)


def command(*arguments: object) -> list[str]:
    """The same for a process of its own."""
    return [sys.executable, "-m", "koinon.cli", *(str(argument) for argument in arguments)]


def start(arguments: Sequence[str]) -> subprocess.Popen:
    """A process in a group of its own, so that a signal reaches its children and nothing else."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=os.name == "posix"
    )


def waited(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Look again until the condition holds; False if it does not within the bound."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def held(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a digest of each file: equal before and after means nothing was touched."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(said: Said, *words: str, code: int = 2) -> None:
    """An error a person can cause: this exit code, nothing on stdout, one line on stderr that says these words."""
    assert said.code == code, said
    assert said.out == ""
    assert said.err.startswith("koinon: ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    for word in words:
        assert word in said.err
