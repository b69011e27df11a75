"""A language model learns facts: ``edit(lm, facts)`` gives a model that knows them, small to save and exact to undo."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from koinon.core import Method
from koinon.data.facts import Fact
from koinon.edit._edited import Edited, Editor, Material
from koinon.edit._patches import Patch, Weights
from koinon.lm.language import LM

Family = Literal["external", "merging", "intrinsic"]
"""Where the knowledge comes to be: beside the model, in parameters added to it, or in its own (Zhang et al., 2024)."""


@dataclass(frozen=True)
class Edit(Method):
    """A way of changing what a language model knows."""

    family: ClassVar[Family]
    """Where it puts knowledge."""
    batch: ClassVar[bool] = False
    """Whether it learns several facts at once; otherwise one after the other."""
    patch: ClassVar[type[Patch]] = Weights
    """What its edits are kept as."""
    needs_subject: ClassVar[bool] = True
    """Whether it writes at the subject; otherwise any prompt will do."""
    needs_cases: ClassVar[bool] = False
    """Whether it must be trained on other facts and their probes first."""
    black_box: ClassVar[bool] = False
    """Whether it only puts words before a prompt, so that nothing inside the model is looked at."""

    def prepare(self, lm: LM, material: Material) -> Any:
        """What it needs to know of a model before the first fact, such as statistics or a trained network."""
        return None

    @abstractmethod
    def learn(self, lm: LM, facts: Sequence[Fact], ready: Any, before: Patch | None) -> Patch:
        """All edits so far with these facts on top, as one step more than ``before`` has.

        Args:
            lm: the model with the earlier edits.
            facts: one, or several for a method that learns in batches.
            ready: what `prepare` gave for the model without edits.
            before: the earlier edits by the same method.

        Raises:
            UserError: facts it cannot learn.
        """

    @final
    def on(self, lm: LM, material: Material | None = None) -> "Editor":
        """An editor of one model, prepared once for all its edits."""
        return Editor(self, lm, self.prepare(lm, material or Material()))

    @final
    def edit(self, lm: LM, facts: Sequence[Fact], material: Material | None = None) -> Edited:
        """The model with the facts in it. ``lm`` itself is as before.

        Raises:
            UserError: facts that contradict each other, or that cannot be learnt.
        """
        return self.on(lm, (material or Material()).tracing(facts)).edit(facts)
