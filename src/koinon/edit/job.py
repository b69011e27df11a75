"""Facts are taught to a model on disk: edits in a small folder, a report of what else changed, and ways back."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from koinon.core import UserError
from koinon.data.outputs import refuse_places
from koinon.edit._advice import Advise
from koinon.edit._compare import Compare
from koinon.edit._contract import Edit
from koinon.edit._edited import Edited, Material
from koinon.edit._folders import Base, Kept, keep, kept, load, save
from koinon.edit._given import Given, Opened, warned
from koinon.edit._locate import Locate
from koinon.edit._measures import means, measure
from koinon.edit._prime import Prime
from koinon.edit._priming import Line, Scores, predict, scores, stepped, template
from koinon.edit._scores import Scored, of_steps, scored, standing
from koinon.lm.folders import write
from koinon.terminal import Told, untold

__all__ = [
    "VERBS", "Job", "Line", "Material", "Scores", "load", "means", "measure", "predict", "save", "scores", "stepped",
    "template",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Teach facts to a model on disk."""

    unit: ClassVar[str] = "facts"
    """What its progress is counted in."""

    opened: Opened
    given: Given
    out: Path
    """Folder for the edits, small and without the model; made new."""
    after: Path | None = None
    """Folder of earlier edits of this model by the same method, which these come on top of."""
    whole: Path | None = None
    """Folder for the edited model itself as Hugging Face saves it, if its edits are of its weights; made new."""
    report: Path | None = None
    """HTML page of what the edits did; replaced if it is there."""

    def run(self, method: Edit, told: Told = untold) -> dict[str, Any]:
        """Teach, measure, keep, and tell what was done.

        Raises:
            UserError: whatever is wrong with model, facts or places; nothing is written then.
        """
        self._refuse(method)
        lm = self.opened.lm()
        cases = self.given.cases(lm)
        earlier = None if self.after is None else self._before(method, self.after)
        before = None if self.after is None or earlier is None else earlier.on(lm, self.after)
        past = earlier.cases if earlier else ()
        with warned() as said:
            start = time.perf_counter()
            editor = method.on(lm, self.given.material(cases, [its for step in past for its in step]))
            prepared = time.perf_counter() - start
            edited = editor.edit([case.fact for case in cases], before, told)
            seconds = time.perf_counter() - start - prepared
        steps = of_steps(edited.steps, past, cases)
        found = scored(lm, edited.lm, measure(lm, edited.lm, standing(steps)))
        cost = {"preparing": round(prepared, 3), "a fact": round(seconds / len(cases), 4)}
        facts = {
            "out": str(self.out),
            "method": repr(method),
            "base": self.opened.model,
            "facts": len(cases),
            "steps": len(edited.steps),
            "seconds": cost,
        }
        page = None if self.report is None else self._page(found, facts, said.lines)
        about = {
            "base": asdict(Base.of(lm, self.opened.model)),
            "seconds": cost,
            "warnings": said.lines,
            "changed": found.changed(),
        }
        with ExitStack() as undone:  # all is written or nothing
            facts["bytes"] = keep(self.out, method, steps, edited.patch, {**about, "scores": found.plain()})
            undone.callback(shutil.rmtree, self.out)
            if self.whole is not None:
                write(edited.lm.model, lm.tokenizer, self.whole)
                undone.callback(shutil.rmtree, self.whole)
                facts["whole"] = str(self.whole)
            if self.report is not None and page is not None:
                _written(self.report, page)
                facts["report"] = str(self.report)
            undone.pop_all()
        changed = {its["prompt"]: f"{its['before']!r} -> {its['now']!r}" for its in found.changed()}
        none = "no answer that was to stay" if found.local else "not known: no probe of what must stay was given"
        return {**facts, **found.plain(), "changed": changed or none}

    def _refuse(self, method: Edit) -> None:
        inputs = [self.opened.model, *self.given.files, self.after]
        refuse_places([self.out, self.whole], [self.report], inputs)
        if self.whole is not None and not method.patch.plain:
            raise UserError(
                f"--whole: {type(method).__name__} keeps its edits beside the model, which no folder of Hugging Face "
                "holds; leave --whole out, and use them with `koinon edit ask` or koinon.edit.job.load"
            )

    def _before(self, method: Edit, folder: Path) -> Kept:
        own = type(method).__module__
        its = kept(folder, None if own.startswith("koinon.") else own)
        if its.method != method:
            raise UserError(f"{folder}: its edits are by {its.method!r}; go on with the same settings, not {method!r}")
        return its

    def _page(self, found: Scored, facts: Mapping[str, Any], said: Sequence[str]) -> str:
        from koinon.edit._report import page

        return page(found, facts, said)


@dataclass(frozen=True)
class Undo:
    """Take edits away again: the folder without them is as it was before them, to the bit."""

    edited: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EDITED")]
    """Folder that `koinon edit` made."""
    out: Path
    """Folder for what is left; made new."""
    last: int | None = None
    """How many steps, from the last; all by default."""
    steps: tuple[int, ...] = ()
    """These steps instead, by their numbers from 0, if the method can take single ones away."""
    own: str | None = None
    """Module path or file of the method, if it is one of your own."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Write the rest, and tell what went."""
        refuse_places([self.out], [], [self.edited])
        if self.steps and self.last is not None:
            raise UserError("--last and --steps: give one of them")
        its = kept(self.edited, self.own)
        lm: Any = None  # taking away needs no model
        whole = Edited(lm, its.method, its.patch, its.steps)
        rest = whole.without(self.steps) if self.steps else whole.undo(self.last)
        gone = set(self.steps or range(len(rest.steps), len(its.cases)))
        cases = [step for number, step in enumerate(its.cases) if number not in gone]
        keep(self.out, its.method, cases, rest.patch, {"base": asdict(its.base), "scores": {}})
        left = f"{len(cases)} steps" if cases else "none: the model is its base again"
        return {"out": str(self.out), "undone": f"{len(gone)} of {len(its.cases)} steps", "left": left}


@dataclass(frozen=True)
class Ask:
    """Ask an edited model, and its base beside it."""

    edited: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EDITED")]
    """Folder that `koinon edit` made."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What the models go on with."""
    opened: Opened
    tokens: int = 20
    """Most tokens of an answer."""
    own: str | None = None
    """Module path or file of the method, if it is one of your own."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Both answers to each prompt."""
        if not self.prompts or self.tokens < 1:
            raise UserError("give one prompt or more, and --tokens from 1")
        lm = self.opened.lm()
        edited = load(self.edited, lm, self.own)
        said = zip(lm.generate(self.prompts, self.tokens), edited.lm.generate(self.prompts, self.tokens))
        return {prompt: {"before": a.strip(), "now": b.strip()} for prompt, (a, b) in zip(self.prompts, said)}


VERBS: Mapping[str, type] = {
    "undo": Undo, "ask": Ask, "locate": Locate, "compare": Compare, "advise": Advise, "prime": Prime
}  # fmt: skip
"""What can be done besides teaching."""


def _written(file: Path, text: str) -> None:
    from koinon.bench.compare import write_whole

    try:
        write_whole(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
