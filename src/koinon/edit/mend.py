"""MEND: trained networks turn the gradient of a fact, taken apart into vectors, into a low-rank edit that stays local.

Departures: what normalises u and delta is measured once on all cases before training, not while training goes on. A
case is taught with an object drawn from its relation's. The weights go against the transformed gradient, as in the
paper's section 3 (the release adds it, and has to learn the sign). Several facts at once are the sum of their edits,
each as it would be alone; training is on single edits, where the paper trains anew for each number of edits at once.
There is no early stop: training is as long as ``edits`` says; a small model needs a larger ``rate`` and far fewer edits
than the published setting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from koinon.core import Paper, UserError, refuse_below
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._hypernetwork import Hypernetwork, factors, living
from koinon.edit._lessons import Lesson, Lessons
from koinon.edit._losses import logits_with, moved, unlikely
from koinon.edit._patches import LowRank, Patch, Weights, finite
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM, Encoded
from koinon.nn.params import stream

CLIP = 100.0
"""The norm that the gradient of training is cut to."""
TOGETHER = 64
"""Facts in one pass when u and delta are measured."""
Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Of each matrix, u and delta of the tokens that have a part in its gradient, [token in] and [token out]."""


class Trained(nn.Module):
    """The networks, one for each shape of a matrix, and alpha, one for each matrix."""

    def __init__(self, places: Sequence[Projection], rank: int, step: float, seed: int):
        super().__init__()
        self.places = list(places)
        shapes = [its.weight.shape for its in places]
        self.kinds = list(dict.fromkeys(shapes))
        self.where = [(self.kinds.index(its), shapes[:place].count(its)) for place, its in enumerate(shapes)]
        self.nets = nn.ModuleList(
            Hypernetwork(into, out, shapes.count(kind), rank, seed) for kind in self.kinds for out, into in [kind]
        )
        self.alpha = nn.Parameter(torch.full((len(places),), step))

    def edit(self, pairs: Pairs) -> dict[str, LowRank]:
        """- alpha sum_tokens delta~ u~^T for each matrix."""
        found = {}
        for its, (net, matrix), alpha in zip(self.places, self.where, self.alpha):
            into, delta = self.nets[net](*pairs[its.parameter], matrix)
            found[its.parameter] = LowRank(-alpha * delta.T, into.T)
        return found


@dataclass(frozen=True)
class Mend(Edit):
    """Model editor networks with gradient decomposition (Mitchell et al., 2022)."""

    paper: ClassVar = Paper("Fast Model Editing at Scale", 2022, "https://arxiv.org/abs/2110.11309")
    family: ClassVar = "intrinsic"
    batch: ClassVar = True
    needs_subject: ClassVar = False
    needs_cases: ClassVar = True
    null: ClassVar = {"step": 0.0, "edits": 0}
    quick: ClassVar = {
        "layers": 2,
        "rank": 8,
        "rate": 1e-3,
        "step": 1e-3,
        "step_rate": 1e-3,
        "edits": 12,
        "together": 4,
    }

    layers: int = 3
    """How many blocks are changed, the last ones: all of their FFN."""
    rank: int = 1920
    """Of the networks' layers, at most."""
    step: float = 1e-4
    """alpha at its start: how far a weight goes against the transformed gradient; learnt for each matrix."""
    rate: float = 1e-6
    """Of Adam, for the networks."""
    step_rate: float = 1e-4
    """Of Adam, for alpha."""
    change: float = 0.1
    """c_edit: weight of the answer behind another wording being unlikely (equation 4)."""
    keep: float = 1.0
    """c_loc: weight of the KL divergence on what must stay (equation 4)."""
    edits: int = 100_000
    """How many edits of cases are trained on."""
    together: int = 10
    """Of these, how many before each step."""
    seed: int = 0
    """Of what the networks start from, and of the edits drawn."""

    def __post_init__(self) -> None:
        refuse_below(1, layers=self.layers, rank=self.rank, together=self.together)
        refuse_below(0, step=self.step, rate=self.rate, step_rate=self.step_rate)
        refuse_below(0, change=self.change, keep=self.keep, edits=self.edits)

    def prepare(self, lm: LM, material: Material) -> Trained:
        """Train on edits of the cases, each made on the model without edits.

        Raises:
            UserError: more layers than the model has, or too few cases.
        """
        if self.layers > len(lm.anatomy.blocks):
            raise UserError(f"layers {self.layers}: the model has {len(lm.anatomy.blocks)}; give no more than that")
        blocks = lm.anatomy.blocks[-self.layers :]
        places = [its for block in blocks for its in (*block.rises, block.falls)]
        found = Trained(places, self.rank, self.step, self.seed).to(lm.device)
        lessons = Lessons(material, stream(self.seed, "mend"))
        _measure(lm, found, lessons)
        adam = torch.optim.Adam(
            [
                {"params": list(found.nets.parameters()), "lr": self.rate},
                {"params": [found.alpha], "lr": self.step_rate},
            ]
        )
        learnt = list(found.parameters())
        for done in range(0, self.edits, self.together):
            taken = lessons.take(min(self.together, self.edits - done))
            adam.zero_grad()
            for lesson, pairs in zip(taken, _pairs(lm, places, [its.fact for its in taken])):
                with torch.enable_grad():
                    harm = self.harm(lm, found, lesson, pairs) / len(taken)
                for its, gradient in zip(learnt, torch.autograd.grad(harm, learnt)):
                    its.grad = gradient if its.grad is None else its.grad + gradient
            nn.utils.clip_grad_norm_(learnt, CLIP)
            adam.step()
        finite(dict(found.named_parameters()))
        return found.requires_grad_(False)

    def harm(self, lm: LM, trained: Trained, lesson: Lesson, pairs: Pairs) -> Tensor:
        """c_edit L_e + c_loc L_loc of one edit (equation 4)."""
        elsewhere, right = lesson.elsewhere
        both = lm.encode([lesson.reworded, elsewhere], [lesson.fact.object, right])
        edit, stays = (Encoded(*(its[row] for its in (both.ids, both.mask, both.answer))) for row in ([0], [1]))
        with torch.no_grad():
            before = lm.logits(both)[[1]]
        edited = trained.edit(pairs)
        weights = {}
        for its in trained.places:
            weight = edited[its.parameter].on(its.weight)
            weights[its.parameter] = weight.T if its.turned else weight
        after = logits_with(lm, weights, both)
        return self.change * unlikely(after[[0]], edit) + self.keep * moved(before, after[[1]], stays)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Trained, before: Patch | None) -> Weights:
        """The gradients of the facts, transformed: one forward and one backward pass."""
        encoded = lm.encode([fact.question for fact in facts], [fact.object for fact in facts])
        places = [Projection(its.name, lm.model.get_submodule(its.name)) for its in ready.places]
        found = factors(lm, places, encoded)
        step = ready.edit({name: living(pair) for name, pair in found.items()})
        for name, change in step.items():
            finite({name: change.left @ change.right.T})
        turned = frozenset(its.parameter for its in places if its.turned)
        return (before if isinstance(before, Weights) else Weights((), turned)).plus(step)


def _pairs(lm: LM, places: Sequence[Projection], facts: Sequence[Fact]) -> list[Pairs]:
    """u and delta of each fact alone, by the name of the matrix."""
    encoded = lm.encode([fact.question for fact in facts], [fact.object for fact in facts])
    found = factors(lm, places, encoded)
    return [
        {name: living((into[row], delta[row])) for name, (into, delta) in found.items()} for row in range(len(facts))
    ]


def _measure(lm: LM, trained: Trained, lessons: Lessons) -> None:
    """What normalises u and delta: of one edit of every case."""
    facts = [lessons.of(case).fact for case in lessons.cases]
    seen: list[list[Tensor]] = [[] for _ in trained.kinds]
    for start in range(0, len(facts), TOGETHER):
        for pairs in _pairs(lm, trained.places, facts[start : start + TOGETHER]):
            for its, (net, _) in zip(trained.places, trained.where):
                seen[net].append(torch.cat(pairs[its.parameter], 1))
    for network, tokens in zip(trained.nets, seen):
        assert isinstance(network, Hypernetwork)
        network.measure(torch.cat(tokens))
