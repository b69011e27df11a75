"""Banks of experts and the gates that mix them, as batched matrix products.

Shapes: batch, expert (one of a bank), reader (one gate), group (experts that read one input), width.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import UserError
from koinon.nn.params import stream, xavier

Linear: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight [n, out, width] and bias [n, out] of n linear maps."""
Parts: TypeAlias = tuple[Tensor, ...]
"""A vector as parts side by side, [batch, part] each: one that nobody trains, as plain numbers, costs no gradient."""
LANES = 16
"""A product is fastest if its width is a multiple of this; a ragged one can take half as long again."""


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
        if len(sizes) < 2 or (names and min(sizes) < 1):  # no MLP at all may have any width
            raise UserError(f"layers of the widths {tuple(sizes[1:])}: give at least one, each from 1")
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

    @property
    def first(self) -> Linear:
        """The weights of the first product."""
        return self.weights[0], self.biases[0] if len(self.biases) else None

    def forward(
        self, x: Float[Tensor, "batch width"] | Float[Tensor, "batch group width"] | Parts
    ) -> Float[Tensor, "batch expert out"]:
        """Run every MLP: all on one input, or the first n/group on the first group's input, and so on."""
        return self.after(*read(x, self))

    def after(self, x: Float[Tensor, "batch expert hidden"]) -> Float[Tensor, "batch expert out"]:
        """From the first product, as `read` gives it, to the output."""
        if not self.names:
            return x.new_zeros(len(x), 0, self.sizes[-1])
        for layer, weight in list(enumerate(self.weights))[1:]:
            x = product(F.relu(x), weight, self.biases[layer] if layer < len(self.biases) else None)
        if self.last == "linear":
            return x
        if self.last == "relu":
            return F.relu(x)
        flat = x.flatten(1).contiguous()  # batch (expert out)
        normal = F.batch_norm(flat, self.running_mean, self.running_var, self.scale, self.shift, self.training)
        return F.silu(normal).view_as(x)


def joined(x: Tensor | Parts) -> Tensor:
    """The whole vector, for what cannot read parts."""
    return torch.cat(x, 1) if isinstance(x, tuple) else x


def product(
    x: Float[Tensor, "batch width"] | Float[Tensor, "batch group width"] | Parts,
    weight: Float[Tensor, "expert out width"],
    bias: Float[Tensor, "expert out"] | None,
) -> Float[Tensor, "batch expert out"]:
    """W_e x + b_e for every e at once: all on one input, or expert/group of them on each group's."""
    experts, out, width = weight.shape
    if isinstance(x, tuple):
        # Each part has a product and a gradient of its own; columns that lie apart would make the weights' slow.
        columns = weight.flatten(0, 1).split([part.shape[1] for part in x], 1)
        first, *others = [(part, its.contiguous()) for part, its in zip(x, columns, strict=True)]
        y = F.linear(*first, None if bias is None else bias.flatten())
        for part, its in others:
            y = y.addmm_(part, its.t())
        return y.view(len(y), experts, out)
    if x.ndim == 2:
        return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten()).view(len(x), experts, out)
    group = x.shape[1]
    each = weight.reshape(group, experts // group * out, width).transpose(1, 2)
    each_x = x.transpose(0, 1)  # group batch width
    y = torch.bmm(each_x, each) if bias is None else torch.baddbmm(bias.reshape(group, 1, -1), each_x, each)
    return y.transpose(0, 1).reshape(len(x), experts, out)


def read(
    x: Float[Tensor, "batch width"] | Float[Tensor, "batch group width"] | Parts, *readers: "Bank | Gates"
) -> list[Float[Tensor, "batch n out"]]:
    """The first product of everything that reads ``x``, as one product; hand each to its reader's ``after``.

    One wide product is faster than several narrow ones, above all backwards: the input's gradient is summed inside it.
    """
    firsts = [reader.first for reader in readers]
    if len(firsts) == 1:
        return [product(x, *firsts[0])]
    group = 1 if isinstance(x, tuple) or x.ndim == 2 else x.shape[1]
    weights = [w.reshape(group, w.shape[0] // group * w.shape[1], w.shape[2]) for w, _ in firsts]
    biases = [
        rows.new_zeros(rows.shape[:2]) if bias is None else bias.reshape(rows.shape[:2])
        for rows, (_, bias) in zip(weights, firsts, strict=True)
    ]
    sizes = [rows.shape[1] for rows in weights]
    ragged = -sum(sizes) % LANES
    if ragged:
        weights.append(weights[0].new_zeros(group, ragged, weights[0].shape[2]))
        biases.append(biases[0].new_zeros(group, ragged))
    y = product(x, torch.cat(weights, 1), torch.cat(biases, 1))  # batch group (all out)
    parts = y.split([*sizes, ragged], 2)
    return [part.reshape(len(y), *weight.shape[:2]) for part, (weight, _) in zip(parts, firsts, strict=False)]


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
        if visible == 0:
            raise UserError(f"{readers[0]} would have no expert to read: give it at least one")
        self.complete = visible == len(self.experts)
        rows = [
            xavier(1, width, stream(seed, "gate", squash, reader, experts[expert]))
            for reader, its in zip(readers, seen, strict=True)
            for expert in its
        ]
        self.weight = nn.Parameter(torch.stack(rows).view(len(self.readers), visible, width))
        self.bias = nn.Parameter(torch.zeros(len(self.readers), visible))
        self.given = _Given()

    @property
    def first(self) -> Linear:
        """The weights of the product that gives the logits."""
        return self.weight, self.bias

    def forward(
        self,
        x: Float[Tensor, "batch width"] | Float[Tensor, "batch reader width"] | Parts,
        values: Float[Tensor, "batch expert out"],
    ) -> Float[Tensor, "batch reader out"]:
        """Mix the experts' outputs for each reader."""
        (logits,) = read(x, self)
        return self.after(logits, values)

    def after(
        self, logits: Float[Tensor, "batch reader visible"], values: Float[Tensor, "batch expert out"]
    ) -> Float[Tensor, "batch reader out"]:
        """From the logits, as `read` gives them, to the mixture."""
        return mixed(values, [self], [logits])

    def weights(self, logits: Float[Tensor, "batch reader visible"]) -> Float[Tensor, "batch reader expert"]:
        """What each reader gives each expert; exactly 0 for those it does not see."""
        # Batch last: over a last axis as short as the experts a softmax takes three times as long.
        turned = logits.permute(1, 2, 0)  # reader visible batch
        gates = (turned.softmax(1) if self.squash == "softmax" else turned.sigmoid()).permute(2, 0, 1)
        if self.complete:
            return gates
        full = gates.new_zeros(len(logits), len(self.readers), len(self.experts))
        return full.scatter(2, self.seen.expand(len(logits), -1, -1), gates)


class _Given(nn.Module):
    """The weights as they are: a module of its own, so that a hook can see them beside what they mix."""

    def forward(
        self, weights: Float[Tensor, "batch reader expert"], values: Float[Tensor, "batch expert out"]
    ) -> Float[Tensor, "batch reader expert"]:
        return weights


def mixed(
    values: Float[Tensor, "batch expert out"],
    gates: Sequence[Gates],
    logits: Sequence[Float[Tensor, "batch reader visible"]],
) -> Float[Tensor, "batch reader out"]:
    """The experts' outputs mixed for each reader of several gates, gates after gates, as one product."""
    weights = [one.given(one.weights(its), values) for one, its in zip(gates, logits, strict=True)]
    return torch.bmm(torch.cat(weights, 1), values)
