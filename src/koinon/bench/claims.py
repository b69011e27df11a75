"""What became of each claim: evaluated from rows, never typed in."""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from koinon.bench.statistics import Interval, Measured, falls, paired
from koinon.core import PACKAGE
from koinon.systems import Claim, System

RESULTS = PACKAGE / "results"
"""Committed rows, one file a comparison: ``capability-data.jsonl``, with ``.gz`` if it would be over a megabyte."""


@dataclass(frozen=True)
class Verdict:
    """A claim and what the rows say: ``held``, ``not held`` or ``untested``."""

    claim: Claim
    state: str
    difference: Interval | None
    """How much better than was claimed, with its interval: above zero if it holds.

    Better minus than, or than minus better where less is better, less `Claim.by`.
    """


def committed(recipe: str) -> list[dict[str, Any]]:
    """The committed rows of a comparison; none if it has not been run."""
    return read_rows(RESULTS / f"{recipe}.jsonl")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, or of the one that is packed beside it; none if neither is there."""
    packed = file.with_name(f"{file.name}.gz")
    if packed.exists():
        text = gzip.decompress(packed.read_bytes()).decode()
    else:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def metric_of(rows: Iterable[Mapping[str, Any]], label: str, metric: str) -> dict[int, Measured]:
    """Seed to metric for one contestant; a meter is a metric without resamplings."""
    return {
        row["seed"]: Measured(
            float(np.array((row["metrics"] | row["meters"])[metric], dtype=float)),
            np.array(row["draws"].get(metric, []), dtype=float),
        )
        for row in rows
        if row["label"] == label and metric in (row["metrics"] | row["meters"])
    }


def evaluate(claim: Claim, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Held if the interval of the paired difference lies above zero."""
    better, than = (metric_of(rows, label, claim.metric) for label in (claim.better, claim.than))
    if len(set(better) & set(than)) < 2:
        return Verdict(claim, "untested", None)
    less = falls(claim.metric)
    asked = {seed: _moved(its, claim.times, -claim.by if less else claim.by) for seed, its in than.items()}
    difference = paired(asked, better) if less else paired(better, asked)
    return Verdict(claim, "held" if difference.sign > 0 else "not held", difference)


def _moved(its: Measured, times: float, by: float) -> Measured:
    return Measured(times * its.value + by, times * its.draws + by)


def verdicts(system: System) -> list[Verdict]:
    """All claims of a system, from the committed rows."""
    return [evaluate(claim, committed(claim.recipe)) for claim in system.claims]


def state_of(system: System) -> str:
    """``absent`` without methods; otherwise how many of its claims held."""
    if not system.methods:
        return "absent"
    states = [verdict.state for verdict in verdicts(system)]
    return ", ".join(f"{states.count(s)} {s}" for s in ("held", "not held", "untested") if s in states) or "no claims"
