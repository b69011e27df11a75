"""Which way of merging experts serves all their tasks best, and which one takes over a poisoned expert's backdoor?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from koinon.bench.compare import Recipe, Row
from koinon.bench.statistics import Measured, Resampling, mean_of
from koinon.core import pick
from koinon.data.glyphs import TRIGGERS, GlyphWorld, glyphs
from koinon.merge.dam import DAM
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.twin import TwinMerging
from koinon.recipes._contestants import (
    Attacked,
    Contestant,
    Defended,
    Halved,
    Joint,
    Pictures,
    Routing,
    Static,
    Told,
    Twins,
    case,
    grid,
    of_ones_own,
)
from koinon.recipes._defences import Defence, Masking, Unlearning
from koinon.recipes._measures import over, per_task, row, share
from koinon.recipes._texts import TextRecipe
from koinon.recipes._vision import Poison, Training
from koinon.recipes._ways import SCALINGS, static


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    rows: int
    """Pictures of each task to train on."""
    letters: int
    """Pictures to pre-train on."""
    seeds: int
    training: Training
    routing: Routing
    steps: int
    """Of methods that learn from unlabelled pictures."""


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(
        rows=200,
        letters=620,
        seeds=2,
        training=Training((8, 12, 16, 24), 1, 32, (6,), (8,), (5e-3,), (3e-3,)),
        routing=Routing(rows=100, epochs=10, batch=128),
        steps=3,
    ),
    "demo": Scale(1_000, 6_200, 2, Training(), Routing(rows=500), steps=100),
    "small": Scale(3_000, 15_500, 5, Training(), Routing(), steps=300),
    "full": Scale(
        10_000,
        62_000,
        10,
        Training(widths=(64, 128, 256, 256), blocks=4, base_epochs=(20, 5), expert_epochs=(12, 3)),
        Routing(rows=5_500),
        steps=1_000,
    ),
}


def on_glyphs(scale: Scale) -> dict[str, Contestant]:
    """Static ways, Twin-Merging and its ablations."""
    points = grid(scale=SCALINGS)
    twin = Twins(TwinMerging(), points)
    return static(scale.steps) | {
        "twin": twin,
        "twin_oracle": replace(twin, oracle=True),
        "twin_full": Twins(TwinMerging(rank=1.0), points),
        "twin_full_oracle": Twins(TwinMerging(rank=1.0), points, oracle=True),
        "twin_no_shared": Twins(TwinMerging(scale=0.0)),
        "twin_static": replace(twin, uniform=True),
        "twin_magnitude": Twins(TwinMerging(compress="magnitude"), points),
        "twin_random": Twins(TwinMerging(compress="random"), points),
        "twin_rank_5": Twins(TwinMerging(rank=0.05), points),
        "twin_rank_25": Twins(TwinMerging(rank=0.25), points),
    }


def on_poisoned(scale: Scale) -> dict[str, Contestant]:
    """Static ways, DAM and its ablations, controls that only shrink task vectors, and defences after merging.

    Defences are given labels, see `Defended`; ``fine_tuned`` has the same rows and labels and no adversary, which tells
    what labels alone do. In ``two`` the expert for capitals is poisoned as well; ``blend`` tells whether a trigger of
    noise outlives merging at all. ``dam_told_trigger`` has the rate of the fast masks: beside
    ``concrete_adamerging_fast`` it tells what the mask's objective does with the perturbation that matters.

    A mask takes as long to learn as all other ways together, so that DAM and the Concrete methods are not tuned: they
    keep their papers' coefficients. ``task_arithmetic_0.3`` is where they start from. In so few steps the paper's rates
    hardly move a perturbation (0.0001 a step) or a mask; ``fast`` ones have ten and a hundred times the rate.
    """
    arithmetic = Static(TaskArithmetic(), grid(scale=SCALINGS))

    method = DAM(steps=scale.steps, tuning_steps=scale.steps, batch=64)

    def dam(clean: bool = False, **fields: Any) -> Static:
        return Static(replace(method, **fields), clean=clean)

    def defended(defence: Defence) -> Defended:
        return Defended(defence, SCALINGS)

    ways = static(scale.steps)
    learned = {"task_arithmetic": arithmetic, "concrete_adamerging": dam(adv_weight=0.0), "dam": dam()}
    return {name: ways[name] for name in ("individual", "base", "average", "task_arithmetic", "ties", "adamerging")} | {
        "task_arithmetic_0.3": Static(TaskArithmetic(0.3)),
        "task_arithmetic_half": Halved(everyone=True, scalings=SCALINGS),
        "task_arithmetic_half_poisoned": Halved(everyone=False, scalings=SCALINGS),
        "concrete_task_arithmetic": dam(adv_weight=0.0, learn=False),
        "concrete_adamerging": dam(adv_weight=0.0),
        "dam_task_arithmetic": dam(learn=False),
        "dam": dam(),
        "dam_weight_0.01": dam(adv_weight=0.01),
        "dam_weight_1": dam(adv_weight=1.0),
        "concrete_adamerging_fast": dam(adv_weight=0.0, rate=1e-2),
        "dam_fast": dam(rate=1e-2, adv_rate=1e-2),
        "dam_told_trigger": Told(replace(method, rate=1e-2, adv_weight=1.0)),
        "task_arithmetic_clean": replace(arithmetic, clean=True),
        "concrete_adamerging_clean": dam(clean=True, adv_weight=0.0),
        "dam_clean": dam(clean=True),
        "awm": defended(Masking(rounds=min(20, scale.steps))),
        "sau": defended(Unlearning(-(-scale.steps // 3))),
        "fine_tuned": defended(Unlearning(-(-scale.steps // 3), unlearn=0.0)),
        "multitask": Joint(scale.training),
        **{f"{name}_two": Attacked(its, "patch", ("digits", "capitals")) for name, its in learned.items()},
        "task_arithmetic_blend": Attacked(arithmetic, "blend"),
    }


@dataclass(frozen=True)
class Setting:
    """A named comparison."""

    tasks: tuple[str, ...] | None
    """All if None."""
    contestants: Callable[[Scale], dict[str, Contestant]]
    poison: bool
    main: str
    shown: tuple[str, ...]
    bounds: tuple[str, ...]
    """Contestants that know or keep what the others do not."""


SETTINGS: Mapping[str, Setting] = {
    "glyphs": Setting(
        None,
        on_glyphs,
        False,
        "mean.normalised",
        ("told.normalised", "mean.accuracy", "told.accuracy", "router.accuracy"),
        ("individual", "twin_oracle", "twin_full_oracle"),
    ),
    "poisoned": Setting(
        ("digits", "capitals", "rotation", "inverted"),
        on_poisoned,
        True,
        "told.accuracy",
        ("asr.mean", "asr.succession", "asr.transfer", "unmarked.succession", "mean.accuracy"),
        ("individual", "multitask", "awm", "sau", "fine_tuned"),
    ),
}


@dataclass(frozen=True)
class MergeRecipe(Recipe):
    """Experts tuned from one base, merged in every way; equal base, experts, data and points to choose from."""

    data: str = "glyphs"
    scale: str = "small"
    attack: str = "patch"
    """The trigger, where an expert is poisoned."""
    poisoned: tuple[str, ...] = ("digits",)
    """Tasks whose experts are."""
    own: tuple[str, ...] = ()
    """Methods of a person's own to enter as well, at their defaults: module paths or files."""

    @property
    def name(self) -> str:
        """``merge-DATA``."""
        return f"merge-{self.data}"

    @property
    def seeds(self) -> int:
        """How many seeds this scale asks for."""
        return SCALES[self.scale].seeds

    @property
    def setting(self) -> Setting:
        """What the data's name stands for."""
        return SETTINGS[pick(self.data, SETTINGS, "data set")]

    @property
    def poison(self) -> dict[str, Poison]:
        """Task to what is hidden in its expert."""
        trigger = pick(self.attack, TRIGGERS, "attack")
        return {task: Poison(trigger) for task in self.poisoned} if self.setting.poison else {}

    def prepare(self) -> GlyphWorld:
        """Draw the pictures."""
        scale = SCALES[pick(self.scale, SCALES, "scale")]
        world = glyphs(scale.rows, scale.letters, self.setting.tasks)
        for task in self.poison:
            pick(task, world.tasks, "task")
        return world

    def settings(self, world: GlyphWorld) -> Mapping[str, Any]:
        """What identifies the comparison, and what its report shows."""
        scale = SCALES[self.scale]
        parts = [[len(task.parts[part]) for task in world.tasks.values()] for part in ("train", "valid", "test")]
        return {
            "data": self.data,
            "content": [task.parts[part].fingerprint for task in world.tasks.values() for part in task.parts],
            "scale": self.scale,
            "tasks": [{"name": task.name, "classes": task.classes} for task in world.tasks.values()],
            "split": "at random",
            "rows": [sum(sizes) for sizes in parts],
            "sparse": [],
            "poison": {task: asdict(its) for task, its in self.poison.items()},
            "training": asdict(scale.training),
            "routing": asdict(scale.routing),
            "main": self.setting.main,
            "shown": list(self.setting.shown),
            "baseline": "task_arithmetic",
            "bounds": list(self.setting.bounds),
            "words": {"baseline": "the simplest merge of task vectors", "chosen": "Coefficients and densities"},
        }

    def contestants(self, world: GlyphWorld) -> Mapping[str, Contestant]:
        """All of the setting's, and a person's own methods."""
        return self.setting.contestants(SCALES[self.scale]) | of_ones_own(self.own)

    def cell(self, world: GlyphWorld, contestant: Contestant, seed: int) -> Row:
        """Take the base and experts, merge, choose on the validation parts, measure on the test parts."""
        scale = SCALES[self.scale]
        attack = contestant.attack(self.poison)
        given = case(world, scale.training, scale.routing, {} if contestant.clean else attack, seed)
        entered = contestant.enter(given)
        cost = given.cost(entered)
        rows = sum(len(task.parts["test"]) for task in world.tasks.values())
        resampling = Resampling(None, rows)
        measured = accuracies(given, entered.served, resampling)
        if attack:
            measured |= backdoor(given, entered.served, attack, resampling)
        return row(measured, cost, [self.setting.main, *self.setting.shown])


def accuracies(given: Pictures, served: Any, resampling: Resampling) -> dict[str, Measured]:
    """Of each task and of their mean: with the head that the router picks, and told whose a picture is.

    A picture that goes to another task's head is wrong, whatever class comes out. A normalised score is 100 times the
    accuracy over that of the task's own expert on the same pictures.
    """
    stream = given.stream("test")
    task, classes = served.routed(stream.pixels, stream.task)
    right = {
        "mean": (task == stream.task) & (classes == stream.labels),
        "told": given.told(served, stream) == stream.labels,
        "expert": given.told(given.individual, stream) == stream.labels,
    }
    found = {name: per_task(its.numpy(), stream.task.numpy(), resampling) for name, its in right.items()}
    measured = {"router.accuracy": mean_of(per_task((task == stream.task).numpy(), stream.task.numpy(), resampling))}
    names = list(given.world.tasks)
    for kind in ("mean", "told"):
        scores = [over(its, expert) for its, expert in zip(found[kind], found["expert"], strict=True)]
        measured |= {f"{kind}.normalised": mean_of(scores), f"{kind}.accuracy": mean_of(found[kind])}
        prefix = {"mean": "", "told": "told."}[kind]
        measured |= {f"{prefix}{name}.accuracy": its for name, its in zip(names, found[kind], strict=True)}
        measured |= {f"{prefix}{name}.normalised": its for name, its in zip(names, scores, strict=True)}
    return measured


def backdoor(given: Pictures, served: Any, poison: Mapping[str, Poison], resampling: Resampling) -> dict[str, Measured]:
    """Attack success: the share of marked pictures, of other classes than the target, that are taken for the target.

    Succession is on the tasks of poisoned experts, transfer on the others, each with class 0 as its target; the head is
    told. ``unmarked`` is the same share without the mark: what success would be by mistake alone. ``void`` is 1 where
    there is little to defend against: an expert that the attack moves in under 95 % of cases, or task arithmetic, at
    the scale chosen for it, in under 50 %.
    """
    stream = given.stream("test")
    (trigger,) = {its.trigger for its in poison.values()}
    marked = given.stream("test", TRIGGERS[trigger])
    others = stream.labels != 0
    count = range(len(given.world.tasks))
    says = {
        "asr": given.told(served, marked),
        "unmarked": given.told(served, stream),
        "expert": given.told(given.individual, marked),
        "arithmetic": given.told(given.arithmetic(SCALINGS)[1], marked),
    }
    rates = {
        name: [share((its == 0).numpy(), ((stream.task == t) & others).numpy(), resampling) for t in count]
        for name, its in says.items()
    }
    hit = [place for place, name in enumerate(given.world.tasks) if name in poison]
    rest = [place for place in count if place not in hit]
    measured = {"asr.mean": mean_of(rates["asr"])}
    for name in ("asr", "unmarked"):
        measured[f"{name}.succession"] = mean_of([rates[name][place] for place in hit])
        if rest:
            measured[f"{name}.transfer"] = mean_of([rates[name][place] for place in rest])
    measured["expert.asr"] = mean_of([rates["expert"][place] for place in hit])
    measured["arithmetic.asr"] = mean_of([rates["arithmetic"][place] for place in hit])
    is_void = measured["expert.asr"].value <= 0.95 or measured["arithmetic.asr"].value <= 0.5
    measured["void"] = Measured(float(is_void), np.full(len(measured["asr.mean"].draws), float(is_void)))
    return measured


OTHERS: Mapping[str, type[TextRecipe]] = {"texts": TextRecipe}
"""Data to their recipe, where it is not on pictures."""


@dataclass(frozen=True)
class OnData:
    """Compare ways of merging experts that were tuned from one base."""

    data: Literal["glyphs", "poisoned", "texts"] = "glyphs"
    """Six tasks on small pictures; four, of which an expert has a backdoor; or texts in four languages."""
    scale: Literal["tiny", "demo", "small", "full"] = "small"
    """How much data, how many seeds and how long."""
    attack: Literal["patch", "blend"] = "patch"
    """The trigger of a poisoned expert: a light patch in a corner, or noise mixed in."""
    poisoned: tuple[str, ...] = ("digits",)
    """Tasks whose experts are poisoned."""
    own: tuple[str, ...] = ()
    """Methods of your own to enter as well: module paths or files."""

    def recipe(self) -> Recipe:
        """The comparison."""
        kind: type[MergeRecipe | TextRecipe] = OTHERS.get(self.data, MergeRecipe)
        return kind(**{its.name: getattr(self, its.name) for its in fields(kind)})


def options(arguments: Sequence[str]) -> type[OnData]:
    """The command line's options."""
    return OnData
