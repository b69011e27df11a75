"""What tells one language model from another: all that it computes with, and how texts become its tokens."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NEUTRAL = frozenset(
    {"architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "initializer_range", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states", "return_dict"}
    | {"id2label", "label2id", "problem_type", "task_specific_params"}
)
"""Of a configuration: what does not change what a model computes; nor do dropout, and names that begin with _."""


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Of a Hugging Face model's values, kind and configuration, and of its fast tokenizer.

    It is the same of a copy, and of what is read again from where it was saved.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_line(type(model).__name__, _telling(model.config.to_diff_dict()), _rules(tokenizer)))
    for name, value in sorted(model.named_parameters()):
        digest.update(_line(name, str(value.dtype), tuple(value.shape)))
        digest.update(_bytes(value))
    for name, value in sorted(_buffers(model)):
        digest.update(_line(name, tuple(value.shape)))
        digest.update(_bytes(value))
    return digest.hexdigest()


def _telling(config: Any) -> Any:
    """A configuration, at all depths, without what changes nothing."""
    if isinstance(config, dict):
        return {name: _telling(its) for name, its in config.items() if not _neutral(str(name))}
    return [_telling(its) for its in config] if isinstance(config, list | tuple) else config


def _neutral(name: str) -> bool:
    return name in NEUTRAL or name.startswith("_") or "drop" in name


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary and rules; how the last call filled texts up, or cut them, is no part of them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: its for name, its in rules.items() if name not in ("version", "padding", "truncation")}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are not saved, such as angles of places, are made anew for each copy, and may differ by rounding."""
    for place, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None:
                coarse = name in module._non_persistent_buffers_set and value.is_floating_point()
                yield f"{place}.{name}", value.to(torch.bfloat16) if coarse else value


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _line(*said: Any) -> bytes:
    return json.dumps(said, sort_keys=True, default=str).encode() + b"\n"
