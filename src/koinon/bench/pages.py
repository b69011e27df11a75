"""Facts about methods and systems as plain data: what `show`, `ledger` and the documentation are made of."""

import ast
import inspect
import itertools
from dataclasses import MISSING, fields
from typing import Any

from koinon import core
from koinon.bench.claims import Verdict, state_of, verdicts
from koinon.bench.statistics import falls
from koinon.systems import SYSTEMS, System


def method_facts(name: str) -> dict[str, Any]:
    """Mechanism, paper, fields and systems of a method; imports its file."""
    kind = core.load(name)
    module = inspect.getmodule(kind)
    assert module is not None
    text = inspect.cleandoc(module.__doc__ or "")
    meanings = field_docs(kind)
    return {
        "name": name,
        "summary": text.split("\n")[0],
        "more": "\n".join(text.split("\n")[1:]).strip(),
        "class": kind.__name__,
        "module": kind.__module__,
        "paper": vars(kind.paper),
        "fields": [
            {
                "name": field.name,
                "default": "-" if field.default is MISSING else repr(field.default),
                "meaning": meanings.get(field.name, ""),
            }
            for field in fields(kind)
        ],
        "null": ", ".join(f"{key}={value!r}" for key, value in kind.null.items()),
        "exempt": dict(kind.exempt),
        "systems": [{"number": s.number, "title": s.title} for s in SYSTEMS if name in s.methods],
    }


def ledger_rows() -> list[dict[str, Any]]:
    """The 81 systems, with what became of each claim."""
    return [
        {
            "number": system.number,
            "title": system.title,
            "year": system.year,
            "url": system.url,
            "capability": system.capability,
            "state": state_of(system),
            "methods": list(system.methods),
            "departures": list(system.departures),
            "claims": claim_rows(system),
        }
        for system in SYSTEMS
    ]


def claim_rows(system: System) -> list[dict[str, Any]]:
    """A system's claims as plain data."""
    return [_claim_row(verdict) for verdict in verdicts(system)]


def _claim_row(verdict: Verdict) -> dict[str, Any]:
    claim, difference = verdict.claim, verdict.difference
    interval = None if difference is None else [difference.mean, difference.low, difference.high]
    than = claim.than if claim.times == 1 else f"{claim.times:g} {claim.than}"
    sides = (than, claim.better) if falls(claim.metric) else (claim.better, than)
    words = " - ".join([*sides, *([f"{claim.by:g}"] if claim.by else [])])
    return {
        "says": claim.says,
        "state": verdict.state,
        "recipe": claim.recipe,
        "metric": claim.metric,
        "difference": interval,
        "text": "-" if interval is None else f"{words}: {interval[0]:+.4f} [{interval[1]:+.4f}, {interval[2]:+.4f}]",
        "why": claim.why if verdict.state == "not held" else "",
    }


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for first, second in itertools.pairwise(definition.body):
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr):
            value = second.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[first.target.id] = inspect.cleandoc(value.value)
    return found
