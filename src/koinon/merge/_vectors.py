"""What the methods on task vectors share: exact order statistics of streams, sign election, weighted sums."""

import math
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from koinon.core import UserError
from koinon.merge._engine import Chunk, Part

HALF = 1 << 16
"""Magnitudes are counted by the upper half of their float32 pattern, and by the lower half where that matters."""

LOOKS = 2
"""That `cutoffs` takes at a part of several chunks."""


def each(values: Sequence[float], models: Sequence[str], what: str) -> list[float]:
    """One value a model, in the models' order; a single one is for all.

    Raises:
        UserError: neither one value nor one a model.
    """
    if len(values) not in (1, len(models)):
        raise UserError(f"{what}: {len(values)} values for {len(models)} models; give one, or one for each")
    return list(values) * (len(models) if len(values) == 1 else 1)


def total_of(weights: Sequence[float], kind: torch.dtype) -> Float[Tensor, ""]:
    """What a weighted sum is divided by, in the type of its numbers.

    Raises:
        UserError: it is 0.
    """
    total = torch.tensor(weights, dtype=kind).sum()
    if total == 0:
        raise UserError(f"weights {tuple(weights)} sum to 0: give others, or do not normalize")
    return total


def kept(density: float, count: int) -> int:
    """How many of ``count`` elements a density keeps: rounded down, but one at least if it is above 0."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


def cutoffs(part: Part, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each model the magnitudes of its task vector at the given ranks, 1 for the largest; rank 0 is infinity.

    Exact, in two passes and memory that does not grow with the part: a histogram of the upper halves of all magnitudes
    finds each rank's bin, and one of the lower halves within that bin the magnitude. One chunk is sorted at once.
    """
    if part.count == 0:
        return [[np.inf] * len(its) for its in ranks]
    if part.chunks == 1:
        ((vectors),) = part.look(lambda chunk: [_magnitudes(delta) for delta in chunk.deltas])
        return [[_ranked(values, rank) for rank in its] for values, its in zip(vectors, ranks, strict=True)]
    counts = [np.zeros(HALF // 2, np.int64) for _ in ranks]  # a magnitude's sign bit is 0
    lock = threading.Lock()

    def count(chunk: Chunk) -> None:
        for delta, counted in zip(chunk.deltas, counts, strict=True):
            found = np.bincount(_halves(delta)[1::2], minlength=HALF // 2)
            with lock:
                counted += found

    part.look(count)
    # For each rank of each model its bin, and the rank within the bin.
    places = [[_place(counted, rank) for rank in its] for counted, its in zip(counts, ranks, strict=True)]
    lower = [{bin: np.zeros(HALF, np.int64) for bin, rank in its if rank} for its in places]

    def collect(chunk: Chunk) -> None:
        for delta, its in zip(chunk.deltas, lower, strict=True):
            halves = _halves(delta)
            for bin, counted in its.items():
                found = np.bincount(halves[::2][halves[1::2] == bin], minlength=HALF)
                with lock:
                    counted += found

    part.look(collect)
    return [
        [_value(bin, _place(its[bin], rank)[0]) if rank else np.inf for bin, rank in found]
        for its, found in zip(lower, places, strict=True)
    ]


def _place(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of what has a rank, 1 for the largest, and its rank within the bin."""
    above = counts[::-1].cumsum()
    steps = int(np.searchsorted(above, rank))
    return len(counts) - 1 - steps, rank - int(above[steps] - counts[::-1][steps])


def _value(upper: int, lower: int) -> float:
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))


def _halves(delta: Tensor) -> NDArray[np.uint16]:
    """The lower and upper halves of each magnitude's pattern, in turn, on a little-endian machine."""
    return _magnitudes(delta).view(np.uint16)


def _magnitudes(delta: Tensor) -> NDArray[np.float32]:
    return delta.abs().float().numpy()


def _ranked(values: NDArray[np.float32], rank: int) -> float:
    return float(np.partition(values, len(values) - rank)[len(values) - rank]) if rank else np.inf


def consensus(
    vectors: Iterable[Float[Tensor, " n"]], weights: Sequence[float], elect: bool, mean: bool
) -> Float[Tensor, " n"]:
    """Several sparse task vectors as one: sum_t w_t tau_t, over the models that agree and as a mean if asked for.

    Args:
        vectors: one a model, which may be overwritten; what a method has cut from it is 0.
        weights: one a model.
        elect: elect a sign for each element, that of the weighted sum (+ for 0), and drop the models that have another.
        mean: divide by the summed weights of the models that are left (not cut, not dropped).

    Each operation rounds to the vectors' type; sums are held in float32 or better.
    """
    weighted = [_scale(vector, w) for vector, w in zip(vectors, weights, strict=True)]
    # A choice by mask is ten times as slow on a CPU as arithmetic with 0, 1 and the sign.
    total = _sum(weighted)
    if elect:
        sign = torch.ge(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)
        weighted = [F.relu(vector * sign) for vector in weighted]
        total = _sum(weighted) * sign
    if mean:
        divisor = _sum([_scale(vector.sign().abs_(), w) for vector, w in zip(weighted, weights, strict=True)])
        total /= divisor + torch.eq(divisor, 0, out=torch.empty_like(divisor))
    return total


def cut_below(vector: Float[Tensor, " n"], cut: float) -> Float[Tensor, " n"]:
    """The vector with 0 for all that is smaller than ``cut`` in magnitude, taken in float32 as `cutoffs` takes it."""
    if vector.dtype == torch.float64:
        return torch.where(vector.abs().float() >= cut, vector, 0)
    if cut <= 0 or math.isinf(cut):
        return vector if cut <= 0 else torch.zeros_like(vector)
    edge = torch.tensor(cut, dtype=vector.dtype)
    below = torch.nextafter(edge, torch.zeros_like(edge))  # what hardshrink keeps is larger, not as large
    return F.hardshrink(vector, float(below))


def _scale(vector: Tensor, weight: float) -> Tensor:
    """In place."""
    return vector if weight == 1 else vector.mul_(torch.tensor(weight, dtype=vector.dtype))


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    kind = vectors[0].dtype
    total = vectors[0].to(torch.promote_types(kind, torch.float32), copy=True)
    for vector in vectors[1:]:
        total += vector
    return total.to(kind)


def added(chunk: Chunk, vector: Float[Tensor, " n"], scale: float) -> Float[Tensor, " n"]:
    """theta_0 + lambda tau; each operation rounds to the type of its numbers."""
    assert chunk.base is not None
    return chunk.base + (vector if scale == 1 else vector * scale)
