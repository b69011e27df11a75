"""Which methods fit: the families of Zhang et al. (2024) as conditions on what a person has and needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koinon.core import UserError, load, names
from koinon.edit._compare import measured
from koinon.edit._contract import Edit
from koinon.terminal import Told, say, untold

PLACES = {
    "external": "knowledge stays beside the model",
    "merging": "parameters are added to the model",
    "intrinsic": "the model's own parameters change",
}
"""What the families do."""


@dataclass(frozen=True)
class Wishes:
    """What a method has to do, or to do without."""

    black_box: bool = False
    """The model can only be asked: its inside is out of reach."""
    batch: int = 1
    """So many facts come at once, and are to be learnt together."""
    keep_locality: float = 0.0
    """The least share of other answers that stay as they are, from 0 to 1; judged by --measured."""
    measured: Path | None = None
    """Folder of a `koinon edit compare` on your model."""
    no_training_data: bool = False
    """There are no other facts with probes to train an editor on."""
    no_subject: bool = False
    """The prompts are about no subject, or it is not known where it stands."""
    exact_undo: bool = False
    """Any single edit can be taken back alone, whatever came after it."""
    plain_model: bool = False
    """The result is a model like the one before, used without koinon."""


@dataclass(frozen=True)
class Advise:
    """Find the methods that fit what you have and what you need."""

    wishes: Wishes

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Every method, whether it fits, and why; a line says so if none does."""
        found = advise(self.wishes)
        if not any(its["fits"] for its in found.values()):
            say("koinon: no method does all of that; beside each stands what it cannot")
        return found


def advise(wishes: Wishes) -> dict[str, Any]:
    """Every method by its name: whether it fits, its family, and why.

    Raises:
        UserError: a number out of its range, or locality to be kept and nothing measured.
    """
    if wishes.batch < 1 or not 0 <= wishes.keep_locality <= 1:
        raise UserError("--batch takes a number from 1, --keep-locality one from 0 to 1")
    if wishes.keep_locality and wishes.measured is None:
        raise UserError(
            "--keep-locality: no family keeps it by itself; give --measured, a folder of koinon edit compare"
        )
    kept = {} if wishes.measured is None else measured(wishes.measured, "locality")
    found = {name.split(".")[1]: _judged(name, wishes, kept) for name in names("edit")}
    return dict(sorted(found.items(), key=lambda item: not item[1]["fits"]))


def _judged(name: str, wishes: Wishes, kept: dict[str, tuple[float, float]]) -> dict[str, Any]:
    kind = load(name)
    assert issubclass(kind, Edit)
    low, high = kept.get(name.split(".")[1], (-1.0, -1.0))
    asked = [
        (wishes.black_box, kind.black_box, "only puts words before a prompt", "reads or changes the model's inside"),
        (wishes.batch > 1, kind.batch, "learns many facts at once", "learns one fact after the other"),
        (wishes.no_training_data, not kind.needs_cases, "needs no training", "is trained on other facts first"),
        (wishes.no_subject, not kind.needs_subject, "takes any prompt", "writes at the subject of a prompt"),
        (wishes.exact_undo, kind.patch.single, "takes any edit back alone", "takes back the last edits, or all"),
        (wishes.plain_model, kind.patch.plain, "gives a plain model", "gives a model that needs koinon"),
        (
            wishes.keep_locality > 0,
            low >= wishes.keep_locality,
            f"keeps {low:.3f} of other answers or more",
            f"may keep as little as {low:.3f} of other answers (at most {high:.3f})"
            if low >= 0
            else "was not measured",
        ),
    ]
    against = [no for wished, has, _, no in asked if wished and not has]
    reasons = against or [yes for wished, has, yes, _ in asked if has and (wished or yes != asked[-1][2])]
    return {"fits": not against, "family": kind.family, "why": "; ".join([PLACES[kind.family], *reasons])}
