"""What enters a comparison of merging: how each contestant is merged, chosen, routed and served."""

import copy
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from koinon.core import load
from koinon.data.glyphs import TRIGGERS, GlyphWorld
from koinon.merge._coefficients import batches, predictor, tuned
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import features, is_own, quietly, with_weights
from koinon.merge.dam import DAM, Search
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.twin import Twin, TwinMerging
from koinon.nn.router import Router, trained_router
from koinon.recipes._defences import Defence
from koinon.recipes._experts import Experts
from koinon.recipes._served import CLASSES, Reading, Served, Switched, Twofold, by_task, numbers
from koinon.recipes._vision import OWN, Poison, Training, experts, joint, tensors

Point = Mapping[str, Any]
"""Settings to try."""


def grid(**values: Sequence[Any]) -> tuple[Point, ...]:
    """All combinations of the fields' values."""
    return tuple(dict(zip(values, its, strict=True)) for its in itertools.product(*values.values()))


@dataclass(frozen=True)
class Routing:
    """How the router of every contestant is trained: as Twin-Merging's own, on the same rows."""

    rows: int = 1_000
    """Training rows of each task, at most."""
    epochs: int = 50
    batch: int = 1_024
    lr: float = 5e-4
    dropout: float = 0.5
    holdout: float = 0.1


@dataclass(frozen=True)
class Stream:
    """Pictures of all tasks, mixed."""

    pixels: Float[Tensor, "rows 16 16"]
    task: Int64[Tensor, " rows"]
    labels: Int64[Tensor, " rows"]


class Case(ABC):
    """What every contestant of one cell is given.

    Args:
        found: base and experts.
        adapt: task to unlabelled rows.
        router_data: task to prompts that routers learn from.
        own: patterns of the tensors that stay a task's own.
        reading: see `Reading`.
        routing: how routers are trained.
        poisoned: tasks whose experts are; for controls that know.
        seed: of everything that is drawn while merging and routing.
    """

    def __init__(
        self,
        found: Experts,
        adapt: Mapping[str, Tensor],
        router_data: Mapping[str, Tensor],
        own: tuple[str, ...],
        reading: Reading,
        routing: Routing,
        poisoned: frozenset[str],
        seed: int,
    ):
        self.reading, self.routing, self.poisoned, self.seed = reading, routing, poisoned, seed
        self.expert_seconds = found.seconds
        self.counted = {"rows": 0, "passes": 0}
        """Rows and batches that the base, the experts and what is made of them have seen: copies count as well."""
        self._start = time.perf_counter()
        base, tuned = quietly(found.base), {name: quietly(its) for name, its in found.tuned.items()}
        for model in (base, *tuned.values()):
            model.register_forward_pre_hook(_counting(self.counted))
        self.pool = Pool(base, tuned, adapt, own)
        self.router_data = router_data
        self.heads = sum(self._numbers(its, True) for its in tuned.values())
        self.trunk = self._numbers(base, False)
        self.individual = self.switched(None)

    @abstractmethod
    def valid(self, served: Served) -> float:
        """How good it is on the validation parts, each row's task known; the mean over tasks."""

    @abstractmethod
    def served(self, merged: nn.Module, routed: bool = False) -> Served:
        """One merged model, for all tasks."""

    def _numbers(self, model: nn.Module, own: bool) -> int:
        return sum(its.numel() for name, its in model.state_dict().items() if is_own(self.pool, name) == own)

    def switched(self, router: Router | None) -> Switched:
        """All experts, and the base as the reader of a router."""
        stored = (len(self.pool.tuned) + 1) * self.trunk + self.heads + (numbers(router) if router else 0)
        return Switched(list(self.pool.tuned.values()), self.pool.base, router, stored, self.reading)

    def cost(self, entered: "Entered") -> dict[str, Any]:
        """What it took since the base and the experts were there."""
        return {
            "trained": entered.served.stored,
            "active": entered.served.active,
            "stored_bytes": 4 * entered.served.stored,
            "samples": self.counted["rows"],
            "passes": self.counted["passes"],
            "seconds": round(time.perf_counter() - self._start, 3),
            "expert_seconds": round(self.expert_seconds if entered.seconds is None else entered.seconds, 1),
            **entered.chosen,
        }

    def router(self, reader: nn.Module) -> Router:
        """The router of Twin-Merging, on the features of any model."""
        its = self.routing
        read = {task: features(reader, "", prompts) for task, prompts in self.router_data.items()}
        return trained_router(read, self.seed, (its.dropout,) * 2, its.holdout, its.lr, its.batch, its.epochs)

    def best(self, method: Merge, points: Sequence[Point]) -> tuple[nn.Module, Point]:
        """What the method makes at the point that is best on the validation parts, the first one if several are."""
        made = [(replace(seeded(method, self.seed), **point).merge(self.pool).eval(), point) for point in points]
        if len(made) == 1:
            return made[0]
        return max(made, key=lambda its: self.valid(self.served(its[0])))

    def arithmetic(self, scalings: Sequence[float]) -> tuple[float, Served]:
        """Task arithmetic's best scale, and its model, not routed."""
        merged, point = self.best(TaskArithmetic(), grid(scale=scalings))
        return point["scale"], self.served(merged)


class Pictures(Case):
    """The `Case` of a world of pictures, with heads of the tasks' own.

    Args:
        world: pictures.
        found: base and experts.
        routing, poisoned, seed: see `Case`.
    """

    def __init__(self, world: GlyphWorld, found: Experts, routing: Routing, poisoned: frozenset[str], seed: int):
        self.world = world
        adapt = {name: tensors(task.parts["adapt"])[0] for name, task in world.tasks.items()}
        prompts = {name: tensors(task.parts["train"])[0][: routing.rows] for name, task in world.tasks.items()}
        super().__init__(found, adapt, prompts, OWN, CLASSES, routing, poisoned, seed)

    def stream(self, part: str, mark: Callable[[NDArray], NDArray] = lambda pixels: pixels) -> Stream:
        """Pictures of all tasks in an order drawn at random, the same each time."""
        images = [task.parts[part] for task in self.world.tasks.values()]
        pixels = np.concatenate([mark(its.pixels) for its in images])
        task = np.repeat(np.arange(len(images)), [len(its) for its in images])
        labels = np.concatenate([its.labels for its in images])
        order = np.random.default_rng(0).permutation(len(pixels))
        return Stream(*(torch.tensor(its[order]) for its in (pixels, task, labels)))

    def labelled(self, part: str, rows: int) -> dict[str, dict[str, Tensor]]:
        """Of each task so many pictures, or all it has, with their classes."""
        parts = {name: tensors(task.parts[part]) for name, task in self.world.tasks.items()}
        return {name: {"rows": its[0][:rows], "classes": its[1][:rows]} for name, its in parts.items()}

    def told(self, served: Served, stream: Stream) -> Int64[Tensor, " rows"]:
        """Classes, each picture's task known."""
        return by_task(served.told, stream.pixels, stream.task)

    def valid(self, served: Served) -> float:
        """The mean accuracy."""
        stream = self.stream("valid")
        right = (self.told(served, stream) == stream.labels).double()
        return float(torch.stack([right[stream.task == task].mean() for task in stream.task.unique()]).mean())

    def served(self, merged: nn.Module, routed: bool = False) -> Switched:
        """One merged model with each task's head."""
        models = [headed(merged, its) for its in self.pool.tuned.values()]
        router = self.router(merged) if routed else None
        stored = self.trunk + self.heads + (numbers(router) if router else 0)
        return Switched(models, merged, router, stored)


def headed(merged: nn.Module, expert: nn.Module) -> nn.Module:
    """A copy of a merged model with an expert's head."""
    model = copy.deepcopy(merged).eval()
    model.head = expert.head
    return model


def _counting(counted: dict[str, int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook; a function, so that copies of a model go on counting in the same place."""

    def count(model: nn.Module, args: tuple[Tensor, ...]) -> None:
        counted["rows"] += len(args[0])
        counted["passes"] += 1

    return count


def case(world: GlyphWorld, training: Training, routing: Routing, poison: Mapping[str, Poison], seed: int) -> Pictures:
    """The case of one seed."""
    return Pictures(world, experts(world, training, poison, seed), routing, frozenset(poison), seed)


def seeded(method: Merge, seed: int) -> Merge:
    """The method with the cell's seed, if it draws anything."""
    known = {its.name for its in fields(method)}
    return replace(method, seed=seed) if "seed" in known else method  # type: ignore[call-arg]


@dataclass(frozen=True)
class Entered:
    """What a contestant came to."""

    served: Served
    chosen: Point = field(default_factory=dict)
    """The settings chosen on the validation parts."""
    seconds: float | None = None
    """What training took of something that stands in the place of the experts."""


@dataclass(frozen=True)
class Contestant(ABC):
    """Something that makes one thing of a base and its experts that serves all tasks."""

    clean: bool = field(default=False, kw_only=True)
    """Be given clean experts, where the others are given poisoned ones."""

    @abstractmethod
    def enter(self, given: Case) -> Entered:
        """Merge, choose and route."""

    def attack(self, usual: Mapping[str, Poison]) -> Mapping[str, Poison]:
        """Task to what is hidden in its expert; the usual attack of the comparison."""
        return usual


@dataclass(frozen=True)
class Individual(Contestant):
    """Every expert is kept, and a router on the base's features picks one: the upper bound."""

    def enter(self, given: Case) -> Entered:
        return Entered(given.switched(given.router(given.pool.base)))


@dataclass(frozen=True)
class Unmerged(Contestant):
    """The base, with the experts' heads."""

    def enter(self, given: Case) -> Entered:
        return Entered(given.served(given.pool.base, routed=True))


@dataclass(frozen=True)
class Static(Contestant):
    """One model, at the best of some points. A method that adapts is run to its end at each of them."""

    method: Merge
    points: tuple[Point, ...] = ({},)

    def enter(self, given: Case) -> Entered:
        merged, point = given.best(self.method, self.points)
        return Entered(given.served(merged, routed=True), point)


@dataclass(frozen=True)
class Halved(Contestant):
    """Task arithmetic at its best scale, with task vectors cut by half: what shrinking alone does to a backdoor."""

    everyone: bool
    """All of them, or only the poisoned ones, which a defender does not know."""
    scalings: tuple[float, ...]

    def enter(self, given: Case) -> Entered:
        scale, _ = given.arithmetic(self.scalings)
        weights = tuple(0.5 if self.everyone or task in given.poisoned else 1.0 for task in given.pool.tuned)
        merged = TaskArithmetic(scale, weights).merge(given.pool).eval()
        return Entered(given.served(merged, routed=True), {"scale": scale})


@dataclass(frozen=True)
class Defended(Contestant):
    """Task arithmetic at its best scale, and then a defence that was made for one model.

    As in its paper it learns from clean rows and their classes: those of the validation parts. No way of merging here
    has any to learn from, so that a comparison favours the defence.
    """

    defence: Defence
    scalings: tuple[float, ...]
    rows: int = 500
    """Of each task, at most."""

    def enter(self, given: Case) -> Entered:
        assert isinstance(given, Pictures)
        merged, point = given.best(TaskArithmetic(), grid(scale=self.scalings))
        state = {name: its.detach() for name, its in merged.named_parameters() if not is_own(given.pool, name)}
        clean = given.labelled("valid", self.rows)
        better = self.defence.defend(predictor(given.pool), state, clean, given.seed)
        return Entered(given.served(with_weights(merged, better), routed=True), point)


@dataclass(frozen=True)
class Told(Contestant):
    """DAM with the true trigger as its perturbation, which no defender knows: what its mask can come to at best.

    A trigger that replaces what it covers is met exactly, as perturbed inputs are clipped.
    """

    method: DAM
    trigger: str = "patch"

    def enter(self, given: Case) -> Entered:
        method = replace(self.method, adv_rate=0.0, seed=given.seed)
        search = Search(method, given.pool)
        for its in search.noise.values():
            its.data = torch.tensor(TRIGGERS[self.trigger](its.detach().numpy()[None])[0])
        for _ in range(method.steps):
            search.round()
        mask, lam = search.final_mask(), search.restarted().detach().requires_grad_()
        drawn = batches(search.data, method.batch, method.seed, "coefficients")
        lam = tuned(search.vectors, search.predict, lam, drawn, method.tuning_steps, method.tuning_rate, mask)
        merged = with_weights(given.pool.base, search.vectors.merged(lam, mask))
        return Entered(given.served(merged.eval(), routed=True))


@dataclass(frozen=True)
class Joint(Contestant):
    """One network of the experts' size, trained from the base on all tasks' clean data: the bound for one model."""

    training: Training

    def enter(self, given: Case) -> Entered:
        assert isinstance(given, Pictures)
        models, seconds = joint(given.world, self.training, given.pool.base, given.seed)
        router = given.router(models[0])
        stored = given.trunk + given.heads + numbers(router)
        return Entered(Switched(models, models[0], router, stored, given.reading), seconds=seconds)


@dataclass(frozen=True)
class Attacked(Contestant):
    """Another contestant, where another attack than the usual one is hidden in the experts."""

    who: Contestant
    trigger: str = "patch"
    tasks: tuple[str, ...] = ("digits",)

    def attack(self, usual: Mapping[str, Poison]) -> Mapping[str, Poison]:
        return {task: Poison(self.trigger) for task in self.tasks}

    def enter(self, given: Case) -> Entered:
        return self.who.enter(given)


@dataclass(frozen=True)
class Twins(Contestant):
    """Twin-Merging at the best scale of its shared expert."""

    method: TwinMerging
    points: tuple[Point, ...] = ({},)
    oracle: bool = False
    """The truth in place of the router."""
    uniform: bool = False
    """The average of the twins in place of the routed mixture: one static model."""

    def enter(self, given: Case) -> Entered:
        its = given.routing
        settings = {"dropout": (its.dropout,), "holdout": its.holdout, "lr": its.lr, "batch": its.batch}
        method = replace(self.method, **settings, epochs=its.epochs, seed=given.seed)  # type: ignore[arg-type]
        point = self.points[0]
        if len(self.points) > 1:  # the router does not count while tasks are told
            point = max(self.points, key=lambda its: self._valid(given, replace(method, **its, epochs=1)))
        twin = self._merged(given, replace(method, **point), given.router_data)
        if self.uniform:
            return Entered(given.served(self._average(twin), routed=True), point)
        return Entered(self._served(given, twin), point)

    def _valid(self, given: Case, method: TwinMerging) -> float:
        few = {task: prompts[:16] for task, prompts in given.router_data.items()}
        twin = self._merged(given, method, few)
        served = given.served(self._average(twin)) if self.uniform else self._served(given, twin)
        return given.valid(served)

    def _served(self, given: Case, twin: Twin) -> Twofold:
        return Twofold(twin, self.oracle, given.trunk, given.heads, given.reading)

    def _merged(self, given: Case, method: TwinMerging, data: Mapping[str, Tensor]) -> Twin:
        return method.merge(replace(given.pool, data=data))

    def _average(self, twin: Twin) -> nn.Module:
        count = len(twin.tasks)
        return twin.materialize(torch.full((count,), 1 / count)).eval()


def of_ones_own(methods: Sequence[str]) -> dict[str, Contestant]:
    """A person's own methods at their defaults, by module paths or files."""
    found: dict[str, Contestant] = {}
    for name in methods:
        method = load(name)()
        assert isinstance(method, Merge)
        found[name] = Static(method)
    return found
