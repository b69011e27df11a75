"""The one training loop, and one way to predict in batches."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from koinon.nn.params import stream
from koinon.nn.tasks import KINDS


class Accelerator(Protocol):
    """What is used of ``accelerate.Accelerator``, which spreads training over devices."""

    def prepare(self, *args: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class Cost:
    """What training has cost so far."""

    epochs: int = 0
    samples: int = 0
    passes: int = 0
    """Forward passes, each with its backward pass."""
    seconds: float = 0.0


class Batches:
    """``(inputs, labels)`` in memory, as minibatches in a new random order each time it is iterated.

    The last batch is never a small rest (batch normalisation cannot use one): sizes differ by at most 1.

    Args:
        inputs: a tensor, or a dict, list or tuple of tensors, all with the batch dimension first.
        labels: task name to labels [rows].
        size: the largest batch size.
        seed: start of the random order.
    """

    def __init__(self, inputs: Any, labels: Mapping[str, Tensor], size: int, seed: int = 0):
        self.inputs, self.labels = inputs, labels
        self.size = size
        self.order = stream(seed, "batches")

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        rows = len(next(iter(self.labels.values())))
        shuffled = torch.randperm(rows, generator=self.order)
        for index in shuffled.tensor_split(-(-rows // self.size)):
            yield pytree.tree_map(lambda x, i=index: x[i], (self.inputs, dict(self.labels)))


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    epochs: int = 1,
    lr: float = 1e-3,
    accelerator: Accelerator | None = None,
) -> Iterator[Cost]:
    """Train with Adam; yields after each epoch, so that the caller can evaluate, keep or stop.

    Args:
        model: changed in place.
        batches: iterated once an epoch.
        loss: from model and batch to a scalar.
        epochs: passes over ``batches``.
        lr: Adam's step size.
        accelerator: an ``accelerate.Accelerator`` to train on its devices.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    runner = model
    if accelerator is not None:
        runner, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    cost, start = Cost(), time.perf_counter()
    for epoch in range(1, epochs + 1):
        runner.train()
        samples, passes = cost.samples, cost.passes
        for batch in batches:
            optimizer.zero_grad()
            value = loss(runner, batch)
            value.backward() if accelerator is None else accelerator.backward(value)
            optimizer.step()
            samples += len(pytree.tree_leaves(batch)[0])
            passes += 1
        cost = Cost(epoch, samples, passes, time.perf_counter() - start)
        yield cost
        start = time.perf_counter() - cost.seconds  # what the caller does in between is not training


def fit(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], **options: Any) -> Cost:
    """`train` to the end; returns what it cost."""
    return deque(train(model, batches, loss, **options), maxlen=1)[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules is given back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def predict(model: nn.Module, inputs: Any, size: int = 8192) -> dict[str, Tensor]:
    """Probabilities (binary) or values (regression) for each task, [rows], computed ``size`` rows at a time.

    The model is put into evaluation mode and given back as it was.
    """
    rows = len(pytree.tree_leaves(inputs)[0])
    with evaluating(model):
        parts = [model(pytree.tree_map(lambda x, s=s: x[s : s + size], inputs)) for s in range(0, rows, size)]
    return {
        task.name: KINDS[task.kind].predict(torch.cat([part[task.name] for part in parts]))
        for task in model.tasks  # type: ignore[union-attr]
    }
