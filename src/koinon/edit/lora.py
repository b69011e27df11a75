"""LoRA: fine-tuning on the facts in which each chosen matrix may change by a product of two narrow ones only.

Departures: the paper tunes with AdamW on a whole task; rank, scale, step size and number of steps are EasyEdit's for
edits, which also drops a tenth of what goes into A (no dropout here: a few steps on one fact) and goes through the
facts one by one (here each step sees all of them). The product is added to the weight, so that the result is a plain
model. AdaLoRA, which prunes ranks over thousands of steps, is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from koinon.core import Paper, UserError, refuse_below
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._losses import logits_with, unlikely
from koinon.edit._patches import LowRank, Patch, Weights, finite
from koinon.lm.anatomy import Projection, linears
from koinon.lm.language import LM
from koinon.nn.params import stream

NARROW = ("q_proj", "v_proj", "query", "value", "c_attn", "qkv_proj", "query_key_value", "Wqkv")
"""What queries and values are made by, in most decoders."""


@dataclass(frozen=True)
class Lora(Edit):
    """Low-rank adaptation (Hu et al., 2022): W <- W + (alpha / r) B A, where A starts random and B at 0."""

    paper: ClassVar = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", 2022, "https://arxiv.org/abs/2106.09685"
    )
    family: ClassVar = "merging"
    batch: ClassVar = True
    needs_subject: ClassVar = False
    null: ClassVar = {"steps": 0}
    quick: ClassVar = {"steps": 6}

    rank: int = 8
    """r: of each change."""
    alpha: float = 32.0
    """alpha: B A is multiplied by alpha / r."""
    steps: int = 30
    """Of Adam, over all facts at once."""
    rate: float = 5e-3
    """Of Adam."""
    where: tuple[str, ...] = NARROW
    """Names of the matrices, or their last parts, as patterns; by default what makes queries and values."""
    seed: int = 0
    """Of A."""

    def __post_init__(self) -> None:
        refuse_below(1, rank=self.rank)
        refuse_below(0, alpha=self.alpha, steps=self.steps, rate=self.rate)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: None, before: Patch | None) -> Weights:
        """Descend on the answers' tokens."""
        places = self.places(lm)
        # 1. A as nn.Linear starts, B at 0: nothing is changed yet.
        left, right = {}, {}
        for its in places:
            out, into = its.weight.shape
            drawn = torch.rand(self.rank, into, generator=stream(self.seed, "lora", its.name)) * 2 - 1
            right[its.parameter] = (drawn / math.sqrt(into)).to(lm.device).requires_grad_()
            left[its.parameter] = torch.zeros(out, self.rank, device=lm.device, requires_grad=True)
        # 2. Adam on both; the model's own weights stay.
        encoded = lm.encode([fact.question for fact in facts], [fact.object for fact in facts])
        factors = [*left.values(), *right.values()]
        adam = torch.optim.Adam(factors, lr=self.rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                weights = {its.parameter: self._changed(its, left, right) for its in places}
                loss = unlikely(logits_with(lm, weights, encoded), encoded)
            for factor, gradient in zip(factors, torch.autograd.grad(loss, factors)):
                factor.grad = gradient
            adam.step()
        # 3. The products are the edit.
        scale = self.alpha / self.rank
        step = {name: LowRank(scale * left[name].detach(), right[name].detach().T.contiguous()) for name in left}
        for name, change in step.items():
            finite({name: change.left @ change.right.T})
        turned = frozenset(its.parameter for its in places if its.turned)
        return (before if isinstance(before, Weights) else Weights((), turned)).plus(step)

    def places(self, lm: LM) -> list[Projection]:
        """The matrices that may change.

        Raises:
            UserError: no name fits.
        """
        found = linears(lm.model, self.where)
        if not found:
            names = sorted({its.name.rpartition(".")[2] for its in linears(lm.model, ("*",))})
            raise UserError(f"where {self.where}: no matrix of the model fits; there are {', '.join(names)}")
        return found

    def _changed(self, its: Projection, left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
        """The weight as it is stored, with the change."""
        change = self.alpha / self.rank * left[its.parameter] @ right[its.parameter]
        weight = its.weight + change.to(its.weight.dtype)
        return weight.T if its.turned else weight
