"""What the methods on task vectors share: exact order statistics of streams, sign election, weighted sums."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from koinon.core import UserError
from koinon.merge._engine import Chunk, Part

SHIFT = 16
"""Magnitudes are sorted by the upper half of their float32 pattern first, then within the half that matters."""


def each(values: Sequence[float], models: Sequence[str], what: str) -> list[float]:
    """One value a model, in the models' order; a single one is for all.

    Raises:
        UserError: neither one value nor one a model.
    """
    if len(values) not in (1, len(models)):
        raise UserError(f"{what}: {len(values)} values for {len(models)} models; give one, or one for each")
    return list(values) * (len(models) if len(values) == 1 else 1)


def share(values: Iterable[float], what: str) -> None:
    """Refuse what is no share from 0 to 1."""
    for value in values:
        if not 0 <= value <= 1:
            raise UserError(f"{what} {value:g}: give a share from 0 to 1")


def kept(density: float, count: int) -> int:
    """How many of ``count`` elements a density keeps: rounded down, but one at least if it is above 0."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


def cutoffs(part: Part, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each model the magnitudes of its task vector at the given ranks, 1 for the largest; rank 0 is infinity.

    Exact, in two passes and little memory: a histogram of the upper bits of all magnitudes finds the bin of each rank,
    and only the magnitudes in these bins are sorted. A part of one chunk is sorted at once.
    """
    if part.count == 0:
        return [[np.inf] * len(its) for its in ranks]
    if part.chunks == 1:
        ((vectors),) = part.look(lambda chunk: [_magnitudes(delta) for delta in chunk.deltas])
        return [[_ranked(values, rank) for rank in its] for values, its in zip(vectors, ranks, strict=True)]
    counts = _added(part.look(lambda chunk: [_histogram(_magnitudes(delta)) for delta in chunk.deltas]))
    above = [counted[::-1].cumsum() for counted in counts]  # how many lie in the bins from the top
    bins = [
        {rank: len(its) - 1 - int(np.searchsorted(its, rank)) for rank in wanted if rank}
        for its, wanted in zip(above, ranks, strict=True)
    ]

    def collect(chunk: Chunk) -> list[dict[int, tuple[NDArray, NDArray]]]:
        found = []
        for delta, its in zip(chunk.deltas, bins, strict=True):
            values = _magnitudes(delta)
            upper = values.view(np.uint32) >> SHIFT
            found.append({b: np.unique(values[upper == b], return_counts=True) for b in set(its.values())})
        return found

    held = part.look(collect)
    result = []
    for model, (its, wanted) in enumerate(zip(bins, ranks, strict=True)):
        edges = {b: int(counts[model][b + 1 :].sum()) for b in set(its.values())}  # how many lie above the bin
        values = {b: _merged([piece[model][b] for piece in held]) for b in edges}
        result.append([_counted(*values[its[r]], r - edges[its[r]]) if r else np.inf for r in wanted])
    return result


def _magnitudes(delta: Tensor) -> NDArray[np.float32]:
    return delta.abs().float().numpy()


def _histogram(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.bincount(values.view(np.uint16)[1::2], minlength=1 << 15)  # the upper halves, on a little-endian machine


def _added(histograms: Sequence[Sequence[NDArray]]) -> list[NDArray]:
    return [np.sum(its, axis=0) for its in zip(*histograms, strict=True)]


def _ranked(values: NDArray[np.float32], rank: int) -> float:
    return float(np.partition(values, len(values) - rank)[len(values) - rank]) if rank else np.inf


def _merged(pieces: Sequence[tuple[NDArray, NDArray]]) -> tuple[NDArray, NDArray]:
    """Values in rising order with their counts, from several such lists."""
    values, places = np.unique(np.concatenate([piece[0] for piece in pieces]), return_inverse=True)
    return values, np.bincount(places, np.concatenate([piece[1] for piece in pieces])).astype(np.int64)


def _counted(values: NDArray[np.float32], counts: NDArray[np.int64], rank: int) -> float:
    """The value at a rank from the top."""
    return float(values[::-1][np.searchsorted(counts[::-1].cumsum(), rank)])


def consensus(
    vectors: Iterable[Float[Tensor, " n"]], weights: Sequence[float], elect: bool, mean: bool
) -> Float[Tensor, " n"]:
    """Several sparse task vectors as one: sum_t w_t tau_t, over the models that agree and as a mean if asked for.

    Args:
        vectors: one a model; what a method has cut from it is 0.
        weights: one a model.
        elect: elect a sign for each element, that of the weighted sum (+ for 0), and drop the models that have another.
        mean: divide by the summed weights of the models that are left (not cut, not dropped).

    Each operation rounds to the vectors' type; sums are held in float32 or better.
    """
    weighted = [vector * torch.tensor(w, dtype=vector.dtype) for vector, w in zip(vectors, weights, strict=True)]
    kind = weighted[0].dtype
    # A choice by mask is ten times as slow on a CPU as arithmetic with 0, 1 and the sign.
    total = _sum(weighted)
    if elect:
        sign = torch.ge(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)
        weighted = [F.relu(vector * sign) for vector in weighted]
        total = _sum(weighted) * sign
    if mean:
        shares = [
            vector.sign().abs_() * torch.tensor(w, dtype=kind) for vector, w in zip(weighted, weights, strict=True)
        ]
        divisor = _sum(shares)
        total /= divisor + torch.eq(divisor, 0, out=torch.empty_like(divisor))
    return total


def cut_below(vector: Float[Tensor, " n"], cut: float) -> Float[Tensor, " n"]:
    """The vector with 0 for all that is smaller than ``cut`` in magnitude, taken in float32 as `cutoffs` takes it."""
    if vector.dtype == torch.float64:
        return torch.where(vector.abs().float() >= cut, vector, 0)
    edge = torch.tensor(cut, dtype=vector.dtype)
    below = torch.nextafter(edge, torch.zeros_like(edge))  # what hardshrink keeps is larger, not as large
    return F.hardshrink(vector, float(below)) if cut > 0 else vector


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
