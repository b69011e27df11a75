"""Run a comparison: contestants x seeds as cells, in parallel, each kept on disk as soon as it is finished."""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import joblib

from koinon.core import PACKAGE, UserError, pick

Row = dict[str, Any]
"""One finished cell: label, contestant, seed, metrics, draws, meters, cost, versions, machine."""
CELL = {"label", "contestant", "seed", "metrics", "draws", "meters", "cost", "versions", "git", "machine"}
"""What every row has."""
BACKENDS: Mapping[str, str] = {"loky": "joblib", "dask": "distributed", "ray": "ray"}
"""joblib's backend and the package it needs."""


class Recipe(ABC):
    """A comparison on one data set. A frozen dataclass: it is sent to other processes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """``capability-data``, which also names the folder of its results."""

    @property
    @abstractmethod
    def seeds(self) -> int:
        """How many seeds to run if nothing else is asked for."""

    @abstractmethod
    def prepare(self) -> Any:
        """Load the data once; what it returns goes to every `cell`."""

    @abstractmethod
    def settings(self, world: Any) -> Mapping[str, Any]:
        """All that must be equal for two rows to be compared, as plain data."""

    @abstractmethod
    def contestants(self, world: Any) -> Mapping[str, Any]:
        """Label to contestant; ``repr`` of a contestant tells its settings."""

    @abstractmethod
    def cell(self, world: Any, contestant: Any, seed: int) -> Row:
        """Train, choose and measure one contestant; gives ``metrics``, ``draws``, ``meters`` and ``cost``."""


def compare(
    recipe: Recipe,
    world: Any,
    seeds: Sequence[int],
    folder: Path,
    labels: Sequence[str] | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    progress: Callable[[int, int, Row | None], None] = lambda done, total, row: None,
) -> list[Row]:
    """Run every cell that ``folder`` does not hold yet; returns the rows of all cells asked for, `in_order`.

    Args:
        recipe: what to compare.
        world: what ``recipe.prepare`` gave.
        seeds: one cell for each contestant and seed; seeds are paired across contestants.
        folder: where cells are kept; made if it does not exist.
        labels: the contestants to run; all if None.
        jobs: parallel processes of one thread each; as many as there are cores if None.
        backend: of joblib: ``"loky"`` for processes here, ``"dask"`` or ``"ray"`` for a cluster.
        progress: told how many cells are done, of how many, and the newest row.

    Raises:
        UserError: the folder holds rows of other settings, or a damaged cell.
    """
    _check_backend(backend)
    contestants = recipe.contestants(world)
    chosen = [pick(label, contestants, "contestant") for label in (labels or contestants)]
    store = Cells(folder, recipe.name, recipe.settings(world))
    found = {(label, seed): store.find(label, repr(contestants[label]), seed) for seed in seeds for label in chosen}
    missing = [cell for cell, row in found.items() if row is None]
    done = len(found) - len(missing)
    progress(done, len(found), None)
    calls = [joblib.delayed(_run)(recipe, world, label, contestants[label], seed) for label, seed in missing]
    with _parallel(backend, jobs) as parallel, _ended(parallel(calls)) as rows:
        for row in rows:
            store.keep(row)
            found[row["label"], row["seed"]] = row
            done += 1
            progress(done, len(found), row)
    return in_order(row for row in found.values() if row is not None)


class Cells:
    """A folder of finished cells, all of one comparison's settings.

    Args:
        folder: made if it does not exist.
        name: the recipe's.
        settings: the comparison's; kept in ``comparison.json``.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]):
        self.folder = folder
        head = json.loads(json.dumps({"recipe": name, "settings": settings}))
        file = folder / "comparison.json"
        try:
            (folder / "cells").mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_whole(file, json.dumps(head, indent=1))
        except OSError as error:
            raise UserError(f"{folder}: cannot keep results there ({error.strerror})") from None
        held = read_whole(file)
        for key in ("recipe", *head["settings"]):
            old, new = (part if key == "recipe" else part.get("settings", {}) for part in (held, head))
            if old.get(key) != new[key]:
                raise UserError(
                    f"{folder}: holds results of other settings ({key}: {old.get(key)!r} there, {new[key]!r} now); "
                    "give another --out, or delete that folder"
                )

    def find(self, label: str, contestant: str, seed: int) -> Row | None:
        """The row of a finished cell, or None."""
        file = self._file(label, contestant, seed)
        if not file.exists():
            return None
        row = read_cell(file)
        if (row["label"], row["contestant"], row["seed"]) != (label, contestant, seed):
            raise UserError(f"{file}: damaged cell: delete it, and it is run again")
        return row

    def keep(self, row: Row) -> None:
        """Write a finished cell, whole or not at all."""
        write_whole(self._file(row["label"], row["contestant"], row["seed"]), json.dumps(row))

    def _file(self, label: str, contestant: str, seed: int) -> Path:
        digest = hashlib.blake2b(f"{label} {contestant}".encode(), digest_size=4).hexdigest()
        return self.folder / "cells" / f"{re.sub(r'[^A-Za-z0-9_-]', '_', label)}-{digest}-seed{seed}.json"


def write_whole(file: Path, text: str) -> None:
    """Write beside, then rename: the file is there whole or not at all."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By seed and label, however they were run: the same cells make the same files."""
    return sorted(rows, key=lambda row: (row["seed"], row["label"]))


def read_cell(file: Path) -> Row:
    """A finished cell; raises UserError if it is damaged."""
    row = read_whole(file)
    if not row.keys() >= CELL:
        raise UserError(f"{file}: damaged cell: delete it, and it is run again")
    return row


def read_whole(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}): delete it, and it is made again") from None
    return content


def _check_backend(backend: str) -> None:
    needed = BACKENDS[pick(backend, BACKENDS, "backend")]
    if importlib.util.find_spec(needed) is None:
        raise UserError(f"--backend {backend} needs {backend}: pip install {needed}")


@contextlib.contextmanager
def _parallel(backend: str, jobs: int | None) -> Iterator[Callable[[Iterable[Any]], Iterable[Row]]]:
    """Gives what runs calls and hands on their rows as they come; processes here are started when it is called."""
    options: dict[str, Any] = {}
    stack = contextlib.ExitStack()
    with stack:
        if backend == "loky":
            options = {"inner_max_num_threads": 1}
        elif backend == "dask":
            stack.enter_context(_dask(jobs))
        else:
            _ray(jobs)
        stack.enter_context(joblib.parallel_config(backend=backend, n_jobs=jobs or -1, **options))
        # Ray's joblib backend cannot hand results back one by one.
        parallel = joblib.Parallel(return_as="list" if backend == "ray" else "generator_unordered")

        def started(calls: Iterable[Any]) -> Iterable[Row]:
            with _deaf_children():
                return parallel(calls)

        yield started if backend == "loky" else parallel


@contextlib.contextmanager
def _ended(rows: Iterable[Row]) -> Iterator[Iterable[Row]]:
    """Afterwards nothing runs that was to give further rows; joblib would advise who stops it to ask for less."""
    try:
        yield rows
    finally:
        if isinstance(rows, Generator):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"\d+ tasks (which were|have been)", UserWarning)
                rows.close()


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started within do not hear Ctrl-C: the one that started them does, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _dask(jobs: int | None) -> Iterator[None]:
    """The cluster named by DASK_SCHEDULER_ADDRESS, or a local one."""
    from distributed import Client

    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    options: dict[str, Any] = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    with Client(address) if address else Client(**options):
        yield


def _ray(jobs: int | None) -> None:
    """The cluster named by RAY_ADDRESS, or a local one."""
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else jobs, ignore_reinit_error=True, log_to_driver=False)
    register_ray()


def _run(recipe: Recipe, world: Any, label: str, contestant: Any, seed: int) -> Row:
    """One cell, in a process of its own with one thread."""
    import torch

    torch.set_num_threads(1)
    reset_peak_memory()
    start = time.perf_counter()
    row = recipe.cell(world, contestant, seed)
    row["cost"] |= {"cell_seconds": round(time.perf_counter() - start, 3), "peak_mb": peak_memory()}
    return {"label": label, "contestant": repr(contestant), "seed": seed} | row | stamp()


def stamp() -> Row:
    """Versions, source state and machine, as every row carries them."""
    packages = ("koinon", "torch", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "git": _git_state(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_state() -> str | None:
    """The commit koinon runs from, with ``+`` if files differ from it; None for an installed package."""
    try:
        here = ["git", "-C", str(PACKAGE)]
        commit = subprocess.run([*here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        inside = subprocess.run([*here, "ls-files", "core.py"], capture_output=True, text=True, check=True)
        if not inside.stdout.strip():
            return None
        changed = subprocess.run([*here, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on (Linux; elsewhere it counts from the start of the process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float | None:
    """The process's largest resident size, in MB; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024, 1)
    if sys.platform == "win32":
        return None
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(size / (1024**2 if sys.platform == "darwin" else 1024), 1)
