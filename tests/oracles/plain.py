"""The formulas that oracles are written in, one expert and one gate at a time.

Nothing here calls a layer of koinon or of torch: a parameter is taken from the network by its name, and the arithmetic
is spelled out, so that an error in a batched layer cannot repeat itself in what it is compared with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-5
"""What batch normalisation adds to a variance."""


class Named(dict[str, Tensor]):
    """Parameters by name; asking for one that the network does not have is a failed comparison."""

    def __missing__(self, name: str) -> Tensor:
        raise AssertionError(f"the network has no parameter {name}")


def parameters(model: nn.Module) -> Named:
    """Every parameter by its name."""
    return Named(model.named_parameters())


def flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One list of all their items."""
    return [item for items in lists for item in items]


def relu(z: Tensor) -> Tensor:
    return (z + z.abs()) / 2


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def normalised(z: Tensor) -> Tensor:
    """Each feature with mean 0 and variance 1 over the batch."""
    mean = z.sum(0) / len(z)
    variance = ((z - mean) ** 2).sum(0) / len(z)
    return (z - mean) / torch.sqrt(variance + EPSILON)


def mlp(p: dict[str, Tensor], bank: str, number: int, x: Tensor, last: str) -> Tensor:
    """MLP ``number`` of a bank: ReLU between layers, and ``last`` ("relu", "swish", "linear") at the end."""
    depth = sum(name.startswith(f"{bank}.weights.") for name in p)
    for layer in range(depth):
        x = x @ p[f"{bank}.weights.{layer}"][number].T
        if not (last == "swish" and layer == depth - 1):  # BN would subtract a bias again
            x = x + p[f"{bank}.biases.{layer}"][number]
        if layer < depth - 1 or last == "relu":
            x = relu(x)
    if last == "swish":
        its = slice(number * x.shape[1], (number + 1) * x.shape[1])
        z = p[f"{bank}.scale"][its] * normalised(x) + p[f"{bank}.shift"][its]
        x = z * sigmoid(z)
    return x


def mixed(p: dict[str, Tensor], gates: str, reader: int, x: Tensor, seen: Sequence[Tensor], squash="softmax") -> Tensor:
    """The sum of the outputs a reader sees, each times its gate: softmax(W x + b), or sigmoid(W x + b)."""
    scores = [x @ p[f"{gates}.weight"][reader][i] + p[f"{gates}.bias"][reader][i] for i in range(len(seen))]
    if squash == "softmax":
        total = sum(torch.exp(score) for score in scores)
        shares = [torch.exp(score) / total for score in scores]
    else:
        shares = [sigmoid(score) for score in scores]
    return sum(share[:, None] * output for share, output in zip(shares, seen, strict=True))


def tower(p: dict[str, Tensor], number: int, x: Tensor) -> Tensor:
    """The output of a task's tower, one number a row."""
    return mlp(p, "towers", number, x, "linear")[:, 0]
