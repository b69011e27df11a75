"""What turns a gradient into an edit: the gradient of a matrix as products of two vectors, and a network over both."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.edit._losses import unlikely
from koinon.lm.anatomy import Projection
from koinon.lm.language import LM, Encoded, rewritten, watched
from koinon.nn.params import stream

EPSILON = 1e-7
"""Added to a standard deviation, as in MEND's release."""

Factors = tuple[Float[Tensor, "text time in"], Float[Tensor, "text time out"]]
"""u, what goes into a matrix, and delta, the gradient of what comes out: the matrix's gradient is sum delta u^T."""


def factors(lm: LM, places: Sequence[Projection], encoded: Encoded) -> dict[str, Factors]:
    """Of each matrix, by the name of its parameter; the loss is the sum over the texts of `unlikely`.

    A text's gradient does not depend on the texts beside it.
    """
    nothing: dict[str, Tensor] = {}

    def change(name: str, vectors: Tensor) -> Tensor:
        nothing[name] = torch.zeros_like(vectors, requires_grad=True)
        return vectors + nothing[name]

    with torch.enable_grad(), ExitStack() as stack:
        texts = len(encoded.ids)
        into = stack.enter_context(watched({its.parameter: its.module for its in places}, "in", texts))
        for its in places:
            stack.enter_context(rewritten(its.module, partial(change, its.parameter), texts))
        loss = texts * unlikely(lm.logits(encoded), encoded)
        names = [its.parameter for its in places]
        found = torch.autograd.grad(loss, [nothing[name] for name in names])
    return {name: (into[name].detach().float(), delta.float()) for name, delta in zip(names, found)}


def living(pair: Factors) -> tuple[Float[Tensor, "token in"], Float[Tensor, "token out"]]:
    """The tokens that have a part in the gradient."""
    into, delta = (its.flatten(0, -2) for its in pair)
    kept = (into != 0).any(1) & (delta != 0).any(1)
    return into[kept], delta[kept]


class Hypernetwork(nn.Module):
    """MEND's equations 3a and 3b, for all matrices of one shape; at its start it gives what it is given, normalised.

    Args:
        into: length of u.
        out: length of delta.
        matrices: how many share it, each with a scale and a shift of its own.
        rank: of its two layers, at most.
        seed: of what it starts from.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, into: int, out: int, matrices: int, rank: int, seed: int):
        super().__init__()
        self.sizes = (into, out)
        width = into + out
        rank = min(rank, width)
        numbers = [stream(seed, "hypernetwork", into, out, layer) for layer in range(2)]
        self.narrow = nn.ParameterList([torch.randn(rank, width, generator=its) for its in numbers])
        self.wide = nn.ParameterList([torch.zeros(width, rank) for _ in range(2)])
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(2, matrices, width))
        self.shift = nn.Parameter(torch.zeros(2, matrices, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    @torch.no_grad()
    def measure(self, tokens: Float[Tensor, "token width"]) -> None:
        """Keep mean and standard deviation of u and delta, side by side, of all matrices together."""
        self.mean.copy_(tokens.mean(0))
        self.deviation.copy_(tokens.std(0))

    def forward(
        self, into: Float[Tensor, "token in"], delta: Float[Tensor, "token out"], matrix: int
    ) -> tuple[Float[Tensor, "token in"], Float[Tensor, "token out"]]:
        """The two vectors of the edit, for each token."""
        z = (torch.cat([into, delta], 1) - self.mean) / (self.deviation + EPSILON)
        for layer in range(2):
            inner = z @ self.narrow[layer].T @ self.wide[layer].T + (self.bias if layer == 0 else 0)
            # clamp, not relu: it has a gradient where it starts, at 0
            z = z + (self.scale[layer, matrix] * inner + self.shift[layer, matrix]).clamp(min=0)
        left, right = z.split(self.sizes, 1)
        return left, right
