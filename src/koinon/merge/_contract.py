"""Several models tuned from one become one: ``merge(pool)`` takes live models, ``koinon merge`` files of any size."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Method
from koinon.merge._engine import Chunk, Part


@dataclass(frozen=True)
class Pool:
    """Models of one architecture, tuned from one base, and what else a method may look at."""

    base: nn.Module
    """The model all others were tuned from."""
    tuned: Mapping[str, nn.Module]
    """Task to the model tuned for it."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Task to unlabelled inputs, [rows, ...]: a tensor, or a mapping of tensors that the model takes by keyword."""
    own: tuple[str, ...] = ()
    """Patterns (as of ``fnmatch``) of the tensors that stay each task's own and may differ in shape, such as heads."""


@dataclass(frozen=True)
class Merge(Method):
    """A way of making one model of several."""

    @abstractmethod
    def merge(self, pool: Pool) -> nn.Module:
        """The merged model, of the base's class where the method's result is one model. Nothing given is changed.

        Raises:
            UserError: no model, models that do not fit each other, or data that the method needs and the pool lacks.
        """


@dataclass(frozen=True)
class Blend(Merge):
    """A way of merging that works element by element, so that models larger than memory stream through it."""

    needs_base: ClassVar[bool] = True
    """Whether it works on the differences to the base; otherwise the base's own numbers are not read."""

    def measure(self, part: Part) -> Any:
        """What must be known of a whole tensor (or of all, see `measures_whole`) before its chunks are blended."""
        return None

    @property
    def measures_whole(self) -> bool:
        """Whether `measure` looks at all tensors at once instead of one at a time."""
        return False

    @property
    def passes(self) -> int:
        """How often a tensor of several chunks is read: by `measure`, and at last by `blend`."""
        return 1

    @abstractmethod
    def blend(self, chunk: Chunk, found: Any) -> Float[Tensor, " n"]:
        """The merged numbers of one chunk; ``found`` is what `measure` gave for its tensor."""

    @final
    def merge(self, pool: Pool) -> nn.Module:
        """See `Merge.merge`."""
        from koinon.merge._live import blended

        return blended(self, pool)
