"""An edited model's folder: what was added to its base, and how; written whole, and checked when it is read."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from koinon.core import UserError, build, describe, names, rebuild
from koinon.data.checkpoints import read_json
from koinon.data.facts import Case, Fact, Probe
from koinon.data.outputs import refuse_taken
from koinon.data.tensorfiles import TensorFile
from koinon.edit._contract import Edit
from koinon.edit._edited import Edited
from koinon.edit._packing import packed, unpacked
from koinon.edit._patches import Patch
from koinon.lm.language import LM

FORMAT = 2
"""Version of the layout."""
TENSORS, ABOUT = "edit.safetensors", "koinon.json"


@dataclass(frozen=True)
class Base:
    """The model that edits are for."""

    name: str
    """As the person called it; it is told, and never opened."""
    fingerprint: str
    dtype: str

    @classmethod
    def of(cls, lm: LM, name: str | None = None) -> "Base":
        """Of a model."""
        kind = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
        return cls(name or str(getattr(lm.model, "name_or_path", "")), lm.fingerprint, kind)

    def refuse_other(self, lm: LM, folder: Path) -> None:
        """Check that this is the model.

        Raises:
            UserError: it is another.
        """
        if lm.fingerprint != self.fingerprint:
            kind = Base.of(lm).dtype
            why = f"in {self.dtype}, this is {kind}" if kind != self.dtype else f"fingerprint {self.fingerprint[:12]}"
            raise UserError(
                f"{folder}: made on another base, {self.name!r} ({why}; this one is {lm.fingerprint[:12]}): "
                "give the model it was made on"
            )


@dataclass(frozen=True)
class Kept:
    """What a folder holds, without the base."""

    base: Base
    method: Edit
    cases: tuple[tuple[Case, ...], ...]
    """The facts of each step, and the probes that they are judged by."""
    patch: Patch | None
    about: Mapping[str, Any]
    """The whole of ``koinon.json``."""

    @property
    def steps(self) -> tuple[tuple[Fact, ...], ...]:
        """The facts alone."""
        return tuple(tuple(case.fact for case in step) for step in self.cases)

    def on(self, lm: LM, folder: Path) -> Edited:
        """The edited model.

        Raises:
            UserError: another base, or tensors that do not fit it.
        """
        self.base.refuse_other(lm, folder)
        edited = Edited(lm, self.method, self.patch, self.steps)
        if self.patch is not None:
            first = self.steps[0][0]
            try:
                self.patch.fit(lm)
                edited.lm.score([first.question], [first.object])
            except UserError as error:
                raise UserError(f"{folder / TENSORS}: does not fit its base: {error}") from None
            except Exception as error:  # whatever tensors of a wrong shape make fail, in whichever module
                raise UserError(f"{folder / TENSORS}: does not fit its base ({_line(error)})") from None
        return edited


def load(folder: str | Path, base: "LM | str | Path | None" = None, own: str | None = None) -> Edited:
    """The edited model in a folder that `save` or ``koinon edit`` made.

    Args:
        folder: the folder; nothing in it is run or followed.
        base: the model it was made on, or where that is.
        own: module path or file of the method, if it is none of koinon's.

    Raises:
        UserError: damaged, made on another base, or none is given.
    """
    folder = Path(folder)
    its = kept(folder, own)
    if base is None:
        raise UserError(f"{folder}: give its base as well; it was made on {its.base.name!r}")
    return its.on(base if isinstance(base, LM) else LM.load(base), folder)


def kept(folder: Path, own: str | None = None) -> Kept:
    """What a folder holds, see `load`."""
    if not (folder / ABOUT).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: holds no edits kept by `koinon edit` ({ABOUT} and {TENSORS})")
    about, tensors = read_json(folder / ABOUT), _tensors(folder / TENSORS)
    try:
        if about["format"] != FORMAT:
            raise UserError(f"of format {about['format']!r}; this koinon reads {FORMAT}")
        its = about["method"]
        if own is None and its["method"] not in names("edit"):
            raise UserError(f"its method {its['method']!r} is none of koinon's: give its file with --own")
        method = rebuild(its | {"method": own or its["method"]})
        assert isinstance(method, Edit), "its method is no edit"
        cases = tuple(tuple(_case(values) for values in step) for step in about["steps"])
        assert all(cases), "a step without a fact"
        assert sorted(tensors) == about["tensors"], "other tensors than were written"
        tensors = unpacked(tensors, about["packed"])
        patch = method.patch.restore(tensors, about["patch"]) if cases else None
        if patch is not None:
            assert patch.length == len(cases), f"{len(cases)} steps, and edits of {patch.length}"
            assert patch.tensors().keys() == tensors.keys(), "tensors that belong to no step"
        json.dumps(about, allow_nan=False)
        return Kept(build(Base, about["base"]), method, cases, patch, about)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # whatever a damaged file makes fail
        raise UserError(f"{folder}: damaged, or not made by `koinon edit` ({_line(error)})") from None


def save(edited: Edited, out: str | Path, base: str | None = None, scores: Mapping[str, Any] | None = None) -> int:
    """Write a folder that `load` reads, whole or not at all; gives its tensors' bytes, zeros packed.

    Args:
        edited: the model.
        out: made new.
        base: what its base is called; by default where it was read from.
        scores: what else to keep, as plain data.

    Raises:
        UserError: the folder is taken, or cannot be written.
    """
    about = {"base": asdict(Base.of(edited.base, base))}
    cases = [[Case(fact) for fact in step] for step in edited.steps]
    return keep(Path(out), edited.method, cases, edited.patch, about | {"scores": dict(scores or {})})


def keep(out: Path, method: Any, cases: Sequence[Sequence[Case]], patch: Patch | None, more: Mapping[str, Any]) -> int:
    """Write ``edit.safetensors`` and ``koinon.json``, see `save`."""
    tensors = {
        name: its.detach().cpu().contiguous().clone() for name, its in (patch.tensors() if patch else {}).items()
    }
    tensors, shapes = packed(tensors)
    description = {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("koinon", "torch", "transformers")},
        "method": describe(method),
        "steps": [[_said(case.fact) | _probes(case) for case in step] for step in cases],
        "patch": patch.notes if patch else {},
        "tensors": sorted(tensors),
        "packed": shapes,
        **more,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
    with appearing(out) as beside:
        (beside / ABOUT).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, beside / TENSORS, {"format": "pt"})
    return sum(its.nbytes for its in tensors.values())


@contextmanager
def appearing(out: Path):
    """A folder beside ``out`` to write into; it takes its place when all is written, and goes if that fails."""
    refuse_taken(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield beside
        for file in beside.iterdir():
            file.chmod(0o644)
        beside.chmod(0o755)
        os.rename(beside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _tensors(file: Path) -> dict[str, Tensor]:
    opened = TensorFile(file)
    found = {}
    for name, spec in opened.specs.items():
        found[name] = opened.read(name, 0, spec.count).view(spec.shape)
        if spec.dtype.is_floating_point and not bool(torch.isfinite(found[name].float()).all()):
            raise UserError(f"{file}: {name} holds NaN or infinity: the file is damaged, or the edit diverged")
    return found


def _said(its: Fact | Probe) -> dict[str, Any]:
    """The fields that say something."""
    return {field.name: value for field in fields(its) if (value := getattr(its, field.name))}


def _probes(case: Case) -> dict[str, Any]:
    return {"probes": [_said(probe) for probe in case.probes]} if case.probes else {}


def _case(values: Mapping[str, Any]) -> Case:
    probes = tuple(build(Probe, _tuples(probe)) for probe in values.get("probes", ()))
    return Case(build(Fact, _tuples({name: its for name, its in values.items() if name != "probes"})), probes)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them they are lists."""
    return {name: tuple(its) if isinstance(its, list) else its for name, its in values.items()}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def number(value: float) -> float | None:
    """As JSON has it, which knows no NaN."""
    return round(value, 6) if math.isfinite(value) else None
