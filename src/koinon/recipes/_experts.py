"""A base and its experts, trained once for each seed and kept for all who merge them."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from koinon.core import UserError
from koinon.data.sources import cache


@dataclass(frozen=True)
class Experts:
    """A base and the experts tuned from it."""

    base: nn.Module
    tuned: Mapping[str, nn.Module]
    seconds: float
    """What training them took, when they were trained."""


def kept(model: nn.Module, settings: Mapping[str, Any], make: Callable[[], None]) -> float:
    """Fill the model from the cache, or make it and keep it there; gives the seconds it took to make.

    A file that is damaged, or of other settings, is made again. Files appear whole: written beside, then renamed.
    """
    text = json.dumps(settings, sort_keys=True)
    folder = cache() / "experts"
    file = folder / f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.safetensors"
    try:
        with safe_open(file, "pt") as held:
            about = held.metadata() or {}
            if about.get("settings") == text:
                model.load_state_dict({name: held.get_tensor(name) for name in held.keys()})  # noqa: SIM118
                return float(about["seconds"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError):
        pass
    start = time.perf_counter()
    make()
    seconds = round(time.perf_counter() - start, 3)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), beside, {"settings": text, "seconds": str(seconds)})
        os.replace(beside, file)
    except OSError as error:
        raise UserError(f"{folder}: cannot keep models there ({error.strerror}): set KOINON_CACHE") from None
    finally:
        beside.unlink(missing_ok=True)
    return seconds


@torch.no_grad()
def in_batches(function: Callable[..., Tensor], *rows: Tensor, size: int = 1024) -> Tensor:
    """The function's rows for all rows of the tensors, computed ``size`` at a time."""
    return torch.cat([function(*part) for part in zip(*(its.split(size) for its in rows), strict=True)])
