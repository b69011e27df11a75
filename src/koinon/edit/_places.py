"""What a model says at some places only: of what its head and last FFN, large parts of it, compute, little is read."""

from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor, nn

from koinon.lm.anatomy import Anatomy


def said_at(
    anatomy: Anatomy,
    rows: Int64[Tensor, " place"],
    columns: Int64[Tensor, " place"],
    call: Callable[[], Tensor],
    but: nn.Module,
) -> Float[Tensor, "place token"]:
    """The logits at some places of the texts that a pass reads; the head and the last block's FFN compute no others.

    Args:
        anatomy: of the model.
        rows: the numbers of the texts.
        columns: the numbers of the tokens.
        call: the pass, which gives logits.
        but: if it is in the last block, that block's FFN computes all.
    """
    taken, wide = [], []

    def take(module: nn.Module, given: tuple) -> tuple | None:
        if given[0].ndim != 3:  # the texts are in one row here: all of it, then
            return None
        (taken if module is anatomy.head else wide).append(given[0].shape[:2])
        return given[0][rows, columns][None], *given[1:]

    def spread(module: nn.Module, given: tuple, out: Tensor) -> Tensor | None:
        return out.new_zeros(*wide[-1], out.shape[-1]).index_put((rows, columns), out[0]) if wide else None

    last = anatomy.blocks[-1]
    handles = [anatomy.head.register_forward_pre_hook(take)]
    if all(its is not but for its in last.module.modules()):
        handles += [its.module.register_forward_pre_hook(take) for its in last.rises]
        handles.append(last.falls.module.register_forward_hook(spread))
    try:
        logits = call()
    finally:
        for handle in handles:
            handle.remove()
    return logits[0] if taken else logits[rows, columns]
