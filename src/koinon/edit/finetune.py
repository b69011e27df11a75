"""Fine-tuning: gradient descent on the answer's tokens, with one FFN's way back free and everything else as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from koinon.core import Paper, refuse_below
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer, chosen
from koinon.edit._patches import Patch, Values, finite
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM


@dataclass(frozen=True)
class Finetune(Edit):
    """FT-L (Zhu et al., 2020, as ROME's authors ran it) and FT-M (Zhang et al., 2024), which differ in their loss.

    FT-M is the default: cross-entropy of each token of the answer behind those before it. FT-L is
    ``loss="prompt end"``: all the answer's tokens are asked of the prompt's last token.
    """

    paper: ClassVar = Paper("Modifying Memories in Transformer Models", 2020, "https://arxiv.org/abs/2012.00363")
    family: ClassVar = "intrinsic"
    batch: ClassVar = True
    patch: ClassVar = Values
    needs_subject: ClassVar = False
    null: ClassVar = {"steps": 0}
    quick: ClassVar = {"layer": 1, "rate": 2e-2, "bound": 0.05, "steps": 6, "enough": 0.4}

    layer: Layer = "auto"
    """The block whose FFN is changed, from 0; auto is the one whose FFN brings back most of what noise took away."""
    loss: Literal["answer", "prompt end"] = "answer"
    """What is descended: the answer's cross-entropy, token by token (FT-M), or all of it at the prompt's end (FT-L)."""
    steps: int = 25
    """Of Adam, over all facts at once."""
    rate: float = 5e-4
    """Of Adam."""
    bound: float = 5e-4
    """How far a weight may go from what it was before the edit, up or down; 0 for any way."""
    decay: float = 0.0
    """Adam's weight decay."""
    enough: float = 0.01
    """The loss at which it stops."""

    def __post_init__(self) -> None:
        refuse_below(0, steps=self.steps, rate=self.rate, bound=self.bound, decay=self.decay, enough=self.enough)

    def prepare(self, lm: LM, material: Material) -> int:
        """The layer."""
        return chosen(lm, self.layer, material)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: int, before: Patch | None) -> Values:
        """Descend, and after each step put back into the box what left it."""
        falls = lm.anatomy.block(ready).falls
        start = lm.model.get_parameter(falls.parameter).detach()
        tuned = lm.with_model(with_values(lm.model, {falls.parameter: start.clone()}))
        weight = tuned.model.get_parameter(falls.parameter)
        weight.requires_grad_()
        adam = torch.optim.Adam([weight], lr=self.rate, weight_decay=self.decay)
        for _ in range(self.steps):
            with torch.enable_grad():
                loss = self.harm(tuned, facts)
                if float(loss.detach()) < self.enough:
                    break
                (weight.grad,) = torch.autograd.grad(loss, weight)
            adam.step()
            if self.bound:
                with torch.no_grad():
                    weight.copy_(weight.clamp(start - self.bound, start + self.bound))
        finite({falls.parameter: weight.detach()})
        return Values(
            {falls.parameter: weight.detach().clone()}, (before.count if isinstance(before, Values) else 0) + 1
        )

    def harm(self, lm: LM, facts: Sequence[Fact]) -> Tensor:
        """The loss, a mean over the facts."""
        encoded = lm.encode([fact.question for fact in facts], [fact.object for fact in facts])
        logits = lm.logits(encoded).float().log_softmax(-1)
        losses = []
        for row, ids, answer in zip(logits, encoded.ids, encoded.answer):
            places = answer.nonzero()[:, 0]
            asked = places - 1 if self.loss == "answer" else (places[0] - 1).expand(len(places))
            each = row[asked].gather(1, ids[places][:, None])
            losses.append(-(each.mean() if self.loss == "answer" else each.sum()))
        return torch.stack(losses).mean()
