"""What a model says at some places only: the head and the last block, large parts of a pass, compute little else."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int64
from torch import Size, Tensor, nn

from koinon.lm.anatomy import Anatomy


def said_at(
    anatomy: Anatomy,
    rows: Int64[Tensor, " place"],
    columns: Int64[Tensor, " place"],
    call: Callable[[], Tensor],
    but: nn.Module | None = None,
) -> Float[Tensor, "place token"]:
    """The logits at some places of the texts that a pass reads.

    Args:
        anatomy: of the model.
        rows: the numbers of the texts.
        columns: the numbers of the tokens.
        call: the pass, which gives logits.
        but: if it is in the last block, that block computes all; as it does if somebody has hooks there.
    """
    if _hooked(anatomy.head):
        return at(call(), rows, columns)
    taken: list[Size] = []
    handle = anatomy.head.register_forward_pre_hook(_taking(rows, columns, taken))
    try:
        with last_block_at(anatomy, rows, columns, but):
            logits = call()
    finally:
        handle.remove()
    return logits.squeeze(0) if taken else at(logits, rows, columns)


@contextmanager
def last_block_at(
    anatomy: Anatomy, rows: Int64[Tensor, " place"], columns: Int64[Tensor, " place"], but: nn.Module | None = None
) -> Iterator[None]:
    """Within, the last block computes what it does place by place only at some places; see `said_at`."""
    last = anatomy.blocks[-1]
    handles: list[Any] = []
    if not any(its is but or _hooked(its) for its in last.module.modules()):
        # What comes out of attention's mixing, and the FFN.
        handles += _narrowed([last.attends.module], last.attends.module, rows, columns)
        handles += _narrowed([its.module for its in last.rises], last.falls.module, rows, columns)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at(
    vectors: Float[Tensor, "text time width"], rows: Int64[Tensor, " place"], columns: Int64[Tensor, " place"]
) -> Float[Tensor, "place width"]:
    """The vectors of [text, time, width] at some places, which may be told on another device."""
    return vectors[rows.to(vectors.device), columns.to(vectors.device)]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _narrowed(starts: Sequence[nn.Module], end: nn.Module, rows: Tensor, columns: Tensor) -> list[Any]:
    """From some modules to another only the places are computed; the others come out as zeros, which nobody reads."""
    taken: list[Size] = []

    def widen(module: nn.Module, given: tuple, out: Tensor) -> Tensor | None:
        places = rows.to(out.device), columns.to(out.device)
        return out.new_zeros(*taken[0], out.shape[-1]).index_put(places, out[0]) if taken else None

    take = _taking(rows, columns, taken)
    return [*(its.register_forward_pre_hook(take) for its in starts), end.register_forward_hook(widen)]


def _taking(rows: Tensor, columns: Tensor, taken: list[Size]) -> Callable[[nn.Module, tuple], tuple | None]:
    def take(module: nn.Module, given: tuple) -> tuple | None:
        if given[0].ndim != 3:  # the texts are in one row here: all of it, then
            return None
        taken.append(given[0].shape[:2])
        return at(given[0], rows, columns)[None], *given[1:]

    return take
