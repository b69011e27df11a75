"""Merging models on disk with koinon and with mergekit: what is computed, then what it costs.

python benchmarks/merge/speed.py --mergekit ENVIRONMENT/bin/mergekit-yaml [--quick]
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from statistics import median

from contestants import Contestant, Cost, cold, copy, koinon, mergekit, size, warm
from equal import compare, compare_trimmed, dropped
from made import SHARD, TINY, Shape, many, models, recipe, sized
from rich.console import Console
from rich.table import Table

WORDS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp")
DENSITY = 0.3
PARTS = ("values", "costs", "floor", "scaling")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="its command, mergekit-yaml")
    arguments.add_argument("--koinon", default=f"{sys.executable} -m koinon.cli", help="koinon's command")
    arguments.add_argument("--folder", type=Path, default=Path("runs/merge-speed"), help="for the models that are made")
    arguments.add_argument("--parameters", type=float, default=1e9, help="of each model")
    arguments.add_argument("--tensors", type=float, default=6303, help="of the model of many small ones")
    arguments.add_argument("--models", type=int, default=3, help="the base and those near it")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--methods", nargs="+", default=WORDS, choices=WORDS)
    arguments.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    arguments.add_argument("--no-async", action="store_true", help="run mergekit once, without --async-write")
    arguments.add_argument(
        "--quick", action="store_true", help="1e8 parameters, one round: shows that it runs, no more"
    )
    chosen = arguments.parse_args()
    if not chosen.mergekit:
        arguments.error("no mergekit-yaml here: install mergekit in an environment of its own and give --mergekit")
    if chosen.quick:
        chosen.parameters, chosen.tensors, chosen.rounds = min(chosen.parameters, 1e8), min(chosen.tensors, 1803), 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.cores])
    chosen.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen)
    bench.console.print(machine(chosen))
    for part in chosen.parts:
        getattr(bench, part)()


class Bench:
    """The parts of the benchmark, each printing its tables."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.folder, self.rounds = chosen, chosen.folder, chosen.rounds
        self.console = Console(width=140)
        self.out = self.folder / "out"
        self.ours = koinon(chosen.koinon, sys.executable, chosen.cores, SHARD)
        self.exact = koinon(chosen.koinon, sys.executable, chosen.cores, SHARD, "every-step")
        self.theirs = mergekit(chosen.mergekit, chosen.cores, SHARD)
        fast = mergekit(chosen.mergekit, chosen.cores, SHARD, asynchronous=True)
        self.sides = (self.ours, self.theirs) if chosen.no_async else (self.ours, self.theirs, fast)
        self.tiny = models(self.folder, TINY, chosen.models)

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right" if table.columns else "left")
        return table

    def recipe(self, word: str, paths: Sequence[Path], **parameters: object) -> Path:
        path = self.folder / f"{word}.yml"
        path.write_text(recipe(word, paths, **parameters))
        return path

    def results(self, word: str, paths: Sequence[Path]) -> dict[str, Path]:
        """Folders of mergekit's result and of koinon's, rounded after every step or once; removed by `values`."""
        found = {}
        for name, side in (("mergekit", self.theirs), ("every step", self.exact), ("once", self.ours)):
            found[name] = self.folder / f"out {name}"
            side.merge(self.recipe(word, paths), found[name], keep=True)
        return found

    # What is computed.

    def values(self) -> None:
        """Element by element, on a smaller model: rounded after every step, as mergekit does, and once, the default."""
        paths = models(self.folder, sized(min(self.chosen.parameters, 1e8)), self.chosen.models)
        table = self.table(
            "Against mergekit's result", "", "rounding", "elements", "differ", "by > 1 step", "most / RMS"
        )
        for word in ("linear", "task_arithmetic", "slerp"):
            outs = self.results(word, paths)
            for rounding in ("every step", "once"):
                table.add_row(word, rounding, *compare(outs[rounding], outs["mergekit"]))
        self.console.print(table)
        columns = ("", "rounding", "elements", "tied at the edge", "others that differ", "tied that differ")
        table = self.table(f"TIES, density {DENSITY}", *columns)
        outs = self.results("ties", paths)
        for rounding in ("every step", "once"):
            table.add_row("ties", rounding, *compare_trimmed(outs[rounding], outs["mergekit"], paths, DENSITY))
        self.console.print(table)
        table = self.table(f"DARE of one model, density {DENSITY}", "", "kept", "its sum of sizes / all")
        outs = self.results("dare_linear", paths[:2])
        for name in ("mergekit", "every step", "once"):
            label = name if name == "mergekit" else f"koinon, {name}"
            table.add_row(label, *dropped(outs[name], paths[0], paths[1], 0.5))
        self.console.print(table)
        for out in outs.values():
            shutil.rmtree(out)

    # What it costs.

    def costs(self) -> None:
        """Time and memory of every method, on large tensors and on many small ones."""
        for title, shape in (("", sized(self.chosen.parameters)), ("many tensors: ", many(self.chosen.tensors))):
            paths = models(self.folder, shape, self.chosen.models)
            columns = ("", "", "seconds", "start-up", "net", "net / koinon", "CPU s", "flush", "MB", "of it start-up",
                       "GB in", "out")  # fmt: skip
            table = self.table(title + described(shape, len(paths)), *columns)
            for word in self.chosen.methods:
                self.rows(table, word, paths, self.sides, shape)
            self.console.print(table)

    def rows(self, table: Table, word: str, paths: Sequence[Path], sides: Sequence[Contestant], shape: Shape) -> None:
        """One row a contestant, who take turns; the files are in the system's memory before each run."""
        costs = {side.name: [] for side in sides}
        starts = {side.name: [] for side in sides}
        for _ in range(self.rounds):
            for side in sides:
                starts[side.name].append(side.merge(self.recipe(word, self.tiny), self.out))
                warm(paths)
                costs[side.name].append(side.merge(self.recipe(word, paths), self.out))
        ours = self.net(costs, starts, sides[0].name)
        used = 2 if word == "slerp" else len(paths)
        for side in sides:
            whole, start = middle(costs[side.name]), middle(starts[side.name])
            net = self.net(costs, starts, side.name)
            bare = side.bare()
            table.add_row(
                word if side is sides[0] else "",
                side.name,
                f"{whole.seconds:.1f}",
                f"{start.seconds:.1f}",
                f"{net:.1f}",
                f"{net / ours:.2f}" if side is not sides[0] else "",
                f"{whole.processor - start.processor:.1f}",
                f"{whole.flush:.1f}",
                f"{(whole.peak - bare) / 1e6:,.0f}",
                f"{(start.peak - bare) / 1e6:,.0f}",
                f"{size(paths[:used]) / 1e9:.2f}",
                f"{2 * shape.parameters / 1e9:.2f}",
            )

    def net(self, costs: dict[str, list[Cost]], starts: dict[str, list[Cost]], name: str) -> float:
        return median(whole.seconds - start.seconds for whole, start in zip(costs[name], starts[name], strict=True))

    def floor(self) -> None:
        """The linear merge against reading the same bytes and writing as many, from a disk the system remembers not."""
        shape = sized(self.chosen.parameters)
        paths = models(self.folder, shape, self.chosen.models)
        found: dict[str, list[Cost]] = {}
        starts: dict[str, list[float]] = {}
        for _ in range(self.rounds):
            cold(paths)
            found.setdefault("read and write the same bytes", []).append(copy(paths, self.out, 2 * shape.parameters))
            for side in self.sides:
                starts.setdefault(side.name, []).append(side.merge(self.recipe("linear", self.tiny), self.out).seconds)
                cold(paths)
                found.setdefault(side.name, []).append(side.merge(self.recipe("linear", paths), self.out))
        table = self.table("linear, from a cold cache", "", "seconds", "with flush", "start-up", "net / the same bytes")
        least = median(its.seconds + its.flush for its in next(iter(found.values())))
        for name, costs in found.items():
            whole = median(its.seconds + its.flush for its in costs)
            start = median(starts.get(name, [0.0]))
            net = f"{(whole - start) / least:.2f}"
            table.add_row(name, f"{middle(costs).seconds:.1f}", f"{whole:.1f}", f"{start:.1f}", net)
        self.console.print(table)

    def scaling(self) -> None:
        """Net seconds and memory as models, parameters and tensors grow."""
        part = self.chosen.parameters / 8
        for title, grid in (
            ("more models", [(sized(part), count) for count in (3, 5, 9)]),
            ("more parameters", [(sized(part * factor), 3) for factor in (1, 2, 4)]),
            ("more tensors", [(many(self.chosen.tensors / factor), 3) for factor in (4, 2, 1)]),
        ):
            columns = ("", "", "koinon s", "mergekit s", "ratio", "koinon MB", "mergekit MB")
            table = self.table(title + ", net of start-up", *columns)
            for word in ("linear", "ties"):
                for shape, count in grid:
                    paths = models(self.folder, shape, count)
                    cells = []
                    for side in (self.ours, self.theirs):
                        start = side.merge(self.recipe(word, self.tiny), self.out)
                        warm(paths)
                        cost = side.merge(self.recipe(word, paths), self.out)
                        cells.append((cost.seconds - start.seconds, (cost.peak - side.bare()) / 1e6))
                    (ours, our_peak), (theirs, their_peak) = cells
                    table.add_row(word, described(shape, count), f"{ours:.1f}", f"{theirs:.1f}",
                                  f"{theirs / ours:.2f}", f"{our_peak:,.0f}", f"{their_peak:,.0f}")  # fmt: skip
            self.console.print(table)


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each number."""
    return Cost(*(median(getattr(its, field.name) for its in costs) for field in fields(Cost)))


def described(shape: Shape, count: int) -> str:
    return f"{count} models of {shape.parameters / 1e6:,.0f} M parameters in {len(shape.shapes):,} tensors"


def machine(chosen: argparse.Namespace) -> str:
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    question = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('safetensors'))"
    words = [str(Path(chosen.mergekit).parent / "python"), "-c", question]
    theirs = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    ours = ", ".join(f"{package} {version(package)}" for package in ("koinon", "torch"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{ours}, Python {platform.python_version()}; mergekit {theirs[0]} with torch {theirs[1]}, safetensors "
        f"{theirs[2]}; {cpus[0]}, {chosen.cores} cores, {memory:.0f} GB; {chosen.rounds} rounds"
    )


if __name__ == "__main__":
    main()
