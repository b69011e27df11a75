"""Causal tracing: where in a model an answer comes from, by breaking its subject and mending one state at a time."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from koinon.data.facts import Fact
from koinon.lm.language import LM, rewritten, watched
from koinon.nn.params import stream

What = Literal["state", "ffn", "attention"]
"""What is mended: the vector between two layers, or what one part of a layer adds to it."""
NOTHING = 1e-3
"""An effect on a probability that is none."""


@dataclass(frozen=True)
class Trace:
    """The effect of mending each place, for one prompt."""

    prompt: str
    """What was asked."""
    answer: str
    """The token whose probability is looked at: the one the model says."""
    tokens: tuple[str, ...]
    """Of the prompt."""
    subject: tuple[int, int]
    """The subject's first token, and the one behind its last."""
    clean: float
    """The answer's probability."""
    broken: float
    """Its probability with noise on the subject."""
    effect: Float[Tensor, "layer token"]
    """How much of the probability comes back when a layer's output at a token is what it was without noise."""


@torch.no_grad()
def trace(
    lm: LM,
    fact: Fact,
    what: What = "state",
    noise: float = 3.0,
    samples: int = 8,
    window: int = 1,
    seed: int = 0,
    last_only: bool = False,
) -> Trace:
    """Meng et al. (2022), section 2: the average indirect effect of each layer and token.

    Args:
        lm: the model.
        fact: its question and where the subject is in it; the answer is what the model says now.
        what: which vectors are mended.
        noise: of the subject's embedding, in standard deviations of all embeddings.
        samples: how often noise is drawn.
        window: how many layers are mended together, around each.
        seed: of the noise.
        last_only: mend at the subject's last token only; the effect of the others is left at 0.
    """
    encoded = lm.encode([fact.question])
    last, start = lm.last_of(fact.question, fact.place), _first_of(lm, fact)
    answer = int(lm.logits(encoded)[0, -1].argmax())
    parts = lm.anatomy
    ids = encoded.ids.expand(samples, -1)
    embedding = parts.embedding
    spread = noise * float(embedding.weight.float().std())  # type: ignore[operator]
    drawn = torch.randn(samples, last + 1 - start, parts.width, generator=stream(seed, "noise")) * spread

    def break_subject(vectors: Tensor) -> Tensor:
        vectors = vectors.clone()
        vectors[:, start : last + 1] += drawn.to(vectors)[..., : vectors.shape[-1]]
        return vectors

    sites = [_site(block, what) for block in parts.blocks]
    with watched({str(n): its for n, its in enumerate(sites)}) as seen:
        clean = _probability(lm, encoded.ids, answer)
    kept = {number: seen[str(number)] for number in range(len(sites))}
    with rewritten(embedding, break_subject):
        broken = _probability(lm, ids, answer)
        effect = torch.zeros(len(sites), ids.shape[1])
        for layer in range(len(sites)):
            around = range(max(0, layer - window // 2), min(len(sites), layer - window // 2 + window))
            for token in [last] if last_only else range(ids.shape[1]):
                with _mended(sites, kept, around, token, samples):
                    effect[layer, token] = _probability(lm, ids, answer) - broken
    words = tuple(lm.tokenizer.decode([its]) for its in encoded.ids[0].tolist())
    return Trace(fact.question, lm.tokenizer.decode([answer]), words, (start, last + 1), clean, broken, effect)


def best_layer(lm: LM, facts: Sequence[Fact], samples: int = 4, seed: int = 0) -> int:
    """The layer whose FFN matters most to what a model says of the subjects: where rank-one methods write.

    Mended is what the FFN adds at the subject's last token; the largest mean over the facts is taken.

    Warns:
        UserWarning: no layer brings anything back, so that which one is taken means nothing.
    """
    effects = layer_effects(lm, facts, samples, seed).mean(0)
    if not float(effects.max()) > NOTHING:
        said = "tracing: no layer brings back what the model says of these subjects: give --layer, or facts it knows"
        warnings.warn(said, stacklevel=2)
    return int(effects.argmax())


def layer_effects(lm: LM, facts: Sequence[Fact], samples: int = 4, seed: int = 0) -> Float[Tensor, "fact layer"]:
    """How much of what a model says of each subject comes back when a layer's FFN is mended at its last token."""
    return torch.stack(
        [trace(lm, its, "ffn", samples=samples, seed=seed, last_only=True).effect.sum(1) for its in facts]
    )


def _site(block, what: What) -> nn.Module:
    return {"state": block.module, "ffn": block.falls.module, "attention": block.attends.module}[what]


def _first_of(lm: LM, fact: Fact) -> int:
    coded = lm.tokenizer([fact.question], return_offsets_mapping=True)["offset_mapping"][0]
    start, end = fact.place
    return next(number for number, (a, b) in enumerate(coded) if a < end and b > start)


def _probability(lm: LM, ids: Int64[Tensor, "sample time"], answer: int) -> float:
    logits = lm.model(input_ids=ids, use_cache=False).logits[:, -1].float()
    return float(logits.softmax(-1)[:, answer].mean())


@contextmanager
def _mended(
    sites: Sequence[nn.Module], kept: dict[int, Tensor], layers: range, token: int, samples: int
) -> Iterator[None]:
    def mend(layer: int):
        def change(vectors: Tensor) -> Tensor:
            vectors = vectors.clone()
            vectors[:, token] = kept[layer][:, token]
            return vectors

        return change

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(rewritten(sites[layer], mend(layer), samples))
        yield
