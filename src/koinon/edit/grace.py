"""GRACE: keeps a codebook beside one layer: near the key of a taught question the layer gives the value learnt for it.

Departures: answers are the same if their texts are (the release compares the means of their tokens' numbers, which are
equal for many different answers). A radius never grows when two keys part, so that a third one keeps its answers; the
release's can. A question that is taught anew with another answer has the new one only. Where a key takes in another
question of the same answer it has the value learnt last, as in the release, but learnt from its own beginning: so any
single edit can be taken away, and leaves what would have been without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, refuse_below
from koinon.data.facts import Fact
from koinon.edit._codebook import Code, Codebook
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._layers import Layer
from koinon.edit._memories import Above, ends, late
from koinon.edit._patches import Patch, finite
from koinon.lm.language import LM
from koinon.nn.params import stream


@dataclass(frozen=True)
class Ready:
    """Where the codebook is put."""

    lm: LM
    """The model without edits."""
    layer: int


@dataclass(frozen=True)
class Grace(Edit):
    """General Retrieval Adaptors for Continual Editing (Hartvigsen et al., 2023)."""

    paper: ClassVar = Paper(
        "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
        2023,
        "https://arxiv.org/abs/2211.11031",
    )
    family: ClassVar = "merging"
    patch: ClassVar = Codebook
    needs_subject: ClassVar = False
    null: ClassVar = {"steps": 0, "start": "layer"}
    quick: ClassVar = {"layer": 1, "steps": 20, "rate": 0.2, "radius": 2.0}

    layer: Layer = "auto"
    """The block at whose FFN's way back the codebook is, from 0; auto is at four fifths of the depth."""
    steps: int = 200
    """Of Adam, for the value of each fact."""
    rate: float = 1.0
    """Of Adam."""
    radius: float = 1.0
    """epsilon: how far from its key a question may be to get its value, in the units of the FFN's activations."""
    start: Literal["random", "layer"] = "random"
    """What a value is at first: uniform numbers from 0 to 1, or what the layer gives for the question."""
    seed: int = 0
    """Of those numbers."""

    def __post_init__(self) -> None:
        refuse_below(0, steps=self.steps, rate=self.rate, radius=self.radius)

    def prepare(self, lm: LM, material: Material) -> Ready:
        """The layer."""
        return Ready(lm, late(lm, self.layer))

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Ready, before: Patch | None) -> Codebook:
        """One fact as one code more; the earlier ones have no part in it."""
        (fact,) = facts
        above = Above(ready.lm, ready.layer, ready.lm.encode([fact.question], [fact.object]))
        # 1. The key: what goes into the layer at the question's last token.
        (last,) = ends(above.texts.prompt).tolist()
        key = above.into[0, last].float()
        # 2. The value: what the layer should give there for the model to say the object.
        value = self._value(above, last, fact)
        finite({"the value": value, "the key": key})
        known = before.codes if isinstance(before, Codebook) else ()
        # 3. The codebook puts keys that are close in order, see `book`.
        name = ready.lm.anatomy.block(ready.layer).falls.name
        return Codebook(name, self.radius, (*known, Code(key.clone(), value, fact.object)))

    def _value(self, above: Above, last: int, fact: Fact) -> Float[Tensor, " out"]:
        value = above.out[0, last].float()
        if self.start == "random":
            value = torch.rand(len(value), generator=stream(self.seed, "value", fact.question)).to(value)
        value.requires_grad_()
        adam = torch.optim.Adam([value], lr=self.rate)

        def change(out: Tensor) -> Tensor:
            return torch.cat([out[:, :last], value.to(out.dtype)[None, None], out[:, last + 1 :]], 1)

        for _ in range(self.steps):
            with torch.enable_grad():
                loss = above.harm(change)
                (value.grad,) = torch.autograd.grad(loss, value)
            adam.step()
        return value.detach()
