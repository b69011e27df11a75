"""Recipes of mergekit, read from their YAML as koinon's methods, one for each tensor, so that they mean the same.

A recipe that asks for something else than blending whole models element by element is refused, never half followed.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from koinon.core import UserError
from koinon.merge._contract import Blend
from koinon.merge.average import Average
from koinon.merge.breadcrumbs import Breadcrumbs
from koinon.merge.dare import Dare
from koinon.merge.slerp import Slerp
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.ties import Ties

try:
    import yaml
except ImportError:
    raise UserError("recipes of mergekit need pyyaml: pip install 'koinon[merge]'") from None

DTYPES = ("bfloat16", "float16", "float32", "float64")
REFUSED = {
    "modules": "models made of several parts are merged here as one, by the names of their tensors",
    "tokenizer_source": "vocabularies are not merged here; leave it out if all models share one",
    "tokenizer": "vocabularies are not merged here; leave it out if all models share one",
    "chat_template": "it is not written here; put it into the result's tokenizer afterwards",
    "residual_weight": "it has no effect in mergekit; leave it out",
}
"""Keys of mergekit that are not followed, and why."""

Setting = tuple[tuple[str, tuple[Any, ...]], ...]
"""What the name must contain, and the value: one, or several spread over the layers. The first that fits counts."""
Settings = Mapping[str, Setting]
Shared = Mapping[str, Any]
"""Values of the parameters that all models share, at one tensor."""
Own = Mapping[str, tuple[float, ...]]
"""Values of those that each model has its own of."""


@dataclass(frozen=True)
class _Kind:
    """A method of mergekit: its parameters with their defaults (None: must be given), and what it is here."""

    build: Callable[[Shared, Own], Blend]
    shared: Shared = field(default_factory=dict)
    own: Mapping[str, float | None] = field(default_factory=dict)
    """Parameters that each model has its own value of."""
    on_base: bool = True
    """Whether it works on the differences to the base, which then is none of the models merged."""
    pair: bool = False
    """Whether it walks from the base to the one other model."""


@dataclass(frozen=True)
class Translated:
    """A recipe: which models, and how each of their tensors is merged."""

    base: str | None
    """Path of the base; of the model whose configuration is kept, where the method uses no base."""
    experts: tuple[str, ...]
    """Paths of the models that are merged."""
    dtype: str | None
    """Type in which mergekit computes; None: that of the models."""
    out_dtype: str | None
    """Type of what is written; None: that of the models."""
    where: str
    """The recipe's path."""
    word: str
    """mergekit's name of the method."""
    layers: int | None
    """Layers that the models must have for the recipe to use them whole; None: any number."""
    shared: tuple[Settings, ...]
    """Parameters of the recipe, the strongest first."""
    own: tuple[tuple[Settings, ...], ...]
    """Parameters of each model, the strongest first."""

    def methods(self, names: Iterable[str]) -> dict[str, Blend]:
        """The method for each of a model's tensors.

        Raises:
            UserError: a parameter that some tensor lacks, or a recipe for another number of layers.
        """
        places = layers_of(names)
        most = max((count for _, count in places.values()), default=0)
        if self.layers is not None and self.layers != most:
            raise UserError(f"{self.where}: takes {self.layers} layers of models that have {most}; {_WHOLE}")
        return {name: self.method_for(name, *place) for name, place in places.items()}

    def method_for(self, tensor_name: str, layer: int | None, count: int) -> Blend:
        """The method for one tensor.

        Args:
            tensor_name: what filters look at.
            layer: the tensor's, from 0; None outside the layers, where a gradient has its first value.
            count: of layers; in the only one of a model a gradient has its last value.
        """
        t = 0.0 if layer is None else layer / (count - 1) if count > 1 else 1.0
        kind = KINDS[self.word]
        shared = {
            name: self._value(name, default, self.shared, tensor_name, t) for name, default in kind.shared.items()
        }
        own = {
            name: tuple(
                self._value(name, default, its, tensor_name, t, f" of {expert}")
                for expert, its in zip(self.experts, self.own, strict=True)
            )
            for name, default in kind.own.items()
        }
        try:
            return kind.build(shared, own)
        except UserError as error:
            raise UserError(f"{self.where}: {error} (at {tensor_name})") from None

    def _value(self, name: str, default: Any, scopes: Sequence[Settings], tensor: str, t: float, of: str = "") -> Any:
        for settings in scopes:
            value = _evaluated(settings.get(name, ()), tensor, t)
            if value is not None:
                return value
        if default is None:
            raise UserError(f"{self.where}: no {name}{of} for {tensor}; end with one that has no filter")
        return default


def read_recipe(path: Path) -> Translated:
    """A mergekit recipe.

    Args:
        path: the YAML; models are looked for beside it, then in the working directory.

    Raises:
        UserError: cannot be read, or asks for something that would not mean the same here.
    """
    return _Reader(path).recipe()


def layers_of(names: Iterable[str]) -> dict[str, tuple[int | None, int]]:
    """Each tensor's layer and how many layers there are beside it.

    The first whole number in a dotted name is the layer: ``model.layers.3.mlp.experts.5.weight`` is of layer 3. Layers
    are counted for each beginning, so that an encoder's and a decoder's are their own.
    """
    found: dict[str, tuple[str, int | None]] = {}
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
        beginning = ".".join(parts[:at]) if at is not None else ""
        found[name] = (beginning, None if at is None else int(parts[at]))
        if at is not None:
            counts[beginning] = max(counts.get(beginning, 0), int(parts[at]) + 1)
    return {name: (layer, 0 if layer is None else counts[beginning]) for name, (beginning, layer) in found.items()}


def _evaluated(setting: Setting, tensor: str, t: float) -> Any:
    """The value at a tensor; None if none of the conditions fits, or the one that does has no values."""
    for part, values in setting:
        if part in tensor:
            if not values:
                return None
            place = t * (len(values) - 1)
            low = int(place)
            high, share = min(low + 1, len(values) - 1), place - low
            whole = isinstance(values[low], bool)
            return values[low] if whole else (1 - share) * values[low] + share * values[high]
    return None


# What each method of mergekit is here.

_WHOLE = "only whole models are merged, layers are neither cut nor stacked"


def _scale(shared: Shared, own: Own) -> float:
    return shared["lambda"] / (sum(own["weight"]) if _divided(shared, own) else 1.0)


def _divided(shared: Shared, own: Own) -> bool:
    return shared["normalize"] and abs(sum(own["weight"])) >= 1e-8  # otherwise mergekit does not either


def _task_arithmetic(shared: Shared, own: Own) -> Blend:
    return TaskArithmetic(shared["lambda"], own["weight"], _divided(shared, own))


def _clamped(density: Iterable[float]) -> tuple[float, ...]:
    return tuple(min(max(its, 0.0), 1.0) for its in density)


def _unscaled(shared: Shared) -> None:
    if shared["rescale"]:
        raise UserError("rescale: only what is dropped at random (dare) is rescaled here; leave it out")


def _ties(shared: Shared, own: Own) -> Blend:
    _unscaled(shared)
    density = _clamped(own["density"])
    return Ties(density, shared["lambda"], own["weight"], elect=True, mean=shared["normalize"], scope="tensor")


def _dare(elect: bool, shared: Shared, own: Own) -> Blend:
    scale = shared["lambda"] if elect else _scale(shared, own)
    rescale: Literal["mass", "none"] = "mass" if shared["rescale"] else "none"
    return Dare(_clamped(own["density"]), scale, own["weight"], rescale, elect, mean=elect and shared["normalize"])


def _breadcrumbs(elect: bool, shared: Shared, own: Own) -> Blend:
    _unscaled(shared)
    bands = set(zip(_clamped(own["density"]), own["gamma"], strict=True))
    if len(bands) > 1:
        raise UserError("breadcrumbs has one density and one gamma for all models here")
    ((density, gamma),) = bands
    outliers = min(max(gamma, 0.0), 1 - density)  # where both do not fit, the density stands; 1 cuts nothing at all
    scale = shared["lambda"] if elect else _scale(shared, own)
    return Breadcrumbs(density, outliers, scale, own["weight"], elect, mean=elect and shared["normalize"])


_ADDED = {"normalize": False, "lambda": 1.0, "rescale": False, "int8_mask": False}
_OWN = {"weight": None, "density": 1.0}
KINDS: Mapping[str, _Kind] = {
    "linear": _Kind(
        lambda shared, own: Average(own["weight"], shared["normalize"]),
        {"normalize": True},
        {"weight": None},
        on_base=False,
    ),
    "slerp": _Kind(lambda shared, own: Slerp(shared["t"]), {"t": None}, on_base=False, pair=True),
    "task_arithmetic": _Kind(_task_arithmetic, _ADDED, _OWN),
    "ties": _Kind(_ties, {**_ADDED, "normalize": True}, _OWN),
    "dare_linear": _Kind(partial(_dare, False), {**_ADDED, "rescale": True}, _OWN),
    "dare_ties": _Kind(partial(_dare, True), {**_ADDED, "rescale": True}, _OWN),
    "breadcrumbs": _Kind(partial(_breadcrumbs, False), _ADDED, {**_OWN, "gamma": 0.01}),
    "breadcrumbs_ties": _Kind(partial(_breadcrumbs, True), _ADDED, {**_OWN, "gamma": 0.01}),
}
"""mergekit's name to what it is here, with mergekit's defaults."""


class _Reader:
    """Takes a recipe apart; whatever is wrong is said with its place in the file."""

    def __init__(self, path: Path):
        self.path = path

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def recipe(self) -> Translated:
        found = self.mapping(self.loaded(), "the recipe")
        top = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
        self.keys(found, top, "the recipe")
        word = found.get("merge_method")
        if not isinstance(word, str) or word not in KINDS:
            raise self.wrong(f"merge_method {reprlib.repr(word)} is not known here; there is {', '.join(KINDS)}")
        kind = KINDS[word]
        known = {**kind.shared, **kind.own}
        dtype, out_dtype = (self.dtype(found, key) for key in ("dtype", "out_dtype"))
        shared = [self.settings(found, "the recipe", known)]
        if (found.get("models") is None) == (found.get("slices") is None):
            raise self.wrong("give either models or slices")
        layers, base_word = None, found.get("base_model")
        if found.get("slices") is not None:
            (piece,) = self.entries(found, "slices", most=1)
            self.keys(piece, ("sources", "base_model", "parameters"), "slices[0]")
            base_word = base_word if piece.get("base_model") is None else piece["base_model"]
            shared.insert(0, self.settings(piece, "slices[0]", known))
            entries = self.entries(piece, "sources")
            layers, place = self.whole(entries), "slices[0].sources"
        else:
            entries, place = self.entries(found, "models"), "models"
        base = None if base_word is None else self.model(base_word, "base_model", None)
        listed: dict[str, Settings] = {}
        for number, entry in enumerate(entries):
            where = f"{place}[{number}]"
            self.keys(entry, ("model", "parameters", *(() if layers is None else ("layer_range",))), where)
            model = self.model(entry.get("model"), where, base)
            if model in listed:
                raise self.wrong(f"{where}: {model} is there twice")
            listed[model] = self.settings(entry, where, kind.own, kind.shared)
        experts = self.experts(word, base, listed, layers is not None)
        own = tuple((listed.get(model, {}), *shared) for model in experts)
        return Translated(base, experts, dtype, out_dtype or dtype, str(self.path), word, layers, tuple(shared), own)

    def experts(self, word: str, base: str | None, listed: Mapping[str, Settings], sliced: bool) -> tuple[str, ...]:
        """The models that are merged, in the order in which mergekit merges them."""
        kind = KINDS[word]
        others = tuple(model for model in listed if model != base)
        if not (kind.on_base or kind.pair):
            # A base that is not listed is merged too, as the last; but not with slices.
            return tuple(listed) if base is None or base in listed or sliced else (*listed, base)
        if base is None:
            raise self.wrong(f"{word} needs a base_model")
        if sliced and base not in listed:
            raise self.wrong(f"the base_model {base} is none of the slice's sources")
        if not others or (kind.pair and len(others) > 1):
            many = "one other model" if kind.pair else "other models"
            raise self.wrong(f"{word} is for the base_model and {many}, here are {len(others)}")
        return (base, *others) if kind.pair else others

    def loaded(self) -> Any:
        try:
            return yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise self.wrong(f"cannot be read ({error.strerror})") from None
        except RecursionError:
            raise self.wrong("is nested too deeply") from None
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"line {mark.line + 1}: " if mark else ""
            raise self.wrong(f"{place}is no YAML of one document ({getattr(error, 'problem', error)})") from None

    def mapping(self, found: Any, what: str) -> dict[str, Any]:
        if not (isinstance(found, dict) and all(isinstance(key, str) for key in found)):
            raise self.wrong(f"{what} is no mapping of names to values")
        return found

    def keys(self, found: Mapping[str, Any], known: Sequence[str], what: str) -> None:
        """Refuse what mergekit would do and koinon not, and what mergekit would not read."""
        for key, value in found.items():
            if key in REFUSED and value is not None:
                raise self.wrong(f"{key}: {REFUSED[key]}")
            if key not in known and key not in REFUSED:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
                raise self.wrong(f"{what} has an unknown key {key!r}: {hint}")

    def entries(self, found: Mapping[str, Any], key: str, most: int | None = None) -> list[dict[str, Any]]:
        given = found.get(key)
        if not (isinstance(given, list) and given):
            raise self.wrong(f"{key} is no list of entries")
        if most is not None and len(given) > most:
            raise self.wrong(f"{key} has {len(given)} entries: {_WHOLE}")
        return [self.mapping(entry, f"{key}[{number}]") for number, entry in enumerate(given)]

    def whole(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """The number of layers that all sources are taken with."""
        ranges = [entry.get("layer_range") for entry in entries]
        for number, its in enumerate(ranges):
            if not (isinstance(its, list) and len(its) == 2 and all(type(n) is int for n in its)):
                raise self.wrong(f"slices[0].sources[{number}]: layer_range is not [0, number of layers]")
        first = ranges[0]
        if first is None or first[0] != 0 or any(its != first for its in ranges):
            raise self.wrong(f"the layer_range of the sources is not the same [0, number of layers]: {_WHOLE}")
        return first[1]

    def dtype(self, found: Mapping[str, Any], key: str) -> str | None:
        word = found.get(key)
        plain = word.removeprefix("torch.") if isinstance(word, str) else word
        if plain is not None and plain not in DTYPES:
            raise self.wrong(f"{key} {reprlib.repr(word)}: give one of {', '.join(DTYPES)}")
        return plain

    def model(self, word: Any, where: str, base: str | None) -> str:
        """The path of a model that is here; of the adapter, where one on the base is meant."""
        if not (isinstance(word, str) and word):
            raise self.wrong(f"{where}: no path of a model, but {reprlib.repr(word)}")
        for path in (self.path.parent / word, Path(word)):
            if path.exists():
                return str(path)
        model, plus, adapter = word.rpartition("+")
        if plus:
            if base is not None and self.model(model, where, None) == base:
                return self.model(adapter, where, None)
            raise self.wrong(
                f"{where}: {word}: an adapter on another model than the base_model; give that as the base_model "
                f"and the adapter's folder {adapter} as the model"
            )
        raise self.wrong(f"{where}: {word} is no folder here; models of a hub must be downloaded first")

    def settings(
        self, found: Mapping[str, Any], where: str, known: Mapping[str, Any], elsewhere: Mapping[str, Any] | None = None
    ) -> Settings:
        """The parameters of an entry; ``elsewhere`` are those that mergekit would not read in this place."""
        given = self.mapping(found.get("parameters") or {}, f"{where}: parameters")
        for name in given:
            if name in (elsewhere or {}):
                raise self.wrong(f"{where}: {name} is not read in a model's parameters; give it in the recipe's")
        self.keys(given, tuple(known), f"{where}: parameters")
        read = {name: _flag if isinstance(default, bool) else _number for name, default in known.items()}
        return {name: self.setting(value, f"{where}: {name}", read[name]) for name, value in given.items()}

    def setting(self, value: Any, where: str, read: Callable[[Any], Any]) -> Setting:
        entries = value if isinstance(value, list) else [value]
        if not any(isinstance(its, dict) for its in entries):
            return (("", self.values(value, where, read)),)
        conditions = []
        for its in entries:
            condition = self.mapping(its, where)
            self.keys(condition, ("value", "filter"), where)
            part = condition.get("filter")
            if not (part is None or isinstance(part, str)):
                raise self.wrong(f"{where}: the filter {reprlib.repr(part)} is no text")
            conditions.append(("" if part == "*" else part or "", self.values(condition.get("value"), where, read)))
        return tuple(conditions)

    def values(self, value: Any, where: str, read: Callable[[Any], Any]) -> tuple[Any, ...]:
        found = tuple(read(its) for its in (value if isinstance(value, list) else [value]))
        if None in found:
            kind = "number" if read is _number else "true or false"
            raise self.wrong(f"{where}: {reprlib.repr(value)} is no {kind}")
        return found


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _flag(value: Any) -> bool | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return words.get(str(value).lower()) if isinstance(value, int | str) else None
