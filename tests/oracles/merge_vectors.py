"""The tensor-wise ways of merging written out: one element, one model and one tensor at a time, in plain float64.

A model is a mapping of names to arrays. Only the differences to the base are taken in the models' own arithmetic, since
which elements are the largest hangs on them. Nothing here calls koinon.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

State = Mapping[str, np.ndarray]


def delta(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """A task vector, in float32 or better as it is computed there, then as float64."""
    kind = np.promote_types(np.promote_types(base.dtype, tuned.dtype), np.float32)
    return (tuned.astype(kind) - base.astype(kind)).astype(np.float64)


def one_each(values: Sequence[float], models: int) -> list[float]:
    return list(values) if len(values) == models else [values[0]] * models


def at_rank(magnitudes: np.ndarray, rank: int) -> float:
    """The magnitude at a rank, 1 for the largest; infinity at rank 0."""
    return float(np.sort(magnitudes.reshape(-1))[::-1][rank - 1]) if rank else math.inf


def agreed(elements: Sequence[float], weights: Sequence[float], elect: bool, mean: bool) -> float:
    """What several models' differences at one element become."""
    parts = [(weight, weight * element) for weight, element in zip(weights, elements, strict=True)]
    if elect:
        sign = 1 if sum(part for _, part in parts) >= 0 else -1
        parts = [(weight, part) for weight, part in parts if part * sign > 0]
    parts = [(weight, part) for weight, part in parts if part != 0]
    total, shares = sum(part for _, part in parts), sum(weight for weight, _ in parts)
    return total / shares if mean and shares != 0 else total


def added(base: np.ndarray, deltas: Sequence[np.ndarray], weights, scale, elect=False, mean=False) -> np.ndarray:
    """Base and scaled consensus, element by element."""
    weights = one_each(weights, len(deltas))
    rows = zip(*(its.reshape(-1) for its in deltas), strict=True)
    merged = [float(b) + scale * agreed(row, weights, elect, mean) for b, row in zip(base.reshape(-1), rows)]
    return np.array(merged, dtype=np.float64).reshape(base.shape)


def average(models: Sequence[State], weights=(1.0,), normalize=True) -> State:
    weights = one_each(weights, len(models))
    total = sum(weights) if normalize else 1.0
    return {
        name: sum(w * model[name].astype(np.float64) for w, model in zip(weights, models)) / total for name in models[0]
    }


def task_arithmetic(base: State, models: Sequence[State], scale=0.3, weights=(1.0,), normalize=False) -> State:
    scale = scale / sum(one_each(weights, len(models))) if normalize else scale
    return {name: added(b, [delta(b, model[name]) for model in models], weights, scale) for name, b in base.items()}


def ties(base, models, density=(0.2,), scale=1.0, weights=(1.0,), elect=True, mean=True, scope="model") -> State:
    """Trim, elect, merge; elements as large as the smallest one kept are kept."""
    densities = one_each(density, len(models))
    trimmed = []
    for share, model in zip(densities, models):
        vectors = {name: delta(b, model[name]) for name, b in base.items()}
        whole = np.concatenate([np.abs(its).reshape(-1) for its in vectors.values()])
        for name, its in vectors.items():
            magnitudes = whole if scope == "model" else np.abs(its)
            many = max(1, int(share * magnitudes.size)) if share > 0 else 0
            edge = at_rank(magnitudes, min(many, magnitudes.size))
            vectors[name] = np.where(np.abs(its) >= edge, its, 0.0)
        trimmed.append(vectors)
    return {
        name: added(b, [vectors[name] for vectors in trimmed], weights, scale, elect, mean) for name, b in base.items()
    }


def breadcrumbs(base, models, density=0.1, outliers=0.01, scale=0.3, weights=(1.0,), elect=False, mean=False) -> State:
    """In each tensor the largest are cut, then a share kept, then the smallest cut."""
    merged = {}
    for name, b in base.items():
        vectors = []
        for model in models:
            its = delta(b, model[name])
            first = int(outliers * its.size)
            high, low = (at_rank(np.abs(its), rank) for rank in (first, min(its.size, first + int(density * its.size))))
            vectors.append(np.where((np.abs(its) >= low) & (np.abs(its) < high), its, 0.0))
        merged[name] = added(b, vectors, weights, scale, elect, mean)
    return merged


def small_fast_chaotic(key: Sequence[int], count: int) -> list[int]:
    """Numbers of 64 bits by Doty-Humphrey's generator from three of them, after its twelve rounds of warming up."""
    top = (1 << 64) - 1
    a, b, c = key
    counter, found = 1, []
    for _ in range(12 + count):
        found.append((a + b + counter) & top)
        counter = (counter + 1) & top
        a, b = b ^ (b >> 11), (c + (c << 3)) & top
        c = (((c << 24) | (c >> 40)) + found[-1]) & top
    return found[12:]


def kept(seed: int, model: str, tensor: str, count: int, chunk: int, density: float) -> np.ndarray:
    """Which elements DARE keeps: a stream of bytes for each chunk, and further on in it a second byte where one is not
    enough to say whether a number of 16 bits is below the density.
    """
    found = []
    steps = round(density * 65536)
    for number, start in enumerate(range(0, count, chunk)):
        words = repr((seed, model, tensor, number)).encode()
        key = np.frombuffer(hashlib.blake2b(words, digest_size=24).digest(), np.uint64)
        size = min(chunk, count - start)
        draws = np.array(small_fast_chaotic([int(its) for its in key], size // 4 + 2), np.uint64).view(np.uint8)
        upper, lower = draws[:size], iter(draws[-(-size // 8) * 8 :])
        for its in upper.tolist():
            undecided = its == steps // 256
            found.append(256 * its + int(next(lower)) < steps if undecided else 256 * its < steps)
    return np.array(found, dtype=bool)


def dare(
    base, models: Mapping[str, State], chunk: int, density=(0.1,), scale=0.3, weights=(1.0,), rescale="density",
    elect=False, mean=False, seed=0,
) -> State:  # fmt: skip
    """Drop at random and rescale by 1 / (1 - p), or by what was lost of the tensor's mass."""
    merged = {}
    for name, b in base.items():
        vectors = []
        for share, (model, state) in zip(one_each(density, len(models)), models.items()):
            its = delta(b, state[name]).reshape(-1)
            left = np.where(kept(seed, model, name, its.size, chunk, share), its, 0.0)
            steps = round(share * 65536)
            mass = np.abs(left).sum()
            factor = {
                "density": 65536 / steps if steps else 0.0,
                "mass": np.abs(its).sum() / mass if mass > 0 else 1.0,
                "none": 1.0,
            }[rescale]
            vectors.append(left * factor)
        merged[name] = added(b, vectors, weights, scale, elect, mean)
    return merged


def slerp(first: State, second: State, t=0.5) -> State:
    """The arc between two tensors laid out flat; the line where they are parallel, opposite or 0."""
    merged = {}
    for name in first:
        a, b = first[name].astype(np.float64), second[name].astype(np.float64)
        lengths = math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())
        cosine = float((a * b).sum()) / lengths if lengths else 1.0
        if abs(cosine) > 0.9995:
            merged[name] = (1 - t) * a + t * b
        else:
            omega = math.acos(cosine)
            merged[name] = (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)
    return merged
