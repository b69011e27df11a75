"""Editing with koinon and with EasyEdit: what is changed, then what it costs.

python benchmarks/edit/speed.py --peer ENVIRONMENT/bin/python --repository EasyEdit [--quick]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from jobs import Job, anonymous
from made import corpus, facts, models
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PAUSE = 0.01
"""Seconds between two looks at a process's memory."""
WRITING: dict[str, Any] = {"rate": 0.5, "kl": 0.0625, "decay": 1e-3, "bound": 4.0}
ROME, MEMIT = WRITING | {"count": 10}, WRITING | {"count": 5, "weight": 15_000.0}
GRACE: dict[str, Any] = {"rate": 1.0, "radius": 1.0}
WISE: dict[str, Any] = {"rate": 1.0, "share": 0.2, "bound": 1.0, "shard": 25}
PARTS = ("values", "costs")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    method: str
    model: str
    layers: list[int]
    steps: int
    edits: int
    """One on top of the other."""
    settings: dict[str, Any]
    whiten: bool = True


VALUES = (
    Case("rome", "world", [1], 20, 10, ROME | {"last": 3}, whiten=False),
    Case("rome", "world", [1], 20, 10, ROME | {"last": 3}),
    Case("memit", "world", [0, 1, 2], 20, 10, MEMIT | {"last": 3}),
    Case("grace", "world", [2], 50, 10, GRACE),
)
COSTS = (
    Case("rome", "smol", [5], 20, 5, ROME | {"last": 29}, whiten=False),
    Case("memit", "smol", [4, 5, 6, 7, 8], 20, 5, MEMIT | {"last": 29}),
    Case("grace", "smol", [23], 50, 5, GRACE),
    Case("wise", "world", [2], 70, 50, WISE),
)


@dataclass(frozen=True)
class Run:
    """What one process told."""

    lines: dict[str, dict[str, Any]]
    """By what was done."""
    peak: float
    """Anonymous bytes at the most."""

    @property
    def each(self) -> list[list[float]]:
        """Of each edit: seconds, processor seconds, forward passes."""
        return self.lines["edit"]["each"]

    def seconds(self, *done: str) -> float:
        """By the processor."""
        return sum(self.lines[its]["processor"] for its in done)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--peer", required=True, help="the interpreter of the environment EasyEdit runs in")
    arguments.add_argument("--repository", type=Path, required=True, help="of EasyEdit")
    arguments.add_argument("--folder", type=Path, default=Path("runs/edit-speed"), help="for the models and results")
    arguments.add_argument("--rounds", type=int, default=2, help="each with facts of its own")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    arguments.add_argument("--methods", nargs="+", default=("rome", "memit", "grace", "wise"))
    arguments.add_argument("--quick", action="store_true", help="2 edits each, the small model: shows that it runs")
    chosen = arguments.parse_args()
    chosen.folder = chosen.folder.resolve()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen)
    bench.console.print(machine(chosen))
    for part in chosen.parts:
        getattr(bench, part)()


class Bench:
    """The parts of the benchmark, each printing its table."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.console = chosen, Console(width=150)
        self.models = models(chosen.folder, ("world",) if chosen.quick else ("world", "smol"))
        self.sides = {"koinon": (sys.executable, "ours.py"), "EasyEdit": (chosen.peer, "theirs.py")}
        self.facts, self.texts = facts(50), corpus(2000)

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        """Those that were asked for."""
        its = [case for case in cases if case.method in self.chosen.methods]
        if not self.chosen.quick:
            return its
        small = {case.method: case for case in VALUES}
        return [replace(case if case in VALUES else small.get(case.method, case), edits=2) for case in its]

    def job(self, case: Case) -> Job:
        """For both sides, with beginnings and moments that koinon has made."""
        name = f"{case.method}-{case.model}" + ("" if case.whiten else "-plain")
        its = Job(case.method, str(self.models[case.model]), [], case.layers, case.steps, whiten=case.whiten)
        its.settings, its.threads = case.settings, self.chosen.threads
        its.repository = str(self.chosen.repository.resolve())
        its.unrelated = [text[:30] for text in self.texts[:100]] if case.method == "wise" else []
        if case.method in ("rome", "memit") and case.whiten:
            its.moments = str(self.chosen.folder / f"{name}.safetensors")
            its.corpus = self.texts[: 2000 if case.model == "world" else 300]
        if case.method != "grace":
            its.kept = str(self.chosen.folder / f"{name}-before.json")
            self.run("koinon", its)
            its.before = json.loads(Path(its.kept).read_text())
        its.kept = ""
        return its

    def run(self, side: str, job: Job) -> Run:
        """In a process of its own.

        Raises:
            SystemExit: it failed.
        """
        python, script = self.sides[side]
        words = [python, "-W", "ignore", str(HERE / script), str(job.write(self.chosen.folder / f"{side}.json"))]
        more = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        errors = self.chosen.folder / f"{side}.log"
        with errors.open("w") as log:
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | more, cwd=self.chosen.folder
            )
            peak = 0.0

            def watch() -> None:
                nonlocal peak
                while process.poll() is None:
                    peak = max(peak, anonymous(process.pid))
                    time.sleep(PAUSE)

            watcher = threading.Thread(target=watch)
            watcher.start()
            out, _ = process.communicate()
            watcher.join()
        if process.returncode:
            raise SystemExit(f"{side} failed:\n{errors.read_text()[-3000:]}")
        return Run({line["done"]: line for line in map(json.loads, out.splitlines())}, peak)

    def values(self) -> None:
        """What each edit of an unedited model changes, number by number."""
        table = self.table(
            "Change of each edit alone", "", "C", "edits", "numbers", "most / largest", "median of edits"
        )
        for case in self.cases(VALUES):
            job = replace(self.job(case), facts=self.facts[: case.edits], separately=True)
            found = {}
            for side in self.sides:
                job.kept = str(self.chosen.folder / f"{side}-{case.method}.safetensors")
                self.run(side, job)
                found[side] = job.kept
            apart, count = compared(found["koinon"], found["EasyEdit"])
            c = ("yes" if case.whiten else "no") if case.method in ("rome", "memit") else ""
            table.add_row(case.method, c, str(case.edits), f"{count:,}", f"{max(apart):.1e}", f"{median(apart):.1e}")
        self.console.print(table)

    def costs(self) -> None:
        """What edits cost that are made one on top of the other."""
        columns = ("", "", "edits", "passes", "CPU s / edit", "times", "s / edit", "times", "start CPU s",
                   "prepare CPU s", "MB", "times", "of it in editing", "times")  # fmt: skip
        table = self.table("Sequential edits", *columns)
        for case in self.cases(COSTS):
            job = self.job(case)
            runs: dict[str, list[Run]] = {side: [] for side in self.sides}
            for number in range(1 if self.chosen.quick else self.chosen.rounds):
                start = number * case.edits % len(self.facts)
                job.facts = self.facts[start : start + case.edits]
                for side in self.sides:
                    runs[side].append(self.run(side, job))
                    self.console.print(
                        f"{case.method} {side}: {' '.join(f'{its[1]:.2f}' for its in runs[side][-1].each)}"
                    )
            ours = [measured(its) for its in runs["koinon"]]
            for side, its in runs.items():
                mine = [measured(one) for one in its]
                row = [median(one[place] for one in mine) for place in range(len(mine[0]))]
                times = ["" if side == "koinon" else f"{ratio(mine, ours, place):.2f}" for place in range(len(row))]
                table.add_row(
                    f"{case.method}, {case.model}" if side == "koinon" else "", side, str(case.edits), f"{row[6]:.0f}",
                    f"{row[0]:.2f}", times[0], f"{row[1]:.2f}", times[1], f"{row[2]:.1f}", f"{row[3]:.1f}",
                    f"{row[4]:,.0f}", times[4], f"{row[5]:,.0f}", times[5],
                )  # fmt: skip
        self.console.print(table)

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right" if table.columns else "left")
        return table


def measured(run: Run) -> list[float]:
    """Medians over edits, and the rest of the table's row."""
    bare, given = run.lines["torch"]["anonymous"], run.lines["given"]["anonymous"]
    wall, processor, passes = (median(each) for each in zip(*run.each, strict=True))
    start, prepare = run.seconds("torch", "import", "load"), run.seconds("prepare")
    return [processor, wall, start, prepare, (run.peak - bare) / 1e6, (run.peak - given) / 1e6, passes]


def ratio(mine: Sequence[Sequence[float]], ours: Sequence[Sequence[float]], place: int) -> float:
    """The median over rounds."""
    return median(one[place] / max(other[place], 1e-9) for one, other in zip(mine, ours, strict=True))


def compared(ours: str, theirs: str) -> tuple[list[float], int]:
    """For each tensor the largest difference as a share of the largest number; and how many numbers there are."""
    from safetensors.torch import load_file

    one, other = load_file(ours), load_file(theirs)
    if one.keys() != other.keys():
        raise SystemExit(f"koinon changed {sorted(one)}, EasyEdit {sorted(other)}")
    apart = [float((one[name] - its).abs().max() / its.abs().max()) for name, its in other.items()]
    return apart, sum(its.numel() for its in other.values())


def machine(chosen: argparse.Namespace) -> str:
    cpu = next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    question = "from importlib.metadata import version as v; print(v('torch'), v('transformers'))"
    theirs = subprocess.run([chosen.peer, "-c", question], check=True, capture_output=True, text=True).stdout.split()
    git = ["git", "-C", str(chosen.repository), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "of an unknown commit"
    ours = ", ".join(f"{package} {version(package)}" for package in ("koinon", "torch", "transformers"))
    return (
        f"{ours}, Python {platform.python_version()}; EasyEdit {commit} with torch {theirs[0]}, transformers "
        f"{theirs[1]}; {cpu}, {chosen.threads} thread, load {os.getloadavg()[0]:.1f}; {chosen.rounds} rounds"
    )


if __name__ == "__main__":
    main()
