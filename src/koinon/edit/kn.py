"""Knowledge Neurons: finds the few FFN neurons that an answer comes from, and turns what they say to the new answer.

Departures: the paper edits BERT, at a blank; here it is a decoder, at the prompt's end, and of an answer of several
tokens the first one counts, which is said there. Words are rows of the head, which in BERT are the embedding's. They
are scaled to the length of the neuron's value, without which lambda would hang on the model, and lambda_2 is 1: both as
in the release; the paper has 8. In a gated FFN neurons can be negative: their change has their sign. The other wordings
of a fact are those that the material's cases have of its relation.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from koinon.core import Paper, refuse_below, refuse_outside
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._patches import LowRank, Patch, Weights, finite
from koinon.edit._spread import earlier
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM, rewritten, watched

Neurons = list[Float[Tensor, " into"]]
"""A number for each neuron, layer by layer."""


@dataclass(frozen=True)
class KnowledgeNeurons(Edit):
    """Knowledge neurons (Dai et al., 2022): v_i <- v_i - lambda_1 t + lambda_2 t' for each neuron i of a fact."""

    paper: ClassVar = Paper("Knowledge Neurons in Pretrained Transformers", 2021, "https://arxiv.org/abs/2104.08696")
    family: ClassVar = "intrinsic"
    null: ClassVar = {"away": 0.0, "towards": 0.0}
    quick: ClassVar = {"steps": 1}

    steps: int = 20
    """m: points between 0 and a neuron's value at which the gradient is taken."""
    threshold: float = 0.2
    """t: neurons with more than this share of the largest attribution count."""
    share: float = 0.4
    """p: in more than this share of a fact's wordings they must; the paper begins with 0.7."""
    away: float = 1.0
    """lambda_1: how much of the old answer's word is taken from a neuron's value, in that value's length."""
    towards: float = 1.0
    """lambda_2: how much of the new answer's word is added."""

    def __post_init__(self) -> None:
        refuse_below(1, steps=self.steps)
        refuse_below(0, away=self.away, towards=self.towards)
        refuse_outside(0, 1, threshold=self.threshold, share=self.share)

    def prepare(self, lm: LM, material: Material) -> dict[str, list[str]]:
        """The wordings of each relation, with ``{}`` for the subject."""
        found: dict[str, dict[str, None]] = {}
        for case in material.cases:
            its = found.setdefault(case.fact.relation, {case.fact.prompt: None})
            asked = [probe.prompt for probe in case.of("generality") if probe.prompt.count(case.fact.subject) == 1]
            its |= {prompt.replace(case.fact.subject, "{}"): None for prompt in asked}
        return {relation: list(its) for relation, its in found.items() if relation}

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Mapping[str, list[str]], before: Patch | None) -> Weights:
        """One fact as one step more; the model stays as it is where no neuron is in enough of the wordings.

        Warns:
            UserWarning: there is none.
        """
        (fact,) = facts
        words = list(dict.fromkeys([fact.prompt, *ready.get(fact.relation, [])]))
        # 1. Of each wording, the neurons whose attribution is a large part of the largest.
        counts: Counter[tuple[int, int]] = Counter()
        for prompt in (its.replace("{}", fact.subject) for its in words):
            counts.update(self.large(attributions(lm, prompt, _token(lm, prompt, fact.was), self.steps)))
        # 2. Those that enough of the wordings share.
        chosen = sorted(its for its, count in counts.items() if count > self.share * len(words))
        if not chosen:
            warnings.warn(f"{fact.question!r}: no neuron is in {self.share:.0%} of its wordings", stacklevel=2)
        # 3. Their values go from the old answer's word to the new one's.
        old, new = (_word(lm, _token(lm, fact.question, its)) for its in (fact.was, fact.object))
        word = self.towards * new - self.away * old
        signs = [its.sign() for its in _activations(lm, lm.encode([fact.question]).ids)]
        blocks, changes = lm.anatomy.blocks, {}
        for layer in sorted({layer for layer, _ in chosen}):
            falls, mine = blocks[layer].falls, torch.zeros_like(signs[layer])
            mine[[number for its, number in chosen if its == layer]] = 1.0
            lengths = falls.weight.detach().float().norm(dim=0)
            changes[falls.parameter] = LowRank(word[:, None], (mine * signs[layer] * lengths)[:, None])
        finite({name: change.left for name, change in changes.items()})
        return earlier(before, lm, range(len(blocks))).plus(changes)

    def large(self, found: Neurons) -> list[tuple[int, int]]:
        """Layer and number of the neurons above the threshold."""
        least = self.threshold * max(float(its.max()) for its in found)
        return [(layer, int(number)) for layer, its in enumerate(found) for number in (its > least).nonzero()[:, 0]]


def attributions(lm: LM, prompt: str, token: int, steps: int) -> Neurons:
    """How much of a token's probability comes from each neuron at the prompt's end: integrated gradients.

    a / m * sum over k of the gradient of P(token) at k / m * a, where a is one layer's neurons; the others stay.

    Args:
        lm: the model.
        prompt: what is asked.
        token: of the answer.
        steps: m.
    """
    found: Neurons = []
    ids = lm.encode([prompt]).ids
    shares = torch.arange(1, steps + 1, device=ids.device)[:, None] / steps
    for block, now in zip(lm.anatomy.blocks, _activations(lm, ids), strict=True):
        points = (shares * now).requires_grad_()  # step into
        given = partial(_through, block.falls, points)
        with torch.enable_grad(), rewritten(block.falls.module, given, steps):
            logits = lm.model(input_ids=ids.expand(steps, -1), use_cache=False).logits[:, -1].float()
            (gradient,) = torch.autograd.grad(logits.softmax(-1)[:, token].sum(), points)
        found.append(now * gradient.mean(0))
    return found


def _through(falls: Projection, points: Float[Tensor, "step into"], vectors: Tensor) -> Tensor:
    """What comes out of the FFN if its neurons are these at the last token."""
    bias = getattr(falls.module, "bias", None)
    its = points @ falls.weight.float().T + (0.0 if bias is None else bias.float())
    return torch.cat([vectors[:, :-1], its[:, None].to(vectors.dtype)], 1)


def _activations(lm: LM, ids: Int64[Tensor, "1 time"]) -> Neurons:
    """What each layer's neurons are at the last token."""
    ways = {str(number): block.falls.module for number, block in enumerate(lm.anatomy.blocks)}
    with torch.no_grad(), watched(ways, "in") as seen:
        lm.model(input_ids=ids, use_cache=False)
    return [seen[name][0, -1].float() for name in ways]


def _token(lm: LM, prompt: str, answer: str) -> int:
    """An answer's first token behind a prompt; the one the model finds likeliest if there is no answer."""
    if answer:
        coded = lm.encode([prompt], [answer])
        return int(coded.ids[coded.answer][0])
    with torch.no_grad():
        return int(lm.logits(lm.encode([prompt]))[0, -1].argmax())


def _word(lm: LM, token: int) -> Float[Tensor, " width"]:
    """The head's row, as it reads what comes out of the blocks, at length 1."""
    return nn.functional.normalize(lm.anatomy.word(token), dim=0)
