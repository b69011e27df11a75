"""Language models in folders: read as Hugging Face's, written beside their place and renamed."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from koinon.core import UserError


def read(where: str | Path, dtype: str = "auto", device: str | None = None, masked: bool = False) -> tuple[Any, Any]:
    """The language model and the tokenizer of a folder, or of the hub by its name: one that continues, or fills in.

    Raises:
        UserError: see `koinon.lm.language.LM.load`.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("language models are read by transformers: pip install 'koinon[lm]'") from None
    folder = Path(where).expanduser()
    if folder.is_dir():
        _check(folder)
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not (kind == "auto" or isinstance(kind, torch.dtype)):
        raise UserError(f"dtype {dtype!r}: no type of numbers; give auto, float32, bfloat16 or float16")
    _refuse_device(device)
    name = str(folder) if folder.is_dir() else str(where)
    kinds = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "device_map": device}
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = kinds.from_pretrained(name, dtype=kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        what = "no language model that transformers can read" if folder.is_dir() else "no folder, and not on the hub"
        raise UserError(f"{where}: {what} ({said[:200]})") from None
    return model, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars that transformers draws while it reads and writes, and what it and the hub say on the way."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, talked, showed = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(talked)
        if showed:
            logging.enable_progress_bar()


def places(config: Any) -> float:
    """How many tokens a model has places for, by its configuration; infinite where that does not say."""
    named = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return next((its for name in named if (its := getattr(config, name, None))), math.inf)


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give a model's folder as Hugging Face writes it")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: only pickled weights; convert them to safetensors first")
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")) and not any(folder.glob("*.model")):
        raise UserError(f"{folder}: no tokenizer in it; put the model's tokenizer.json beside its weights")


def _refuse_device(device: str | None) -> None:
    if device not in (None, "auto"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"device {device!r}: cannot be used ({said[:150]}); leave it out, or give cpu") from None


def write(model: Any, tokenizer: Any, out: Path) -> None:
    """A model's folder, which appears whole or not at all.

    Raises:
        UserError: there is something already, or the disk is full or closed.
    """
    if out.exists():
        raise UserError(f"{out}: there already; give a new name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        with quiet():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        os.chmod(beside, 0o755)
        os.rename(beside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
