"""Banks of experts and the gates that mix them, as batched matrix products.

Shapes: batch, expert (one of a bank), reader (one gate), group (experts that read one input), width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.nn.params import stream, xavier


class Expert(NamedTuple):
    """The name of one expert; parameters are drawn from the random stream of this name."""

    level: int
    """Counted from 1, nearest to the input."""
    owner: str
    """``"shared"``, ``"group NAME"`` or ``"task NAME"``."""
    number: int


def experts_of(level: int, owners: Sequence[str], each: int) -> list[Expert]:
    """``each`` experts for every owner, owner by owner."""
    return [Expert(level, owner, number) for owner in owners for number in range(each)]


class Bank(nn.Module):
    """MLPs of one shape side by side: one matrix product a layer for all of them.

    Args:
        names: one for each MLP; its weights are drawn from the random stream of that name.
        sizes: widths from input to output, ``(d_in, hidden, ..., d_out)``.
        seed: start of the random streams.
        last: ``"relu"``, ``"swish"`` (batch normalisation, then z * sigmoid(z)) or ``"linear"``.
            Layers before the last one use ReLU.
        bias: add a vector after each product (never before batch normalisation, which would subtract it).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, names: Sequence[object], sizes: Sequence[int], seed: int, last: str = "relu", bias: bool = True):
        super().__init__()
        self.names = tuple(names)
        self.sizes = tuple(sizes)
        self.last = last
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        depth = len(self.sizes) - 1
        for layer, (width, out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            drawn = [xavier(out, width, stream(seed, name, layer)) for name in self.names]
            self.weights.append(nn.Parameter(torch.stack(drawn) if drawn else torch.empty(0, out, width)))
            if bias and not (last == "swish" and layer == depth - 1):
                self.biases.append(nn.Parameter(torch.zeros(len(self.names), out)))
        if last == "swish":
            total = len(self.names) * self.sizes[-1]
            self.scale = nn.Parameter(torch.ones(total))
            self.shift = nn.Parameter(torch.zeros(total))
            self.register_buffer("running_mean", torch.zeros(total))
            self.register_buffer("running_var", torch.ones(total))

    def forward(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch group width"]
    ) -> Float[Tensor, "batch expert out"]:
        """Run every MLP: all on one input, or the first n/group on the first group's input, and so on."""
        if not self.names:
            return x.new_zeros(len(x), 0, self.sizes[-1])
        for layer, weight in enumerate(self.weights):
            if layer:
                x = F.relu(x)
            x = product(x, weight, self.biases[layer] if layer < len(self.biases) else None)
        return self._activate(x)

    def _activate(self, x: Float[Tensor, "batch expert out"]) -> Float[Tensor, "batch expert out"]:
        if self.last == "linear":
            return x
        if self.last == "relu":
            return F.relu(x)
        flat = x.flatten(1)  # batch (expert out)
        normal = F.batch_norm(flat, self.running_mean, self.running_var, self.scale, self.shift, self.training)
        return F.silu(normal).view_as(x)


def product(
    x: Float[Tensor, "batch width"] | Float[Tensor, "batch group width"],
    weight: Float[Tensor, "expert out width"],
    bias: Float[Tensor, "expert out"] | None,
) -> Float[Tensor, "batch expert out"]:
    """x W_e + b_e for every e at once: all on one input, or expert/group of them on each group's."""
    experts, out, width = weight.shape
    if x.ndim == 2:
        return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten()).view(-1, experts, out)
    group = x.shape[1]
    each = weight.reshape(group, experts // group * out, width).transpose(1, 2)
    each_x = x.transpose(0, 1)  # group batch width
    y = torch.bmm(each_x, each) if bias is None else torch.baddbmm(bias.reshape(group, 1, -1), each_x, each)
    return y.transpose(0, 1).reshape(-1, experts, out)


class Gates(nn.Module):
    """One gate a reader: its output is a weighted sum of the experts it may see.

    Args:
        readers: one name for each gate.
        experts: one name for each expert, in the order of ``values`` in `forward`.
        sees: for each reader the owners whose experts it may see; equally many experts for all readers.
        width: width of the gates' input.
        seed: start of the random streams.
        squash: ``"softmax"`` over the visible experts, or ``"sigmoid"`` of each.
    """

    seen: Tensor

    def __init__(
        self,
        readers: Sequence[str],
        experts: Sequence[Expert],
        sees: Sequence[Sequence[str]],
        width: int,
        seed: int,
        squash: str = "softmax",
    ):
        super().__init__()
        self.readers = tuple(readers)
        self.experts = tuple(experts)
        self.squash = squash
        seen = [[i for i, expert in enumerate(experts) if expert.owner in owners] for owners in sees]
        self.register_buffer("seen", torch.tensor(seen, dtype=torch.long), persistent=False)
        visible = len(seen[0])
        self.complete = visible == len(self.experts)
        rows = [
            xavier(1, width, stream(seed, "gate", squash, reader, experts[expert]))
            for reader, its in zip(readers, seen, strict=True)
            for expert in its
        ]
        self.weight = nn.Parameter(torch.stack(rows).view(len(self.readers), visible, width))
        self.bias = nn.Parameter(torch.zeros(len(self.readers), visible))

    def weights(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch reader width"]
    ) -> Float[Tensor, "batch reader expert"]:
        """What each reader gives each expert; exactly 0 for those it does not see."""
        logits = product(x, self.weight, self.bias)  # batch reader visible
        gates = logits.softmax(-1) if self.squash == "softmax" else logits.sigmoid()
        if self.complete:
            return gates
        full = gates.new_zeros(len(x), len(self.readers), len(self.experts))
        return full.scatter(2, self.seen.expand(len(x), -1, -1), gates)

    def forward(
        self,
        x: Float[Tensor, "batch width"] | Float[Tensor, "batch reader width"],
        values: Float[Tensor, "batch expert out"],
    ) -> Float[Tensor, "batch reader out"]:
        """Mix the experts' outputs for each reader."""
        return torch.bmm(self.weights(x), values)
