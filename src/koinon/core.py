"""What a method is, and how methods are found: the file system is the registry."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
PACKAGE = Path(__file__).parent


class UserError(Exception):
    """Something a person can put right. One line: what is wrong, where, and what would be right."""


@dataclass(frozen=True)
class Paper:
    """The publication a method comes from."""

    title: str
    year: int
    url: str


@dataclass(frozen=True)
class Method(ABC):
    """One idea as a frozen dataclass: its fields are the hyper-parameters, one verb applies it.

    A capability's ``_contract.py`` adds the verb; a method file implements it and nothing else.
    """

    paper: ClassVar[Paper]
    """Where the mechanism was published."""
    null: ClassVar[Mapping[str, Any]] = {}
    """The settings at which the method must equal the capability's baseline."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Settings at which the checks try it instead of the defaults, where these take long: fewer steps, no less."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Checks that cannot apply to this method, each with the reason."""


def capabilities() -> list[str]:
    """The names of the folders that hold a contract."""
    return sorted(contract.parent.name for contract in PACKAGE.glob("*/_contract.py"))


def names(capability: str | None = None) -> list[str]:
    """Every method as ``capability.file``; reads the folders, imports nothing."""
    chosen = capabilities() if capability is None else [pick(capability, capabilities(), "capability")]
    return [
        f"{folder}.{file.stem}"
        for folder in chosen
        for file in sorted((PACKAGE / folder).glob("*.py"))
        if not file.stem.startswith("_") and file.stem != "job"
    ]


def summary(name: str) -> str:
    """The sentence on line 1 of a method's file, read without importing it."""
    capability, file = name.split(".")
    text = (PACKAGE / capability / f"{file}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def load(name: str) -> type[Method]:
    """The method class in ``capability.file``, in a module of one's own, or in a file ending in ``.py``.

    Raises:
        UserError: no such method (with the nearest name), or not exactly one in that module.
    """
    if name in names():
        module = importlib.import_module(f"koinon.{name}")
    elif name.endswith(".py"):
        module = _import_file(Path(name))
    else:
        module = _import_module(name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise UserError(f"{name}: a method file defines exactly one method, this one defines {len(found)}")
    return found[0]


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data, ``{"method": "share.home", "settings": {...}}``; `rebuild` is the way back."""
    return {
        "method": type(method).__module__.removeprefix("koinon."),
        "settings": {field.name: getattr(method, field.name) for field in fields(method)},
    }


def rebuild(description: Mapping[str, Any]) -> Method:
    """The method that `describe` described, also after a round trip through JSON."""
    settings = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description["settings"].items()
    }
    return build(load(description["method"]), settings)


def build(kind: type[T], settings: Mapping[str, Any]) -> T:
    """``kind(**settings)`` of a dataclass, with a helpful error for a field that does not exist or a wrong type."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    types = get_type_hints(kind)
    for key, value in settings.items():
        pick(key, known, f"field of {kind.__name__}")
        if not _fits(value, types[key]):
            raise UserError(f"{key} {value!r}: give {_in_words(types[key])}")
    return kind(**settings)


def refuse_below(least: float, /, **settings: float | tuple[float, ...]) -> None:
    """Raise UserError for a setting, or a part of one, that is below, not finite or no number."""
    refuse_outside(least, math.inf, **settings)


def refuse_outside(low: float, high: float, /, **settings: float | tuple[float, ...]) -> None:
    """Raise UserError for a setting, or a part of one, that is not between both, not finite or no number."""
    for name, value in settings.items():
        for its in value if isinstance(value, tuple) else (value,):
            if not (low <= its <= high and math.isfinite(its)):
                right = f"from {low:g}" + (f" to {high:g}" if high < math.inf else "")
                raise UserError(f"{name} {its:g}: give a number {right}")


def pick(word: str, options: Iterable[str], what: str) -> str:
    """``word`` if it is one of ``options``; otherwise an error that names the nearest one."""
    options = list(options)
    if word in options:
        return word
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "there is: " + (", ".join(options) or "none")
    raise UserError(f"unknown {what} {word!r}: {hint}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; of types that are none of a setting's it is not known."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(its) and value == its for its in options)
    if origin in (Union, UnionType):
        return any(_fits(value, its) for its in options)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = options[:1] * len(value) if options[1:] == (...,) else options
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _in_words(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, options))
    if origin is tuple:
        return f"({', '.join(map(_in_words, options))})"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", NoneType: "None"}
    return "..." if hint is ... else words.get(hint, getattr(hint, "__name__", str(hint)))


def _import_module(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the module is there, something it needs is not
        raise UserError(_unknown(name)) from None


def _unknown(name: str) -> str:
    try:
        pick(name, names(), "method")
    except UserError as error:
        return str(error)
    raise AssertionError(name)


def _import_file(path: Path):
    import cloudpickle

    if not path.is_file():
        raise UserError(f"{path}: no such file; give a method's name or the path of its file")
    name = f"koinon_own_{path.stem}"  # so that a file json.py does not take the place of json
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, pickle and inspect look a class up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    cloudpickle.register_pickle_by_value(module)  # other processes cannot import it
    return module
