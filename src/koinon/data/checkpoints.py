"""Models as people keep them: folders of safetensors shards, single files, PEFT adapters, and, if trusted, pickles."""

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from koinon.core import UserError
from koinon.data.tensorfiles import Spec, TensorFile, Weights

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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

    def expect(self, name: str) -> None:
        """Tell the system that a tensor will be read soon."""
        self._file_of[name].expect(name)


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
        self.sha256 = file_digest(file)
        kind = str(config.get("peft_type")).upper()
        if kind != "LORA" or config.get("use_dora"):
            raise UserError(f"{folder}: an adapter of the kind {'DoRA' if kind == 'LORA' else kind}; LoRA is read here")
        weights = TensorFile(file)
        held = {_plain(name): _whole(weights, name) for name in weights.specs}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._replaced: dict[str, Tensor] = {}
        for name, value in held.items():
            if name.endswith((".lora_A", ".lora_embedding_A")):
                embedding = name.endswith(".lora_embedding_A")
                module = name.removesuffix(".lora_A").removesuffix(".lora_embedding_A")
                other = held.get(f"{module}.lora_{'embedding_' if embedding else ''}B")
                if other is None:
                    raise UserError(f"{folder}: {module} has a factor A and no B")
                turned = embedding or bool(config.get("fan_in_fan_out"))
                a, b = value.float().flatten(1), _scaling(config, module) * other.float().flatten(1)
                self._factors[f"{module}.weight"] = (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)
            elif ".lora_" not in name:
                self._replaced[name] = value.flatten()
        self._check(held)
        self.specs = {
            name: Spec(spec.shape, torch.float32) if name in self._factors else spec
            for name, spec in base.specs.items()
        }

    def _check(self, held: Mapping[str, Tensor]) -> None:
        for name, (left, right) in self._factors.items():
            spec = self.base.specs.get(name)
            if spec is None:
                raise UserError(f"{self.path}: adapts {name}, which the base does not have; is it another model's?")
            fits = left.shape[1] == right.shape[0] and left.shape[0] == spec.shape[0]
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
        if name in self._replaced:
            return self._replaced[name][start:stop]
        values = self.base.read(name, start, stop)
        if name not in self._factors:
            return values
        left, right = self._factors[name]
        columns = right.shape[1]
        top = start // columns
        added = left[top : -(-stop // columns)] @ right  # the rows that hold the stretch
        return values.float() + added.flatten()[start - top * columns : stop - top * columns]


def open_weights(path: Path, base: Weights | None = None, trust_pickle: bool = False) -> Weights:
    """The tensors of a model on disk.

    Args:
        path: a folder as Hugging Face or PEFT save it, or one file.
        base: what an adapter is applied to.
        trust_pickle: read pickled weights as well (their tensors only; no code in them is run).

    Raises:
        UserError: nothing there, damaged, or pickled and not trusted.
    """
    if path.is_file():
        return Checkpoint(path, [path]) if path.suffix == ".safetensors" else _unpickled(path, [path], trust_pickle)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / "adapter_config.json").is_file():
        if base is None:
            raise UserError(f"{path}: an adapter; give the model it was trained on as the base")
        return Adapted(base, path)
    for index in sorted(path.glob("*.safetensors.index.json")):
        return Checkpoint(path, _indexed(index))
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 or path / "model.safetensors" in files:
        return Checkpoint(path, [path / "model.safetensors" if len(files) > 1 else files[0]])
    if files:
        raise UserError(f"{path}: {len(files)} safetensors files and no index that says which belong together")
    for index in sorted(path.glob("*.bin.index.json")):
        return _unpickled(path, _indexed(index), trust_pickle)
    pickled = sorted(file for pattern in PICKLED for file in path.glob(pattern) if file.name != "training_args.bin")
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
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
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
        if file != Path(file).name or file in (".", "..") or "\\" in file or "\0" in file:
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
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a damaged pickle makes fail
            raise UserError(f"{file}: cannot be read as pickled tensors ({str(error).splitlines()[0]})") from None
        if not (isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())):
            raise UserError(f"{file}: holds something else than named tensors")
        state |= found
    return Loaded(state)


def _plain(name: str) -> str:
    """``base_model.model.a.b.lora_A.weight`` is about ``a.b.lora_A``; a replaced ``a.b.weight`` stays."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    for part in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B"):
        for ending in (f"{part}.weight", f"{part}.default.weight", f"{part}.default"):
            if name.endswith(ending):
                return name.removesuffix(ending) + part
    return name


def _whole(weights: TensorFile, name: str) -> Tensor:
    spec = weights.specs[name]
    return weights.read(name, 0, spec.count).reshape(spec.shape).clone()


def _scaling(config: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) if it is rank-stabilised; both may differ by module."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for pattern, value in (config.get("rank_pattern") or {}).items():
        rank = value if module.endswith(pattern) else rank
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        alpha = value if module.endswith(pattern) else alpha
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise UserError(f"adapter_config.json: no valid r and lora_alpha ({rank!r}, {alpha!r})")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
