"""What a shard is trained with: the entries that may move, the descent, and the loss that makes edits excite it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from koinon.edit._sides import Excitement
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM
from koinon.nn.params import stream

Masking = Literal["random", "shared", "disjoint"]
PAPER = 20.0
"""beta in the paper, which is taken to stand for the norm of what a projection gives."""
SAMPLE = 64
"""Texts at most by which a projection is measured."""


@dataclass(frozen=True)
class Masks:
    """Which entries of a matrix each shard may change; the last mask that was asked for is kept."""

    shape: tuple[int, ...]
    share: float
    """rho."""
    masking: Masking
    seed: int
    _last: dict[int, Bool[Tensor, "out into"]] = field(default_factory=dict, repr=False)

    def of(self, shard: int) -> Bool[Tensor, "out into"]:
        """The mask of a shard: exactly a share of all entries."""
        if shard not in self._last:
            self._last.clear()
            self._last[shard] = self._made(shard)
        return self._last[shard]

    def _made(self, shard: int) -> Tensor:
        size = self.shape[0] * self.shape[1]
        count = round(self.share * size)
        order = torch.randperm(size, generator=stream(self.seed, "mask", shard if self.masking == "random" else 0))
        start = shard * count if self.masking == "disjoint" else 0
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[torch.arange(start, start + count) % size]] = True
        return mask.view(self.shape)


@dataclass(frozen=True)
class Scale:
    """How large what a projection gives is."""

    unit: float
    """What excitement is counted in."""
    gain: float
    """How many times as long as its input its output is."""


@torch.no_grad()
def scale_of(lm: LM, projection: Projection, texts: Sequence[str], balanced: bool) -> Scale:
    """The medians over texts' tokens of ||A(x) W_v^T|| (balanced, of its ratio to ||A(x)||) and of that ratio."""
    norms, gains = [], []
    weight = projection.weight.float()
    for part in lm._batches(lm.encode(list(texts[:SAMPLE]))):
        seen = lm.seen({"it": projection.module}, part, "in")["it"]
        into = seen[part.mask.to(seen.device)].float()
        norms.append((into @ weight.T).norm(dim=-1))
        gains.append(norms[-1] / into.norm(dim=-1))
    norm, gain = (float(torch.cat(its).median()) for its in (norms, gains))
    return Scale((gain if balanced else norm) / PAPER, gain)


@dataclass(frozen=True)
class Prompts:
    """Prompts, as what goes into the projection at their tokens, which no edit changes."""

    into: Float[Tensor, "text time into"]
    mask: Bool[Tensor, "text time"]

    @classmethod
    def of(cls, lm: LM, projection: Projection, prompts: Sequence[str]) -> "Prompts | None":
        """None if there is none."""
        if not prompts:
            return None
        encoded = lm.encode(list(prompts))
        into = lm.seen({"it": projection.module}, encoded, "in")["it"]
        return cls(into, encoded.mask.to(into.device))


@dataclass(frozen=True)
class Routing:
    """The routing loss."""

    alpha: float
    """How much irrelevant prompts may excite a memory."""
    beta: float
    """How much taught ones must."""
    gamma: float
    """How much more the one than the other."""
    unit: float
    """What excitement is counted in."""
    excitement: Excitement

    def loss(
        self,
        delta: Float[Tensor, "out into"],
        edit: Prompts,
        outside: Prompts | None,
        old: Prompts | None,
        far: Prompts | None,
        moved: Float[Tensor, "text time out"] | None = None,
    ) -> Tensor:
        """L_a (equation 6), and the same margins for replayed prompts; a mean over prompts of each term.

        Args:
            delta: W_v' - W_v.
            edit: the fact's, behind each beginning.
            outside: irrelevant ones.
            old: of earlier edits in this memory.
            far: of edits in others.
            moved: what delta makes of the fact's, if it is known.
        """
        inside = self._of(edit, delta, moved)
        total = (self.beta - inside).relu().mean()
        if outside is not None:
            out = self._of(outside, delta)
            total = total + (out - self.alpha).relu().mean() + (self.gamma - (inside[:, None] - out)).relu().mean()
        if old is not None:
            total = total + (self.beta - self._of(old, delta)).relu().mean()
        if far is not None:
            total = total + (self._of(far, delta) - self.alpha).relu().mean()
        return total

    def _of(self, prompts: Prompts, delta: Tensor, moved: Tensor | None = None) -> Tensor:
        return self.excitement.of(prompts.into, delta, prompts.mask, moved) / self.unit


@dataclass(frozen=True)
class Descent:
    """How a shard's change is found."""

    steps: int
    rate: float
    decay: float
    """Weight decay of W_v'."""
    bound: float
    """How far an entry may be from what it is in W_v."""
    enough: float
    """The loss at which it stops."""

    def run(
        self,
        delta: Float[Tensor, "out into"],
        weight: Float[Tensor, "out into"],
        mask: Bool[Tensor, "out into"],
        loss: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "out into"]:
        """W_v' - W_v by gradient descent, of the entries in the mask.

        Args:
            delta: where it begins.
            weight: W_v.
            mask: the entries that move.
            loss: of W_v' - W_v.
        """
        delta, free = delta.clone().requires_grad_(), mask.to(delta)
        for _ in range(self.steps):
            with torch.enable_grad():
                now = loss(delta)
                if float(now.detach()) <= self.enough:
                    break
                (slope,) = torch.autograd.grad(now, delta)
            with torch.no_grad():
                slope.add_(weight, alpha=self.decay).add_(delta, alpha=self.decay).mul_(free)
                delta.sub_(slope, alpha=self.rate).clamp_(-self.bound, self.bound)
        return delta.detach()
