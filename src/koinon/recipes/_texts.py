"""Experts of a small decoder, tuned from one base on texts in several languages, and merged in every way."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from koinon.bench.compare import Recipe, Row
from koinon.bench.statistics import Measured, Resampling, mean_of
from koinon.core import pick
from koinon.data.texts import TextWorld, fingerprint, made, texts, windows
from koinon.merge.adamerging import AdaMerging
from koinon.merge.twin import TwinMerging
from koinon.nn.decoder import Decoder
from koinon.nn.train import Batches, fit
from koinon.recipes._contestants import Case, Contestant, Routing, Static, Twins, grid, of_ones_own
from koinon.recipes._experts import Experts, in_batches, kept
from koinon.recipes._measures import over, per_task, row
from koinon.recipes._served import Reading, Served, numbers
from koinon.recipes._ways import SCALINGS, static

MAIN = "mean.normalised"
SHOWN = ("told.normalised", "mean.bits_per_byte", "told.bits_per_byte", "router.accuracy")
"""Metrics to rank by, and to show beside it."""


@dataclass(frozen=True)
class TextTraining:
    """How the base is trained, and each expert from it.

    Epochs and rates were chosen by the validation parts of seed 0: longer, the experts learn their texts by heart.
    """

    width: int = 96
    layers: int = 3
    heads: int = 3
    context: int = 96
    """Bytes of a window."""
    prompt: int = 32
    """The first bytes of a window: all that a router sees, and not scored."""
    batch: int = 16
    base_epochs: tuple[int, ...] = (7, 1)
    """Passes over the general text, at each of the rates."""
    expert_epochs: tuple[int, ...] = (2, 1)
    """Passes over a task's text, at each of the rates."""
    base_rates: tuple[float, ...] = (2e-3, 4e-4)
    expert_rates: tuple[float, ...] = (1e-3, 2e-4)

    @property
    def scored(self) -> int:
        """Bytes of a window that are to be predicted."""
        return self.context - self.prompt

    def decoder(self, seed: int) -> Decoder:
        """One that is not trained yet."""
        return Decoder(256, self.width, self.layers, self.heads, self.context, seed)

    def windows(self, text: bytes) -> Int64[Tensor, "rows context"]:
        """Windows that overlap by their prompts: each byte behind the first prompt is scored once."""
        return torch.from_numpy(windows(text, self.context, self.scored)).long()

    @property
    def reading(self) -> Reading:
        """Routers see prompts; the answer is the bits that the scored bytes of a window cost, for each of them."""
        return Reading(
            lambda rows: rows[:, : self.prompt], lambda logits, rows: bits(logits, rows, self.scored), size=256
        )


def bits(
    logits: Float[Tensor, "rows context symbols"], rows: Int64[Tensor, "rows context"], scored: int
) -> Float[Tensor, " rows"]:
    """Mean bits that each of a window's last bytes costs, given those before it."""
    said, due = logits[:, -scored - 1 : -1], rows[:, -scored:]
    return F.cross_entropy(said.transpose(1, 2), due, reduction="none").mean(1) / math.log(2)


def text_experts(world: TextWorld, training: TextTraining, seed: int) -> Experts:
    """The base and an expert for each task: from the cache, or trained and put there.

    Args:
        world: the general text and the tasks.
        training: equal for all experts.
        seed: of the base's weights and of the order of the batches.
    """
    described = asdict(training) | {"torch": torch.__version__, "seed": seed}
    later = {key: described.pop(key) for key in ("expert_epochs", "expert_rates")}
    described["general"] = fingerprint(world.general)
    base = training.decoder(seed)
    seconds = kept(base, described, _tuning(base, world.general, training, False, seed))
    tuned = {}
    for name, task in world.tasks.items():
        text, model = task.parts["train"], copy.deepcopy(base)
        settings = described | later | {"task": name, "text": fingerprint(text)}
        seconds += kept(model, settings, _tuning(model, text, training, True, seed))
        tuned[name] = model
    return Experts(base, tuned, seconds)


def _tuning(model: Decoder, text: bytes, training: TextTraining, expert: bool, seed: int) -> Callable[[], None]:
    """Training the model, when it is called."""

    def loss(network: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return F.cross_entropy(network(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def tune() -> None:
        rows = torch.from_numpy(windows(text, training.context, training.context // 2)).long()
        batches = Batches(rows, {"rows": torch.arange(len(rows))}, training.batch, seed)
        epochs = training.expert_epochs if expert else training.base_epochs
        rates = training.expert_rates if expert else training.base_rates
        for count, rate in zip(epochs, rates, strict=True):
            fit(model, batches, loss, epochs=count, lr=rate)

    return tune


class Single(Served):
    """One model for rows of all tasks: nothing is routed.

    Args:
        model: the merged one.
        reading: see `Reading`.
    """

    def __init__(self, model: nn.Module, reading: Reading):
        self.model, self.reading = model, reading
        self.stored = self.active = numbers(model)

    def told(self, rows: Tensor, task: int) -> Tensor:
        return in_batches(lambda part: self.reading.answer(self.model(part), part), rows, size=self.reading.size)

    def routed(self, rows: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(truth, -1), self.told(rows, 0)


class Texts(Case):
    """The `Case` of a world of texts; nothing stays a task's own.

    Args:
        world: texts.
        found: base and experts.
        training: how they were trained.
        routing, seed: see `Case`.
    """

    def __init__(self, world: TextWorld, found: Experts, training: TextTraining, routing: Routing, seed: int):
        self.world, self.training = world, training
        reading = training.reading
        adapt = {name: training.windows(task.parts["adapt"]) for name, task in world.tasks.items()}
        rows = {name: training.windows(task.parts["train"])[: routing.rows] for name, task in world.tasks.items()}
        prompts = {name: reading.prompt(its) for name, its in rows.items()}
        super().__init__(found, adapt, prompts, (), reading, routing, frozenset(), seed)

    def stream(self, part: str) -> tuple[Int64[Tensor, "rows context"], Int64[Tensor, " rows"]]:
        """Windows of all tasks, and whose they are."""
        found = [self.training.windows(task.parts[part]) for task in self.world.tasks.values()]
        return torch.cat(found), torch.repeat_interleave(torch.tensor([len(its) for its in found]))

    def told(self, served: Served, rows: Tensor, task: Tensor) -> Float[Tensor, " rows"]:
        """Bits a byte of each window, its task known."""
        return torch.cat([served.told(rows[task == number], number) for number in range(len(self.world.tasks))])

    @cached_property
    def held(self) -> tuple[Tensor, Tensor]:
        """The windows to choose on."""
        return self.stream("valid")

    def valid(self, served: Served) -> float:
        """The mean of minus the bits a byte."""
        rows, task = self.held
        found = self.told(served, rows, task).double()
        return -float(torch.stack([found[task == number].mean() for number in task.unique()]).mean())

    def served(self, merged: nn.Module, routed: bool = False) -> Single:
        """One merged model is served as it is."""
        return Single(merged, self.reading)


@dataclass(frozen=True)
class TextScale:
    """How large a comparison is."""

    world: Callable[[], TextWorld]
    seeds: int
    training: TextTraining
    routing: Routing
    steps: int
    """Of AdaMerging."""


SCALES: Mapping[str, TextScale] = {
    "tiny": TextScale(
        made,
        2,
        TextTraining(24, 1, 2, 48, 16, 16, (2,), (4,), (5e-3,), (5e-3,)),
        Routing(rows=100, epochs=10, batch=128),
        steps=3,
    ),
    "demo": TextScale(texts, 2, TextTraining(width=48, base_epochs=(4, 1)), Routing(rows=500), steps=10),
    "small": TextScale(texts, 3, TextTraining(), Routing(), steps=40),
    "full": TextScale(texts, 10, TextTraining(192, 6, 6), Routing(rows=5_500), steps=500),
}


def on_texts(steps: int) -> dict[str, Contestant]:
    """Static ways, Twin-Merging and its bounds. AdaMerging starts at three scales, with two rates."""
    ways, points = static(steps), grid(scale=SCALINGS)
    entered = ("individual", "base", "average", "task_arithmetic", "ties", "dare", "breadcrumbs")
    twin = Twins(TwinMerging(), points)
    return {name: ways[name] for name in entered} | {
        "adamerging": Static(AdaMerging(steps=steps, batch=8), grid(init=(0.2, 0.3, 0.5), rate=(1e-3, 1e-2))),
        "twin": twin,
        "twin_oracle": replace(twin, oracle=True),
        "twin_full_oracle": Twins(TwinMerging(rank=1.0), points, oracle=True),
    }


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """Experts of a decoder tuned from one base, merged in every way; equal base, experts, data and points."""

    data: str = "texts"
    scale: str = "small"
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

    def prepare(self) -> TextWorld:
        """Read the texts."""
        return SCALES[pick(self.scale, SCALES, "scale")].world()

    def settings(self, world: TextWorld) -> Mapping[str, Any]:
        """What identifies the comparison, and what its report shows."""
        scale = SCALES[self.scale]
        parts = [
            [len(scale.training.windows(task.parts[part])) for task in world.tasks.values()]
            for part in ("train", "valid", "test")
        ]
        return {
            "data": self.data,
            "content": [
                fingerprint(world.general),
                *(its for task in world.tasks.values() for its in task.fingerprints),
            ],
            "scale": self.scale,
            "tasks": [{"name": task.name, "classes": 256} for task in world.tasks.values()],
            "split": "by conversations that share no line",
            "rows": [sum(sizes) for sizes in parts],
            "sparse": [],
            "training": asdict(scale.training),
            "routing": asdict(scale.routing),
            "main": MAIN,
            "shown": list(SHOWN),
            "baseline": "task_arithmetic",
            "bounds": ["individual", "twin_oracle", "twin_full_oracle"],
            "words": {"baseline": "the simplest merge of task vectors", "chosen": "Coefficients and densities"},
        }

    def contestants(self, world: TextWorld) -> Mapping[str, Contestant]:
        """All of them, and a person's own methods."""
        return on_texts(SCALES[self.scale].steps) | of_ones_own(self.own)

    def cell(self, world: TextWorld, contestant: Contestant, seed: int) -> Row:
        """Take the base and experts, merge, choose on the validation parts, measure on the test parts."""
        scale = SCALES[self.scale]
        given = Texts(world, text_experts(world, scale.training, seed), scale.training, scale.routing, seed)
        entered = contestant.enter(given)
        cost = given.cost(entered)
        return row(bits_per_byte(given, entered.served), cost, [MAIN, *SHOWN])


def bits_per_byte(given: Texts, served: Served) -> dict[str, Measured]:
    """Of each task and of their mean: routed by the prompt, and told whose a window is.

    A normalised score is 100 times the bits a byte of the task's own expert over those of what is measured: less is
    more. Resamplings are of windows. Where nothing is routed, both are the same, and the router has no accuracy.
    """
    rows, task = given.stream("test")
    resampling, whose = Resampling(None, len(rows)), task.numpy()
    picked, cost = served.routed(rows, task)
    found = {
        kind: per_task(its.double().numpy(), whose, resampling)
        for kind, its in {
            "mean": cost,
            "told": given.told(served, rows, task),
            "expert": given.told(given.individual, rows, task),
        }.items()
    }
    right = (picked == task).double().where(picked >= 0, math.nan)
    measured = {"router.accuracy": mean_of(per_task(right.numpy(), whose, resampling))}
    for kind, prefix in (("mean", ""), ("told", "told.")):
        scores = [over(expert, its) for its, expert in zip(found[kind], found["expert"], strict=True)]
        measured |= {f"{kind}.normalised": mean_of(scores), f"{kind}.bits_per_byte": mean_of(found[kind])}
        for name, its, score in zip(given.world.tasks, found[kind], scores, strict=True):
            measured |= {f"{prefix}{name}.bits_per_byte": its, f"{prefix}{name}.normalised": score}
    return measured
