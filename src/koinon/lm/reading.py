"""Which tokens of a pass are prompt: for modules that decide once for a sequence, and hold to it while it grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

CACHES = ("cache", "past_key_values")
"""What transformers calls the keys and values of earlier tokens, from version 5.24 and before."""


class Reading(nn.Module):
    """Part of a model that holds such modules: watches each pass of it. It has no parameters.

    In the first pass over a sequence all tokens are prompt, unless `asked` says which are. In later passes, which
    a cache of keys and values shows, nothing is decided anew: the rows must stay the same sequences, as they do when
    decoding is greedy or sampled, and do not in a beam search.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt: Tensor | None = None
        self.first = True
        self._given: Tensor | None = None

    @contextmanager
    def asked(self, prompt: Bool[Tensor, "text time"]) -> Iterator[None]:
        """Within, the first pass takes these tokens as the prompt."""
        self._given = prompt
        try:
            yield
        finally:
            self._given = self.prompt = None

    def begins(self, model: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        """Before each pass of the model."""
        cache = next((named[name] for name in CACHES if named.get(name) is not None), None)
        length = 0 if cache is None else int(cache.get_seq_length())
        self.first = length == 0
        if self.first:
            self.prompt = self._tokens(given, named)

    def _tokens(self, given: tuple, named: dict[str, Any]) -> Tensor:
        ids = named.get("input_ids", given[0] if given else None)
        ids = named.get("inputs_embeds") if ids is None else ids
        assert ids is not None
        if self._given is not None and self._given.shape == ids.shape[:2]:
            return self._given
        mask = named.get("attention_mask")
        return mask.bool() if mask is not None and mask.ndim == 2 else ids.new_ones(ids.shape[:2], dtype=torch.bool)


class _Nobody:
    """Stands for the reading of a model that has none."""

    @contextmanager
    def asked(self, prompt: Tensor) -> Iterator[None]:
        yield


def reading_of(model: nn.Module) -> Any:
    """The reading that is part of a model; if it has none, one that does nothing."""
    return next((its for its in model.modules() if isinstance(its, Reading)), _Nobody())


def attach(model: nn.Module) -> Reading:
    """A model's reading, put there if it has none. The model is changed: give a copy."""
    found = reading_of(model)
    if not isinstance(found, Reading):
        found = Reading()
        model.add_module("koinon_reading", found)
        model.register_forward_pre_hook(found.begins, with_kwargs=True)
    return found
