"""Where results go: what cannot be written, or would be written over what is read, is refused before work begins."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from koinon.core import UserError


def refuse_places(
    folders: Sequence[Path | None], files: Sequence[Path | None], inputs: Sequence[str | Path | None]
) -> None:
    """Check all places of a command.

    Args:
        folders: made new.
        files: replaced if they are there.
        inputs: files and folders that are read; what is none of them, such as a name on a hub, may be among them.

    Raises:
        UserError: one is taken or cannot be written, is read or within a folder that is, or is within another.
    """
    refuse_taken(*folders)
    for file in filter(None, files):
        _refuse_file(file)
    outs = [its for its in (*folders, *files) if its is not None]
    refuse_read(outs, inputs)
    for place, out in enumerate(outs):
        if other := next((its for its in outs[:place] if _within(out, its) or _within(its, out)), None):
            raise UserError(f"{out}: is the same as {other}, or one is within the other; give places apart")


def refuse_taken(*outs: Path | None, empty: bool = False) -> None:
    """Raise UserError for the first that is there already, or that cannot be made; an empty folder may be free."""
    for out in filter(None, outs):
        try:
            if out.exists() and not (empty and out.is_dir() and not any(out.iterdir())):
                raise UserError(f"{out}: exists already; give a new name")
            above = next(its for its in out.absolute().parents if its.exists())
            if not above.is_dir():
                raise UserError(f"{out}: cannot be written ({above} is a file)")
            tempfile.TemporaryDirectory(dir=above).cleanup()
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{str(out)[:200]}: cannot be written ({error.strerror})") from None


def refuse_read(outs: Sequence[Path], inputs: Sequence[str | Path | None]) -> None:
    """Raise UserError for the first that is one of the inputs, or within one."""
    read = [Path(its).expanduser() for its in inputs if its is not None]
    for out in outs:
        if its := next((its for its in read if its.exists() and _within(out, its)), None):
            raise UserError(f"{out}: is {its} or within it, which is read; give another place")


def _refuse_file(file: Path) -> None:
    try:
        if file.is_dir():
            raise UserError(f"{file}: is a folder; give the name of a file")
        if not file.absolute().parent.is_dir():
            raise UserError(f"{file}: cannot be written (there is no folder {file.parent})")
        tempfile.TemporaryFile(dir=file.absolute().parent).close()
    except OSError as error:
        raise UserError(f"{str(file)[:200]}: cannot be written ({error.strerror})") from None


def _within(path: Path, other: Path) -> bool:
    """Whether it is the other, or in it."""
    return path.resolve().is_relative_to(other.resolve())
