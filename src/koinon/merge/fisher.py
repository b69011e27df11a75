"""Fisher merging: average the models element by element, each weighted by how much its predictions hang on the element.

Departures: the floor is under every model's Fisher information; the paper's release has it under the first model's
only, which is then favoured. Running means and variances have no Fisher information and are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import Paper, refuse_below
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import needed, outputs, parts, quietly, rows, shared_states, taken, with_weights
from koinon.merge._vectors import each
from koinon.merge.average import weighted_mean
from koinon.nn.params import stream


@dataclass(frozen=True)
class Fisher(Merge):
    """sum_t w_t F_t theta_t / sum_t w_t F_t (Matena and Raffel, section 3), with F_t diagonal."""

    paper: ClassVar = Paper("Merging Models with Fisher-Weighted Averaging", 2021, "https://arxiv.org/abs/2111.09832")
    null: ClassVar = {"floor": 1e9}
    exempt: ClassVar = {"seed_is_live": "nothing is drawn while the expectation is exact, as it is by default"}

    floor: float = 1e-6
    """Smallest Fisher information of an element; far above all of them it makes an average."""
    weights: tuple[float, ...] = (1.0,)
    """w_t, the paper's lambda: one for each model, or one for all."""
    normalize: bool = False
    """Divide each model's Fisher information by its norm first, as the release does: a model whose predictions are sure
    has little of it, and is overruled otherwise."""
    sampled: bool = False
    """Draw one class a row from the model's prediction, not the exact sum over classes: one backward pass a row."""
    seed: int = 0
    """Start of the random streams that classes are drawn from."""

    def merge(self, pool: Pool) -> nn.Module:
        """1. The Fisher information of each model on its own inputs. 2. The mean that it weights."""
        refuse_below(0, floor=self.floor)
        base, tuned = shared_states(pool)
        names, others = parts(pool.base, base)
        weights = each(self.weights, list(tuned), "weights")
        state = {name: weighted_mean([its[name] for its in tuned.values()], weights, True) for name in others}
        above: dict[str, Tensor] = {}
        below: dict[str, Tensor] = {}
        for (task, inputs), weight in zip(needed(pool, "Fisher merging").items(), weights, strict=True):
            generator = stream(self.seed, "classes", task) if self.sampled else None
            found = information(pool.tuned[task], names, inputs, generator)
            norm = torch.stack([its.norm() for its in found]).norm() if self.normalize else 1
            for name, its in zip(names, found, strict=True):
                share = weight * (its / norm).nan_to_num().clamp(min=self.floor)
                above[name] = above.get(name, 0) + share * tuned[task][name]
                below[name] = below.get(name, 0) + share
        for name in names:
            plain = weighted_mean([its[name] for its in tuned.values()], weights, True)
            state[name] = torch.where(below[name] == 0, plain, above[name] / below[name])
        return with_weights(pool.base, state)


@torch.enable_grad()
def information(
    module: nn.Module, names: Sequence[str], inputs: Any, generator: torch.Generator | None = None
) -> list[Float[Tensor, "..."]]:
    """The diagonal of the Fisher information of some parameters: E_x E_y (d log p(y | x) / d theta)^2.

    x are the rows of the inputs, y the model's own predictions: all classes by their probability, or one that is drawn.
    Rows are taken one by one, so that no more is held than one gradient; on a CPU ``torch.func.vmap`` is no faster.
    """
    module = quietly(module)
    held = dict(module.named_parameters())
    parameters = [held[name].requires_grad_() for name in names]
    totals = [torch.zeros_like(its, dtype=torch.promote_types(its.dtype, torch.float32)) for its in parameters]
    count = rows(inputs)
    for row in range(count):
        logs = outputs(module, taken(inputs, slice(row, row + 1))).log_softmax(-1).flatten(0, -2)  # place class
        chances = logs.detach().exp()
        for place, chance in enumerate(chances):
            for label, weight in _labels(chance, generator):
                slopes = torch.autograd.grad(
                    logs[place, label], parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for total, slope in zip(totals, slopes, strict=True):
                    total.addcmul_(slope, slope, value=weight / count)
    return totals


def _labels(chance: Float[Tensor, " class"], generator: torch.Generator | None) -> list[tuple[int, float]]:
    if generator is None:
        return list(enumerate(chance.tolist()))
    return [(int(torch.multinomial(chance.cpu(), 1, generator=generator)), 1.0)]
