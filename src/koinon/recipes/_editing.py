"""What editors are given and how they are judged: facts that a model knows, cut into pools, and probes of them."""

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koinon.bench.statistics import Measured, Resampling
from koinon.data.edittasks import REFUSAL, passage, style
from koinon.data.factlab import Lab, shown
from koinon.data.facts import Aspect, Case, Fact
from koinon.data.phrases import RELATIONS
from koinon.data.probes import FactTable
from koinon.edit._contract import Edit, Editor
from koinon.edit._edited import Edited, Material
from koinon.edit._measures import ASPECTS, Remembered, measure
from koinon.edit._measures import Measured as Judged
from koinon.lm.language import LM
from koinon.lm.tracing import layer_effects
from koinon.recipes._measures import share
from koinon.recipes._spreading import spearman

Point = Mapping[str, Any]
POOLS: Mapping[str, range] = {"train": range(4), "valid": range(4, 6), "test": range(6, 10)}
"""Tenths of the subjects: what editors may look at, what settings are chosen on, and what is reported."""
DRAWS = 20
"""How often texts are drawn, to find some whose end the model gets wrong."""
HOWS = ("exact", "teacher", "sampled")
"""See `koinon.edit._measures.Answered`."""


def pool_of(subject: str) -> str:
    """Whose a subject is, by its name alone: the same for every seed and model."""
    tenth = hashlib.blake2b(subject.encode(), digest_size=4).digest()[0] % 10
    return next(name for name, tenths in POOLS.items() if tenth in tenths)


@dataclass(frozen=True)
class EditWorld:
    """A model and what it was taught."""

    lm: LM
    lab: Lab
    """What the model knows."""
    larger: Lab
    """The same and more: facts about subjects that the model never saw."""

    @cached_property
    def known(self) -> tuple[Fact, ...]:
        """The facts that the model says when it is asked as it was taught."""
        facts = self.lab.taught
        said = self.lm.score([fact.question for fact in facts], [fact.object for fact in facts])
        return tuple(fact for fact, its in zip(facts, said, strict=True) if its.exact)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("lm", "lab", "larger")} | (
            {"known": self.known} if "known" in self.__dict__ else {}
        )

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Sizes:
    """How many facts."""

    single: int
    """Of each of KnowEdit's tasks, each taught alone."""
    stream: tuple[int, ...]
    """Taught one after the other; after so many all of them are asked again. None if there are none."""
    batch: int
    """Taught at once; 0 for none."""
    valid: int
    """Taught for each point that settings are chosen from, see `Lesson.chosen`."""
    material: int
    """Facts to train editors on, and as many prompts to be left alone."""
    probes: int
    """Of each kind, for each fact."""


class Lesson:
    """What every editor of one cell is given.

    Args:
        world: model and facts.
        sizes: how many.
        seed: of what is drawn.
        names: of the tasks whose facts are taught alone.
    """

    def __init__(self, world: EditWorld, sizes: Sizes, seed: int, names: Sequence[str]):
        self.world, self.sizes, self.seed, self.names = world, sizes, seed, names
        self.table = world.lab.table
        self._plain = Remembered(world.lm)
        self._start = time.perf_counter()
        self.edits = 0

    def _drawn(self, pool: str, what: str, count: int, facts: Sequence[Fact] | None = None) -> list[Fact]:
        """Facts about different subjects of a pool, in an order of the seed's own."""
        mine = [fact for fact in (self.world.known if facts is None else facts) if pool_of(fact.subject) == pool]
        random.Random(f"{self.seed} {pool} {what}").shuffle(mine)
        return list({fact.subject: fact for fact in reversed(mine)}.values())[::-1][:count]

    def swapped(self, pool: str, what: str, count: int) -> list[Case]:
        """Known facts with another object of their relation, to be taught together."""
        facts: list[Fact] = []
        for fact in self._drawn(pool, what, 2 * count):
            options = {its.object for its in self.world.lab.related(fact.relation)} - {fact.object}
            if options and len(facts) < count:
                facts.append(self.world.lab.counterfactual(fact, self.seed))
        return self.table.cases(facts, self.sizes.probes, self.seed)

    @cached_property
    def stream(self) -> list[Case]:
        """What is taught in a row."""
        return self.swapped("test", "stream", max((*self.sizes.stream, self.sizes.batch)))

    @cached_property
    def valid(self) -> list[Case]:
        """What settings are chosen on."""
        return self.swapped("valid", "valid", self.sizes.valid)

    @cached_property
    def tasks(self) -> dict[str, list[Case]]:
        """KnowEdit's tasks: what changes, is new, is one of several, must go, how a text ends, how one is spoken of.

        Of a fact that must go the new object is a refusal. New are facts about cities that the model never saw. Of
        texts the model gets the end wrong. Only those that the comparison names, and that the facts allow.
        """
        makers: dict[str, Callable[[], list[Case]]] = {
            "modification": lambda: self.swapped("test", "modification", self.sizes.single),
            "insertion": self._inserted,
            "one of several": self._added,
            "erasure": self._erased,
            "passage": self._ended,
            "style": self._praised,
        }
        found = {name: self._fitting(makers[name]()) for name in self.names}
        return {name: cases for name, cases in found.items() if cases}

    def _inserted(self) -> list[Case]:
        taught = {fact.subject for fact in self.world.lab.facts}
        unseen = [fact for fact in self.world.larger.taught if fact.subject not in taught]
        return self._cases(self.world.larger.table, self._drawn("test", "insertion", self.sizes.single, unseen))

    def _added(self) -> list[Case]:
        many = [fact for fact in self.world.lab.facts if RELATIONS[fact.relation].many]
        added = []
        for fact in self._drawn("test", "several", self.sizes.single, many):
            true = {its.object for its in self.world.lab.about(fact.subject, fact.relation)} | {fact.subject}
            options = sorted({its.object for its in many} - true)
            new = random.Random(f"{self.seed} {fact.subject}").choice(options)
            added.append(replace(fact, object=new, answers=()))
        return self._cases(self.table, added)

    def _erased(self) -> list[Case]:
        facts = [
            replace(fact, object=REFUSAL, was=fact.object, answers=())
            for fact in self._drawn("test", "erasure", self.sizes.single)
        ]
        return self._cases(replace(self.table, inverses={}), facts)

    def _ended(self) -> list[Case]:
        """Texts about known facts whose end the model gets wrong nevertheless."""
        subjects, count = self._subjects, self.sizes.single
        found: dict[str, Case] = {}
        for draw in range(DRAWS):
            cases = passage(self.table, len(subjects), self.sizes.probes, DRAWS * self.seed + draw, subjects).cases
            said = self._plain.score([its.fact.question for its in cases], [its.fact.object for its in cases])
            wrong = [case for case, its in zip(cases, said, strict=True) if not its.exact]
            for case in self._fitting(wrong):
                found.setdefault(case.fact.subject, case)
            if len(found) >= count:
                break
        return list(found.values())[:count]

    def _praised(self) -> list[Case]:
        return list(style(self.table, self.sizes.single, self.sizes.probes, self.seed, self._subjects).cases)

    def _fitting(self, cases: Sequence[Case]) -> list[Case]:
        """Without those questions that the model has too few places for when it is told the fact before them."""

        def fits(fact: Fact, prompt: str, answer: str) -> bool:
            (ids,) = self.world.lm.tokenizer([shown(fact, f"{prompt} {answer}")])["input_ids"]
            return len(ids) <= self.world.lm.limit

        found = []
        for case in cases:
            if fits(case.fact, case.fact.question, case.fact.object):
                probes = tuple(its for its in case.probes if fits(case.fact, its.prompt, its.answer))
                found.append(replace(case, probes=probes))
        return found

    def _cases(self, table: FactTable, facts: Sequence[Fact]) -> list[Case]:
        """Of facts that are taught alone."""
        return [table.case(fact, self.sizes.probes, self.seed) for fact in facts]

    @cached_property
    def _subjects(self) -> frozenset[str]:
        """Those to report on of whom the model knows something."""
        return frozenset(fact.subject for fact in self.world.known if pool_of(fact.subject) == "test")

    @cached_property
    def material(self) -> Material:
        """Texts the model was trained on, facts to train on with their probes, and prompts to leave alone.

        None of the prompts is asked when edits are judged.
        """
        every = [*self.stream, *self.valid, *(case for its in self.tasks.values() for case in its)]
        asked = {probe.prompt for case in every for probe in case.probes} | {case.fact.question for case in every}
        cases = []
        for case in self.swapped("train", "material", self.sizes.material):
            probes = tuple(its for its in case.probes if its.prompt not in asked)
            cases.append(Case(case.fact, probes))
        prompts = [self.world.lab.held(fact)[0] for fact in self._drawn("train", "unrelated", 3 * self.sizes.material)]
        corpus = self.world.lab.statements()
        random.Random(f"{self.seed} corpus").shuffle(corpus)
        return Material(corpus[:2_000], cases, [its for its in prompts if its not in asked][: self.sizes.material])

    def editor(self, method: Edit) -> Editor:
        """The method on the model, with the material."""
        return method.on(self.world.lm, self.material)

    def alone(
        self, editor: Editor, cases: Sequence[Case], look: Callable[[Edited, Case], None] | None = None
    ) -> list[Judged]:
        """Each fact taught to a model of its own, at which there may be another look."""
        found = []
        for case in cases:
            edited = self._taught(editor, [case])
            found += measure(self._plain, edited.lm, [case])
            if look is not None:
                look(edited, case)
        return found

    def by_layer(self, method: Edit, cases: Sequence[Case]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each case and layer, what tracing says of the layer, and how well it is edited there.

        The first is what its FFN brings back at the subject's last token, the second the mean of reliability and
        generality, greedy.
        """
        lm = self.world.lm
        success = []
        for layer in range(len(lm.anatomy.blocks)):
            place: dict[str, Any] = {"layer": layer}
            judged = self.alone(self.editor(replace(method, **place)), cases)
            success.append(np.mean([values(judged, aspect, "exact") for aspect in ASPECTS[:2]], axis=0))
        effects = layer_effects(lm, [case.fact for case in cases]).double().numpy()
        return effects, np.array(success).T

    def _taught(self, editor: Editor, cases: Sequence[Case], after: Edited | None = None) -> Edited:
        self.edits += len(cases)
        return editor.edit([case.fact for case in cases], after)

    def in_a_row(
        self,
        editor: Editor,
        cases: Sequence[Case],
        marks: Sequence[int],
        look: Callable[[Edited], None] | None = None,
    ) -> dict[int, list[Judged]]:
        """One after the other; at each mark all facts so far are asked again, of the model as it is then.

        At each there may be another look.
        """
        found, edited = {}, None
        for number, case in enumerate(cases[: max(marks)], start=1):
            edited = self._taught(editor, [case], edited)
            if number in marks:
                found[number] = measure(self._plain, edited.lm, cases[:number])
                if look is not None:
                    look(edited)
        return found

    def at_once(self, editor: Editor, cases: Sequence[Case]) -> list[Judged]:
        """All facts in one batch."""
        return measure(self._plain, self._taught(editor, cases).lm, cases)

    def chosen(self, method: Edit, points: Sequence[Point]) -> tuple[Edit, Point]:
        """The point with the best score on other facts, the first one if several are.

        They are taught as those to report on are: in a row, or each alone if none of those is in a row.
        """
        if len(points) == 1:
            return replace(method, **points[0]), points[0]
        scores = []
        for point in points:
            editor = self.editor(replace(method, **point))
            if self.sizes.stream:
                (judged,) = self.in_a_row(editor, self.valid, [len(self.valid)]).values()
            else:
                judged = self.alone(editor, self.valid)
            scores.append(score(judged))
        best = points[int(np.argmax(scores))]
        return replace(method, **best), best

    @property
    def cost(self) -> dict[str, Any]:
        """What it took so far."""
        return {"edits": self.edits, "seconds": round(time.perf_counter() - self._start, 3)}


def values(judged: Sequence[Judged], aspect: Aspect, how: str, kind: str | None = None) -> NDArray[np.float64]:
    """An aspect's score for each case; NaN where it has no such probe."""
    found = [its.score(aspect, how, kind) for its in judged]
    return np.array([np.nan if its is None else its for its in found])


def score(judged: Sequence[Judged]) -> float:
    """The mean of reliability, generality and locality, greedy."""
    return float(np.mean([np.nanmean(values(judged, aspect, "exact")) for aspect in ASPECTS[:3]]))


def figures(judged: Sequence[Judged], start: str, draws: int = 100) -> dict[str, Measured]:
    """Every aspect under names that begin with ``start``, and their means; resamplings are of cases.

    ``triangle`` is the mean of reliability, generality and locality, ``harmonic`` their harmonic mean, both greedy.
    """
    resampling = Resampling(None, len(judged), draws)
    found = {}
    for how in HOWS:
        ending = "" if how == "exact" else f".{how}"
        for aspect in ASPECTS:
            its = _mean(values(judged, aspect, how), resampling)
            if its is not None:
                found[f"{start}.{aspect}{ending}"] = its
    kinds = {(its.probe.aspect, its.probe.kind) for one in judged for its in one.answered if its.probe.kind}
    for aspect, kind in sorted(kinds):
        its = _mean(values(judged, aspect, "exact", kind), resampling)
        if its is not None and aspect in ("locality", "portability"):
            found[f"{start}.{aspect}.{kind.replace(' ', '_')}"] = its
    three = [found[name] for aspect in ASPECTS[:3] if (name := f"{start}.{aspect}") in found]
    if len(three) == 3:
        table = np.array([[its.value, *its.draws] for its in three])
        found[f"{start}.triangle"] = resampling.measured(table.mean(0))
        with np.errstate(divide="ignore"):
            found[f"{start}.harmonic"] = resampling.measured(3 / (1 / np.maximum(table, 1e-12)).sum(0))
    return found


def worded(task: str) -> str:
    """A task's name in the names of metrics."""
    return task.replace(" ", "_")


def over_tasks(found: Mapping[str, Measured], tasks: Iterable[str], start: str = "alone") -> dict[str, Measured]:
    """The mean over tasks of each aspect and of their means, over those tasks that have it."""
    means = {}
    for name in (*ASPECTS, "triangle", "harmonic"):
        its = [found[full] for task in tasks if (full := f"{start}.{worded(task)}.{name}") in found]
        if its:
            value, *draws = np.mean([[one.value, *one.draws] for one in its], axis=0)
            means[f"{start}.{name}"] = Measured(float(value), np.array(draws))
    return means


def agreement(one: NDArray[np.float64], other: NDArray[np.float64], draws: int = 100) -> Measured:
    """The rank correlation over layers of two means over cases; resamplings are of cases.

    Args:
        one: by case and layer.
        other: the same.
        draws: how many resamplings.
    """
    resampling = Resampling(None, len(one), draws)
    means = zip(*(resampling.counts @ its / resampling.counts.sum(1, keepdims=True) for its in (one, other)))
    return resampling.measured(np.array([spearman(*its) for its in means]))


def gone(edited: Edited, case: Case) -> bool:
    """Whether greedy decoding no longer says what was true."""
    (said,) = edited.lm.score([case.fact.question], [case.fact.was])
    return not said.exact


def _mean(each: NDArray[np.float64], resampling: Resampling) -> Measured | None:
    """Over the cases that have a value."""
    known = ~np.isnan(each)
    if not known.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return share(each, known, resampling)
