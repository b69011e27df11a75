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
from torch.nn import functional as F

from koinon.data.glyphs import GlyphWorld
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import features, quietly
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.twin import Twin, TwinMerging
from koinon.nn.router import Router, trained_router
from koinon.recipes._vision import OWN, Experts, Poison, Training, experts, in_batches, tensors

Point = Mapping[str, Any]
"""Settings to try."""


def grid(**values: Sequence[Any]) -> tuple[Point, ...]:
    """All combinations of the fields' values."""
    return tuple(dict(zip(values, its, strict=True)) for its in itertools.product(*values.values()))


@dataclass(frozen=True)
class Routing:
    """How the router of every contestant is trained: as Twin-Merging's own, on the same pictures."""

    rows: int = 1_000
    """Training pictures of each task, at most."""
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


class Served(ABC):
    """Something that classifies pictures of all tasks."""

    stored: int
    """Numbers that are kept: weights, heads, twins and router."""
    active: int
    """Numbers that one picture meets."""

    @abstractmethod
    def told(self, pixels: Float[Tensor, "rows 16 16"], task: int) -> Int64[Tensor, " rows"]:
        """Classes, of pictures known to be this task's."""

    @abstractmethod
    def routed(self, pixels: Tensor, truth: Int64[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Tasks and classes, [rows] each. Only an oracle looks at the truth."""


class Switched(Served):
    """A model for each task, and a router that picks one by the features of a reader.

    Args:
        models: one a task; statically merged ones differ in their heads only.
        reader: whose features the router reads.
        router: trained on them; None if nothing is to be routed.
        stored: see `Served`.
    """

    def __init__(self, models: Sequence[nn.Module], reader: nn.Module, router: Router | None, stored: int):
        self.models, self.reader, self.router, self.stored = models, reader, router, stored
        self.active = numbers(models[0]) + (numbers(router) if router else 0)

    def told(self, pixels: Tensor, task: int) -> Tensor:
        return in_batches(lambda part: self.models[task](part).argmax(1), pixels)

    def routed(self, pixels: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        assert self.router is not None
        router = self.router
        task = in_batches(lambda part: router(features(self.reader, "", part)).argmax(1), pixels)
        classes = torch.zeros_like(task)
        for number in task.unique().tolist():
            classes[task == number] = self.told(pixels[task == number], number)
        return task, classes


class Twofold(Served):
    """A `Twin`, with its router or with the truth in its place."""

    def __init__(self, twin: Twin, oracle: bool, given: "Case"):
        self.twin, self.oracle = twin, oracle
        self.active = given.trunk + twin.stored_numbers + numbers(twin.router)
        self.stored = self.active + given.heads

    def told(self, pixels: Tensor, task: int) -> Tensor:
        return self._of(pixels, torch.full((len(pixels),), task))

    def routed(self, pixels: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if self.oracle:
            return truth, self._of(pixels, truth)
        weights = in_batches(self.twin.route, pixels)
        pairs = torch.cat([pixels.flatten(1), weights], 1)
        width = weights.shape[1]
        classes = in_batches(
            lambda part: self._mixed(part[:, :-width].view(-1, *pixels.shape[1:]), part[:, -width:]), pairs
        )
        return weights.argmax(1), classes

    def _of(self, pixels: Tensor, task: Tensor) -> Tensor:
        classes = torch.zeros_like(task)
        for number in task.unique().tolist():
            chosen = (task == number).nonzero().flatten()
            classes[chosen] = in_batches(self._only(number), pixels[chosen])
        return classes

    def _only(self, task: int) -> Callable[[Tensor], Tensor]:
        weight = F.one_hot(torch.tensor(task), len(self.twin.tasks)).float()
        return lambda pixels: self._mixed(pixels, weight.expand(len(pixels), -1))

    def _mixed(self, pixels: Tensor, weights: Tensor) -> Tensor:
        return self.twin.with_weights(pixels, weights).argmax(1)


def numbers(module: nn.Module) -> int:
    """How many a module holds."""
    return sum(value.numel() for value in module.state_dict().values())


class Case:
    """What every contestant of one cell is given.

    Args:
        world: pictures.
        found: base and experts.
        routing: how routers are trained.
        poisoned: tasks whose experts are; for controls that know.
        seed: of everything that is drawn while merging and routing.
    """

    def __init__(self, world: GlyphWorld, found: Experts, routing: Routing, poisoned: frozenset[str], seed: int):
        self.world, self.routing, self.poisoned, self.seed = world, routing, poisoned, seed
        self.expert_seconds = found.seconds
        self.counted = {"rows": 0, "passes": 0}
        """Rows and batches that the base, the experts and what is made of them have seen: copies count as well."""
        self._start = time.perf_counter()
        adapt = {name: tensors(task.parts["adapt"])[0] for name, task in world.tasks.items()}
        base, tuned = quietly(found.base), {name: quietly(its) for name, its in found.tuned.items()}
        for model in (base, *tuned.values()):
            model.register_forward_pre_hook(_counting(self.counted))
        self.pool = Pool(base, tuned, adapt, OWN)
        self.router_data = {name: tensors(task.parts["train"])[0][: routing.rows] for name, task in world.tasks.items()}
        self.heads = sum(numbers(its.head) for its in found.tuned.values())
        self.trunk = numbers(base) - numbers(found.base.head)
        self.individual = Switched(list(tuned.values()), base, None, (len(tuned) + 1) * self.trunk + self.heads)

    def elapsed(self) -> float:
        """Seconds since the base and the experts were there."""
        return time.perf_counter() - self._start

    def stream(self, part: str, mark: Callable[[NDArray], NDArray] = lambda pixels: pixels) -> Stream:
        """Pictures of all tasks in an order drawn at random, the same each time."""
        images = [task.parts[part] for task in self.world.tasks.values()]
        pixels = np.concatenate([mark(its.pixels) for its in images])
        task = np.repeat(np.arange(len(images)), [len(its) for its in images])
        labels = np.concatenate([its.labels for its in images])
        order = np.random.default_rng(0).permutation(len(pixels))
        return Stream(*(torch.tensor(its[order]) for its in (pixels, task, labels)))

    def told(self, served: Served, stream: Stream) -> Int64[Tensor, " rows"]:
        """Classes, each picture's task known."""
        classes = torch.zeros_like(stream.labels)
        for task in range(len(self.world.tasks)):
            classes[stream.task == task] = served.told(stream.pixels[stream.task == task], task)
        return classes

    def valid(self, served: Served) -> float:
        """Mean over tasks of the accuracy on the validation parts, each picture's task known."""
        stream = self.stream("valid")
        right = (self.told(served, stream) == stream.labels).double()
        return float(torch.stack([right[stream.task == task].mean() for task in stream.task.unique()]).mean())

    def served(self, merged: nn.Module, routed: bool = False) -> Switched:
        """One merged model with each task's head."""
        models = [headed(merged, its) for its in self.pool.tuned.values()]
        router = self.router(merged) if routed else None
        stored = self.trunk + self.heads + (numbers(router) if router else 0)
        return Switched(models, merged, router, stored)

    def router(self, reader: nn.Module) -> Router:
        """The router of Twin-Merging, on the features of any model."""
        its = self.routing
        read = {task: features(reader, "", pixels) for task, pixels in self.router_data.items()}
        return trained_router(read, self.seed, (its.dropout,) * 2, its.holdout, its.lr, its.batch, its.epochs)

    def best(self, method: Merge, points: Sequence[Point]) -> tuple[nn.Module, Point]:
        """What the method makes at the point that is best on the validation parts, the first one if several are."""
        made = [(replace(seeded(method, self.seed), **point).merge(self.pool).eval(), point) for point in points]
        if len(made) == 1:
            return made[0]
        return max(made, key=lambda its: self.valid(self.served(its[0])))

    def arithmetic(self, scalings: Sequence[float]) -> tuple[float, Switched]:
        """Task arithmetic's best scale, and its model, not routed."""
        merged, point = self.best(TaskArithmetic(), grid(scale=scalings))
        return point["scale"], self.served(merged)


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


def case(world: GlyphWorld, training: Training, routing: Routing, poison: Mapping[str, Poison], seed: int) -> Case:
    """The case of one seed."""
    return Case(world, experts(world, training, poison, seed), routing, frozenset(poison), seed)


def seeded(method: Merge, seed: int) -> Merge:
    """The method with the cell's seed, if it draws anything."""
    return replace(method, seed=seed) if any(its.name == "seed" for its in fields(method)) else method  # type: ignore[call-arg]


@dataclass(frozen=True)
class Entered:
    """What a contestant came to."""

    served: Served
    chosen: Point = field(default_factory=dict)
    """The settings chosen on the validation parts."""


@dataclass(frozen=True)
class Contestant(ABC):
    """Something that makes one thing of a base and its experts that serves all tasks."""

    clean: bool = field(default=False, kw_only=True)
    """Be given clean experts, where the others are given poisoned ones."""

    @abstractmethod
    def enter(self, given: Case) -> Entered:
        """Merge, choose and route."""


@dataclass(frozen=True)
class Individual(Contestant):
    """Every expert is kept, and a router on the base's features picks one: the upper bound."""

    def enter(self, given: Case) -> Entered:
        kept, router = given.individual, given.router(given.pool.base)
        return Entered(Switched(kept.models, given.pool.base, router, kept.stored + numbers(router)))


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
        return Entered(Twofold(twin, self.oracle, given), point)

    def _valid(self, given: Case, method: TwinMerging) -> float:
        few = {task: pixels[:16] for task, pixels in given.router_data.items()}
        twin = self._merged(given, method, few)
        served = given.served(self._average(twin)) if self.uniform else Twofold(twin, self.oracle, given)
        return given.valid(served)

    def _merged(self, given: Case, method: TwinMerging, data: Mapping[str, Tensor]) -> Twin:
        return method.merge(replace(given.pool, data=data))

    def _average(self, twin: Twin) -> nn.Module:
        count = len(twin.tasks)
        return twin.materialize(torch.full((count,), 1 / count)).eval()
