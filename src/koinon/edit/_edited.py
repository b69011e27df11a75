"""An edited model: what it was, what was added, and the ways back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from koinon.core import Method, UserError
from koinon.data.facts import Case, Fact
from koinon.edit._patches import Patch
from koinon.edit._requests import teachable
from koinon.lm.language import LM
from koinon.terminal import Told, untold

if TYPE_CHECKING:
    from koinon.edit._contract import Edit


@dataclass(frozen=True)
class Material:
    """What a method may look at beside the facts; all of it optional."""

    corpus: Sequence[str] = ()
    """Texts of the kind the model was trained on, for statistics; what the model says by itself if there are none."""
    cases: Sequence[Case] = ()
    """Facts with probes, none of them taught: to train networks that edit, or to show how edits go."""
    unrelated: Sequence[str] = ()
    """Prompts the model shall go on answering as before; no probe of locality is among them."""
    traced: Sequence[Fact] = ()
    """Whose questions show which layer matters (only what the model says now counts); those of the cases if none."""

    def tracing(self, facts: Sequence[Fact]) -> "Material":
        """The same with these facts to trace, if it has none at all."""
        return self if self.traced or self.cases else replace(self, traced=tuple(facts))


@dataclass(frozen=True, eq=False)
class Edited:
    """A model with edits; the base and its values are shared, not copied, and stay as they are."""

    base: LM
    """Without the edits."""
    method: Method
    """What made them."""
    patch: Patch | None
    """All that was added; none yet if there was no fact."""
    steps: tuple[tuple[Fact, ...], ...]
    """The facts of each step, the earliest first."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All that was taught, in order."""
        return tuple(fact for step in self.steps for fact in step)

    @cached_property
    def lm(self) -> LM:
        """The model that knows the facts."""
        return self.base if self.patch is None else self.patch.attach(self.base)

    def undo(self, last: int | None = None) -> "Edited":
        """Without the last steps, or without any edit: equal to the bit to what was before them.

        Raises:
            UserError: more steps than there are, or a method whose steps cannot be told apart.
        """
        last = len(self.steps) if last is None else last
        if not 0 <= last <= len(self.steps):
            raise UserError(f"undo {last}: there are {len(self.steps)} steps to undo")
        return self.without(range(len(self.steps) - last, len(self.steps)))

    def without(self, numbers: Sequence[int]) -> "Edited":
        """Without these steps, by their numbers from 0.

        Raises:
            UserError: a number that is none, or a method whose later steps stand on these.
        """
        unknown = [number for number in numbers if not 0 <= number < len(self.steps)]
        if unknown:
            raise UserError(f"undo step {unknown[0]}: there are steps 0 to {len(self.steps) - 1}")
        kept = [number for number in range(len(self.steps)) if number not in set(numbers)]
        patch = self.patch.keeping(kept) if kept and self.patch else None
        return replace(self, patch=patch, steps=tuple(self.steps[number] for number in kept))


@dataclass(frozen=True, eq=False)
class Editor:
    """A method on one model."""

    method: "Edit"
    lm: LM
    """Without this editor's edits."""
    ready: Any
    """What the method prepared."""

    def edit(self, facts: Sequence[Fact], after: Edited | None = None, told: Told = untold) -> Edited:
        """The model with these facts, on top of its own earlier edits if these are given.

        Args:
            facts: each is a step; all together are one for a method that learns in batches.
            after: what this method made of this model before.
            told: hears how many of the facts are learnt.
        """
        facts = teachable(self.lm, facts)
        edited = after or Edited(self.lm, self.method, None, ())
        done = 0
        for group in [facts] if self.method.batch and facts else [[fact] for fact in facts]:
            told(done, len(facts))
            patch = self.method.learn(edited.lm, group, self.ready, edited.patch)
            edited = replace(edited, patch=patch, steps=(*edited.steps, tuple(group)))
            done += len(group)
        told(done, len(facts))
        return edited
