"""What memories beside a model's own share: they hang on one projection, and decide once a sequence, on its prompt."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from koinon.edit._layers import Layer
from koinon.lm.anatomy import sharing
from koinon.lm.language import LM, Encoded, by_text, first, rewritten
from koinon.lm.places import last_block_at, said_at
from koinon.lm.reading import Reading, attach

DEPTH = 0.8
"""Share of the way from the first layer to the last at which memories are put if nobody says where."""


def late(lm: LM, layer: Layer) -> int:
    """The number of a block, from 0: auto is four fifths of the way to the last one, and never the last.

    Raises:
        UserError: no such layer.
    """
    count = len(lm.anatomy.blocks)
    if layer == "auto":
        return int(DEPTH * (count - 1))
    lm.anatomy.block(int(layer))
    return int(layer) % count


def ends(prompt: Bool[Tensor, "text time"]) -> Tensor:
    """The column of each row's last token of the prompt; filling may be on either side."""
    places = torch.arange(prompt.shape[1], device=prompt.device)
    return (prompt * places).max(1).values


class Memory(nn.Module, ABC):
    """Part of a model that may change what one of its projections gives."""

    reading: Reading
    _texts = 1

    @abstractmethod
    def first(
        self,
        into: Float[Tensor, "text time into"],
        out: Float[Tensor, "text time out"],
        prompt: Bool[Tensor, "text time"],
    ) -> Float[Tensor, "text time out"]:
        """What the projection shall give in the first pass over a sequence; here it is decided what is done with it.

        Args:
            into: what goes into the projection.
            out: what it gives; must be handed back as it is where the memory has nothing to say.
            prompt: the tokens to decide by.
        """

    @abstractmethod
    def later(
        self, into: Float[Tensor, "text time into"], out: Float[Tensor, "text time out"]
    ) -> Float[Tensor, "text time out"]:
        """What it shall give in the passes after the first, for the same sequences."""

    def after(self, module: nn.Module, given: tuple, out: Tensor) -> Tensor:
        """Forward hook of the projection."""
        prompt = self.reading.prompt
        if self.reading.first:  # the same texts go on in later passes
            self._texts = 1 if prompt is None else len(prompt)
        into, comes = by_text(given[0], self._texts), by_text(out, self._texts)
        if not self.reading.first:
            return self.later(into, comes).reshape(out.shape)
        if prompt is None or prompt.shape != comes.shape[:2]:  # a part of the model is called alone
            prompt = torch.ones(comes.shape[:2], dtype=torch.bool, device=out.device)
        return self.first(into, comes, prompt.to(out.device)).reshape(out.shape)


def put(base: LM, name: str, memory: Memory) -> LM:
    """The model with a memory at one of its projections; a plain Hugging Face model that shares the base's values.

    Args:
        base: stays as it is; it may hold other memories.
        name: of the projection.
        memory: becomes part of the new model, and is to be put into no other.
    """
    model = sharing(base.model)
    memory.reading = attach(model)
    site = model.get_submodule(name)
    memory.to(next(site.parameters()).device)
    number = sum(isinstance(its, Memory) for its in model.modules())
    model.add_module(f"koinon_memory_{number}", memory)
    site.register_forward_hook(memory.after)
    return base.with_model(model)


class Above:
    """Texts read again and again from one projection on: what is below it is computed once.

    That it gives the same again is tried; where it does not hold, every pass is a whole one.
    """

    def __init__(self, lm: LM, layer: int, texts: Encoded):
        self.lm, self.texts = lm, texts
        self.read = texts.needed
        """What is read of the texts: not the last token of the longest answers, behind which nothing is asked."""
        self.falls = lm.anatomy.block(layer).falls.module
        """The way back of the block's FFN."""
        met = _Met(lm, layer, len(texts.ids))
        with torch.no_grad(), met:
            plain = lm.logits(self.read)
        self.into: Float[Tensor, "text time into"] = met.into
        """What goes into that projection; the same in every pass."""
        self.out: Float[Tensor, "text time out"] = met.out
        """What it gives if it is not changed."""
        self._row, self._column = texts.answer[:, 1:].nonzero().T
        self._due = texts.ids[self._row, self._column + 1, None]
        self._counts = self._row.bincount(minlength=len(texts.ids))
        self._tail = met.tail(plain)
        self.short = self._tail is not None or self._shortened(layer, plain)
        """Whether what is below is left out."""

    def _shortened(self, layer: int, plain: Tensor) -> bool:
        """Have the parts that are done before the projection give what they gave, in whole passes of a copy."""
        self.lm = self.lm.with_model(sharing(self.lm.model))
        blocks = [block.module for block in self.lm.anatomy.blocks[: layer + 1]]
        self.falls = self.lm.anatomy.block(layer).falls.module
        seen: dict[str, Any] = {}
        before = _Before(blocks[-1], self.falls)
        handles = [its.register_forward_hook(lambda module, given, out: seen.update(below=out)) for its in blocks[:-1]]
        with torch.no_grad(), before:
            self.lm.logits(self.read)
        for handle in handles:
            handle.remove()
        gives = {**dict.fromkeys(blocks[:-1], seen.get("below")), **before.found}
        for module, given in gives.items():
            module.forward = lambda *args, given=given, **named: given
        with torch.no_grad():
            if torch.equal(self.lm.logits(self.read), plain):
                return True
        for module in gives:
            del module.forward
        return False

    def logits(self, change: Callable[[Tensor], Tensor]) -> Float[Tensor, "text time token"]:
        """What the model says, with gradients, if what the projection gives is changed."""
        if self._tail is not None:
            with torch.enable_grad():
                return self._tail.logits(change)
        with rewritten(self.falls, change, len(self.texts.ids)), torch.enable_grad():
            return self.lm.logits(self.read)

    def harm(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over the texts of the mean negative log-probability of their answers' tokens, if so changed."""
        places = self._row, self._column
        if self._tail is not None:
            with last_block_at(self.lm.anatomy, *places, but=self.falls), torch.enable_grad():
                said = self._tail.logits(change, *places)
        else:
            said = said_at(self.lm.anatomy, *places, lambda: self.logits(change), but=self.falls)
        each = -said.float().log_softmax(-1).gather(1, self._due).squeeze(1)
        return (each.new_zeros(len(self._counts)).index_add(0, self._row, each) / self._counts).mean()


@dataclass(frozen=True)
class _Tail:
    """The end of a pass: a block's last sum, and what comes after it."""

    past: Float[Tensor, "text time width"]
    """What goes past the FFN."""
    out: Float[Tensor, "text time width"]
    """What the FFN gives."""
    calls: list[tuple[nn.Module, tuple, dict[str, Any]]]
    """The blocks above, each with what it is called with beside the vectors."""
    after: list[nn.Module]
    """The last normalisation, and the head with what is before it."""

    def logits(self, change: Callable[[Tensor], Tensor], *places: Tensor) -> Float[Tensor, "*place token"]:
        """What the model says, everywhere or at some places, if what the FFN gives is changed."""
        vectors = self.past + change(self.out)
        for module, given, named in self.calls:
            vectors = first(module(vectors, *given, **named))
        vectors = vectors[places] if places else vectors
        for module in self.after:
            vectors = module(vectors)
        return vectors


class _Met:
    """Within, keeps what a pass meets from a block's FFN on."""

    def __init__(self, lm: LM, layer: int, texts: int):
        self.lm, self.texts = lm, texts
        self.block, self.upper = lm.anatomy.block(layer), [its.module for its in lm.anatomy.blocks[layer + 1 :]]
        self.pasts: list[Tensor] = []
        self.calls: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

    def __enter__(self) -> None:
        def fell(module: nn.Module, given: tuple, out: Tensor) -> None:
            self.into, self.out = by_text(given[0], self.texts), by_text(out, self.texts)

        def ended(module: nn.Module, given: tuple, out: Any) -> None:
            self.end = first(out)

        def passes(module: nn.Module, given: tuple) -> None:
            self.pasts.append(by_text(given[0], self.texts))

        def called(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            self.calls.append((module, given, named))

        self._handles = [
            self.block.falls.module.register_forward_hook(fell),
            self.block.module.register_forward_hook(ended),
            *[its.register_forward_pre_hook(passes) for its in self.block.norms],
            *[its.register_forward_pre_hook(called, with_kwargs=True) for its in self.upper],
        ]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def tail(self, plain: Tensor) -> _Tail | None:
        """The rest of the pass, if it is no more than the parts that were met, to the bit.

        Not in models that decide by whole passes what they read, or whose FFN is not the last that a block adds.
        """
        if any(isinstance(its, Reading) for its in self.lm.model.modules()):
            return None
        past = next((its for its in self.pasts if _adds_up(its, self.out, self.end)), None)
        if past is None or [its for its, _, _ in self.calls] != self.upper or not all(its for _, its, _ in self.calls):
            return None
        anatomy = self.lm.anatomy
        after = [its for its in (anatomy.norm, anatomy.narrows, anatomy.head) if its is not None]
        found = _Tail(past, self.out, [(its, given[1:], named) for its, given, named in self.calls], after)
        with torch.no_grad():
            return found if torch.equal(found.logits(lambda out: out), plain) else None


def _adds_up(one: Tensor, other: Tensor, total: Tensor) -> bool:
    return one.shape == other.shape == total.shape and torch.equal(one + other, total)


class _Before:
    """What the parts of a block give that are done when one of them begins, and are not called again."""

    def __init__(self, block: nn.Module, end: nn.Module):
        self.block, self.end = block, end
        self.found: dict[nn.Module, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "_Before":
        begun: list[bool] = []
        calls: list[nn.Module] = []

        def after(module: nn.Module, given: tuple, out: Any) -> None:
            calls.append(module)
            if not begun and calls.count(module) == 1:
                self.found[module] = out
            elif calls.count(module) > 1:
                self.found.pop(module, None)

        self._handles = [its.register_forward_hook(after) for its in self.block.modules() if its is not self.end]
        self._handles.append(self.end.register_forward_pre_hook(lambda *_: begun.append(True)))
        self._handles.append(
            self.end.register_forward_hook(lambda module, given, out: self.found.update({module: out}))
        )
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
