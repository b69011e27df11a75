"""Checks that can tell a method from a no-op; every method file is under them by existing.

A capability adds ``_checks.py`` with a `Fixture`: how to apply a method to something tiny, and what else must be true.
"""

import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from koinon.bench.pages import field_docs
from koinon.core import Method, Paper, UserError, build, capabilities, describe, rebuild

Outcome = Mapping[str, Tensor]
"""What applying a method gave, as named tensors."""


@dataclass(frozen=True)
class Fixture:
    """How to try a capability's methods on something tiny."""

    contract: type[Method]
    """The capability's abstract class."""
    baseline: Callable[[], Method]
    """The method that a null setting must equal."""
    arguments: Callable[[], Any]
    """Fresh inputs for ``apply``, equal each time."""
    apply: Callable[[Method, Any], Outcome]
    """Apply a method to the inputs and give everything it brought about; must not depend on anything else."""
    properties: Mapping[str, Callable[[Method], None]]
    """What else holds for every method: name to a function that asserts it."""


@dataclass(frozen=True)
class Check:
    """One thing that must be true of a method."""

    name: str
    run: Callable[[], None]
    """Raises AssertionError if it is not."""
    exempt: str = ""
    """The method's reason why the check cannot apply to it; empty if it does."""


def fixture_of(kind: type[Method]) -> Fixture:
    """The fixture of the capability whose contract the method implements."""
    for capability in capabilities():
        fixture: Fixture = importlib.import_module(f"koinon.{capability}._checks").FIXTURE
        if issubclass(kind, fixture.contract):
            return fixture
    raise UserError(f"{kind.__name__}: implements no capability's contract ({', '.join(capabilities())})")


def checks_of(kind: type[Method]) -> list[Check]:
    """Every check of a method, in the order of a report; nothing runs before `Check.run`."""
    fixture = fixture_of(kind)
    found: dict[str, Callable[[], None]] = {name: _bound(check, kind) for name, check in GENERAL.items()}
    found |= {name: _bound(check, kind, fixture) for name, check in APPLIED.items()}
    for field in fields(kind):
        found[f"{field.name}_is_live"] = _bound(_is_live, kind, fixture, field.name)
    found |= {name: _property(check, kind) for name, check in fixture.properties.items()}
    unknown = set(kind.exempt) - set(found)
    if unknown:
        raise UserError(f"{kind.__name__}: exempt from {sorted(unknown)}, which are no checks of it")
    return [Check(name, run, kind.exempt.get(name, "")) for name, run in found.items()]


def _bound(check: Callable[..., None], *args: Any) -> Callable[[], None]:
    return lambda: check(*args)


def _property(check: Callable[[Method], None], kind: type[Method]) -> Callable[[], None]:
    return lambda: check(tried(kind))


# What every method must be, whatever it does.


def _builds_without_arguments(kind: type[Method]) -> None:
    kind()


def _is_frozen(kind: type[Method]) -> None:
    method = kind()
    try:
        object.__getattribute__(method, "__setattr__")("anything", 1)
    except FrozenInstanceError:
        return
    raise AssertionError("its fields can be changed: write @dataclass(frozen=True)")


def _repr_rebuilds(kind: type[Method]) -> None:
    for method in (kind(), _turned(kind)):
        assert eval(repr(method), {kind.__name__: kind}) == method, f"{method!r} does not rebuild it"
        for field in fields(kind):
            assert f"{field.name}=" in repr(method), f"{field.name} is not in {method!r}"


def _description_rebuilds(kind: type[Method]) -> None:
    method = kind()
    settings = describe(method)["settings"]
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    assert build(kind, {k: tuple(v) if isinstance(v, list) else v for k, v in lists.items()}) == method
    if kind.__module__.startswith("koinon."):
        assert rebuild({"method": describe(method)["method"], "settings": lists}) == method


def _pickles(kind: type[Method]) -> None:
    assert pickle.loads(pickle.dumps(kind())) == kind()


def _names_its_paper(kind: type[Method]) -> None:
    paper = getattr(kind, "paper", None)
    assert isinstance(paper, Paper), "has no `paper: ClassVar = Paper(...)`"
    assert paper.title, "its paper has no title"
    assert paper.url.startswith("https://"), "its paper has no https link"
    assert 1900 < paper.year < 2100, f"its paper is from {paper.year}"


def _opens_with_its_mechanism(kind: type[Method]) -> None:
    first = (inspect.getmodule(kind).__doc__ or "").split("\n")[0]
    assert ": " in first, "line 1 of its file is not a docstring 'Name: the mechanism in one sentence.'"
    assert first.endswith("."), "line 1 of its file does not end its sentence"


def _documents_every_field(kind: type[Method]) -> None:
    documented = field_docs(kind)
    missing = [field.name for field in fields(kind) if field.name not in documented]
    assert not missing, f"no docstring under {', '.join(missing)}"


def _is_final(kind: type[Method]) -> None:
    above = [base for base in kind.__mro__[1:] if issubclass(base, Method) and base is not Method]
    methods = [base.__name__ for base in above if not inspect.isabstract(base)]
    assert not methods, f"inherits from the method {', '.join(methods)}: wrap it or write it out"


# What must be true when it is applied.


def _output_is_finite(kind: type[Method], fixture: Fixture) -> None:
    for name, value in fixture.apply(tried(kind), fixture.arguments()).items():
        assert bool(torch.isfinite(value).all()), f"{name} holds NaN or infinity"


def _repeats_exactly(kind: type[Method], fixture: Fixture) -> None:
    first, second = (fixture.apply(tried(kind), fixture.arguments()) for _ in range(2))
    assert same(first, second), "a second run on equal inputs gives another result"


def _leaves_the_global_rng_alone(kind: type[Method], fixture: Fixture) -> None:
    before = torch.random.get_rng_state()
    try:
        outcomes = []
        for seed in (1, 2):
            torch.random.manual_seed(seed)
            held = torch.random.get_rng_state()
            outcomes.append(fixture.apply(tried(kind), fixture.arguments()))
            assert torch.equal(held, torch.random.get_rng_state()), "draws from the global random numbers"
        assert same(*outcomes), "its result depends on the global random numbers"
    finally:
        torch.random.set_rng_state(before)


def _leaves_its_inputs_alone(kind: type[Method], fixture: Fixture) -> None:
    arguments = fixture.arguments()
    before = pickle.dumps(arguments)
    fixture.apply(tried(kind), arguments)
    assert pickle.dumps(arguments) == before, "changes its inputs: work on a copy"


def _null_equals_baseline(kind: type[Method], fixture: Fixture) -> None:
    method = build(kind, {**kind.quick, **kind.null})
    outcome, baseline = (fixture.apply(m, fixture.arguments()) for m in (method, fixture.baseline()))
    # Equal up to rounding: a product of another width may add in another order.
    equal = outcome.keys() == baseline.keys() and all(
        torch.allclose(outcome[name], baseline[name], rtol=1e-4, atol=1e-5) for name in outcome
    )
    assert equal, f"at its null settings {dict(kind.null)} it differs from {fixture.baseline()!r}"


def _is_alive(kind: type[Method], fixture: Fixture) -> None:
    outcome, baseline = (fixture.apply(m, fixture.arguments()) for m in (tried(kind), fixture.baseline()))
    assert not same(outcome, baseline), f"at its defaults it does the same as {fixture.baseline()!r}"


def _is_live(kind: type[Method], fixture: Fixture, field: str) -> None:
    method = tried(kind)
    turned = replace(method, **{field: _another(kind, field, getattr(method, field))})
    outcomes = [fixture.apply(m, fixture.arguments()) for m in (method, turned)]
    assert not same(*outcomes), f"turning {field} to {getattr(turned, field)!r} changes nothing"


GENERAL: Mapping[str, Callable[[type[Method]], None]] = {
    "builds_without_arguments": _builds_without_arguments,
    "is_frozen": _is_frozen,
    "repr_rebuilds": _repr_rebuilds,
    "description_rebuilds": _description_rebuilds,
    "pickles": _pickles,
    "names_its_paper": _names_its_paper,
    "opens_with_its_mechanism": _opens_with_its_mechanism,
    "documents_every_field": _documents_every_field,
    "is_final": _is_final,
}
APPLIED: Mapping[str, Callable[[type[Method], Fixture], None]] = {
    "output_is_finite": _output_is_finite,
    "repeats_exactly": _repeats_exactly,
    "leaves_the_global_rng_alone": _leaves_the_global_rng_alone,
    "leaves_its_inputs_alone": _leaves_its_inputs_alone,
    "null_equals_baseline": _null_equals_baseline,
    "is_alive": _is_alive,
}


def tried(kind: type[Method]) -> Method:
    """The method as it is tried: at its defaults, but for what would take long."""
    return build(kind, kind.quick)


def same(one: Outcome, other: Outcome) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _turned(kind: type[Method]) -> Method:
    """The method with every field at another value than the default."""
    method = kind()
    return replace(method, **{f.name: _another(kind, f.name, getattr(method, f.name)) for f in fields(kind)})


def _allowed(kind: type[Method], field: str, value: float) -> bool:
    try:
        replace(kind(), **{field: value})
    except UserError:
        return False
    return True


def _another(kind: type[Method], field: str, value: Any) -> Any:
    """A different value of the field's type."""
    options = [option for option in get_args(get_type_hints(kind)[field]) if isinstance(option, str)]
    if options:
        return next(option for option in options if option != value)
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 2 * value + 0.125 if _allowed(kind, field, 2 * value + 0.125) else value / 2  # a share stays one
        case tuple() if value and isinstance(value[0], int):
            return (value[0] + 1, *value[1:])
        case tuple() if value and isinstance(value[0], float):  # one for all becomes one for each of two
            return (value[0] / 2, *value)
        case tuple() if get_type_hints(kind)[field] == tuple[str, ...]:  # patterns
            return ("*",)
        case str():
            return "*"
    raise AssertionError(
        f"no other value is known for {field}={value!r}: give it a number, a bool, a pattern, a tuple or a Literal"
    )
