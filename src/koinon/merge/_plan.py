"""What a merge of models on disk will do, known before a number is read: which tensors, from where, of what kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from koinon.core import UserError
from koinon.data.checkpoints import Adapted, matching, open_weights
from koinon.data.tensorfiles import Spec, Weights
from koinon.merge._contract import Blend
from koinon.merge._engine import CHUNK

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

    def reads(self, needs_base: bool) -> int:
        """Bytes to read, once."""
        models = [*self.tuned.values(), *([self.base] if self.base is not None and needs_base else [])]
        merged = sum(its.specs[name].size for its in models for name in self.merged)
        return merged + sum(self.reference.specs[name].size for name in self.copied)

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
) -> Plan:
    """Open all the models and see that they fit each other.

    Args:
        base: folder or file of the base, if the method has one.
        experts: folders or files of the models, or of adapters of the base.
        only: patterns of the tensors to merge; the others are the reference's. All if empty.
        dtype: of the result; each tensor's own if None.
        missing: take a tensor that a model lacks for unchanged.

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
    merged = matching(floating, only) if only else floating
    if not merged:
        raise UserError(f"{base or experts[0]}: holds no floating-point tensors to merge")
    chosen = set(merged)
    for path, weights in ((base or experts[0], reference), *((paths[name], its) for name, its in opened.items())):
        _refuse_scaled(path, weights, chosen)
    looked_at = chosen if only else None
    tuned = {name: _fitted(name, its, reference, looked_at, missing, notes) for name, its in opened.items()}
    copied = tuple(name for name in reference.specs if name not in chosen)
    out = {}
    for name, spec in reference.specs.items():
        kept = spec.dtype if dtype is None or not spec.dtype.is_floating_point else dtype
        out[name] = Spec(spec.shape, kept)
    if dtype is None and isinstance(reference, Adapted):
        out = {name: Spec(spec.shape, reference.base.specs[name].dtype) for name, spec in out.items()}
    return Plan(paths, base, base_weights, tuned, tuple(merged), copied, out, tuple(notes))


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


def _fitted(
    model: str, weights: Weights, reference: Weights, only: set[str] | None, missing: bool, notes: list[str]
) -> Weights:
    """The model under the reference's names, all or only some; raises UserError where it does not fit."""
    if weights is reference:
        return weights
    known, its = reference.specs, weights.specs
    if only is not None:
        known, its = ({name: spec for name, spec in specs.items() if name in only} for specs in (known, its))
    wrong = [name for name in known if name in its and its[name].shape != known[name].shape]
    if wrong:
        shapes = " against ".join(" x ".join(map(str, specs[wrong[0]].shape)) for specs in (its, known))
        raise UserError(f"model {model!r}: {wrong[0]} is {shapes} in the base{_more(wrong)}: another architecture?")
    elsewhere: dict[str, tuple[Weights, str]] = {}
    lacking = [name for name in known if name not in its]
    for name in lacking:
        twin = _twin(reference, name)
        if twin is not None and twin in its:
            elsewhere[name] = (weights, twin)  # tied there, so that one of the two is not kept
        elif missing:
            elsewhere[name] = (reference, name)
    left = [name for name in lacking if name not in elsewhere]
    if left:
        raise UserError(f"model {model!r}: has no tensor {left[0]}{_more(left)}; --missing takes it for unchanged")
    if missing and lacking:
        notes.append(f"model {model!r} lacks {lacking[0]}{_more(lacking)}: taken for unchanged")
    extra = [name for name in its if name not in known]
    unknown = [name for name in extra if _twin(weights, name) is None]
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


def _twin(weights: Weights, name: str) -> str | None:
    """Another tensor of the model with the same content: two names for one, as of tied embeddings."""
    spec = weights.specs[name]
    same = (other for other, its in weights.specs.items() if other != name and its == spec and spec.count > 1)
    return next((other for other in same if _equal(weights, name, weights, other)), None)


def _equal(one: Weights, name: str, other: Weights, there: str) -> bool:
    if one.specs[name] != other.specs[there]:
        return False
    count = one.specs[name].count
    stretches = (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
    return all(
        torch.equal(one.read(name, its.start, its.stop), other.read(there, its.start, its.stop)) for its in stretches
    )
