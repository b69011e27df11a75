"""What a merge of models on disk will do, known before a number is read: which tensors, from where, of what kind."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from koinon.core import UserError
from koinon.data.checkpoints import Adapted, matches, matching, open_weights
from koinon.data.tensorfiles import Spec, Weights
from koinon.merge._contract import Blend
from koinon.merge._engine import CHUNK, as_bytes

SCALES = ("_scale", "_scale_inv", ".scale", ".scale_inv")
"""How the name of a tensor ends that others' numbers are to be multiplied with."""


class Fitted:
    """A model's tensors under the names and shapes of the reference; what it lacks is read elsewhere.

    Args:
        weights: the model.
        elsewhere: name to the source and the name there.
    """

    def __init__(self, weights: Weights, elsewhere: Mapping[str, tuple[Weights, str]]):
        self.weights, self.elsewhere = weights, elsewhere
        self.specs = dict(weights.specs) | {name: its.specs[there] for name, (its, there) in elsewhere.items()}

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """See `Weights.read`."""
        weights, there = self.elsewhere.get(name, (self.weights, name))
        return weights.read(there, start, stop)


@dataclass(frozen=True)
class Plan:
    """All that is known before a number is read."""

    paths: Mapping[str, Path]
    """The experts' folders or files by name."""
    base_path: Path | None
    base: Weights | None
    tuned: Mapping[str, Weights]
    merged: tuple[str, ...]
    """Tensors to merge, in the order of the reference's files."""
    copied: tuple[str, ...]
    """Tensors to take from the reference as they are."""
    out: Mapping[str, Spec]
    """Every tensor of the result."""
    tied: Mapping[str, str]
    """Tensors that some model keeps only under another name, to that name."""
    notes: tuple[str, ...]
    """What a person should know of."""

    @property
    def reference(self) -> Weights:
        """The model whose names, configuration and tokenizer the result has."""
        return self.base if self.base is not None else next(iter(self.tuned.values()))

    @property
    def reference_path(self) -> Path:
        """Where it is."""
        return self.base_path or next(iter(self.paths.values()))

    @property
    def inputs(self) -> list[Path]:
        """Every folder or file that is read: the base's, if there is one, then the experts'."""
        return [*([self.base_path] if self.base_path is not None else []), *self.paths.values()]

    def methods(self, method_for: Callable[[str], Blend]) -> dict[str, Blend]:
        """The different methods of the tensors to merge, by their ``repr``."""
        return {repr(method): method for method in map(method_for, self.merged)}

    def reads(self, method_for: Callable[[str], Blend]) -> int:
        """Bytes to read; a tensor of several chunks is read as often as its method looks at it."""
        total = sum(self.reference.specs[name].size for name in self.copied)
        for name in self.merged:
            method = method_for(name)
            models = [
                *self.tuned.values(),
                *([self.base] if self.base is not None and self.reads_base([method]) else []),
            ]
            several = method.measures_whole or self.out[name].count > CHUNK
            total += sum(its.specs[name].size for its in models) * (method.passes if several else 1)
        return total

    def reads_base(self, methods: Iterable[Blend]) -> bool:
        """Whether the base's numbers are read: by a method, or as what adapters are applied to."""
        return any(its.needs_base for its in methods) or any(isinstance(its, Adapted) for its in self.tuned.values())

    @property
    def numbers(self) -> int:
        """Of all models, the base among them."""
        return sum(spec.count for its in (self.reference, *self.tuned.values()) for spec in its.specs.values())

    @property
    def writes(self) -> int:
        """Bytes to write."""
        return sum(spec.size for spec in self.out.values())


def plan(
    base: Path | None,
    experts: Sequence[Path],
    only: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    missing: bool = False,
    trust_pickle: bool = False,
    own: Sequence[str] = (),
) -> Plan:
    """Open all the models and see that they fit each other.

    Args:
        base: folder or file of the base, if the method has one.
        experts: folders or files of the models, or of adapters of the base.
        only: patterns of the tensors to merge; the others are the reference's. All if empty.
        dtype: of the result; each tensor's own if None.
        missing: take a tensor that a model lacks for unchanged.
        trust_pickle: read pickled weights as well.
        own: patterns of the tensors that stay each model's own: they need not fit.

    Raises:
        UserError: a model that is not there, is damaged, or does not fit; names the tensor.
    """
    if not experts:
        raise UserError("no model to merge: give their folders with --experts")
    base_weights = None if base is None else open_weights(base, trust_pickle=trust_pickle)
    paths = dict(zip(names_of(experts), experts, strict=True))
    opened = {name: open_weights(path, base_weights, trust_pickle) for name, path in paths.items()}
    reference = next(iter(opened.values())) if base_weights is None else base_weights
    notes: list[str] = []
    floating = [name for name, spec in reference.specs.items() if spec.dtype.is_floating_point]
    merged = matching(floating, only) if only else [name for name in floating if not matches(name, own)]
    if not merged:
        raise UserError(f"{base or experts[0]}: holds no floating-point tensors to merge")
    chosen = set(merged)
    for path, weights in ((base or experts[0], reference), *((paths[name], its) for name, its in opened.items())):
        _refuse_scaled(path, weights, chosen)
    twins = _Twins(reference)
    tuned = {}
    for name, its in opened.items():
        seen = {there for there in {*reference.specs, *its.specs} if not matches(there, own)}
        tuned[name] = _fitted(name, its, twins, chosen if only else seen, missing, notes)
    fitted = [its for its in tuned.values() if isinstance(its, Fitted)]
    tied = {name: there for its in fitted for name, (held, there) in its.elsewhere.items() if held is its.weights}
    copied = tuple(name for name in reference.specs if name not in chosen)
    out = {}
    for name, spec in reference.specs.items():
        kept = spec.dtype if dtype is None or not spec.dtype.is_floating_point else dtype
        out[name] = Spec(spec.shape, kept)
    if dtype is None and isinstance(reference, Adapted):
        out = {name: Spec(spec.shape, reference.base.specs[name].dtype) for name, spec in out.items()}
    return Plan(paths, base, base_weights, tuned, tuple(merged), copied, out, tied, tuple(notes))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Each model's name: its folder's, with as much of the way to it as tells it from the others."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path in paths if whole.count(path.resolve()) > 1)
        raise UserError(f"{twice}: given twice among the experts")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]


def _fitted(model: str, weights: Weights, twins: "_Twins", seen: set[str], missing: bool, notes: list[str]) -> Weights:
    """The model under the reference's names, as far as they are looked at; raises UserError where it does not fit."""
    reference = twins.weights
    if weights is reference:
        return weights
    known, its = ({name: spec for name, spec in at.specs.items() if name in seen} for at in (reference, weights))
    wrong = [name for name in known if name in its and its[name].shape != known[name].shape]
    if wrong:
        shapes = " against ".join(" x ".join(map(str, specs[wrong[0]].shape)) for specs in (its, known))
        raise UserError(
            f"model {model!r}: {wrong[0]} is {shapes} in the reference{_more(wrong)}: another architecture, or a head?"
        )
    elsewhere: dict[str, tuple[Weights, str]] = {}
    lacking = [name for name in known if name not in its]
    for name in lacking:
        twin = next((twin for twin in twins.of(name) if twin in its), None)
        if twin is not None:
            elsewhere[name] = (weights, twin)  # tied there, so that one of the two is not kept
        elif missing:
            elsewhere[name] = (reference, name)
    left = [name for name in lacking if name not in elsewhere]
    if left:
        raise UserError(f"model {model!r}: has no tensor {left[0]}{_more(left)}; --missing takes it for unchanged")
    if missing and lacking:
        notes.append(f"model {model!r} lacks {lacking[0]}{_more(lacking)}: taken for unchanged")
    extra = [name for name in its if name not in known]
    own_twins = _Twins(weights)
    unknown = [name for name in extra if not own_twins.of(name)]
    if unknown:
        raise UserError(f"model {model!r}: has a tensor {unknown[0]}{_more(unknown)}, which the reference lacks")
    for name in known:
        if name not in its:
            continue
        if known[name].dtype.is_floating_point != its[name].dtype.is_floating_point:
            raise UserError(f"model {model!r}: {name} holds {its[name].dtype}, in the reference {known[name].dtype}")
        if known[name].dtype.is_floating_point or _equal(weights, name, reference, name):
            continue
        if known[name].count > 1:
            raise UserError(f"model {model!r}: {name} holds {known[name].dtype}, other ones than the base: quantized?")
        notes.append(f"model {model!r} has another {name}: the reference's is kept")  # such as a count of batches
    return Fitted(weights, elsewhere) if elsewhere else weights


def _refuse_scaled(path: Path, weights: Weights, chosen: set[str]) -> None:
    """Raise UserError for numbers of 8 bits or fewer with a scale in another tensor: neither can be merged alone."""
    for name, spec in weights.specs.items():
        ending = next((its for its in SCALES if name.endswith(its)), "")
        if not ending or not spec.dtype.is_floating_point:
            continue
        stem = name.removesuffix(ending)
        for held in (stem, f"{stem}.weight", f"{stem}_packed"):
            its = weights.specs.get(held)
            short = its is not None and (its.dtype.itemsize == 1 or not its.dtype.is_floating_point)
            if short and not chosen.isdisjoint((name, held)):
                raise UserError(
                    f"{path}: {name} is the scale of a quantized {held}; give the model in bfloat16 instead"
                )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class _Twins:
    """Which tensors of a model hold the same numbers under two names, as tied embeddings do.

    Where all numbers of a tensor are equal, as in a bias that was never trained, that says nothing.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self._found: dict[Spec, dict[str, bytes]] = {}
        """Of a kind of tensors, name to digest; kinds are looked at when one is asked for."""

    def of(self, name: str) -> list[str]:
        """The other names of a tensor."""
        spec = self.weights.specs[name]
        if spec not in self._found:
            alike = [other for other, its in self.weights.specs.items() if its == spec]
            digests = {other: self._digest(other) for other in alike} if len(alike) > 1 and spec.count > 1 else {}
            self._found[spec] = {other: digest for other, digest in digests.items() if digest is not None}
        found = self._found[spec]
        return [other for other, digest in found.items() if other != name and digest == found.get(name)]

    def _digest(self, name: str) -> bytes | None:
        found, varied = hashlib.sha256(), False
        first = self.weights.read(name, 0, 1)
        for start, stop in _stretches(self.weights.specs[name]):
            values = self.weights.read(name, start, stop)
            varied = varied or not torch.equal(values, first.expand_as(values))
            found.update(as_bytes(values))
        return found.digest() if varied else None


def _stretches(spec: Spec) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, spec.count)) for start in range(0, spec.count, CHUNK))


def _equal(one: Weights, name: str, other: Weights, there: str) -> bool:
    if one.specs[name] != other.specs[there]:
        return False
    return all(
        torch.equal(one.read(name, start, stop), other.read(there, start, stop))
        for start, stop in _stretches(one.specs[name])
    )
