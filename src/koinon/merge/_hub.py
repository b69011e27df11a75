"""Methods that look at data, on models as Hugging Face keeps them: loaded, merged in memory, and kept as such again."""

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koinon.bench.compare import write_whole
from koinon.core import UserError, describe, rebuild
from koinon.data.checkpoints import file_digest, read_json
from koinon.lm.folders import places
from koinon.merge._contract import Merge, Pool
from koinon.merge._files import carry, digest_of
from koinon.merge._live import State, is_own
from koinon.merge._plan import Plan
from koinon.merge.twin import Twin, TwinMerging
from koinon.nn.branches import Branches
from koinon.nn.lowrank import Stack
from koinon.nn.router import Router
from koinon.terminal import Told

try:
    import transformers
except ModuleNotFoundError:
    raise UserError("models of Hugging Face need transformers: pip install 'koinon[lm]'") from None

FORMAT = 1
"""Version of the layout of a kept twin's folder."""
BATCH = 64
"""Texts that run at once."""


def load_model(path: Path) -> nn.Module:
    """A model in float32 and evaluation mode; no code that comes with it is run.

    Raises:
        UserError: not a folder with a model that transformers knows.
    """
    names = read_json(path / "config.json").get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(
            f"{path}: its config.json names the architecture {names[0]!r}, which transformers does not have"
        )
    with _quiet(path):
        return kind.from_pretrained(path, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model."""
    with _quiet(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """What transformers cannot load is one line."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # whatever a damaged folder makes fail
        raise UserError(f"{path}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    finally:
        transformers.logging.set_verbosity(before)


def read_texts(file: Path) -> list[str]:
    """One text a line, or, in a file that ends in .jsonl, one object a line with a ``text``."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not lines:
        raise UserError(f"{file}: holds no text")
    if file.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line)["text"])
        except (ValueError, TypeError, KeyError):
            found.append(None)
        if not isinstance(found[-1], str):
            raise UserError(f'{file}: line {number} is no object with a text, such as {{"text": "..."}}')
    return found


def tokens(tokenizer: Any, texts: Sequence[str], longest: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [row, token], padded on the right."""
    tokenizer.padding_side = "right"
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def read_all(data: Sequence[Path], models: Sequence[str]) -> dict[str, list[str]]:
    """The texts of each model, from a file for each in their order."""
    if len(data) != len(models):
        raise UserError(f"--data: {len(data)} files for {len(models)} models; give one for each, in their order")
    return {name: read_texts(file) for name, file in zip(models, data, strict=True)}


def pool_of(
    base: Path, experts: Mapping[str, Path], texts: Mapping[str, Sequence[str]], own: Sequence[str], longest: int
) -> Pool:
    """The models with their data."""
    tokenizer, model = load_tokenizer(base), load_model(base)
    longest = int(min(longest, places(model.config), tokenizer.model_max_length))
    inputs = {name: tokens(tokenizer, its, longest) for name, its in texts.items()}
    return Pool(model, {name: load_model(path) for name, path in experts.items()}, inputs, tuple(own))


def manifest_of(method: Merge, found: Plan, data: Sequence[Path]) -> dict[str, Any]:
    """What is made of what."""
    return {
        "format": FORMAT,
        "koinon": metadata.version("koinon"),
        "methods": [repr(method)],
        "models": {
            name: {"path": str(path), "tensors sha256": digest_of(found.tuned[name]), "texts sha256": file_digest(file)}
            for (name, path), file in zip(found.paths.items(), data, strict=True)
        },
        "base": {"path": str(found.base_path), "tensors sha256": digest_of(found.reference)},
    }


def merge_models(
    method: Merge, pool: Pool, base: Path, out: Path, dtype: torch.dtype, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge, and keep the result in a new folder that appears whole.

    One merged model is kept as transformers keeps it, the tensors that stay a task's own beside it in ``own``; a twin
    also has its factors, its router and the heads in ``twin.safetensors``.
    """
    merged = method.merge(pool)
    with _whole(out) as folder:
        facts: dict[str, Any] = {"out": str(out), "method": repr(method)}
        if isinstance(merged, Twin):
            model, facts["numbers of the twins"] = merged.shared, merged.stored_numbers
            state = {name: value for name, value in merged.state_dict().items() if not name.startswith("shared.")}
            save_file({name: value.contiguous() for name, value in state.items()}, folder / "twin.safetensors")
            configs = {task: json.loads(module.config.to_json_string()) for task, module in pool.tuned.items()}  # type: ignore[union-attr,operator]
            words = {"format": FORMAT, "method": describe(method), "width": merged.width, "configs": configs}
            (folder / "twin.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
        else:
            model = merged
        _keep(model, dtype, folder)
        carry(base, folder, ("config.json", "generation_config.json"))
        for task, module in pool.tuned.items():
            held = {name: value.contiguous() for name, value in module.state_dict().items() if is_own(pool, name)}
            if held and not isinstance(merged, Twin):
                (folder / "own").mkdir(exist_ok=True)
                save_file(held, folder / "own" / f"{task.replace('/', '-')}.safetensors")
        (folder / "koinon.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return facts


def load_twin(folder: Path) -> Twin:
    """A twin that `merge_models` kept.

    Raises:
        UserError: it is not whole, or something else.
    """
    if not (folder / "twin.json").is_file():
        raise UserError(f"{folder}: holds no twin kept by `koinon merge twin`")
    words, shared = read_json(folder / "twin.json"), load_model(folder).requires_grad_(False)
    try:
        method = rebuild(words["method"])
        assert isinstance(method, TwinMerging)
        state = load_file(folder / "twin.safetensors")
        stacks = _stacks(state, shared.state_dict())
        tasks = tuple(words["configs"])
        own: dict[str, State] = {task: {} for task in tasks}
        for name, value in state.items():
            if name.startswith("own."):
                _, number, local = name.split(".", 2)
                own[tasks[int(number)]][local.replace("/", ".")] = value  # type: ignore[index]
        router = Router(tasks, state["router.last.weight"].shape[1] // 2, 0)
        twin = Twin(method, shared, Branches(shared, stacks), router, own)
        twin.load_state_dict({f"shared.{name}": value for name, value in shared.state_dict().items()} | state)
        twin.width = int(words["width"])
    except Exception as error:  # whatever a damaged file makes fail, in whichever library
        raise UserError(f"{folder}: damaged, or not a twin kept by `koinon merge twin` ({error})") from None
    return twin


def answer(twin: Path, texts: Path, out: Path, longest: int, told: Told) -> dict[str, Any]:
    """Write the router's weights and the logits of each text, -inf as null."""
    if longest < 1:
        raise UserError("--longest: give 1 or more")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    model, tokenizer, given = load_twin(twin), load_tokenizer(twin), read_texts(texts)
    longest = int(min(longest, places(model.shared.config), tokenizer.model_max_length))
    lines = []
    for start in range(0, len(given), BATCH):
        inputs = tokens(tokenizer, given[start : start + BATCH], longest)
        with torch.no_grad():
            weights = model.route(inputs)
            logits = model.with_weights(inputs, weights)
        for row, values in zip(weights, logits, strict=True):
            shares = dict(zip(model.tasks, row.tolist(), strict=True))
            said = values.masked_fill(values.isinf(), torch.nan).tolist() if values.ndim == 1 else None
            line = {"task": max(shares, key=shares.__getitem__), "weights": shares}
            lines.append(line | ({"logits": [None if x != x else x for x in said]} if said else {}))
        told(len(lines), len(given))
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    return {"out": str(out), "texts": len(lines)}


def materialize(twin: Path, weights: Sequence[float], out: Path) -> dict[str, Any]:
    """One model of the base's class."""
    model = load_twin(twin)
    if len(weights) != len(model.tasks):
        raise UserError(f"--weights: {len(weights)} for the tasks {', '.join(model.tasks)}; give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {' '.join(map(str, weights))}: give finite numbers")
    with _whole(out) as folder:
        _keep(model.materialize(torch.tensor(weights)), None, folder)
        if model.names:  # the head is that of one task, and so is what the configuration says of it
            config = read_json(twin / "twin.json")["configs"][
                model.tasks[max(range(len(weights)), key=weights.__getitem__)]
            ]
            (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        carry(twin, folder, ("config.json", "generation_config.json", "twin.json"))
    return {"out": str(out), "weights": dict(zip(model.tasks, weights, strict=True))}


def _keep(model: nn.Module, dtype: torch.dtype | None, folder: Path) -> None:
    assert isinstance(model, transformers.PreTrainedModel)
    kept = model if dtype is None else copy.deepcopy(model).to(dtype=dtype)  # type: ignore[call-arg]
    transformers.logging.disable_progress_bar()
    kept.save_pretrained(folder)


def _stacks(state: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Stack]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("branches.stacks."):
            name, part = key.removeprefix("branches.stacks.").rsplit(".", 1)
            found.setdefault(name.replace("/", "."), {})[part] = value
    return {
        name: Stack(list(its["whole"]))
        if "whole" in its
        else Stack(list(its["left"]), list(its["right"]), shared[name].shape)
        for name, its in found.items()
    }


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place at the end, or is gone."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield beside
        beside.chmod(0o755)
        os.replace(beside, out)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{out}: cannot be written ({said})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
