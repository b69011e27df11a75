"""SLERP: walk from one model to another on the arc between their weights, tensor by tensor, instead of the line."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import Paper, UserError
from koinon.merge._contract import Blend
from koinon.merge._engine import Chunk, Part

PARALLEL = 0.9995
"""Cosine above which the arc is taken for a line."""


@dataclass(frozen=True)
class Slerp(Blend):
    """Spherical linear interpolation (Shoemake, section 3.3) of two models' tensors, one angle for each tensor."""

    paper: ClassVar = Paper("Animating rotation with quaternion curves", 1985, "https://doi.org/10.1145/325165.325242")
    exempt: ClassVar = {
        "null_equals_baseline": "no setting makes the arc a line; parallel weights do, which an oracle checks",
    }
    needs_base: ClassVar = False

    t: float = 0.5
    """Where on the arc: 0 is the first model, 1 the second."""

    @property
    def passes(self) -> int:
        """See `Blend.passes`."""
        return 2

    def measure(self, part: Part) -> tuple[float, float]:
        """sin((1 - t) omega) / sin(omega) and sin(t omega) / sin(omega), with omega the angle between the tensors."""
        if len(part.models) != 2:
            raise UserError(f"slerp is for two models, here are {len(part.models)}")
        ab, aa, bb = torch.tensor(part.look(_products), dtype=torch.float64).view(-1, 3).sum(0).tolist()
        # A tensor of zeros has no direction: a right angle, as mergekit takes it.
        cosine = max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 0.0
        if abs(cosine) > PARALLEL:
            return 1 - self.t, self.t
        omega = math.acos(cosine)
        return math.sin((1 - self.t) * omega) / math.sin(omega), math.sin(self.t * omega) / math.sin(omega)

    def blend(self, chunk: Chunk, found: tuple[float, float]) -> Float[Tensor, " n"]:
        """See `Blend.blend`."""
        kind = torch.promote_types(next(iter(chunk.tuned.values())).dtype, torch.float32)
        first, second = (its.to(kind) for its in chunk.tuned.values())
        return found[0] * first + found[1] * second


def _products(chunk: Chunk) -> list[float]:
    a, b = (its.double() for its in chunk.tuned.values())
    return [float(a @ b), float(a @ a), float(b @ b)]
