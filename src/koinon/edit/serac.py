"""SERAC: keeps edits in a memory; a prompt in the scope of one goes to a small model that reads it, others to the base.

The result is an `LM` with a router, whose model is the base itself: use `LM.score` and `LM.generate`; the plain model
that is in it knows no edit.

Departures: scope is measured on the base's own vectors of one layer, with a trained read-out, where the paper tunes
DistilBERT; the counterfactual model is trained from nothing on the cases, where the paper starts from T5-small. That
is why step size and number of steps are other than the paper's. Cases are taught with an object drawn from their
relation's. An edit's prompt alone is compared, without its answer, as EasyEdit does for decoders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from koinon.core import Paper, refuse_below
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._lessons import Lesson, Lessons
from koinon.edit._losses import unlikely
from koinon.edit._patches import Patch, finite
from koinon.edit._scope import Memory, Scope, apart, mistaken, points, read, shown
from koinon.lm.language import LM
from koinon.lm.small import decoder
from koinon.nn.params import stream

DEPTH = 0.5
"""Of the base's blocks, where the vectors are taken that the scope reads."""
SIZE = 64
"""Numbers that stand for a prompt when distances are taken."""
HEADS = 4
"""Of the counterfactual model's attention."""
CONTEXT = 512
"""Tokens it reads, if the base does not say how many it does."""


@dataclass(frozen=True)
class Serac(Edit):
    """Semi-parametric editing with a retrieval-augmented counterfactual model (Mitchell et al., 2022)."""

    paper: ClassVar = Paper("Memory-Based Model Editing at Scale", 2022, "https://arxiv.org/abs/2206.06520")
    family: ClassVar = "external"
    patch: ClassVar = Memory
    needs_subject: ClassVar = False
    needs_cases: ClassVar = True
    null: ClassVar = {"threshold": 1.0}
    quick: ClassVar = {"steps": 25, "rows": 4, "rate": 3e-2, "layers": 1}

    threshold: float = 0.5
    """A prompt is in the scope of an edit that is more alike than this; at 1 none is."""
    share: float = 0.5
    """Width of the counterfactual model, as a share of the base's."""
    layers: int = 4
    """Of the counterfactual model."""
    steps: int = 3_000
    """Of Adam, for the scope and the counterfactual model; the paper's start from models that are trained."""
    rows: int = 32
    """Edits in each step."""
    rate: float = 2e-3
    """Of Adam; falls to 0."""
    seed: int = 0
    """Of what they start from, and of the edits drawn."""

    def __post_init__(self) -> None:
        refuse_below(1, layers=self.layers, rows=self.rows)
        refuse_below(0, threshold=self.threshold, share=self.share, steps=self.steps, rate=self.rate)

    def prepare(self, lm: LM, material: Material) -> Memory:
        """Train the scope and the counterfactual model; neither looks at the other, and the base stays as it is."""
        lessons = Lessons(material, stream(self.seed, "serac"))
        width = max(8, round(self.share * lm.anatomy.width / 8) * 8)
        context = int(lm.limit) if lm.limit < math.inf else CONTEXT
        shape = (width, self.layers, HEADS, 4 * width, context)
        model = nn.Module.to(decoder(lm.tokenizer, *shape, seed=self.seed), lm.device)
        layer = lm.anatomy.at(DEPTH)
        scope = Scope(lm.anatomy.width, SIZE, self.seed).to(lm.device)
        small, held = LM(model, lm.tokenizer), dict[str, Any]()
        learnt = [*scope.parameters(), *model.parameters()]
        adam = torch.optim.Adam(learnt, lr=self.rate)
        for step in range(self.steps):
            taken = lessons.take(self.rows)
            with torch.enable_grad():
                harm = _mistaken(lm, scope, layer, taken, held) + _unlikely(small, taken)
            for its, gradient in zip(learnt, torch.autograd.grad(harm, learnt)):
                its.grad = gradient
            for group in adam.param_groups:
                group["lr"] = self.rate * (1 - step / self.steps)
            adam.step()
        memory = Memory((), _values(scope), _values(model), shape, layer, self.threshold)
        finite(memory.tensors())
        return memory

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Memory, before: Patch | None) -> Memory:
        """Write it down."""
        known = before if isinstance(before, Memory) else ready
        return replace(known, facts=(*known.facts, *((fact.question, fact.object) for fact in facts)))


def _unlikely(small: LM, lessons: Sequence[Lesson]) -> Tensor:
    """The counterfactual model's loss: of every other edit its own question is asked, of the others another wording."""
    asked = [its.reworded if place % 2 else its.fact.question for place, its in enumerate(lessons)]
    prompts = [shown((its.fact.question, its.fact.object), prompt) for its, prompt in zip(lessons, asked)]
    encoded = small.encode(prompts, [its.fact.object for its in lessons])
    return unlikely(small.logits(encoded), encoded)


def _mistaken(lm: LM, scope: Scope, layer: int, lessons: Sequence[Lesson], held: dict[str, Any]) -> Tensor:
    """The scope's loss: another wording belongs to its edit; what must stay, and the next edit's wording, do not."""
    asked = [[its.fact.question for its in lessons], [its.reworded for its in lessons]]
    asked.append([its.elsewhere[0] for its in lessons])
    new = sorted({prompt for prompts in asked for prompt in prompts} - held.keys())
    held |= dict(zip(new, read(lm, new, layer))) if new else {}
    edits, same, stays = (points(scope, [held[prompt] for prompt in prompts]) for prompts in asked)
    near, far = apart(edits, same), apart(edits, stays).diagonal()
    subjects = [(its.fact.subject, its.fact.relation) for its in lessons]
    other = [place for place, its in enumerate(subjects) if its != subjects[place - 1]]
    return mistaken(near.diagonal(), torch.cat([far, near[other, [place - 1 for place in other]]]))


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: its.detach().clone() for name, its in module.named_parameters()}
