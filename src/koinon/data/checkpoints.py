"""Models as people keep them: folders of safetensors shards, single files, PEFT adapters, and, if trusted, pickles."""

import difflib
import fnmatch
import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from koinon.core import UserError
from koinon.data.tensorfiles import WORDS, Spec, TensorFile, Weights

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
"""What training leaves beside them."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's ``init_lora_weights`` that leave the base as it is."""


class Loaded:
    """Tensors in memory.

    Args:
        state: name to tensor, as of ``state_dict``.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = {name: value.detach() for name, value in state.items()}
        self.specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in self.state.items()}

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """See `Weights.read`."""
        return self.state[name].reshape(-1)[start:stop].cpu()


class Checkpoint:
    """The tensors of one or several safetensors files.

    Args:
        path: what to call it in messages.
        files: the files.

    Raises:
        UserError: a file is damaged, or two hold the same tensor.
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path = path
        self.files = tuple(TensorFile(file) for file in files)
        self._file_of = {name: file for file in self.files for name in file.specs}
        if len(self._file_of) < sum(len(file.specs) for file in self.files):
            raise UserError(f"{path}: two of its files hold the same tensor; remove the outdated ones")
        self.specs = {name: spec for file in self.files for name, spec in file.specs.items()}

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """See `Weights.read`."""
        return self._file_of[name].read(name, start, stop)


class Adapted:
    """A base with a LoRA adapter applied as it is read, in float32: W + s B A; nothing is rounded or kept in between.

    Args:
        base: what the adapter was trained on.
        folder: of ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT saves them.

    Raises:
        UserError: an adapter of another kind, or one that does not fit the base.
    """

    def __init__(self, base: Weights, folder: Path):
        self.base, self.path = base, folder
        config = read_json(folder / "adapter_config.json")
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise UserError(f"{folder}: no adapter_model.safetensors in it; save the adapter with safetensors")
        self.sha256, self.config_sha256 = file_digest(file), file_digest(folder / "adapter_config.json")
        _refuse_others(folder, config)
        weights = TensorFile(file)
        held = {_plain(name): _whole(weights, name) for name in weights.specs}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._replaced: dict[str, Tensor] = {}
        for name, value in held.items():
            module, part, kind = name.rpartition(".lora_")
            if not part:
                self._replaced[name] = value.flatten()
                continue
            other = held.get(f"{module}.lora_{kind[:-1] + _OTHER.get(kind[-1:], '')}")
            if kind not in ("A", "B", "embedding_A", "embedding_B") or other is None:
                raise UserError(f"{folder}: {name} is no pair of factors A and B, which alone are read here")
            if kind.endswith("A"):
                if min(value.ndim, other.ndim) < 2 or len(value) == 0:
                    raise UserError(f"{folder}: the factors of {module} are no matrices")
                scale = _scaling(folder, config, module, len(value))
                a, b = value.float().flatten(1), scale * other.float().flatten(1)
                turned = kind == "embedding_A" or bool(config.get("fan_in_fan_out"))
                self._factors[f"{module}.weight"] = (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)
        self._check(held)
        self.specs = {name: Spec(spec.shape, self._kind(name, spec.dtype)) for name, spec in base.specs.items()}

    def _kind(self, name: str, kind: torch.dtype) -> torch.dtype:
        kind = self._replaced[name].dtype if name in self._replaced else kind
        return torch.promote_types(kind, torch.float32) if name in self._factors else kind

    def _check(self, held: Mapping[str, Tensor]) -> None:
        for name, (left, right) in self._factors.items():
            spec = self.base.specs.get(name)
            if spec is None:
                raise UserError(f"{self.path}: adapts {name}, which the base does not have; is it another model's?")
            fits = left.shape[1] == right.shape[0] and spec.shape[:1] == left.shape[:1]
            if not fits or left.shape[0] * right.shape[1] != spec.count:
                raise UserError(
                    f"{self.path}: its factors of {name} make {left.shape[0]} x {right.shape[1]}, "
                    f"the base has {' x '.join(map(str, spec.shape))}"
                )
        for name in self._replaced:
            spec = self.base.specs.get(name)
            if spec is None or spec.shape != tuple(held[name].shape):
                raise UserError(f"{self.path}: replaces {name}, which the base does not have in that shape")

    def read(self, name: str, start: int, stop: int) -> Float[Tensor, " n"]:
        """See `Weights.read`."""
        replaced = self._replaced.get(name)
        values = self.base.read(name, start, stop) if replaced is None else replaced[start:stop]
        if name not in self._factors:
            return values
        left, right = self._factors[name]
        columns = right.shape[1]
        top = start // columns
        added = left[top : -(-stop // columns)] @ right  # the rows that hold the stretch
        return values.to(self.specs[name].dtype) + added.flatten()[start - top * columns : stop - top * columns]


def open_weights(path: Path, base: Weights | None = None, trust_pickle: bool = False) -> Weights:
    """The tensors of a model on disk.

    Args:
        path: a folder as Hugging Face or PEFT save it, or one file.
        base: what an adapter is applied to.
        trust_pickle: read pickled weights as well (their tensors only; no code in them is run).

    Raises:
        UserError: nothing there, damaged, or pickled and not trusted.
    """
    try:
        return _opened(path, base, trust_pickle)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _opened(path: Path, base: Weights | None, trust_pickle: bool) -> Weights:
    if path.is_file():
        if any(path.match(pattern) for pattern in PICKLED):
            return _unpickled(path, [path], trust_pickle)
        return Checkpoint(path, [path])
    if not path.is_dir():
        beside = [its.name for its in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        raise UserError(
            f"{path}: no such file or folder" + (f"; did you mean {path.with_name(near[0])}?" if near else "")
        )
    if (path / "adapter_config.json").is_file():
        if base is None:
            raise UserError(f"{path}: an adapter; give the model it was trained on as the base")
        return Adapted(base, path)
    files = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob("*.safetensors.index.json"), key=lambda file: not file.name.startswith("model."))
    if path / "model.safetensors" in files:  # as Hugging Face prefers it
        return Checkpoint(path, [path / "model.safetensors"])
    for index in indices:
        found = Checkpoint(path, _indexed(index))
        lost = [name for name in read_json(index)["weight_map"] if name not in found.specs]
        if lost:
            raise UserError(f"{path}: none of its files holds {lost[0]}, which {index.name} names")
        return found
    if len(files) == 1:
        return Checkpoint(path, files)
    if files:
        raise UserError(f"{path}: {len(files)} safetensors files and no index that says which belong together")
    for index in sorted(path.glob("*.bin.index.json")):
        return _unpickled(path, _indexed(index), trust_pickle)
    pickled = sorted(file for pattern in PICKLED for file in path.glob(pattern) if file.name not in NOT_WEIGHTS)
    if pickled:
        return _unpickled(path, pickled, trust_pickle)
    raise UserError(f"{path}: holds no weights (*.safetensors)")


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns, in which * stands for anything.

    Raises:
        UserError: a pattern that matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no tensor matches {pattern!r}; there is for example {next(iter(names), 'none')}")
    return [name for name in names if matches(name, patterns)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is meant by one of the patterns, as of ``fnmatch``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not file.is_file():
        raise UserError(f"{file}: cannot be read (no such file)")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is no JSON object")
    return found


def file_digest(file: Path) -> str:
    """Its SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _indexed(index: Path) -> list[Path]:
    """The files an index names; only files beside it."""
    named = read_json(index).get("weight_map")
    if not (isinstance(named, dict) and named and all(isinstance(file, str) for file in named.values())):
        raise UserError(f"{index}: has no weight_map")
    files = sorted(set(named.values()))
    for file in files:
        if Path(file).parts != (file,) or file == ".." or "\\" in file or "\0" in file:
            raise UserError(f"{index}: names {file!r}, which is not a file beside it")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent}: {file} is missing, which its index names")
    return [index.parent / file for file in files]


def _unpickled(path: Path, files: Sequence[Path], trusted: bool) -> Loaded:
    if not trusted:
        raise UserError(
            f"{path}: pickled weights ({files[0].name}), which can run code; "
            "convert them to safetensors, or give --trust-pickle to read their tensors only"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: cannot be read (no such file)")
        try:
            mapped = zipfile.is_zipfile(file)  # older files are read whole
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:  # what torch says of code in it ends in the advice to run that code
            said = "damaged, or it holds more than tensors"
            raise UserError(f"{file}: cannot be read as pickled tensors ({said})") from None
        except Exception as error:  # whatever a damaged pickle makes fail
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{file}: cannot be read as pickled tensors ({said})") from None
        if not (isinstance(found, dict) and all(isinstance(name, str) and _is_plain(t) for name, t in found.items())):
            raise UserError(f"{file}: holds something else than named tensors of numbers")
        state |= found
    return Loaded(state)


def _is_plain(value: Any) -> bool:
    if not (isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"):
        return False
    return value.dtype in WORDS and not value.is_quantized


_OTHER = {"A": "B", "B": "A"}


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError for an adapter that is more than W + s B A on the base as it is."""
    kind = str(config.get("peft_type"))[:40].upper()
    if kind != "LORA" or config.get("use_dora"):
        kind = "DoRA" if kind == "LORA" else kind
        raise UserError(f"{folder}: an adapter of the kind {kind}; LoRA is read here")
    begun = config.get("init_lora_weights")
    if not (isinstance(begun, str | bool | None) and begun in PLAIN_STARTS):
        raise UserError(
            f"{folder}: begun with {str(begun)[:40]!r}, which changes the base itself; make it plain LoRA with PEFT"
        )
    for key in ("layer_replication", "use_qalora", "use_bdlora"):
        if config.get(key):
            raise UserError(f"{folder}: {key} is not read here; merge it into its base with PEFT first")


def _plain(name: str) -> str:
    """``base_model.model.a.b.lora_A.weight`` is about ``a.b.lora_A``; a replaced ``a.b.weight`` stays."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
    for part in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B"):
        for ending in (f"{part}.weight", f"{part}.default.weight", f"{part}.default"):
            if name.endswith(ending):
                return name.removesuffix(ending) + part
    return name


def _whole(weights: TensorFile, name: str) -> Tensor:
    spec = weights.specs[name]
    return weights.read(name, 0, spec.count).reshape(spec.shape).clone()


def _scaling(folder: Path, config: Mapping[str, Any], module: str, rows: int) -> float:
    """alpha / r, or alpha / sqrt(r) if it is rank-stabilised; both may differ by module."""
    found: list[float] = []
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        special = config.get(patterns) or {}
        if not isinstance(special, dict):
            raise UserError(f"{folder}: adapter_config.json: {patterns} is no mapping")
        value = next((its for pattern, its in special.items() if _meant(folder, pattern, module)), config.get(key))
        if not (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53):
            raise UserError(f"{folder}: adapter_config.json: no valid {key} for {module}: {str(value)[:40]}")
        found.append(value)
    rank, alpha = found
    if rank != rows:
        raise UserError(f"{folder}: {module} has factors of rank {rows}, adapter_config.json says {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _meant(folder: Path, pattern: str, module: str) -> bool:
    """Whether PEFT takes a module for meant: its name, or the end of it from a dot on, is the regular expression."""
    if "(" in pattern or len(re.findall(r"[*+?{]", pattern)) > 2 or len(module) > 500:  # could take for ever
        raise UserError(f"{folder}: adapter_config.json: the pattern {pattern[:60]!r} is too involved to be read here")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise UserError(f"{folder}: adapter_config.json: the pattern {pattern[:60]!r} is damaged ({error})") from None
