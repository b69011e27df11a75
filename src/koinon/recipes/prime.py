"""What does teaching a model one text do to answers that have nothing to do with it, and which remedy dilutes that?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from koinon.bench.compare import Recipe, Row
from koinon.core import UserError, pick
from koinon.data import factlab
from koinon.data.surprises import Surprises, of_english, of_facts, sentences
from koinon.edit._priming import Tokens
from koinon.edit.dilute import Dilute
from koinon.lm import shelf
from koinon.lm.language import LM
from koinon.recipes._measures import row
from koinon.recipes._spreading import MAIN, PREDICTORS, SHOWN, measure
from koinon.recipes._teaching import Form, Taught, Teaching, matched


@dataclass(frozen=True)
class Contestant:
    """A way of bringing a text to a model."""

    method: Dilute
    """Its rate is the one that `Teaching.rate` chooses."""
    form: Form = "taught"
    match: Literal["", "rate", "steps", "pull"] = ""
    """The field whose value is chosen so that as much is memorised as by ignoring the largest 8 %."""
    predictor: str = "probability"
    """What priming is foretold by."""

    def enter(self, given: Teaching, factors: Sequence[float]) -> tuple[Dilute, Taught]:
        """The method with what was chosen, and what it did to the texts to report on."""
        method = replace(self.method, rate=given.rate)
        if self.match:
            choices: Mapping[str, Sequence[float]] = {
                "rate": [given.rate * its for its in factors],
                "steps": range(1, method.steps + 1),
                "pull": [0.01 / its**3 for its in factors],  # from strong to weak: more and more is memorised
            }

            def memory(value: float) -> float:
                return given.taught(self._with(method, value), self.form, "choose").memory

            target = given.taught(given.method(), part="choose").memory
            method = self._with(method, matched(memory, target, choices[self.match]))
        return method, given.taught(method, self.form)

    def _with(self, method: Dilute, value: float) -> Dilute:
        change: dict[str, Any] = {self.match: value}
        return replace(method, **change)

    def at(self, changes: Mapping[str, Any]) -> "Contestant":
        """With other values of the fields that are as the paper has them; what is filtered as a whole stays so."""
        usual = Dilute()
        mine = {name: its for name, its in changes.items() if getattr(self.method, name) == getattr(usual, name)}
        method = replace(self.method, **mine)
        return replace(self, method=replace(method, every=method.steps if method.every > 1 else 1))


def remedies() -> dict[str, Contestant]:
    """Plain fine-tuning, and what needs no more than it."""
    plain = Dilute(share=0.0)
    return {
        "untaught": Contestant(Dilute(steps=0)),
        "plain": Contestant(plain),
        "ignore_8": Contestant(Dilute()),
        "random_8": Contestant(Dilute(which="random")),
        "slower": Contestant(plain, match="rate"),
        "stones": Contestant(plain, form="rewritten"),
        "in_context": Contestant(plain, form="told"),
        **{f"by_{its}": Contestant(plain, predictor=its) for its in PREDICTORS[1:]},
    }


def ablations() -> dict[str, Contestant]:
    """Remedies, other shares, other readings of the paper, and other ways of learning less."""
    plain = Dilute(share=0.0)
    return remedies() | {
        **{f"ignore_{percent}": Contestant(Dilute(percent / 100)) for percent in (1, 4, 15, 30)},
        "ignore_8_tensor": Contestant(Dilute(per="tensor")),
        "ignore_8_whole": Contestant(Dilute(every=Dilute().steps)),
        "ignore_8_stones": Contestant(Dilute(), form="rewritten"),
        "keep_8": Contestant(Dilute(which="others")),
        "shorter": Contestant(plain, match="steps"),
        "pulled": Contestant(plain, match="pull"),
        "decayed": Contestant(Dilute(share=0.0, decay=0.1)),
        "plain_still_words": Contestant(Dilute(share=0.0, words=False)),
        "ignore_8_still_words": Contestant(Dilute(words=False)),
        "plain_alone": Contestant(Dilute(share=0.0, size=1)),
        "plain_spaced": Contestant(Dilute(share=0.0, spacing=4)),
    }


FACTORS = (*(round(0.02 * 1.28**its, 4) for its in range(16)), 1.0)
"""Of the rate, for what is matched."""


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    texts: tuple[int, int]
    """About facts: to report on, for each keyword and kind; to choose by, for each keyword. English: in all; none."""
    seeds: int
    rates: tuple[float, ...]
    factors: tuple[float, ...] = FACTORS
    changes: tuple[tuple[str, int], ...] = ()
    """Fields of every method that are not at the paper's values."""
    made: bool = False
    """Whether a tiny model, trained on the spot, stands for the real one."""


@dataclass(frozen=True)
class World:
    """What all cells need."""

    lm: Callable[[], LM]
    texts: Callable[[int], Surprises]
    """Of a seed."""
    model: str
    """What the model is."""


def small_world(said: Sequence[str], context: int = 96) -> LM:
    """A tiny model that has seen some texts, trained on the spot."""
    from koinon.lm.small import decoder, tokenizer_of, train

    tokenizer = tokenizer_of(said, 400)
    model = decoder(tokenizer, width=32, layers=2, heads=2, wide=64, context=context)
    train(model, tokenizer, said, epochs=12, rows=2, lr=1e-2)
    return LM.of(model, tokenizer)


def _given(lm: LM) -> LM:
    return lm


def _loaded(name: str) -> LM:
    return LM.load(shelf.path(name))


def _same(texts: Surprises, seed: int) -> Surprises:
    return texts


def of_world(scale: Scale, model: str) -> World:
    """Facts, told to a model that knows them."""
    if model:
        raise UserError(f"model {model}: facts are told to a model that was taught them; give --data sentences")
    each, chosen = scale.texts
    if scale.made:
        known = factlab.made(12, 4)
        lab = factlab.Lab(tuple(its for its in known.facts if its.relation in ("country", "capital")))
        return World(partial(_given, small_world(lab.statements())), partial(of_facts, lab, each, chosen), "made")
    shelf.path("world")
    lab = factlab.world()
    return World(partial(_loaded, "world"), partial(of_facts, lab, each, chosen), shelf.place("world").name)


def of_sentences(scale: Scale, model: str) -> World:
    """English sentences, told to a pretrained model: a person's own, or SmolLM2."""
    count, _ = scale.texts
    if scale.made:
        report, choose = sentences(count)
        said = tuple(its.rewritten for its in (*report, *choose))
        texts = Surprises(report, choose, said, said, "{} ")
        return World(partial(_given, small_world(said, 256)), partial(_same, texts), "made")
    if model:
        LM.load(model)  # what is wrong with it is said before anything runs
        return World(partial(LM.load, model, "float32"), partial(of_english, count), model)
    shelf.path("smollm2")
    return World(partial(_loaded, "smollm2"), partial(of_english, count), shelf.place("smollm2").name)


@dataclass(frozen=True)
class Setting:
    """A named comparison."""

    world: Callable[[Scale, str], World]
    contestants: Callable[[], dict[str, Contestant]]
    scales: Mapping[str, Scale]


RATES = (3e-5, 1e-4, 3e-4, 1e-3)
LARGE = (("steps", 15), ("size", 4), ("longest", 32), ("sample", 1_000_000))
"""For a model that takes a second for a step."""
COARSE = (0.2, 0.35, 0.5, 0.7, 1.0)
SETTINGS: Mapping[str, Setting] = {
    "world": Setting(
        of_world,
        ablations,
        {
            "tiny": Scale((1, 1), 2, (1e-3, 1e-2), (0.3, 1.0), (("steps", 4), ("size", 3)), made=True),
            "demo": Scale((1, 1), 1, RATES, COARSE),
            "small": Scale((1, 2), 5, RATES),
            "full": Scale((20, 4), 10, RATES),
        },
    ),
    "sentences": Setting(
        of_sentences,
        remedies,
        {
            "tiny": Scale((12, 0), 1, (1e-2,), (0.3, 1.0), (("steps", 4), ("size", 3)), made=True),
            "demo": Scale((4, 0), 1, (5e-5,), (0.35, 1.0), LARGE),
            "small": Scale((12, 0), 1, (5e-5,), COARSE, LARGE),
            "full": Scale((36, 0), 4, (1e-5, 2e-5, 5e-5, 1e-4)),
        },
    ),
}


@dataclass(frozen=True)
class PrimeRecipe(Recipe):
    """Texts taught one at a time to a fresh copy of one model; equal texts, minibatches, steps and rate."""

    data: str = "world"
    scale: str = "small"
    model: str = ""
    """A person's own model for the sentences."""
    tokens: Tokens = "first"

    @property
    def name(self) -> str:
        """``prime-DATA``."""
        return f"prime-{self.data}"

    @property
    def setting(self) -> Setting:
        """What the data's name stands for."""
        return SETTINGS[pick(self.data, SETTINGS, "data set")]

    @property
    def size(self) -> Scale:
        """What the scale's name stands for."""
        return self.setting.scales[pick(self.scale, self.setting.scales, "scale")]

    @property
    def seeds(self) -> int:
        """How many seeds this scale asks for."""
        return self.size.seeds

    def prepare(self) -> World:
        """Get the model and the facts."""
        return self.setting.world(self.size, self.model)

    def settings(self, world: World) -> Mapping[str, Any]:
        """What identifies the comparison, and what its report shows."""
        texts = world.texts(0)
        themes = dict.fromkeys(its.theme for its in texts.report)
        words = {theme: {its.keyword for its in texts.report if its.theme == theme} for theme in themes}
        return {
            "data": self.data,
            "content": texts.fingerprint,
            "model": world.model,
            "tokens": self.tokens,
            "scale": self.scale,
            "tasks": [{"name": theme, "classes": len(its)} for theme, its in words.items()],
            "split": "by drawing other subjects, or kinds of sentences",
            "rows": [len(texts.ordinary), len(texts.choose), len(texts.report)],
            "sparse": [],
            "size": asdict(self.size),
            "main": MAIN,
            "shown": list(SHOWN),
            "baseline": "plain",
            "bounds": ["untaught", "in_context", *(f"by_{its}" for its in PREDICTORS[1:])],
            "words": {"baseline": "fine-tuning without a remedy", "chosen": "Rates, and what is matched on memory,"},
        }

    def contestants(self, world: World) -> Mapping[str, Contestant]:
        """All of the setting's, at the scale's steps and minibatches."""
        return {name: its.at(dict(self.size.changes)) for name, its in self.setting.contestants().items()}

    def cell(self, world: World, contestant: Contestant, seed: int) -> Row:
        """Choose on the texts to choose by, teach the texts to report on, and measure."""
        given = Teaching(world.lm(), world.texts(seed), self.size.rates, self.size.changes, self.tokens, seed)
        method, found = contestant.enter(given, self.size.factors)
        plain = given.taught(given.method(share=0.0))
        keywords = [its.keyword for its in given.texts.report]
        measured = measure(found.outcomes, plain.outcomes, given.foreseen, contestant.predictor, keywords)
        cost = {
            "trained": sum(its.numel() for its in given.lm.model.parameters()),
            "samples": found.passes * method.size,
            "passes": found.passes,
            "seconds": found.seconds,
            "samples_per_second": round(found.passes * method.size / max(found.seconds, 1e-3)),
            "rate": method.rate,
            "steps": method.steps,
            "pull": method.pull,
        }
        return row(measured, cost, [MAIN, *SHOWN])


@dataclass(frozen=True)
class OnData:
    """Compare ways of teaching a model one text without spreading it."""

    data: Literal["world", "sentences"] = "world"
    """Facts told to a small model that knows some; or English sentences told to a pretrained one."""
    scale: Literal["tiny", "demo", "small", "full"] = "small"
    """How many texts, how many seeds and how long."""
    model: str = ""
    """For sentences: a model of your own, a folder or a name on the hub; SmolLM2-135M if there is none."""
    tokens: Literal["first", "all"] = "first"
    """What counts of a keyword with several tokens: the first, or the product over all."""

    def recipe(self) -> PrimeRecipe:
        """The comparison."""
        return PrimeRecipe(self.data, self.scale, self.model, self.tokens)


def options(arguments: Sequence[str]) -> type[OnData]:
    """The command line's options."""
    return OnData
