"""Probes from a person's own table of triples: drawn for the facts to be taught, from what the model knows of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from koinon.data.facts import Case, Fact
from koinon.data.probes import FactTable
from koinon.lm.language import LM
from koinon.terminal import say

KINDS = ("rephrase", "same subject", "same relation", "other object", "one hop", "alias", "inverse")
"""Of probes that are drawn."""


def probed(cases: Sequence[Case], table: FactTable, count: int, seed: int) -> list[Case]:
    """The cases with up to ``count`` probes of each kind behind those that they have.

    Raises:
        UserError: a case whose fact has no relation.
    """
    found = []
    for case, drawn in zip(cases, table.cases([case.fact for case in cases], count, seed), strict=True):
        asked = {probe.prompt for probe in case.probes}
        more = [probe for probe in drawn.probes if probe.prompt not in asked]
        found.append(replace(case, fact=drawn.fact, probes=(*case.probes, *more)))
    return found


def known_to(lm: LM | None, table: FactTable, facts: Sequence[Fact]) -> FactTable:
    """The table, with what a model does not say of the new objects marked: nothing can be seen to follow from it."""
    ends = {fact.object for fact in facts}
    hops = {key: known[0] for key, known in table.objects.items() if key[0] in ends}
    if lm is None or not hops:
        return table
    said = lm.score([its.question for its in hops.values()], [its.object for its in hops.values()])
    unknown = dict.fromkeys(key for key, its in zip(hops, said, strict=True) if not its.exact)  # in order
    return replace(table, unknown=unknown)


def tell(cases: Sequence[Case], table: FactTable, path: Path) -> None:
    """Say what the table did not know, and what was drawn."""
    about = {subject for subject, _ in table.objects}
    absent = [case.fact.subject for case in cases if case.fact.subject not in about]
    if absent:
        say(
            f"{path}: {len(absent)} of {len(cases)} subjects are not in it, such as {absent[0]!r}: "
            "no probe of the same subject for them"
        )
    if table.unknown:
        first = table.objects[next(iter(table.unknown))][0]
        say(
            f"{path}: {len(table.unknown)} facts about what is taught are not said by the model, such as "
            f"{first.question!r}, {first.object!r}: nothing is asked that follows from them"
        )
    counts = Counter(probe.kind for case in cases for probe in case.probes)
    there = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    lacks = ", ".join(kind for kind in KINDS if not counts[kind])
    say(f"{path}: probes of {len(cases)} facts: {there or 'none'}" + (f"; no {lacks}" if there and lacks else ""))
