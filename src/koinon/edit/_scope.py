"""Whether a prompt is about a taught fact: distances between prompts, read from a model's own vectors, and trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from koinon.core import UserError, refuse_below
from koinon.edit._patches import Patch
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM, joint
from koinon.lm.small import decoder
from koinon.nn.params import stream, xavier

HEADS = 4
"""Places in a prompt that are looked at."""


class Scope(nn.Module):
    """A prompt as a point: a few weighted means of its tokens' vectors, each projected.

    Args:
        width: of the vectors.
        size: of the point; a multiple of the heads is taken.
        seed: of what it starts from.
    """

    def __init__(self, width: int, size: int, seed: int):
        super().__init__()
        each = -(-size // HEADS)
        self.query = nn.Parameter(xavier(HEADS, width, stream(seed, "scope", "query")))
        self.value = nn.Parameter(
            torch.stack([xavier(each, width, stream(seed, "scope", "value", head)) for head in range(HEADS)])
        )

    def forward(
        self, vectors: Float[Tensor, "text time width"], mask: Bool[Tensor, "text time"]
    ) -> Float[Tensor, "text size"]:
        """The points."""
        weights = (vectors @ self.query.T).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        means = torch.einsum("nth,ntw->nhw", weights, vectors)
        return torch.einsum("nhw,hew->nhe", means, self.value).flatten(1)


@torch.no_grad()
def read(lm: LM, prompts: Sequence[str], layer: int) -> list[tuple[Tensor, Tensor]]:
    """What comes out of a block for each prompt alone, [1 time width], and its mask; each vector of mean square 1."""
    found = []
    for part in lm._batches(lm.encode(prompts)):
        seen = lm.seen({"block": lm.anatomy.block(layer).module}, part)["block"].float()
        seen = seen / seen.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        found += [(row[None], mask[None]) for row, mask in zip(seen, part.mask)]
    return found


def points(scope: Scope, vectors: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "text size"]:
    """The points of prompts that were read, filled up on the right."""
    time = max(mask.shape[1] for _, mask in vectors)
    width = vectors[0][0].shape[2]
    filled = vectors[0][0].new_zeros(len(vectors), time, width)
    mask = filled.new_zeros(len(vectors), time, dtype=torch.bool)
    for row, (its, known) in enumerate(vectors):
        filled[row, : known.shape[1]], mask[row, : known.shape[1]] = its[0], known[0]
    return scope(filled, mask)


def apart(one: Float[Tensor, "n size"], other: Float[Tensor, "m size"]) -> Float[Tensor, "n m"]:
    """||e(x) - e(z)||^2; how alike two prompts are is e to the minus that."""
    return (one[:, None] - other[None]).square().sum(-1)


def mistaken(same: Float[Tensor, " n"], different: Float[Tensor, " m"]) -> Tensor:
    """Cross-entropy of e to the minus squared distances; pairs that belong together weigh as much as the others."""
    others = -torch.log(-torch.expm1(-different.clamp(min=1e-4)))
    return (same.mean() + others.mean()) / 2


# Who answers.

Told = tuple[str, str]
"""A question and its new answer."""


@dataclass(frozen=True)
class Router:
    """SERAC's equation 1: who answers a prompt."""

    base: LM
    counterfactual: LM
    scope: Scope
    layer: int
    """Of the base, whose vectors the scope reads."""
    threshold: float
    facts: Sequence[Told]
    """The memory."""

    def __call__(self, prompts: Sequence[str]) -> list[tuple[LM, str]]:
        """The base for a prompt as it is, or the small model for the nearest edit with the prompt behind it."""
        if not prompts:
            return []
        nearest, alike = self.alike(prompts).max(1)[::-1]
        return [
            (self.counterfactual, shown(self.facts[place], prompt)) if its > self.threshold else (self.base, prompt)
            for prompt, place, its in zip(prompts, nearest.tolist(), alike.tolist())
        ]

    @torch.no_grad()
    def alike(self, prompts: Sequence[str]) -> Tensor:
        """How alike each prompt and each edit are, [prompt edit], from 0 to 1."""
        asked = points(self.scope, read(self.base, prompts, self.layer))
        held = points(self.scope, read(self.base, [question for question, _ in self.facts], self.layer))
        return torch.exp(-apart(asked, held))


@dataclass(frozen=True)
class Memory(Patch):
    """The edits, and the two parts that were trained before the first one."""

    single: ClassVar[bool] = True

    facts: tuple[Told, ...]
    scope: Mapping[str, Tensor]
    counterfactual: Mapping[str, Tensor]
    shape: tuple[int, ...]
    """Of the counterfactual model: width, layers, heads, width inside, longest text."""
    layer: int
    threshold: float

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return len(self.facts)

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`: the base's model with a router before it."""
        model = with_values(decoder(base.tokenizer, *self.shape), dict(self.counterfactual))
        scope = Scope(base.anatomy.width, len(self.scope["value"].flatten(0, 1)), 0).to(base.device)
        scope.load_state_dict(dict(self.scope))
        small = LM.of(model.to(base.device), base.tokenizer)
        return replace(
            base, router=Router(base, small, scope.requires_grad_(False), self.layer, self.threshold, self.facts)
        )

    def keeping(self, numbers: Sequence[int]) -> "Memory":
        """See `Patch.keeping`: any step can be taken away alone."""
        return replace(self, facts=tuple(self.facts[number] for number in numbers))

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        width, size = self.scope["query"].shape[1], len(self.counterfactual["model.embed_tokens.weight"])
        if (width, size) != (base.anatomy.width, len(base.tokenizer)):
            raise UserError(
                f"the memory reads vectors of {width} numbers and {size} tokens, the base has {base.anatomy.width} and "
                f"{len(base.tokenizer)}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        parts = {"scope": self.scope, "counterfactual": self.counterfactual}
        return {f"{part}|{name}": its for part, held in parts.items() for name, its in held.items()}

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        facts = [list(its) for its in self.facts]
        return {"facts": facts, "shape": list(self.shape), "layer": self.layer, "threshold": self.threshold}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Memory":
        """See `Patch.restore`."""
        parts: dict[str, dict[str, Tensor]] = {"scope": {}, "counterfactual": {}}
        for key, its in tensors.items():
            part, _, name = key.partition("|")
            parts[part][name] = its
        refuse_below(0, threshold=notes["threshold"])
        facts = tuple((str(question), str(answer)) for question, answer in notes["facts"])
        return cls(facts, **parts, shape=tuple(notes["shape"]), layer=notes["layer"], threshold=notes["threshold"])


def shown(told: Told, prompt: str) -> str:
    """What the counterfactual model reads: the edit, and then the prompt."""
    question, answer = told
    return f"{question}{joint(question, answer)} {prompt}"
