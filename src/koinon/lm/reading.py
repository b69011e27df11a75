"""Which tokens of a pass are prompt: for modules that decide once for a sequence, and hold to it while it grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F

CACHES = ("cache", "past_key_values")
"""What transformers calls the keys and values of earlier tokens, from version 5.24 and before."""


class Reading(nn.Module):
    """Part of a model that holds such modules: watches each pass of it. It has no parameters.

    In the first pass over a sequence all tokens are prompt, unless `asked` says which are. In later passes nothing is
    decided anew: a cache of keys and values shows them, and without one that they are of one call of ``generate`` (a
    loop of one's own without a cache looks like many prompts). The rows must stay sequences of the same prompts, as
    they do in greedy decoding, sampling and beam search.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt: Tensor | None = None
        """Which tokens of a pass are prompt; in a later one without a cache, those that were in the first."""
        self.first = True
        """Whether the pass computes the prompt, as all do that have no cache."""
        self._given: Tensor | None = None
        self._generating = False

    @contextmanager
    def asked(self, prompt: Bool[Tensor, "text time"]) -> Iterator[None]:
        """Within, the first pass takes these tokens as the prompt."""
        self._given = prompt
        try:
            yield
        finally:
            self._given = self.prompt = None

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Within, passes go on from the prompt of the first one."""
        self.prompt, self._generating = None, True
        try:
            yield
        finally:
            self.prompt, self._generating = None, False

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
        held = self.prompt if self._generating else None
        if held is not None and len(held) == len(ids) and held.shape[1] < ids.shape[1]:
            return F.pad(held, (0, ids.shape[1] - held.shape[1]))
        if self._given is not None and self._given.shape == ids.shape[:2]:
            return self._given
        mask = named.get("attention_mask")
        return mask.bool() if mask is not None and mask.ndim == 2 else ids.new_ones(ids.shape[:2], dtype=torch.bool)


@dataclass
class _Generate:
    """A model's ``generate``, while which its reading holds to the prompt."""

    model: Any

    def __call__(self, *given: Any, **named: Any) -> Any:
        with reading_of(self.model).generating():
            return type(self.model).generate(self.model, *given, **named)


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
        if hasattr(model, "generate"):
            model.generate = _Generate(model)  # type: ignore[assignment]
    return found
