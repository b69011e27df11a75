"""Which way of sharing one network among several tasks serves a table best?"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from koinon.bench.compare import Recipe, Row
from koinon.bench.statistics import Measured, Resampling
from koinon.core import load, pick
from koinon.data.movielens import movielens
from koinon.data.related import related
from koinon.data.schema import TableEncoder
from koinon.data.tables import TableFile, World
from koinon.nn.health import expert_health
from koinon.nn.params import trained
from koinon.recipes._trees import BoostedTrees
from koinon.share._contract import Share
from koinon.share._tables import Budget, choose, main_metric, measure, predict_rows
from koinon.share.home import HoME
from koinon.share.mmoe import MMoE
from koinon.share.ple import PLE
from koinon.share.shared_bottom import SharedBottom
from koinon.share.single_task import SingleTask

M = TypeVar("M", bound=Share)

WORLDS: Mapping[str, Callable[[int | None], World]] = {
    "movielens": movielens,
    "related": lambda rows: related(max(rows or 60_000, 4_000)),  # the rarest task needs as many
}


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    rows: int | None
    """Rows of a named data set; all if None. A person's own table is always used whole."""
    seeds: int
    budget: Budget
    expert: int
    """Width of HoME's experts; the others are widened until they have as many parameters."""


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(2_000, 2, Budget(epochs=2, batch=256, rates=(0.01,), embedding=4), expert=8),
    "demo": Scale(40_000, 2, Budget(epochs=5, batch=1024, rates=(0.003, 0.01)), expert=32),
    "small": Scale(None, 5, Budget(epochs=10, batch=1024, rates=(0.005, 0.015)), expert=64),
    "full": Scale(None, 10, Budget(epochs=30, batch=4096, rates=(0.0003, 0.001, 0.003, 0.01)), expert=256),
}


@dataclass(frozen=True)
class Network:
    """A way of sharing as a contestant."""

    method: Share

    def enter(self, world: World, budget: Budget, seed: int) -> tuple[dict, dict, dict]:
        """Predictions for the test part, cost, meters."""
        chosen = choose(self.method, world, budget, seed)
        inputs, _ = world.test.tensors()
        embedded = chosen.model.encoder
        tables = [m for m in embedded.modules() if isinstance(m, TableEncoder)]
        idle = sum(m.embedding.numel() - m.dim * len(world.schema.categories) for m in tables)
        cost = {
            "trained": trained(chosen.model),
            "active": trained(chosen.model) - idle,
            "samples": chosen.cost.samples,
            "passes": chosen.cost.passes,
            "seconds": round(chosen.cost.seconds, 3),
            "samples_per_second": round(chosen.cost.samples / chosen.cost.seconds),
            "rate": chosen.rate,
            "epoch": chosen.epoch,
        }
        return predict_rows(chosen.model, world, inputs), cost, expert_health(chosen.model, [inputs])


@dataclass(frozen=True)
class Trees:
    """Boosted trees as a contestant."""

    trees: BoostedTrees

    def enter(self, world: World, budget: Budget, seed: int) -> tuple[dict, dict, dict]:
        """Predictions for the test part, cost, meters."""
        predictions, cost = self.trees.predict(world, budget, seed)
        return predictions, cost, {}


@dataclass(frozen=True)
class ShareRecipe(Recipe):
    """HoME, its baselines and ablations, and trees, on one table at equal parameters and budget."""

    data: str = "movielens"
    """A named data set, or what a person's own table is to be called."""
    scale: str = "small"
    table: TableFile | None = None
    """A person's own table instead of a named data set."""
    own: tuple[str, ...] = ()
    """Methods of a person's own to enter as well, at their defaults: module paths or files."""

    @property
    def name(self) -> str:
        """``share-DATA``."""
        return f"share-{self.data}"

    @property
    def seeds(self) -> int:
        """How many seeds this scale asks for."""
        return SCALES[self.scale].seeds

    def prepare(self) -> World:
        """Read the table, or make the named data set at this scale."""
        scale = SCALES[pick(self.scale, SCALES, "scale")]
        if self.table is not None:
            return self.table.world()
        return WORLDS[pick(self.data, WORLDS, "data set")](scale.rows)

    def settings(self, world: World) -> Mapping[str, Any]:
        """What identifies the comparison, and what its report shows."""
        main, shown = _reported(world)
        return {
            "data": self.data,
            "content": _fingerprint(world),
            "scale": self.scale,
            "tasks": [dataclasses.asdict(task) for task in world.tasks],
            "split": world.split,
            "rows": [len(world.train), len(world.valid), len(world.test)],
            "sparse": list(world.sparse),
            "budget": dataclasses.asdict(SCALES[self.scale].budget),
            "main": main,
            "shown": shown,
            "baseline": "shared_bottom",
        }

    def contestants(self, world: World) -> Mapping[str, Network | Trees]:
        """All at the parameters of HoME (above the encoder), by widening; ablations of HoME keep its widths."""
        width = SCALES[self.scale].expert
        embedding = SCALES[self.scale].budget.embedding
        home = HoME(expert=(width,))
        size = _parameters(home, world, embedding)
        mmoe, ple = (
            _widened(MMoE(), "expert", size, world, embedding),
            _widened(PLE(), "expert", size, world, embedding),
        )
        methods: dict[str, Share] = {
            "single_task": _widened(SingleTask(), "bottom", size, world, embedding),
            "shared_bottom": _widened(SharedBottom(), "bottom", size, world, embedding),
            "mmoe": mmoe,
            "mmoe_swish": dataclasses.replace(mmoe, swish=True),
            "ple": ple,
            "ple_swish": dataclasses.replace(ple, swish=True),
            "home": home,
            "home_no_meta_feature_gate": dataclasses.replace(home, meta_feature_gates=0),
            "home_no_task_feature_gate": dataclasses.replace(home, task_feature_gates=0),
            "home_no_self_gate": dataclasses.replace(home, self_gate=False),
            "home_no_mask": dataclasses.replace(home, hierarchy=False),
            "home_relu": dataclasses.replace(home, swish=False),
        }
        entered = {label: Network(method) for label, method in methods.items()}
        return {**entered, **{name: Network(load(name)()) for name in self.own}, "trees": Trees(BoostedTrees())}  # type: ignore[arg-type]

    def cell(self, world: World, contestant: Network | Trees, seed: int) -> Row:
        """Train, choose on the validation part, measure on the test part."""
        predictions, cost, meters = contestant.enter(world, SCALES[self.scale].budget, seed)
        measured = measure(world, world.test, predictions, Resampling(world.test.groups, len(world.test)))
        main, shown = _reported(world)
        return {
            "metrics": {name: _number(metric.value, 6) for name, metric in measured.items()},
            "draws": {name: _digits(measured[name]) for name in dict.fromkeys([main, *shown])},
            "meters": {name: round(value, 5) for name, value in (meters | _on_sparse(world, meters)).items()},
            "cost": cost,
        }


@dataclass(frozen=True)
class OnData:
    """Compare ways of sharing on a named data set.

    On a table of your own: koinon compare share --table FILE --tasks NAME:GROUP ...; add --help for its options.
    """

    data: Literal["movielens", "related"] = "movielens"
    """MovieLens-100K, or made tasks whose relatedness is known."""
    scale: Literal["tiny", "demo", "small", "full"] = "small"
    """How much data, how many seeds and how long."""
    own: tuple[str, ...] = ()
    """Methods of your own to enter as well: module paths or files."""

    def recipe(self) -> ShareRecipe:
        """The comparison."""
        return ShareRecipe(self.data, self.scale, None, self.own)


@dataclass(frozen=True)
class OnTable:
    """Compare ways of sharing on a table of your own."""

    file: TableFile
    scale: Literal["tiny", "demo", "small", "full"] = "small"
    """How many seeds, how wide and how long; the table is used whole."""
    own: tuple[str, ...] = ()
    """Methods of your own to enter as well: module paths or files."""

    def recipe(self) -> ShareRecipe:
        """The comparison, named after the file."""
        return ShareRecipe(self.file.table.stem, self.scale, self.file, self.own)


def options(arguments: Sequence[str]) -> type[OnData] | type[OnTable]:
    """The command line's options: those of a table if one is given."""
    return OnTable if any(word.split("=")[0] == "--table" for word in arguments) else OnData


def _reported(world: World) -> tuple[str, list[str]]:
    """The metric to rank by, and those to show beside it."""
    main = main_metric(world, world.tasks)
    shown = ["mean.auc"] if main == "gauc" else []
    shown += [f"sparse.{main}"] if world.sparse and main != "score" else []
    shown += [f"{task.name}.{main_metric(world, [task]) if task.kind == 'binary' else 'rmse'}" for task in world.tasks]
    return f"mean.{main}", shown


def _on_sparse(world: World, meters: Mapping[str, float]) -> dict[str, float]:
    """``underfitting``: the mean of the sparse tasks' meters, if the network has them."""
    found = [meters[f"underfitting.{name}"] for name in world.sparse if f"underfitting.{name}" in meters]
    return {"underfitting": sum(found) / len(found)} if found else {}


def _digits(metric: Measured) -> list[float | None]:
    return [_number(float(value), 5) for value in metric.draws]


def _number(value: float, digits: int) -> float | None:
    """None where a metric has no value: JSON knows no NaN."""
    return None if math.isnan(value) else round(value, digits)


def _parameters(method: Share, world: World, embedding: int) -> int:
    """Trained parameters above the encoder."""
    encoder = TableEncoder(world.schema, embedding)
    model = method.share(encoder, world.tasks, encoder.width)
    return trained(model) - trained(model.encoder)


def _widened(method: M, field: str, size: int, world: World, embedding: int) -> M:
    """The method with the width of its layers at which its parameters come nearest to ``size``."""

    def at(width: int) -> M:
        return dataclasses.replace(method, **{field: (width,)})

    high = 1
    while _parameters(at(high), world, embedding) < size:
        high *= 2
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        if _parameters(at(middle), world, embedding) < size:
            low = middle + 1
        else:
            high = middle
    return at(low)


def _fingerprint(world: World) -> str:
    """Of all the data's content."""
    digest = hashlib.blake2b(digest_size=8)
    for rows in (world.train, world.valid, world.test):
        for part in (rows.inputs, rows.labels):
            for name, array in part.items():
                digest.update(name.encode())
                digest.update(array.tobytes())
    return digest.hexdigest()
