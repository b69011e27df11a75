"""A router: a small network that tells by features which of several models a row is for, and its training."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import UserError
from koinon.nn.lowrank import thinned
from koinon.nn.params import stream, xavier
from koinon.nn.train import Batches, evaluating, train

Drop = Callable[[Tensor, int], Tensor]
"""What is done to a hidden layer, given its number."""


class Router(nn.Module):
    """An MLP d -> 2d -> 2d -> T with batch normalisation and leaky ReLU, from features to logits of the classes.

    Linear layers have no bias before batch normalisation, which would subtract it.
    """

    last: nn.Linear

    def __init__(self, classes: tuple[str, ...], width: int, seed: int):
        super().__init__()
        sizes = [(width, 2 * width), (2 * width, 2 * width)]
        hidden = [nn.utils.skip_init(nn.Linear, *its, bias=False) for its in sizes]
        self.last = nn.utils.skip_init(nn.Linear, 2 * width, len(classes))
        with torch.no_grad():
            for layer, linear in enumerate(hidden):
                linear.weight.copy_(xavier(linear.out_features, linear.in_features, stream(seed, "router", layer)))
            drawn = [xavier(1, 2 * width, stream(seed, "router", name)) for name in classes]
            self.last.weight.copy_(torch.cat(drawn))
            self.last.bias.zero_()
        self.hidden = nn.ModuleList(hidden)
        self.norms = nn.ModuleList(nn.BatchNorm1d(2 * width) for _ in sizes)

    def forward(self, x: Float[Tensor, "batch width"], drop: Drop = lambda h, layer: h) -> Float[Tensor, "batch class"]:
        """``drop`` is applied to each hidden layer, given its number."""
        for layer, (linear, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            x = drop(F.leaky_relu(norm(linear(x))), layer)
        return self.last(x)


def trained_router(
    rows: Mapping[str, Float[Tensor, "rows width"]],
    seed: int,
    dropout: Sequence[float],
    holdout: float,
    lr: float,
    batch: int,
    epochs: int,
) -> Router:
    """A router that tells by a row's features whose it is, as of the epoch of least loss on rows held out.

    The order of the names in ``rows`` changes nothing but the order of the logits.

    Args:
        rows: name to its rows' features.
        seed: start of the random streams.
        dropout: a probability for each hidden layer.
        holdout: share of each name's rows that are held out.
        lr: Adam's step size.
        batch: rows a step.
        epochs: passes over the rows.

    Raises:
        UserError: fewer than 4 rows of a name, or in a batch.
    """
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for name in sorted(rows):
        count = len(rows[name])
        if min(count, batch) < 4:
            raise UserError(f"{name!r}: {count} rows of data in batches of {batch}: the router needs 4 or more of each")
        order = torch.randperm(count, generator=stream(seed, "held out", name))
        held = min(max(round(holdout * count), 1), count - 2)
        for side, chosen in ((True, order[:held]), (False, order[held:])):
            sides[side].append((rows[name][chosen], torch.full_like(chosen, list(rows).index(name))))
    (held_x, held_y), (x, y) = ([torch.cat(its) for its in zip(*sides[side], strict=True)] for side in (True, False))
    router, masks = Router(tuple(rows), x.shape[1], seed), stream(seed, "dropout")

    def loss(model: nn.Module, given: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        logits = model(given[0], lambda h, layer: thinned(h, 1 - dropout[layer], masks))
        return F.cross_entropy(logits, given[1]["name"])

    least, best = float("inf"), router.state_dict()
    with torch.enable_grad():
        for _ in train(router, Batches(x, {"name": y}, batch, seed), loss, epochs, lr):
            with evaluating(router):
                value = float(F.cross_entropy(router(held_x), held_y).detach())
            if value < least:
                least, best = value, copy.deepcopy(router.state_dict())
    router.load_state_dict(best)
    return router.eval().requires_grad_(False)
