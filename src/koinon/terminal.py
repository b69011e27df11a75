"""What people see: tables, facts, and bars on anything that takes longer than two seconds."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Told: TypeAlias = Callable[[int, int], None]
"""Hears how much is done, of how much."""


def untold(done: int, total: int) -> None:
    """For those who need not hear."""


def print_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False)
    for cells in body:
        table.add_row(*(Text(str(cell)) for cell in cells))
    Console(highlight=False).print(table)


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {text}")


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Within, what is finished is kept: a person who stops it is told so."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was finished is kept") from None


def say(text: str) -> None:
    """For people, beside what machines read."""
    print(text, file=sys.stderr)


class Tally:
    """Called as cells finish: a bar on a terminal, a line each elsewhere."""

    def __init__(self, bar: Any, task: Any):
        self.bar, self.task = bar, task
        self.fresh: list[dict[str, Any]] = []

    def __call__(self, done: int, total: int, row: dict[str, Any] | None) -> None:
        if row is not None:
            self.fresh.append(row)
        newest = f"{row['label']} seed {row['seed']} ({row['cost']['cell_seconds']:.0f} s)" if row else "starting"
        if sys.stderr.isatty():
            self.bar.update(self.task, completed=done, total=total, newest=newest)
        elif row is not None or done:
            say(f"{done}/{total} {newest if row else 'cells are there already'}")


@contextlib.contextmanager
def progress(title: str) -> Iterator[Tally]:
    """For a comparison: cells done, and the newest one."""
    from rich import progress as show
    from rich.console import Console

    columns: list[Any] = [title, show.BarColumn(), show.MofNCompleteColumn(), show.TimeElapsedColumn(), "left",
               show.TimeRemainingColumn(), "{task.fields[newest]}"]  # fmt: skip
    console = Console(stderr=True)
    with show.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Tally(bar, bar.add_task(title, total=None, newest=""))


@contextlib.contextmanager
def waiting(title: str, unit: str) -> Iterator[Told]:
    """A bar on a terminal, nothing elsewhere; gives what is told how much is done, of how much.

    Args:
        title: of the bar.
        unit: what is counted; ``"bytes"`` are shown with their speed.
    """
    from rich import progress as show
    from rich.console import Console

    console = Console(stderr=True)
    counted: list[Any] = (
        [show.DownloadColumn(), show.TransferSpeedColumn()] if unit == "bytes" else [show.MofNCompleteColumn(), unit]
    )
    columns = [title, show.BarColumn(), *counted, show.TimeElapsedColumn(), "left", show.TimeRemainingColumn()]
    with show.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
