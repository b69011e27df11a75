"""A codebook at one projection: near a key, the projection gives the key's value at the prompt's last token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from koinon.core import refuse_below
from koinon.edit._memories import Memory, ends, put
from koinon.edit._patches import Patch, expect_matrix
from koinon.lm.language import LM

SAME = 1e-5
"""Keys that differ by no more than this share of their norm are one question, read in another batch."""
GAP = 1e-5
"""Left between the radii of two keys that answer differently, so that a question in the middle has one answer."""


@dataclass(frozen=True)
class Code:
    """What one step taught; it does not depend on the other steps."""

    key: Float[Tensor, " into"]
    """What goes into the projection at the last token of the question."""
    value: Float[Tensor, " out"]
    """What it shall give there."""
    label: str
    """The answer."""


@dataclass
class Entry:
    """A key with its reach."""

    key: Float[Tensor, " into"]
    value: Float[Tensor, " out"]
    radius: float
    label: str


def book(codes: Sequence[Code], radius: float) -> list[Entry]:
    """The codebook after all steps (Hartvigsen et al., 2023, algorithm 1).

    Args:
        codes: the steps, in order.
        radius: epsilon, the reach of a new key.
    """
    found: list[Entry] = []
    for code in codes:
        new = Entry(code.key, code.value, radius, code.label)
        near = min(found, key=lambda entry: _distance(entry.key, code.key), default=None)
        apart = _distance(near.key, code.key) if near else float("inf")
        if near is None or apart > radius + near.radius:  # 1. Nothing is close: a new key.
            found.append(new)
        elif near.label == code.label:  # 2. Close, and the same answer: the old key reaches as far as the new one.
            near.value, near.radius = code.value, max(near.radius, apart)
        elif apart <= SAME * float(code.key.norm()):  # 3. The same question: the new answer takes its place.
            found[found.index(near)] = new
        else:  # 4. Close, and another answer: each keeps half of the way between them.
            near.radius, new.radius = min(near.radius, apart / 2 - GAP), min(radius, apart / 2)
            found.append(new)
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm())


@dataclass(frozen=True)
class Codebook(Patch):
    """All steps; any of them can be taken away alone, and the rest is what it would have been without it."""

    single: ClassVar[bool] = True

    name: str
    """Of the projection."""
    radius: float
    """epsilon, of a new key."""
    codes: tuple[Code, ...]

    @property
    def entries(self) -> list[Entry]:
        """The keys that questions are compared with."""
        return book(self.codes, self.radius)

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return len(self.codes)

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`."""
        return put(base, self.name, Codes(self.entries))

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        expect_matrix(base, self.name, (len(self.codes[0].value), len(self.codes[0].key)))

    def keeping(self, numbers: Sequence[int]) -> "Codebook":
        """See `Patch.keeping`."""
        return Codebook(self.name, self.radius, tuple(self.codes[number] for number in numbers))

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        return {
            "keys": torch.stack([code.key for code in self.codes]),
            "values": torch.stack([code.value for code in self.codes]),
        }

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        return {"name": self.name, "radius": self.radius, "labels": [code.label for code in self.codes]}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Codebook":
        """See `Patch.restore`."""
        refuse_below(0, radius=notes["radius"])
        codes = zip(tensors["keys"], tensors["values"], notes["labels"], strict=True)
        return cls(str(notes["name"]), float(notes["radius"]), tuple(Code(*its) for its in codes))


class Codes(Memory):
    """The codebook as part of a model: a question near no key is answered by the model alone, to the bit."""

    def __init__(self, entries: Sequence[Entry]):
        super().__init__()
        self.keys = nn.Parameter(torch.stack([entry.key for entry in entries]), requires_grad=False)
        self.values = nn.Parameter(torch.stack([entry.value for entry in entries]), requires_grad=False)
        self.radii = nn.Parameter(torch.tensor([entry.radius for entry in entries]), requires_grad=False)

    def first(self, into: Tensor, out: Tensor, prompt: Bool[Tensor, "text time"]) -> Tensor:
        """The value of the nearest key at the prompt's last token, where the key reaches that far."""
        rows = torch.arange(len(into), device=into.device)
        last = ends(prompt)
        away = (into[rows, last].float()[:, None] - self.keys.float()).norm(dim=-1)  # text key
        distance, nearest = away.min(1)
        near = distance <= self.radii[nearest]
        if not bool(near.any()):
            return out
        changed = out.clone()
        changed[rows[near], last[near]] = self.values[nearest[near]].to(out.dtype)
        return changed

    def later(self, into: Tensor, out: Tensor) -> Tensor:
        """The prompt's last token is behind: nothing is replaced."""
        return out
