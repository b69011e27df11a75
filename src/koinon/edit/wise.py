"""WISE: edits go into copies of one FFN matrix beside the model, and what excites such a copy enough is answered by it.

Departures: a sequence is routed once, by its prompt, and stays there while it is generated; each sequence of a batch is
routed for itself (the release routes by the batch's mean, and anew with each token). Excitement is taken of what the
matrices give, as in the paper; the release puts it through the model's activation function first. Weight decay, too, is
held to the shard's mask, and exactly a share of the entries is free, not each with that probability. The descent ends
when the loss is low, moving or not. Replay asks edits of the same memory to excite it, and those of others not to, with
or without merging. SLERP and DARE are not offered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from koinon.core import Paper, refuse_below, refuse_outside
from koinon.data.facts import Fact
from koinon.edit._aims import contexts
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer
from koinon.edit._memories import Above, late
from koinon.edit._patches import Patch, finite
from koinon.edit._shards import Descent, Masking, Masks, Prompts, Routing, Scale, scale_of
from koinon.edit._sides import MERGED, Asking, Excitement, Over, Side, SideMemory
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM
from koinon.lm.moments import own_texts
from koinon.nn.params import stream


@dataclass(frozen=True)
class Ready:
    """What WISE knows of a model before the first fact."""

    lm: LM
    """Without edits."""
    layer: int
    before: list[str]
    """Beginnings of a prompt, the empty one first."""
    pool: Sequence[str]
    """Irrelevant prompts."""
    scale: Scale
    masks: Masks

    @property
    def falls(self) -> Projection:
        """W_v."""
        return self.lm.anatomy.block(self.layer).falls


@dataclass(frozen=True)
class Wise(Edit):
    """Dual parametric memory for lifelong editing (Wang et al., 2024); WISE-Retrieve, or WISE-Merge."""

    paper: ClassVar = Paper(
        "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
        2024,
        "https://arxiv.org/abs/2405.14768",
    )
    family: ClassVar = "merging"
    patch: ClassVar = SideMemory
    null: ClassVar = {"steps": 0}
    quick: ClassVar = (
        {"layer": 1, "steps": 7, "rate": 0.03, "share": 0.4, "bound": 0.3, "decay": 0.01, "enough": 2.1, "alpha": 2.0}
        | {"shard": 1, "shards": 1, "retrieve": False, "trim": 0.3, "past": 0.4, "ratio": 0.66, "quantile": 0.4}
        | {"count": 1, "lengths": (2,), "over": "last"}
    )

    layer: Layer = "auto"
    """The block whose FFN's way back W_v is copied, from 0; auto is at four fifths of the depth."""
    retrieve: bool = True
    """Keep merged memories apart and ask the one that is excited most; otherwise all are merged into one."""
    share: float = 0.2
    """rho: share of the entries of W_v that a shard may change."""
    masks: Masking = "random"
    """Which ones: drawn for each shard, the same for all, or none a second time as long as there are others."""
    shard: int = 500
    """Edits that go into one shard, one after the other."""
    shards: int = 2
    """k: shards that are merged into one memory when they are full."""
    trim: float = 0.53
    """Share of each shard's entries that merging keeps, the largest."""
    elect: bool = True
    """Elect a sign for each entry, and merge what has it (TIES); otherwise merging is a mean."""
    past: float = 0.6
    """Weight of the memory merged before in the next merging, of 1; the shards have equal parts of the rest."""
    steps: int = 70
    """Of gradient descent, for each fact."""
    rate: float = 1.0
    """Of gradient descent."""
    decay: float = 1e-5
    """Weight decay of W_v'."""
    enough: float = 0.02
    """The loss at which it stops."""
    bound: float = 1.0
    """How far an entry may go from what it is in W_v, up or down."""
    routing: float = 1.0
    """Weight of the routing loss L_a."""
    alpha: float = 5.0
    """How much irrelevant prompts may excite a memory."""
    beta: float = 20.0
    """How much a taught one must."""
    gamma: float = 10.0
    """How much more the one than the other."""
    calibrated: bool = True
    """Take excitement in twentieths of the median norm of what W_v gives, and the rate in squares of its median gain;
    otherwise both as they are, which suits the paper's models."""
    irrelevant: int = 1
    """Irrelevant prompts for each fact."""
    count: int = 5
    """How many beginnings of each length are put before the prompt."""
    lengths: tuple[int, ...] = (5, 10)
    """Of the beginnings, in tokens."""
    replay: int = 0
    """Earlier edits of this memory, and of the others, that are in the routing loss of each fact as well."""
    ratio: float = 0.88
    """epsilon is so many times the excitement of the edit that excites its memory least."""
    quantile: float = 0.0
    """Take this quantile of the edits' excitement in place of the least."""
    over: Over = "mean"
    """Excitement is the mean over the prompt's tokens, the most excited one's, or the last one's."""
    balanced: bool = False
    """Count each token by the length of what goes into W_v: in small models a few tokens, such as the first, have so
    much more of it than all others that they alone decide, and they do so alike in all prompts."""
    seed: int = 0
    """Of masks, beginnings, irrelevant prompts and replay."""

    def __post_init__(self) -> None:
        refuse_outside(0, 1, share=self.share, trim=self.trim, past=self.past, quantile=self.quantile)
        refuse_below(1, shard=self.shard, shards=self.shards, lengths=self.lengths)
        refuse_below(0, steps=self.steps, rate=self.rate, decay=self.decay, enough=self.enough, bound=self.bound)
        refuse_below(0, routing=self.routing, alpha=self.alpha, beta=self.beta, gamma=self.gamma, ratio=self.ratio)
        refuse_below(0, irrelevant=self.irrelevant, count=self.count, replay=self.replay)

    def prepare(self, lm: LM, material: Material) -> Ready:
        """Choose the layer, let the model write beginnings, and see how large what the layer gives is."""
        layer = late(lm, self.layer)
        falls = lm.anatomy.block(layer).falls
        pool = tuple(material.unrelated) or tuple(own_texts(lm, seed=self.seed))
        scale = scale_of(lm, falls, pool, self.balanced) if self.calibrated else Scale(1.0, 1.0)
        masks = Masks(tuple(falls.weight.shape), self.share, self.masks, self.seed)
        return Ready(lm, layer, contexts(lm, self.count, self.lengths, self.seed), pool, scale, masks)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> SideMemory:
        """One fact more in the shard that is not full yet, and a merging if that fills the last of k."""
        (fact,) = facts
        excitement = Excitement(self.over, self.balanced)
        asking = Asking(self.retrieve, self.ratio, self.quantile, excitement, self.trim, self.elect, self.past)
        known = before if isinstance(before, SideMemory) else SideMemory(ready.falls.name, (), (), asking)
        step, sides = len(known.questions), list(known.sides)
        # 1. The shard: a copy of W_v, of which the entries in its mask may move.
        if sides and sides[-1].shard != MERGED and len(sides[-1].steps) < self.shard:
            side = sides.pop()
        else:
            side = Side(torch.zeros_like(ready.falls.weight, dtype=torch.float32), (), (), step // self.shard)
        # 2. Descend.
        texts = [its + fact.question for its in ready.before]
        above = Above(ready.lm, ready.layer, ready.lm.encode(texts, [fact.object] * len(texts)))
        edit = Prompts(above.into, above.read.prompt)
        tokens = above.read.mask.nonzero(as_tuple=True)  # filling need not be multiplied
        into, empty = above.into[tokens], above.into.new_zeros(*above.read.ids.shape, len(ready.falls.weight))
        outside, replayed, far = self._others(ready, known, side, fact)
        routing = Routing(self.alpha, self.beta, self.gamma, ready.scale.unit, excitement)
        rate = self.rate * ready.scale.gain**2
        how = Descent(self.steps, rate, self.decay, self.bound, self.enough)

        def loss(delta: Tensor) -> Tensor:
            moved = empty.index_put(tokens, F.linear(into, delta.to(into.dtype)))
            margins = routing.loss(delta, edit, outside, replayed, far, moved)
            return above.harm(lambda out: out + moved) + self.routing * margins

        delta = how.run(side.delta, ready.falls.weight.detach(), ready.masks.of(side.shard), loss)
        finite({"W_v' - W_v": delta})
        score = float(excitement.of(above.into[:1], delta, above.read.prompt[:1]))
        sides.append(replace(side, delta=delta, scores=(*side.scores, score), steps=(*side.steps, step)))
        found = SideMemory(known.name, tuple(sides), (*known.questions, fact.question), asking)
        # 3. Merge k full shards; without retrieval also with what was merged before.
        return found.closed(ready.lm, self.shard, self.shards)

    def _others(self, ready: Ready, known: SideMemory, side: Side, fact: Fact) -> list[Prompts | None]:
        """Irrelevant prompts, and those of earlier edits in this memory, and in others."""
        pool = [its for its in ready.pool if fact.subject not in its]
        old = [known.questions[number] for number in side.steps]
        far = [its for number, its in enumerate(known.questions) if number not in side.steps and its != fact.question]
        drawn = [
            _some(pool, self.irrelevant, self.seed, fact, "irrelevant"),
            _some(old, self.replay, self.seed, fact, "old"),
            _some(far, self.replay, self.seed, fact, "far"),
        ]
        return [Prompts.of(ready.lm, ready.falls, its) for its in drawn]


def _some(prompts: Sequence[str], count: int, seed: int, fact: Fact, *words: str) -> list[str]:
    order = torch.randperm(len(prompts), generator=stream(seed, *words, fact.question))
    return [prompts[place] for place in order[:count].tolist()]
