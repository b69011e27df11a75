"""What a person hands in: a model, the facts for it, and what a method may look at beside them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from koinon.core import UserError
from koinon.data.factfiles import read_cases, read_templates
from koinon.data.facts import Case
from koinon.data.probes import FactTable, Templates, drop_overlap, refuse_contradictions
from koinon.data.triples import Triples
from koinon.edit._edited import Material
from koinon.edit._probing import known_to, probed, tell
from koinon.lm import shelf
from koinon.lm.language import LM
from koinon.terminal import say


@dataclass(frozen=True)
class Opened:
    """A model on disk, of the hub, or of koinon's own."""

    model: str
    """Folder as Hugging Face saves models, name on its hub, or one of koinon's own: world, world-made, smollm2."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the model's numbers; auto: as they are stored."""
    device: str | None = None
    """Where it runs, such as cuda or auto; the processor by default."""

    def lm(self) -> LM:
        """The model, made first if it is koinon's own and not there yet."""
        here = Path(self.model).expanduser()
        if not here.is_dir() and self.model in shelf.names():
            return LM.load(shelf.path(self.model), self.dtype, self.device)
        if not here.is_dir() and (self.model.startswith((".", "/", "~")) or self.model.count("/") > 1):
            raise UserError(f"{self.model}: no such folder")
        return LM.load(self.model, self.dtype, self.device)


@dataclass(frozen=True)
class Given:
    """Facts, and what may be looked at beside them."""

    facts: Path
    """Facts with or without probes: JSON Lines, CSV of triples, or the data of EasyEdit, KnowEdit or CounterFact."""
    templates: Path | None = None
    """For facts without a prompt: a JSON object of relations with their prompts, {} standing for the subject."""
    table: Path | None = None
    """Triples of what is known, CSV or JSON Lines, that probes of what else changed are drawn from."""
    probes: int = 5
    """Most probes of each kind that are drawn for a fact."""
    draw: int = 0
    """Seed of which are drawn."""
    first: int | None = None
    """Only so many of the facts."""
    corpus: Path | None = None
    """Texts like those the model was trained on, one a line, for statistics; what the model says itself by default."""
    unrelated: Path | None = None
    """Prompts that the model shall go on answering as before, one a line."""
    train: Path | None = None
    """Other facts with probes, to train methods that learn how to edit; none of them is taught."""

    @property
    def files(self) -> list[Path | None]:
        """All that is read."""
        return [self.facts, self.templates, self.table, self.corpus, self.unrelated, self.train]

    def cases(self, lm: LM | None = None) -> list[Case]:
        """The facts, each once, with the probes that are evidence; what is left out is said.

        Args:
            lm: the model to be edited, if probes shall not follow from what it does not know.
        """
        triples = self._triples()
        prompts: Templates = read_templates(self.templates) if self.templates else {}
        if triples is not None:
            prompts = {relation: its[:1] for relation, its in triples.templates.items()}  # the others are drawn
        cases = read_cases(self.facts, templates=prompts, first=self.first, say=say)
        try:
            facts, doubled = refuse_contradictions(case.fact for case in cases)
        except UserError as error:
            raise UserError(f"{self.facts}: {error}") from None
        kept = {id(fact) for fact in facts}
        cases = [case for case in cases if id(case.fact) in kept]
        table = None if triples is None else known_to(lm, triples.table(facts, say), facts)
        cases = cases if table is None else self._probed(cases, table)
        cases, dropped = drop_overlap(cases, table)
        for sentence in doubled:
            say(f"{self.facts}: {sentence}")
        for why, count in dropped.items():
            say(f"{self.facts}: {count} probes are no evidence and left out: {why}")
        if triples is not None and table is not None:
            tell(cases, table, triples.path)
        return cases

    def _triples(self) -> Triples | None:
        if self.probes < 1:
            raise UserError(f"--probes {self.probes}: give a number from 1")
        return None if self.table is None else Triples.read(self.table, self.templates)

    def _probed(self, cases: list[Case], table: FactTable) -> list[Case]:
        try:
            return probed(cases, table, self.probes, self.draw)
        except UserError as error:
            raise UserError(f"{self.facts}: {error}") from None

    def material(self, cases: Sequence[Case], earlier: Sequence[Case] = ()) -> Material:
        """What a method may look at when it learns these cases' facts: nothing that they are judged by.

        Args:
            cases: those of the file of facts.
            earlier: of edits that these come on top of, which are judged again.
        """
        cases = [*earlier, *cases]
        where = f"{self.facts} or of earlier edits" if earlier else self.facts
        asked = {probe.prompt for case in cases for probe in case.probes}
        unrelated = lines(self.unrelated) if self.unrelated else []
        if same := next((its for its in unrelated if its in asked), None):
            raise UserError(f"{self.unrelated}: {same!r} is a probe of {where}: leave it out of one of them")
        others = read_cases(self.train, say=say) if self.train else []
        taught = {case.fact.question for case in cases}
        if both := next((its.fact.question for its in others if its.fact.question in taught), None):
            raise UserError(f"{self.train}: {both!r} is taught as well: train on other facts")
        found = Material(lines(self.corpus) if self.corpus else (), others, unrelated)
        return found.tracing([case.fact for case in cases])


def lines(file: Path) -> list[str]:
    """The texts in a file, one a line; raises UserError if there are none."""
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not found:
        raise UserError(f"{file}: holds no text; give one a line")
    return found


@dataclass
class Warned:
    """What was warned of."""

    lines: list[str] = field(default_factory=list)


@contextmanager
def warned() -> Iterator[Warned]:
    """Within, a warning is a line that a person reads, said once."""
    found = Warned()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        text = " ".join(str(message).split())
        if text not in found.lines and "Triggered internally" not in text:  # of torch, about its own calls
            found.lines.append(text)
            say(f"koinon: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield found
