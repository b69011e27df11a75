"""Smaller stand-ins for a tensor: few singular values, few elements, or a random share; and several of them as a stack.

Where a matrix is needed, see `as_matrix`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Stack(nn.Module):
    """One tensor a model, all of one shape, kept whole or as products of two narrow matrices.

    Args:
        parts: whole tensors, one a model; or their left factors [out, rank].
        right: the right factors [rank, width], if the parts are left ones.
        shape: of the tensor that factors stand for.
    """

    left: Tensor
    """[model, out, rank], if kept as factors."""
    right: Tensor
    """[model, rank, width], if kept as factors."""
    whole: Tensor
    """[model, ...], otherwise."""

    def __init__(self, parts: Sequence[Tensor], right: Sequence[Tensor] | None = None, shape: Sequence[int] = ()):
        super().__init__()
        self.factored = right is not None
        self.shape = tuple(shape) if self.factored else tuple(parts[0].shape)
        self.register_buffer("left" if self.factored else "whole", torch.stack(list(parts)).contiguous())
        if right is not None:
            self.register_buffer("right", torch.stack(list(right)).contiguous())

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(value.numel() for value in self.buffers())

    def part(self, model: int) -> Float[Tensor, " *shape"]:
        """The tensor of one model."""
        return (self.left[model] @ self.right[model]).view(self.shape) if self.factored else self.whole[model]

    def mixed(self, weights: Float[Tensor, " model"]) -> Float[Tensor, " *shape"]:
        """sum_t w_t of the models' tensors."""
        weights = weights.to(next(self.buffers()))
        if self.factored:
            return torch.einsum("t,tor,trw->ow", weights, self.left, self.right).view(self.shape)
        return torch.tensordot(weights, self.whole, 1)

    def rows(self, weights: Float[Tensor, "batch model"]) -> Float[Tensor, "batch ..."]:
        """`mixed` for each row; for small tensors only."""
        return torch.stack([self.mixed(row) for row in weights])

    def product(self, x: Float[Tensor, "batch ... width"], weights: Float[Tensor, "batch model"]) -> Tensor:
        """sum_t w_t L_t R_t x, [batch, ..., out], of factors: two narrow products for all models and rows."""
        scales = weights.repeat_interleave(self.right.shape[1], 1)  # batch (model rank)
        inner = F.linear(x, self.right.flatten(0, 1)) * beside(scales, x.ndim)
        return F.linear(inner, self.left.transpose(0, 1).flatten(1))


def as_matrix(tensor: Float[Tensor, " *shape"]) -> Tensor:
    """A tensor of more than two dimensions as [first, all others], the way a convolution multiplies.

    Dimensions of size 1 in front are dropped, so that a token or positions for all rows count as what they are.
    """
    if tensor.ndim <= 2:
        return tensor
    sizes = list(tensor.shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return tensor.reshape(sizes[0], -1) if len(sizes) > 1 else tensor.reshape(sizes)


def truncated(matrix: Float[Tensor, "out width"], rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of that rank (Eckart and Young, 1936) as [out, rank] times [rank, width].

    Each factor carries the roots of the singular values.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def largest(tensor: Float[Tensor, " *shape"], count: int) -> Float[Tensor, " *shape"]:
    """Exactly ``count`` elements of largest magnitude, the others 0."""
    flat = tensor.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def thinned(tensor: Float[Tensor, " *shape"], density: float, numbers: torch.Generator) -> Float[Tensor, " *shape"]:
    """Each element is kept with probability ``density`` and divided by it, so that the expectation stays."""
    kept = torch.rand(tensor.shape, generator=numbers) < density
    return torch.where(kept, tensor, 0) / density if density else torch.zeros_like(tensor)


def _singular(tensors: Sequence[Tensor], share: float, numbers: Sequence[torch.Generator]) -> Stack:
    """As factors, if these are smaller than the matrices."""
    matrices = [as_matrix(tensor) for tensor in tensors]
    out, width = matrices[0].shape
    rank = int(share * min(out, width))
    pairs = [truncated(matrix, rank) for matrix in matrices]
    if rank * (out + width) < out * width:
        return Stack([left for left, _ in pairs], [right for _, right in pairs], tensors[0].shape)
    return Stack([(left @ right).view_as(tensors[0]) for left, right in pairs])


def _largest(tensors: Sequence[Tensor], share: float, numbers: Sequence[torch.Generator]) -> Stack:
    return Stack([largest(tensor, int(share * tensor.numel())) for tensor in tensors])


def _thinned(tensors: Sequence[Tensor], share: float, numbers: Sequence[torch.Generator]) -> Stack:
    return Stack([thinned(tensor, share, its) for tensor, its in zip(tensors, numbers, strict=True)])


CUTS: Mapping[str, Callable[[Sequence[Tensor], float, Sequence[torch.Generator]], Stack]] = {
    "svd": _singular,
    "magnitude": _largest,
    "random": _thinned,
}
"""Ways to keep a share, of the singular values or of the elements, of one tensor a model, each with a random stream."""


def beside(values: Float[Tensor, "batch n"], dimensions: int) -> Float[Tensor, "batch ... n"]:
    """One vector a row as a tensor of so many dimensions, for all places of the row."""
    return values.view(len(values), *[1] * (dimensions - 2), values.shape[-1])
