"""The one way tensors are merged, live or on disk: chunk by chunk, so that no model has to fit into memory.

The grid of chunks is fixed. What a method draws at random hangs on the seed, the model, the tensor and the chunk, and
nothing else, so a result does not depend on the number of workers or on how files are cut.
"""

import contextlib
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from koinon.core import UserError
from koinon.data.tensorfiles import Spec, Weights

if TYPE_CHECKING:
    from koinon.merge._contract import Blend

T = TypeVar("T")
Digests: TypeAlias = dict[str | None, dict[int, bytes]]
"""Model (None for the base) to chunk to digest."""

CHUNK = 1 << 19
"""Elements blended at a time: a few chunks of float32 fit into a cache, and a worker seldom waits for another."""
RUN = 4
"""Chunks a worker takes at once."""
SMALL = 1 << 14
"""Elements of a tensor that is merged sooner than it is handed to a worker."""


@dataclass(frozen=True)
class Chunk:
    """The same stretch of one tensor in every model, laid out flat."""

    name: str
    """The tensor's; of two that are tied, the same for both."""
    number: int
    """Of the chunk in its tensor."""
    base: Tensor | None
    """[n]; None where the method does not look at the base."""
    tuned: Mapping[str, Tensor]
    """Model to its [n]."""

    @property
    def deltas(self) -> Iterator[Tensor]:
        """The task vectors tau_t = theta_t - theta_0, one at a time."""
        assert self.base is not None
        return (tuned - self.base for tuned in self.tuned.values())

    def random(self, seed: int, model: str) -> np.random.Generator:
        """A random stream of this chunk and model."""
        words = repr((seed, model, self.name, self.number)).encode()
        return np.random.Generator(np.random.SFC64(_Digest(words)))  # type: ignore[arg-type]  # numpy documents it


class _Digest(np.random.bit_generator.ISeedSequence):
    """Seeds a stream with the digest of some words as it is: mixing it once more takes longer than drawing a chunk."""

    def __init__(self, words: bytes):
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """So many whole numbers."""
        size = n_words * np.dtype(dtype).itemsize
        return np.frombuffer(hashlib.blake2b(self._words, digest_size=size).digest(), dtype)


@dataclass(frozen=True)
class Sources:
    """What is merged."""

    base: Weights | None
    tuned: Mapping[str, Weights]
    rounding: torch.dtype | None = None
    """None: compute in float32 (float64 for float64) and round once, at the end. Otherwise: round to it every step."""
    allow_nonfinite: bool = False
    """Take NaN and infinity as they are."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Tensor to another one that holds the same, in some model only under that name: what is drawn is the same too."""

    def chunk(self, name: str, number: int, digests: Digests | None = None, known: bool = False) -> Chunk:
        """Read one chunk, as numbers to compute with; ``digests`` gets what was read added.

        ``known``: the chunk has been read before, so that its numbers are known to be allowed.
        """
        spec = next(iter(self.tuned.values())).specs[name]
        start = number * CHUNK
        stop = min(start + CHUNK, spec.count)
        base, tuned = None, {}
        for model, weights in self._all():
            values = weights.read(name, start, stop)
            if digests is not None:
                digests.setdefault(model, {})[number] = hashlib.sha256(as_bytes(values)).digest()
            numbers = values.to(self.rounding or _exact(values)) if values.is_floating_point() else values
            if not self.allow_nonfinite and not known and values.is_floating_point():
                _refuse_nonfinite(numbers, values, model, name)
            if model is None:
                base = numbers
            else:
                tuned[model] = numbers
        return Chunk(self.tied.get(name, name), number, base, tuned)

    def _all(self) -> Iterator[tuple[str | None, Weights]]:
        if self.base is not None:
            yield None, self.base
        yield from self.tuned.items()


def _exact(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _refuse_nonfinite(numbers: Tensor, values: Tensor, model: str | None, name: str) -> None:
    """Refuse NaN and infinity in what was read, or in the numbers made of it."""
    # A sum is finite only if all its terms are: one cheap pass; where it overflows, a second one decides.
    if math.isfinite(numbers.sum(dtype=_exact(values)).item()):
        return
    exact = values.to(_exact(values))
    if not bool(exact.isfinite().all()):
        what = "NaN" if bool(exact.isnan().any()) else "infinity"
        where = "the base" if model is None else f"model {model!r}"
        raise UserError(f"{where}: {what} in {name}; give --allow-nonfinite to merge it as it is")


def _refuse_overflow(merged: Tensor, name: str) -> None:
    """Refuse a result that its type cannot hold, as what it was made of is finite."""
    if math.isfinite(merged.sum(dtype=_exact(merged)).item()) or bool(merged.to(_exact(merged)).isfinite().all()):
        return
    kind = str(merged.dtype).removeprefix("torch.")
    raise UserError(f"{name}: what is merged is more than {kind} holds; give another --dtype, or smaller settings")


class Part:
    """The chunks of one tensor, or of all, to be looked at before they are blended.

    Args:
        sources: what is merged.
        names: of the tensors.
        each: how to run a function on many things, in order: ``map``, or on several workers.
        held: the only chunk, if it has been read already.
    """

    def __init__(
        self, sources: Sources, names: Sequence[str], each: Callable[..., Any] = map, held: Chunk | None = None
    ):
        self._sources, self._each, self._held = sources, each, held
        specs = next(iter(sources.tuned.values())).specs
        self._grid = [(name, number) for name in names for number in range(chunks(specs[name]))]
        self.models = tuple(sources.tuned)
        """Their names."""
        self.count = sum(specs[name].count for name in names)
        """Elements of each model."""
        self.seen = False
        """Whether all chunks have been read."""

    def look(self, function: Callable[[Chunk], T]) -> list[T]:
        """What the function gives for every chunk, in order; read anew each time."""
        known = self.seen

        def chunk(place: tuple[str, int]) -> Chunk:
            return self._held or self._sources.chunk(*place, known=known)

        found = list(self._each(lambda place: function(chunk(place)), self._grid))
        self.seen = True
        return found

    @property
    def chunks(self) -> int:
        """How many."""
        return len(self._grid)


def blend_all(
    method_for: Callable[[str], "Blend"],
    sources: Sources,
    names: Sequence[str],
    out: Mapping[str, Spec],
    write: Callable[[str, int, Shaped[Tensor, " n"]], None],
    done: Callable[[str, Mapping[str | None, str]], None] = lambda name, digests: None,
    workers: int = 1,
    digest: bool = False,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Merge the tensors one after the other.

    Args:
        method_for: the method for a tensor of that name; the same for all unless a recipe varies it.
        sources: where to read.
        names: of the tensors, in the order in which they are merged.
        out: kind of each result.
        write: takes a stretch of a tensor, from any worker.
        done: told when a tensor is whole, with each model's digest of it.
        workers: threads.
        digest: compute SHA-256 of what is read.
        measured: what `measure_all` found, for a method that measures the whole model.
    """
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        jobs = _Jobs(pool, limit=4 * workers)
        try:
            for name in names:
                method, spec = method_for(name), out[name]
                task = _Tensor(method, sources, name, spec, write, done, digest)
                if task.chunks <= 1:
                    if spec.count <= SMALL:
                        task.small(measured)
                    else:
                        jobs.add(task.small, measured)
                    continue
                if measured is not None and method.measures_whole:
                    found = measured[repr(method)]
                else:
                    part = Part(sources, [name], jobs.map)
                    found = method.measure(part)
                    task.seen = part.seen
                for first in range(0, task.chunks, RUN):
                    jobs.add(task.stretch, found, first)
            jobs.finish()
        except BaseException:
            jobs.cancel()
            raise


def measure_all(method: "Blend", sources: Sources, names: Sequence[str], workers: int = 1) -> Any:
    """What the method measures on the whole model."""
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        jobs = _Jobs(pool, 4 * workers)
        try:
            return method.measure(Part(sources, names, jobs.map))
        except BaseException:
            jobs.cancel()
            raise


class _Tensor:
    """The blending of one tensor, cut into stretches of chunks."""

    def __init__(self, method, sources, name, spec, write, done, digest):
        self.method, self.sources, self.name, self.spec = method, sources, name, spec
        self.write, self.done = write, done
        self.chunks = chunks(spec)
        self.digests: Digests | None = {} if digest else None
        self.left = self.chunks
        self.seen = False
        self.lock = threading.Lock()

    def small(self, measured: Mapping[str, Any] | None) -> None:
        """A tensor of at most one chunk, which is read once."""
        digests: Digests | None = None if self.digests is None else {}
        chunk = self.sources.chunk(self.name, 0, digests) if self.chunks else None
        if measured is not None and self.method.measures_whole:
            found = measured[repr(self.method)]
        else:
            found = self.method.measure(Part(self.sources, [self.name], held=chunk))
        if chunk is not None:
            self.blend(chunk, found)
        self.count(self.chunks, digests)

    def stretch(self, found: Any, first: int) -> None:
        """A run of chunks, of a tensor of several."""
        digests: Digests | None = None if self.digests is None else {}
        last = min(first + RUN, self.chunks)
        for number in range(first, last):
            self.blend(self.sources.chunk(self.name, number, digests, self.seen), found)
        self.count(last - first, digests)

    def blend(self, chunk: Chunk, found: Any) -> None:
        merged = self.method.blend(chunk, found).to(self.spec.dtype)
        if not self.sources.allow_nonfinite and merged.is_floating_point():
            _refuse_overflow(merged, self.name)
        self.write(self.name, chunk.number * CHUNK, merged)

    def count(self, blended: int, digests: Digests | None) -> None:
        with self.lock:
            for model, held in (digests or {}).items():
                assert self.digests is not None
                self.digests.setdefault(model, {}).update(held)
            self.left -= blended
            whole = self.left == 0
        if whole:
            self.done(self.name, {model: tree(held) for model, held in (self.digests or {}).items()})


class _Jobs:
    """Work handed to a pool, never more than ``limit`` pieces ahead; the first failure is raised to whoever waits."""

    def __init__(self, pool: ThreadPoolExecutor, limit: int):
        self.pool, self.limit = pool, limit
        self.running: set[Future[Any]] = set()

    def add(self, function: Callable[..., Any], *args: Any) -> None:
        while len(self.running) >= self.limit:
            self._collect(FIRST_COMPLETED)
        self.running.add(self.pool.submit(function, *args))

    def map(self, function: Callable[[Any], T], places: Sequence[Any]) -> list[T]:
        """In order, a run of places a piece."""

        def run(some: Sequence[Any]) -> list[T]:
            return [function(place) for place in some]

        pieces = [self.pool.submit(run, places[i : i + RUN]) for i in range(0, len(places), RUN)]
        return [result for piece in pieces for result in piece.result()]

    def finish(self) -> None:
        while self.running:
            self._collect(FIRST_COMPLETED)

    def cancel(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self, when: str) -> None:
        finished, self.running = wait(self.running, return_when=when)
        for future in finished:
            future.result()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Workers are the parallelism: an operation inside one is not cut once more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def chunks(spec: Spec) -> int:
    """How many chunks a tensor has; an empty one has none."""
    return -(-spec.count // CHUNK)


def tree(digests: Mapping[int, bytes]) -> str:
    """One digest of the chunks' digests."""
    return hashlib.sha256(b"".join(digests[number] for number in sorted(digests))).hexdigest()


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a flat tensor."""
    return values.contiguous().view(torch.uint8).numpy().data


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
