"""The same networks in koinon, torch-rechub and deepctr-torch, with koinon's weights copied into the peers.

A peer's library is imported where its network is built, so that a process that measures memory holds one library only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.data.schema import Category, Number, Schema, TableEncoder
from koinon.nn.experts import Bank, Gates
from koinon.nn.tasks import Task, shared_loss
from koinon.share._contract import Share, Shared
from koinon.share.home import HoME
from koinon.share.mmoe import MMoE
from koinon.share.ple import PLE

TASKS = tuple(Task(f"t{i}", group=("a", "b")[i % 2]) for i in range(6))
NAMES = [task.name for task in TASKS]
EXPERT, TOWER = 64, 32


@dataclass(frozen=True)
class Table:
    """What the networks read."""

    categories: int
    """Columns of categories; 0 for a table of numbers that comes as one tensor."""
    numbers: int
    """Columns of numbers."""
    size: int = 1000
    """Values a category takes."""
    embedding: int = 16
    """Width of a category's vector."""

    @property
    def width(self) -> int:
        return self.categories * self.embedding + self.numbers

    def encoder(self) -> nn.Module:
        """koinon's."""
        if not self.categories:
            return nn.Identity()
        values = tuple(str(value) for value in range(1, self.size))  # and code 0 for every other one
        categories = tuple(Category(f"c{i}", values) for i in range(self.categories))
        numbers = tuple(Number(f"n{i}", 0.0, 1.0) for i in range(self.numbers))
        return TableEncoder(Schema(categories, numbers), self.embedding)


@dataclass(frozen=True)
class Rows:
    """One batch."""

    categories: Int[Tensor, "batch column"]
    numbers: Float[Tensor, "batch column"]
    labels: Float[Tensor, "batch task"]


@dataclass(frozen=True)
class Contestant:
    """A network with a batch in the form its library wants."""

    name: str
    model: nn.Module
    forward: Callable[[], Float[Tensor, "batch task"]]
    """Probabilities."""
    loss: Callable[[], Float[Tensor, ""]]
    """What its library's trainer minimises, as a sum over tasks of means over rows."""
    optimizer: Callable[[], torch.optim.Optimizer]
    """Adam, as its library's trainer makes it."""
    same: str | None = None
    """Name of the contestant that has the same weights; None for koinon's own."""
    exact: bool = True
    """Equal in training as well; otherwise in evaluation only, where a fresh batch normalisation does nothing."""
    gate_bias: bool = True
    """Its gates add a bias."""


SETTINGS = {
    "trunk": Table(0, 700),
    "table, embedding 8": Table(100, 600, embedding=8),
    "table, embedding 16": Table(100, 600, embedding=16),
}
METHODS: dict[str, Callable[[bool], Share]] = {
    "mmoe": lambda swish: MMoE(experts=8, expert=(EXPERT,), tower=(TOWER,), swish=swish),
    "ple": lambda swish: PLE(levels=2, shared=1, specific=1, expert=(EXPERT,), tower=(TOWER,), swish=swish),
    "home": lambda swish: HoME(expert=(EXPERT,), tower=(TOWER,), swish=swish),
}
CONTESTANTS = {
    "mmoe": ["koinon", "koinon swish", "deepctr-torch", "torch-rechub no BN", "torch-rechub"],
    "ple": ["koinon", "koinon swish", "deepctr-torch", "torch-rechub no BN", "torch-rechub"],
    "home": ["koinon swish"],
}


def draw(table: Table, batch: int) -> Rows:
    random = torch.Generator().manual_seed(0)
    return Rows(
        torch.randint(table.size, (batch, table.categories), generator=random),
        torch.randn(batch, table.numbers, generator=random),
        torch.randint(2, (batch, len(TASKS)), generator=random).float(),
    )


def build(name: str, method: str, table: Table, rows: Rows) -> Contestant:
    """One contestant, with the weights that every other one of this method and table has."""
    swish = name in ("koinon swish", "torch-rechub")
    ours = METHODS[method](swish).share(table.encoder(), TASKS, table.width)
    jitter(ours)
    if name.startswith("koinon"):
        return _koinon(name, ours, table, rows)
    if name == "deepctr-torch":
        return _deepctr(ours, method, table, rows)
    return _rechub(name, ours, method, table, rows)


@torch.no_grad()
def jitter(ours: Shared) -> None:
    """Move every bias off zero, so that a wrongly copied one shows; but deepctr-torch's gates have none."""
    random = torch.Generator().manual_seed(2)
    gates = [id(module.bias) for module in ours.modules() if isinstance(module, Gates)]
    for name, parameter in ours.named_parameters():
        if "bias" in name and id(parameter) not in gates:
            parameter.normal_(0, 0.1, generator=random)


def _koinon(name: str, ours: Shared, table: Table, rows: Rows) -> Contestant:
    inputs = {"categories": rows.categories, "numbers": rows.numbers} if table.categories else rows.numbers
    labels = dict(zip(NAMES, rows.labels.T.contiguous(), strict=True))
    return Contestant(
        name,
        ours,
        lambda: torch.stack(list(ours(inputs).values()), 1).sigmoid(),
        lambda: shared_loss(ours, (inputs, labels)),
        lambda: torch.optim.Adam(ours.parameters(), fused=True),
    )


def _peer(name: str, model: nn.Module, inputs: Any, labels: Tensor, **kind: Any) -> Contestant:
    def loss() -> Tensor:
        out = model(inputs)
        return torch.stack([F.binary_cross_entropy(out[:, i], labels[:, i]) for i in range(len(TASKS))]).sum()

    return Contestant(name, model, lambda: model(inputs), loss, lambda: torch.optim.Adam(model.parameters()), **kind)


def _deepctr(ours: Shared, method: str, table: Table, rows: Rows) -> Contestant:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import MMOE, PLE

    sparse = [SparseFeat(f"c{i}", table.size, table.embedding) for i in range(table.categories)]
    dense = [DenseFeat(f"n{i}") for i in range(table.numbers)] if sparse else [DenseFeat("numbers", table.numbers)]
    shape = {
        "expert_dnn_hidden_units": (EXPERT,),
        "gate_dnn_hidden_units": (),
        "tower_dnn_hidden_units": (TOWER,),
        "l2_reg_embedding": 0,
        "task_types": ["binary"] * len(TASKS),
        "task_names": NAMES,
    }
    if method == "mmoe":
        model = MMOE(sparse + dense, num_experts=8, **shape)
        for expert, its in zip(model.expert_dnn, linears(ours.trunk.experts), strict=True):
            copy(expert.linears[0], *its)
        for gate, weight in zip(model.gate_dnn_final_layer, ours.trunk.gates.weight, strict=True):
            copy(gate, weight)
    else:
        model = PLE(sparse + dense, shared_expert_num=1, specific_expert_num=1, num_levels=2, **shape)
        for level, extraction in enumerate(ours.trunk):
            for experts, its in zip(model.specific_experts[level], linears(extraction.specific), strict=True):
                copy(experts[0].linears[0], *its)
            for expert, its in zip(model.shared_experts[level][0], linears(extraction.shared), strict=True):
                copy(expert.linears[0], *its)
            gates = model.specific_gate_dnn_final_layer[level]
            for gate, weight in zip(gates, extraction.task_gates.weight, strict=True):
                copy(gate, weight.roll(-1, 0))
            if extraction.shared_gate is not None:
                copy(model.shared_gate_dnn_final_layer[level], extraction.shared_gate.weight[0].roll(-1, 0))
    for i, (hidden, (weight, bias)) in enumerate(zip(linears(ours.towers), linears(ours.towers, 1), strict=True)):
        copy(model.tower_dnn[i].linears[0], *hidden)
        copy(model.tower_dnn_final_layer[i], weight)
        assign(model.out[i].bias, bias)
    embed(model.embedding_dict, ours, table)
    inputs = torch.cat([rows.categories.float(), rows.numbers], 1)
    return _peer("deepctr-torch", model, inputs, rows.labels, same="koinon", gate_bias=False)


def _rechub(name: str, ours: Shared, method: str, table: Table, rows: Rows) -> Contestant:
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE

    inputs: dict[str, Tensor] = {f"c{i}": column.contiguous() for i, column in enumerate(rows.categories.T)}
    features: list[Any] = [SparseFeature(column, table.size, table.embedding) for column in inputs]
    if features:
        numbers = {f"n{i}": column.contiguous() for i, column in enumerate(rows.numbers.T)}
        features += [DenseFeature(column) for column in numbers]
        inputs |= numbers
    else:
        features.append(DenseFeature("numbers", table.numbers))
        inputs["numbers"] = rows.numbers
    as_released = name == "torch-rechub"
    types = ["classification"] * len(TASKS)
    expert = {"dims": [EXPERT], "activation": nn.SiLU if as_released else "relu"}
    towers = [{"dims": [TOWER]} for _ in TASKS]
    if method == "mmoe":
        model = MMOE(features, types, 8, expert, towers)
        for mlp, its in zip(model.experts, linears(ours.trunk.experts), strict=True):
            copy(mlp.mlp[0], *its)
        for gate, its in zip(model.gates, zip(ours.trunk.gates.weight, ours.trunk.gates.bias), strict=True):
            copy(gate.mlp[0], *its)
    else:
        model = PLE(features, types, 2, 1, 1, expert, towers)
        for cgc, extraction in zip(model.cgc_layers, ours.trunk, strict=True):
            for mlp, its in zip(cgc.experts_specific, linears(extraction.specific), strict=True):
                copy(mlp.mlp[0], *its)
            for mlp, its in zip(cgc.experts_shared, linears(extraction.shared), strict=True):
                copy(mlp.mlp[0], *its)
            for gate, weight in zip(cgc.gates_specific, extraction.task_gates.weight, strict=True):
                copy(gate.mlp[0], weight.roll(-1, 0))
            if extraction.shared_gate is not None:
                copy(cgc.gate_shared.mlp[0], extraction.shared_gate.weight[0].roll(-1, 0))
    for tower, hidden, last in zip(model.towers, linears(ours.towers), linears(ours.towers, 1), strict=True):
        copy(tower.mlp[0], *hidden)
        copy(tower.mlp[-1], *last)
    embed(model.embedding.embed_dict, ours, table)
    if not as_released:
        for part in [part for part in model.modules() if isinstance(part, nn.Sequential)]:
            for i, layer in enumerate(part):
                if isinstance(layer, nn.BatchNorm1d):
                    part[i] = nn.Identity()
    same = "koinon swish" if as_released else "koinon"
    return _peer(name, model, inputs, rows.labels, same=same, exact=not as_released)


def linears(bank: Bank, layer: int = 0) -> Iterator[Sequence[Tensor]]:
    """Weight and, where the bank has one, bias of each MLP's layer."""
    tensors = [bank.weights[layer], *bank.biases[layer : layer + 1]]
    return zip(*tensors, strict=True)


@torch.no_grad()
def copy(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    assign(linear.weight, weight)
    if linear.bias is not None:
        assign(linear.bias, torch.zeros_like(linear.bias) if bias is None else bias)


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    assert parameter.shape == value.shape
    parameter.copy_(value)


def embed(embeddings: nn.ModuleDict, ours: Shared, table: Table) -> None:
    if table.categories:
        for i, part in enumerate(ours.encoder.embedding.split(table.size)):
            assign(embeddings[f"c{i}"].weight, part)
