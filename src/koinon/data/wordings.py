"""How a person asks for relations: a JSON object of prompts, and of what else probes need words for."""

from dataclasses import dataclass, fields
from pathlib import Path

from koinon.data.records import Record, kind_of, read_object, shown


@dataclass(frozen=True)
class Wording:
    """The words of one relation; ``{}`` stands for the subject, in ``inverses`` for the object."""

    prompts: tuple[str, ...] = ()
    """Texts that the object goes on from; the first is taught, the others ask the same in other words."""
    phrase: str = ""
    """The object in words, such as ``the country that {} is in``."""
    inverses: tuple[str, ...] = ()
    """Texts that the subject goes on from."""
    symmetric: bool = False
    """Whether it holds in both directions."""
    several: bool | None = None
    """Whether a subject may have several objects; if not said, whether one has."""


NAMES = [field.name for field in fields(Wording)]


def read_wordings(path: Path) -> dict[str, Wording]:
    """A JSON object of relations, each with its prompt, a list of prompts, or an object with `Wording`'s fields.

    Raises:
        UserError: the file is something else, or a text does not hold ``{}`` exactly once.
    """
    record = read_object(path, '{"capital": ["The capital of {} is"]}')
    return {relation: _wording(record, relation) for relation in record.values}


def _wording(record: Record, relation: str) -> Wording:
    value = record.values[relation]
    if not isinstance(value, dict):
        if not (prompts := _texts(record, relation)):
            raise record.wrong(relation, "has no prompt: give one")
        return Wording(prompts)
    its = record.inner(relation, value)
    for name in its.values:
        if name not in NAMES:
            raise its.unknown(name, NAMES)
    phrases = _texts(its, "phrase")
    if len(phrases) > 1:
        raise its.wrong("phrase", f"{len(phrases)} texts: give one")
    return Wording(
        _texts(its, "prompts"), "".join(phrases), _texts(its, "inverses"), bool(_answer(its, "symmetric")),
        _answer(its, "several"),
    )  # fmt: skip


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """One text or a list of them, each with a place to be filled."""
    found = (record.text(name),) if isinstance(record.values.get(name), str) else record.texts(name)
    for its in found:
        if its.count("{}") != 1:
            raise record.wrong(name, f"{shown(its)} holds {{}} {its.count('{}')} times: once is right")
    return found


def _answer(record: Record, name: str) -> bool | None:
    value = record.values.get(name)
    if value is not None and not isinstance(value, bool):
        raise record.wrong(name, f"{shown(value)} is {kind_of(value)}: give true or false")
    return value
