"""What edits add to a model, apart from it: small, saved as tensors, and taken away again exactly."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import UserError
from koinon.lm.anatomy import Projection, with_values
from koinon.lm.language import LM


class Patch(ABC):
    """All edits of one method on one model."""

    plain: ClassVar[bool] = False
    """Whether the edited model is its base with other values: of the same class, and used without koinon."""
    single: ClassVar[bool] = False
    """Whether any step can be taken away alone; otherwise the last ones, or all."""

    @property
    @abstractmethod
    def length(self) -> int:
        """How many steps it holds."""

    @abstractmethod
    def attach(self, base: LM) -> LM:
        """The edited model; the base is as before, and shares every value that no edit changed."""

    @abstractmethod
    def keeping(self, numbers: Sequence[int]) -> Self:
        """As it would be with these steps only, in order; at least one.

        Raises:
            UserError: steps that cannot be taken away alone.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""

    @property
    def notes(self) -> dict[str, Any]:
        """What else is saved, as JSON."""
        return {}

    def fit(self, base: LM) -> None:  # noqa: B027
        """Nothing, if it can be attached to this model.

        Raises:
            UserError: what does not fit, by its name.
        """

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Self:
        """The patch from what was saved."""


@dataclass(frozen=True)
class LowRank:
    """A change of a matrix as a product."""

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]

    def on(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The changed matrix, rounded once to its type."""
        left, right = (its.to(weight.device).float() for its in (self.left, self.right))
        return (weight.float() + left @ right.T).to(weight.dtype)


Step = Mapping[str, LowRank]
"""Name of a parameter (of a projection) to its change."""


@dataclass(frozen=True)
class Weights(Patch):
    """Changes of a model's own matrices, one low-rank change for each step, applied in order."""

    plain: ClassVar[bool] = True

    steps: tuple[Step, ...]
    """The earliest first."""
    turned: frozenset[str] = frozenset()
    """The parameters that are stored as [in, out]."""

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return len(self.steps)

    def plus(self, step: Step) -> "Weights":
        """With one step more."""
        return Weights((*self.steps, step), self.turned)

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`."""
        values: dict[str, Tensor] = {}
        for step in self.steps:
            for name, change in step.items():
                weight = values.get(name)
                weight = base.model.get_parameter(name).detach() if weight is None else weight
                values[name] = change.on(weight.T).T.contiguous() if name in self.turned else change.on(weight)
        return base.with_model(with_values(base.model, values))

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        for step in self.steps:
            for name, change in step.items():
                shape = (len(change.left), len(change.right))
                _expect(base, name, shape[::-1] if name in self.turned else shape)
                if change.left.shape[1:] != change.right.shape[1:]:
                    raise UserError(f"{name}: its two factors have different ranks")

    def keeping(self, numbers: Sequence[int]) -> "Weights":
        """See `Patch.keeping`: each step stands on those before it."""
        _first_ones(numbers)
        return Weights(self.steps[: len(numbers)], self.turned)

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        return {
            f"{number}|{name}|{side}": getattr(change, side)
            for number, step in enumerate(self.steps)
            for name, change in step.items()
            for side in ("left", "right")
        }

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        return {"steps": len(self.steps), "turned": sorted(self.turned)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Weights":
        """See `Patch.restore`."""
        steps: list[dict[str, LowRank]] = [{} for _ in range(int(notes["steps"]))]
        for key in tensors:
            number, name, side = key.split("|")
            if side == "left":
                steps[int(number)][name] = LowRank(tensors[key], tensors[f"{number}|{name}|right"])
        return cls(tuple(steps), frozenset(notes["turned"]))


@dataclass(frozen=True)
class Values(Patch):
    """New values of some of a model's parameters; only the last state is kept, so that all steps go or none."""

    plain: ClassVar[bool] = True

    values: Mapping[str, Tensor]
    """Name of a parameter to what it is now."""
    count: int
    """How many steps led there."""

    @property
    def length(self) -> int:
        """See `Patch.length`."""
        return self.count

    def attach(self, base: LM) -> LM:
        """See `Patch.attach`."""
        return base.with_model(with_values(base.model, dict(self.values)))

    def fit(self, base: LM) -> None:
        """See `Patch.fit`."""
        for name, value in self.values.items():
            _expect(base, name, tuple(value.shape))

    def keeping(self, numbers: Sequence[int]) -> "Values":
        """See `Patch.keeping`."""
        if len(numbers) != self.count:
            raise UserError(f"of {self.count} steps only the last state is kept: undo all of them or none")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """See `Patch.tensors`."""
        return dict(self.values)

    @property
    def notes(self) -> dict[str, Any]:
        """See `Patch.notes`."""
        return {"steps": self.count}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "Values":
        """See `Patch.restore`."""
        return cls(dict(tensors), int(notes["steps"]))


def expect_matrix(base: LM, name: str, shape: tuple[int, int]) -> None:
    """Raises UserError: the base has no projection of this name, from the second length to the first."""
    try:
        its = Projection(name, base.model.get_submodule(name))
    except AttributeError:
        raise UserError(f"{name}: the base has no such module") from None
    _expect(base, its.parameter, shape[::-1] if its.turned else shape)


def _expect(base: LM, name: str, shape: tuple[int, ...]) -> None:
    try:
        there = tuple(base.model.get_parameter(name).shape)
    except AttributeError:
        raise UserError(f"{name}: the base has no such parameter") from None
    if there != shape:
        raise UserError(
            f"{name}: the edit is for {' x '.join(map(str, shape))}, the base has {' x '.join(map(str, there))}"
        )


def _first_ones(numbers: Sequence[int]) -> None:
    if list(numbers) != list(range(len(numbers))):
        missing = next(place for place, number in enumerate(numbers) if number != place)
        raise UserError(f"step {missing} cannot be undone alone: the steps after it stand on it; undo these as well")


def finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError: a tensor with NaN or infinity in it."""
    for name, its in tensors.items():
        if not bool(torch.isfinite(its).all()):
            raise UserError(f"the edit diverged: {name} holds NaN or infinity; the model is unchanged")
