"""Which way of editing a language model makes a fact stick, alone and among two hundred, and leaves the rest alone?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from koinon.bench.compare import Recipe, Row
from koinon.bench.statistics import Measured, Resampling
from koinon.core import UserError, build, load, pick
from koinon.data import factlab
from koinon.edit._contract import Edit
from koinon.edit._edited import Edited
from koinon.edit._packing import packed
from koinon.edit._patches import Patch, Weights
from koinon.edit.alphaedit import AlphaEdit
from koinon.edit.finetune import Finetune
from koinon.edit.grace import Grace
from koinon.edit.ike import Ike
from koinon.edit.kn import KnowledgeNeurons
from koinon.edit.lora import Lora
from koinon.edit.memit import Memit
from koinon.edit.mend import Mend
from koinon.edit.rome import Rome
from koinon.edit.serac import Serac
from koinon.edit.wise import Wise
from koinon.lm import shelf
from koinon.lm.language import LM
from koinon.recipes._contestants import grid
from koinon.recipes._editing import EditWorld, Lesson, Point, Sizes, agreement, figures, gone, over_tasks, worded
from koinon.recipes._measures import row, share

GONE = "alone.erasure.gone"
"""Share of the facts to be refused whose old answer is no longer given."""
TRACED = "alone.modification.traced"
"""Rank correlation over layers of what tracing finds and how well a method edits there."""


@dataclass(frozen=True)
class Entrant:
    """A method, and the points its settings are chosen from."""

    method: Edit
    points: tuple[Point, ...] = ({},)
    traced: bool = False
    """Whether it is asked as well if tracing tells the layers at which editing works."""


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    sizes: Sizes
    seeds: int
    training: int
    """Steps of methods that train a network before the first edit."""


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(Sizes(single=2, stream=(1, 4), batch=3, valid=2, material=8, probes=2), 2, 2),
    "demo": Scale(Sizes(single=6, stream=(1, 10, 20), batch=20, valid=6, material=40, probes=3), 2, 100),
    "small": Scale(
        Sizes(single=20, stream=(1, 10, 50, 100, 200), batch=50, valid=20, material=200, probes=5), 5, 1_000
    ),
    "full": Scale(
        Sizes(single=100, stream=(1, 10, 100, 500, 1_000), batch=1_000, valid=50, material=2_000, probes=10), 5, 20_000
    ),
}
ALONE: Mapping[str, Scale] = {
    name: replace(SCALES[name], sizes=replace(SCALES[name].sizes, single=single, stream=(), batch=0, valid=valid))
    for name, single, valid in (("tiny", 2, 2), ("demo", 3, 3), ("small", 8, 6), ("full", 100, 50))
}
"""For facts that are only taught alone."""
SLOW: Mapping[str, Scale] = {
    "tiny": SCALES["tiny"],
    "demo": Scale(Sizes(single=1, stream=(1, 3), batch=3, valid=1, material=20, probes=2), 1, 0),
    "small": Scale(Sizes(single=4, stream=(1, 5, 10), batch=10, valid=3, material=60, probes=3), 2, 0),
    "full": SCALES["small"],
}
"""For a model that takes a second for a step: fewer facts."""
IN_A_ROW: Mapping[str, Scale] = {
    name: replace(scale, sizes=replace(scale.sizes, single=0, stream=stream, batch=0))
    for (name, scale), stream in zip(SCALES.items(), ((1, 4), (1, 10, 20), (1, 10, 100), (1, 10, 100, 1_000)))
}
"""For facts that are only taught in a row."""
SHOWN = ("reliability", "generality", "locality", "portability", "harmonic")


def side_of(depth: int) -> Wise:
    """WISE for small models: a memory for each fact, asked by the prompt's last token, counted by its length."""
    return Wise(
        layer=depth // 2, count=2, steps=40, shard=1, shards=10**6, irrelevant=8, balanced=True, over="last", ratio=0.7
    )


def entrants(training: int, depth: int) -> dict[str, Entrant]:
    """The unedited model, fine-tuning as published twice, and every way of editing; six points each, where they fit.

    Layers are the first, and those at a quarter and half of the depth: later ones only add to what is said. WISE and
    GRACE write at half of it, as each of their edits costs a second or more. What is trained before the first edit is
    trained once, at settings for a small model. Settings for small models were found on other facts than these.
    """
    layers = tuple(sorted({0, depth // 4, depth // 2}))
    tuned = grid(layer=layers, rate=(1e-3, 5e-3))
    written = grid(layer=layers, decay=(0.5, 1e-3))
    spread = Memit(spread=min(2, depth), bound=4.0, decay=1e-3)
    guarded = AlphaEdit(spread=min(2, depth), bound=4.0, decay=1e-3, rate=0.5, relative=True)
    side = side_of(depth)
    apart = grid(ratio=(0.7, 0.88))
    return {
        "base": Entrant(Finetune(layer=0, steps=0)),
        "finetune_m": Entrant(Finetune(bound=0.0), tuned),
        "finetune_m_bound": Entrant(Finetune(bound=5e-3), tuned),
        "finetune_l": Entrant(Finetune(loss="prompt end", bound=5e-3), tuned),
        "lora": Entrant(Lora(), grid(rate=(1e-3, 2e-3, 5e-3), steps=(10, 30))),
        "rome": Entrant(Rome(), written),
        "rome_release": Entrant(Rome(keys="release"), written),
        "rome_identity": Entrant(Rome(whiten=False), written),
        "memit": Entrant(spread, grid(layer=layers, weight=(10.0, 1_000.0))),
        "emmet": Entrant(replace(spread, spread=1, weight=0.0), grid(layer=layers, steps=(25, 40))),
        "alphaedit": Entrant(guarded, grid(layer=layers, threshold=(0.3, 1.0))),
        "kn": Entrant(KnowledgeNeurons(), grid(threshold=(0.1, 0.2, 0.4), towards=(1.0, 8.0))),
        "mend": Entrant(Mend(rank=64, step=3e-3, rate=1e-3, step_rate=1e-3, edits=3 * training)),
        "serac": Entrant(Serac(steps=2 * training, layers=2, rate=3e-3)),
        "ike": Entrant(Ike(), grid(count=(0, 1))),
        "grace": Entrant(Grace(layer=depth // 2, steps=60, rate=0.3), grid(radius=(1.0, 2.0, 3.0))),
        "wise": Entrant(side, apart),
        "wise_one_shard": Entrant(replace(side, shard=10**6), apart),
        "wise_no_margin": Entrant(replace(side, routing=0.0), apart),
        "wise_always": Entrant(replace(side, ratio=0.0)),
    }


FAMILIES = (
    *("base", "finetune_m", "finetune_l", "lora"),
    *("rome", "memit", "alphaedit", "kn", "mend"),
    *("serac", "ike", "grace", "wise"),
)
"""Of `entrants`, one of each way of editing."""


def families(training: int, depth: int) -> dict[str, Entrant]:
    """One of each way of editing, and rank-one editing at the layer that tracing points to beside that at the best."""
    every = entrants(training, depth)
    return {name: every[name] for name in FAMILIES} | {
        "rome_traced": Entrant(Rome(layer="auto"), grid(decay=(0.5, 1e-3)), traced=True)
    }


def sides(training: int, depth: int) -> dict[str, Entrant]:
    """WISE with one part of it changed at a time: its layer; and, its memories merged by fours, masks and merging."""
    side = side_of(depth)
    fours = replace(side, shards=4)
    apart = grid(ratio=(0.5, 0.7, 0.88))
    every = {
        "wise": side,
        "wise_first_layer": replace(side, layer=0),
        "wise_last_layer": replace(side, layer=depth - 1),
        "wise_fours": fours,
        "wise_fours_same_mask": replace(fours, masks="shared"),
        "wise_fours_disjoint": replace(fours, masks="disjoint"),
        "wise_fours_averaged": replace(fours, trim=1.0, elect=False),
        "wise_merged": replace(fours, retrieve=False),
    }
    return {"finetune_m": entrants(training, depth)["finetune_m"]} | {
        name: Entrant(method, apart) for name, method in every.items()
    }


def published(training: int, depth: int) -> dict[str, Entrant]:
    """Those that need no training beforehand, as published but for the layer or rate, one of two for each.

    What tells variants of a method apart is compared on the small model.
    """
    early, middle = max(1, depth // 6), depth // 2
    layers = grid(layer=(early, middle))
    near = grid(ratio=(0.7, 0.88))
    return {
        "base": Entrant(Finetune(layer=0, steps=0)),
        "finetune_m": Entrant(Finetune(bound=0.0), layers),
        "lora": Entrant(Lora(), grid(rate=(1e-3, 5e-3))),
        "rome": Entrant(Rome(), layers),
        "memit": Entrant(Memit(spread=min(3, depth)), layers),
        "alphaedit": Entrant(AlphaEdit(spread=min(3, depth)), layers),
        "ike": Entrant(Ike(), grid(count=(4, 16))),
        "grace": Entrant(Grace(), grid(radius=(1.0, 3.0))),
        "wise": Entrant(Wise(shard=1, shards=10**6), near),
    }


def world_of(name: str, cities: int, seed: int = 0) -> EditWorld:
    """A model of the shelf, what it was taught, and as many cities again that it was not."""
    lm = LM.load(shelf.path(name))
    if cities:
        return EditWorld(lm, factlab.world(cities, seed), factlab.world(2 * cities, seed))
    return EditWorld(lm, factlab.made(seed=seed), factlab.made(towns=36, seed=seed))


@dataclass(frozen=True)
class Setting:
    """A named comparison."""

    model: str
    """On the shelf."""
    cities: int
    """Whose facts it is asked."""
    entrants: Callable[[int, int], dict[str, Entrant]]
    """Of the steps of training beforehand, and the model's depth."""
    scales: Mapping[str, Scale]
    tasks: tuple[str, ...] = ("modification", "insertion", "one of several", "erasure")
    """KnowEdit's, see `Lesson.tasks`."""


SETTINGS: Mapping[str, Setting] = {
    "world": Setting("world", 2_500, entrants, SCALES),
    "tasks": Setting("world", 2_500, families, ALONE, (*Setting.tasks, "passage", "style")),
    "smollm2": Setting("smollm2", 2_500, published, SLOW),
    "wise": Setting("world", 2_500, sides, IN_A_ROW, ()),
}
MADE = ("world-made", 0)
"""The model that the tiny scale takes in place of any, and no cities: its facts are made."""


@dataclass(frozen=True)
class EditRecipe(Recipe):
    """Facts taught to a small model that knows others: alone, at once and in a row; equal facts, probes and points."""

    data: str = "world"
    scale: str = "small"
    own: tuple[str, ...] = ()
    """Methods of a person's own to enter as well, at their defaults: module paths or files."""

    @property
    def name(self) -> str:
        """``edit-DATA``."""
        return f"edit-{self.data}"

    @property
    def setting(self) -> Setting:
        """What the data's name stands for."""
        return SETTINGS[pick(self.data, SETTINGS, "data set")]

    @property
    def _scale(self) -> Scale:
        scales = self.setting.scales
        return scales[pick(self.scale, scales, "scale")]

    @property
    def seeds(self) -> int:
        """How many seeds this scale asks for."""
        return self._scale.seeds

    @property
    def _main(self) -> str:
        stream = self._scale.sizes.stream
        return f"row.{max(stream)}.triangle" if stream else "alone.triangle"

    @property
    def _shown(self) -> list[str]:
        stream = self._scale.sizes.stream
        if not stream:
            return [
                *(f"alone.{aspect}" for aspect in SHOWN[:4]),
                *(f"alone.{worded(name)}.triangle" for name in self.setting.tasks),
                *(GONE, TRACED),
            ]
        return [
            *(f"row.{max(stream)}.{aspect}" for aspect in SHOWN[:3]),
            *(f"alone.modification.{aspect}" for aspect in SHOWN if self.setting.tasks),
            *(f"row.{mark}.triangle" for mark in stream[:-1]),
        ]

    def prepare(self) -> EditWorld:
        """Fetch or train the model, and find what it knows."""
        setting = self.setting
        pick(self.scale, setting.scales, "scale")
        world = world_of(*(MADE if self.scale == "tiny" else (setting.model, setting.cities)))
        if not world.known:
            raise UserError(f"{self.data}: the model knows none of the facts, so that none can be changed")
        return world

    def settings(self, world: EditWorld) -> Mapping[str, Any]:
        """What identifies the comparison, and what its report shows."""
        sizes = self._scale.sizes
        return {
            "data": self.data,
            "content": [world.lm.fingerprint, world.lab.fingerprint, world.larger.fingerprint],
            "scale": self.scale,
            "split": "by subjects",
            "rows": [sizes.material, sizes.valid, max(sizes.stream, default=sizes.single * len(self.setting.tasks))],
            "known": len(world.known),
            "sizes": asdict(sizes),
            "training": self._scale.training,
            "sparse": [],
            "main": self._main,
            "shown": self._shown,
            "baseline": "finetune_m",
            "bounds": [],
            "words": {"baseline": "fine-tuning one matrix", "chosen": "Layers and rates"},
        }

    def contestants(self, world: EditWorld) -> Mapping[str, Entrant]:
        """All of them, and a person's own methods."""
        own = {}
        for name in self.own:
            kind = load(name)
            if not issubclass(kind, Edit):
                raise UserError(f"{name}: no way of editing; it implements no koinon.edit contract")
            method = build(kind, {})
            assert isinstance(method, Edit)
            own[kind.__name__.lower()] = Entrant(method)
        return self.setting.entrants(self._scale.training, len(world.lm.anatomy.blocks)) | own

    def cell(self, world: EditWorld, contestant: Entrant, seed: int) -> Row:
        """Choose settings on other facts; then teach each task's facts alone, many in a row, and a batch at once."""
        sizes = self._scale.sizes
        lesson = Lesson(world, sizes, seed, self.setting.tasks)
        method, point = lesson.chosen(_seeded(contestant.method, seed), contestant.points)
        editor = lesson.editor(method)
        found: dict[str, Measured] = {}
        forgotten: list[bool] = []
        rest: dict[str, int] = {}
        for name, cases in lesson.tasks.items():
            look = (lambda edited, case: forgotten.append(gone(edited, case))) if name == "erasure" else None
            found |= figures(lesson.alone(editor, cases, look), f"alone.{worded(name)}")
        found |= over_tasks(found, lesson.tasks)
        if contestant.traced:
            found[TRACED] = agreement(*lesson.by_layer(method, lesson.tasks["modification"]))
        if forgotten:
            every = np.full(len(forgotten), True)
            found[GONE] = share(np.array(forgotten), every, Resampling(None, len(forgotten)))
        if sizes.stream:
            after: list[Edited] = []
            for mark, judged in lesson.in_a_row(editor, lesson.stream, sizes.stream, after.append).items():
                found |= figures(judged, f"row.{mark}")
            rest["row_bytes"] = _bytes(after[-1].patch)
        if sizes.batch and method.batch:
            found |= figures(lesson.at_once(editor, lesson.stream[: sizes.batch]), f"batch.{sizes.batch}")
        first, *_ = lesson.stream or next(iter(lesson.tasks.values()))
        patch = editor.edit([first.fact]).patch
        cost = lesson.cost | {
            "kept_bytes": _bytes(patch),
            **rest,
            "low_rank": isinstance(patch, Weights),
            **{name: list(its) if isinstance(its, tuple) else its for name, its in point.items()},
        }
        return row(found, cost, [self._main, *self._shown])


def _bytes(patch: Patch | None) -> int:
    """What its tensors take in a folder."""
    tensors, _ = packed(patch.tensors() if patch is not None else {})
    return sum(its.nbytes for its in tensors.values())


def _seeded(method: Edit, seed: int) -> Edit:
    known: dict[str, Any] = {"seed": seed} if "seed" in {field.name for field in fields(method)} else {}
    return replace(method, **known)


@dataclass(frozen=True)
class OnData:
    """Compare ways of teaching facts to a language model."""

    data: Literal["world", "tasks", "smollm2", "wise"] = "world"
    """A small model trained here on 4,207 facts, with many in a row, KnowEdit's six tasks, or parts of WISE; or a
    pretrained one."""
    scale: Literal["tiny", "demo", "small", "full"] = "small"
    """How many facts, how many seeds and how long."""
    own: tuple[str, ...] = ()
    """Methods of your own to enter as well: module paths or files."""

    def recipe(self) -> Recipe:
        """The comparison."""
        return EditRecipe(self.data, self.scale, self.own)


def options(arguments: Sequence[str]) -> type[OnData]:
    """The command line's options."""
    return OnData
