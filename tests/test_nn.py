"""Blocks: streams, banks of experts, gates, tasks and their loss, training, prediction, meters."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from oracles.plain import mlp, parameters
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from koinon.core import UserError
from koinon.nn.experts import Bank, Expert, Gates, experts_of, joined, mixed, read
from koinon.nn.health import expert_health
from koinon.nn.params import stream, trained, xavier
from koinon.nn.tasks import Task, distinct, parse_task, shared_loss, task_loss
from koinon.nn.train import Batches, fit, predict, train

# Random streams.


def test_streams_leave_the_global_random_numbers_alone():
    """Drawing from a stream neither reads nor moves the global generator."""
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        held = torch.random.get_rng_state()
        drawn.append(torch.rand(3, generator=stream(0, "a")))
        assert torch.equal(held, torch.random.get_rng_state())
    torch.random.set_rng_state(before)
    assert torch.equal(*drawn)


def test_streams_differ_by_seed_and_by_every_word():
    """Equal for equal words only; how words are cut matters, and numbers are not text."""
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "ab"), (0, "a", "b"), (0, ("a", "b"))]
    drawn = {key: torch.rand(4, generator=stream(*key)) for key in keys}
    assert len({tuple(values.tolist()) for values in drawn.values()}) == len(keys)
    for key, values in drawn.items():
        assert torch.equal(values, torch.rand(4, generator=stream(*key)))


def test_streams_have_known_values():
    """The same on every machine and in every process, or saved results could not be run again."""
    assert stream(0).initial_seed() == 7210762507766007076
    assert stream(3, "expert", 1).initial_seed() == 9137553504055296545
    assert all(0 <= stream(seed, "x").initial_seed() < 2**63 for seed in range(50))


def test_xavier_has_the_variance_it_is_named_for():
    """Uniform within sqrt(6 / (width + out)): variance 2 / (width + out)."""
    drawn = xavier(300, 200, stream(0, "x"))
    assert drawn.shape == (300, 200)
    assert drawn.abs().max() <= math.sqrt(6 / 500)
    assert drawn.var().item() == pytest.approx(2 / 500, rel=0.02)
    assert drawn.mean().item() == pytest.approx(0, abs=1e-3)


def test_trained_counts_what_training_changes():
    model = nn.Linear(3, 2)
    assert trained(model) == 8
    model.bias.requires_grad_(False)
    assert trained(model) == 6


# Banks.


def bank_of(names, sizes, last="relu", bias=True) -> Bank:
    """A bank in double precision with every parameter drawn anew."""
    bank = Bank(names, sizes, seed=0, last=last, bias=bias).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream(1, "bank", *parameter.shape)))
    return bank


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "draw", *shape), dtype=torch.float64)


@pytest.mark.parametrize("last", ["relu", "swish", "linear"])
@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (4, 5, 6, 3)])
@pytest.mark.parametrize("groups", [None, 1, 2, 3, 6])
def test_bank_equals_loops_over_its_mlps(last, sizes, groups):
    """All on one input, or the first 6 / groups on the first group's input, and so on."""
    bank = bank_of(range(6), sizes, last)
    x = draw(9, 4) if groups is None else draw(9, groups, 4)
    found = bank(x)
    assert found.shape == (9, 6, sizes[-1])
    p = {f"bank.{name}": value for name, value in parameters(bank).items()}
    for expert in range(6):
        own = x if groups is None else x[:, expert * groups // 6]
        torch.testing.assert_close(found[:, expert], mlp(p, "bank", expert, own, last), rtol=1e-10, atol=1e-12)


def test_bank_without_bias_has_none():
    """Never a vector to add where ``bias`` is False, and none before batch normalisation."""
    assert [name for name, _ in bank_of(range(2), (4, 5, 3), bias=False).named_parameters()] == [
        "weights.0",
        "weights.1",
    ]
    assert len(bank_of(range(2), (4, 5, 3)).biases) == 2
    assert len(bank_of(range(2), (4, 5, 3), "swish").biases) == 1
    x = draw(7, 4)
    bank = bank_of(range(2), (4, 3), "linear", bias=False)
    torch.testing.assert_close(bank(x), torch.einsum("bd,eod->beo", x, bank.weights[0]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("last", ["relu", "swish", "linear"])
def test_empty_bank_gives_no_expert(last):
    """A bank of none is a layer that adds nothing to a concatenation."""
    bank = Bank([], (4, 5, 3), seed=0, last=last)
    assert bank(torch.ones(7, 4)).shape == bank(torch.ones(7, 2, 4)).shape == (7, 0, 3)
    assert trained(bank) == 0


def test_bank_draws_by_name():
    """An MLP starts the same whatever else is in the bank, and MLPs of one bank start differently."""
    one, other = Bank(["a", "b"], (4, 5, 3), seed=0), Bank(["c", "b", "a"], (4, 5, 3), seed=0)
    for layer in range(2):
        assert torch.equal(one.weights[layer][0], other.weights[layer][2])
        assert torch.equal(one.weights[layer][1], other.weights[layer][1])
        assert len({tuple(w.flatten().tolist()) for w in other.weights[layer]}) == 3
    again = Bank(["a", "b"], (4, 5, 3), seed=1)
    assert not torch.equal(one.weights[0], again.weights[0])


def test_bank_in_evaluation_uses_running_statistics():
    """They move a tenth of the way to each training batch, with the unbiased variance, and rows do not mix."""
    bank = bank_of(range(2), (4, 3), "swish")
    x = draw(11, 4)
    z = torch.cat([x @ w.T for w in bank.weights[0]], 1)
    bank(x)
    torch.testing.assert_close(bank.running_mean, 0.1 * z.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bank.running_var, 0.9 + 0.1 * z.var(0), rtol=1e-10, atol=1e-12)
    bank.eval()
    normal = (z - bank.running_mean) / torch.sqrt(bank.running_var + 1e-5) * bank.scale + bank.shift
    torch.testing.assert_close(bank(x).flatten(1), normal * normal.sigmoid(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bank(x)[:1], bank(x[:1]), rtol=1e-10, atol=1e-12)


def test_experts_of_names_owner_by_owner():
    assert experts_of(2, ["shared", "task a"], 2) == [
        Expert(2, "shared", 0),
        Expert(2, "shared", 1),
        Expert(2, "task a", 0),
        Expert(2, "task a", 1),
    ]
    assert experts_of(1, ["shared"], 0) == []


# Gates.

NAMES = experts_of(1, ["shared"], 2) + experts_of(1, ["task a", "task b"], 1)


def gates_of(sees, squash="softmax", readers=("task a", "task b")) -> Gates:
    gates = Gates(readers, NAMES, sees, 4, seed=0, squash=squash).double()
    with torch.no_grad():
        gates.bias.copy_(draw(*gates.bias.shape))
    return gates


def test_gates_refuse_ragged_views():
    """Readers that see different numbers of experts cannot be one product, and must not be padded in silence."""
    with pytest.raises(ValueError, match="length"):
        Gates(["a", "b"], NAMES, [["shared"], ["shared", "task b"]], 4, seed=0)


@pytest.mark.parametrize("squash", ["softmax", "sigmoid"])
@pytest.mark.parametrize("each", [False, True])
def test_gates_equal_loops_and_give_exactly_zero_to_the_unseen(squash, each):
    """Each reader on the common input, or on one of its own."""
    gates = gates_of([["shared", "task a"], ["shared", "task b"]], squash)
    x = draw(5, 2, 4) if each else draw(5, 4)
    weights, values = gates.weights(*read(x, gates)), draw(5, 4, 3)
    for reader, seen in enumerate(([0, 1, 2], [0, 1, 3])):
        own = x[:, reader] if each else x
        scores = torch.stack([own @ gates.weight[reader, i] + gates.bias[reader, i] for i in range(3)], 1)
        given = scores.exp() / scores.exp().sum(1, keepdim=True) if squash == "softmax" else 1 / (1 + (-scores).exp())
        torch.testing.assert_close(weights[:, reader, seen], given, rtol=1e-12, atol=1e-14)
        unseen = ({0, 1, 2, 3} - set(seen)).pop()
        assert bool((weights[:, reader, unseen] == 0).all())
        mixed = sum(given[:, [i]] * values[:, expert] for i, expert in enumerate(seen))
        torch.testing.assert_close(gates(x, values)[:, reader], mixed, rtol=1e-12, atol=1e-14)


def test_gates_that_see_all_need_no_mask():
    gates = gates_of([["shared", "task a", "task b"]] * 2)
    weights = gates.weights(*read(draw(5, 4), gates))
    assert weights.shape == (5, 2, 4)
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2, dtype=torch.float64))


def test_gates_draw_by_reader_and_expert():
    """A gate's row starts the same whatever else there is."""
    one = Gates(["task a"], NAMES[:2], [["shared"]], 4, seed=0)
    other = Gates(["task b", "task a"], NAMES, [["shared", "task b"], ["shared", "task a"]], 4, seed=0)
    assert torch.equal(one.weight[0], other.weight[1, :2])
    assert not torch.equal(other.weight[0, :2], other.weight[1, :2])


def test_several_gates_mix_as_each_alone():
    """Whatever each sees, as one product."""
    one, other = gates_of([["shared"]], readers=("level 1",)), gates_of([["shared", "task a"], ["shared", "task b"]])
    x, values = draw(5, 4), draw(5, 4, 3)
    both = mixed(values, [one, other], read(x, one, other))
    torch.testing.assert_close(both, torch.cat([one(x, values), other(x, values)], 1), rtol=1e-12, atol=1e-14)


# A vector in parts.


def test_parts_are_read_as_the_whole():
    """The same outputs and gradients, with any number of parts and readers, and an empty part."""
    bank, gates = bank_of(range(3), (6, 5, 3)), Gates(["a"], NAMES, [["shared", "task a"]], 6, seed=0).double()
    x = draw(9, 6)
    assert torch.equal(joined(x.split([2, 3, 1], 1)), x)
    assert joined(x) is x
    for readers in ((bank,), (bank, gates)):
        found = []
        for given in (x, x.split([6], 1), x.split([2, 4], 1), x.split([1, 2, 3], 1), x.split([0, 6], 1)):
            outputs = read(given, *readers)
            mass = sum((output.sin() * (i + 1)).sum() for i, output in enumerate(outputs))
            slopes = torch.autograd.grad(mass, [tensor for reader in readers for tensor in reader.first])
            found.append([*outputs, *slopes])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_a_part_that_is_not_trained_costs_no_gradient():
    """The product of the backward pass is over the trained columns only, and gives them what they get in the whole."""
    bank, numbers = bank_of(range(3), (6, 5)), draw(9, 4)
    slopes, flops = [], []
    for parts in (lambda a: (a, numbers), lambda a: torch.cat([a, numbers], 1)):
        trained_part = draw(9, 2).requires_grad_()
        mass = bank(parts(trained_part)).sin().sum()
        with FlopCounterMode(display=False) as counter:
            mass.backward()
        slopes.append(trained_part.grad)
        flops.append(counter.get_total_flops())
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)
    weights = 2 * 9 * 6 * 15
    assert flops == [weights + 2 * 9 * 2 * 15, 2 * weights]


# Tasks and their loss.


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("like", Task("like", "binary", "all")),
        ("like:positive", Task("like", "binary", "positive")),
        ("stars=regression", Task("stars", "regression", "all")),
        ("stars:taste=regression", Task("stars", "regression", "taste")),
        ("like=", Task("like")),
        ("like:", Task("like")),
    ],
)
def test_parse_task(text, task):
    assert parse_task(text) == task


@pytest.mark.parametrize("text", ["", ":positive", "=regression", ":a=binary"])
def test_parse_task_needs_a_name(text):
    with pytest.raises(UserError, match="has no name: write NAME:GROUP=KIND"):
        parse_task(text)


def test_parse_task_names_the_nearest_kind():
    with pytest.raises(UserError, match="kind of task 'stars' 'regresion': did you mean 'regression'"):
        parse_task("stars=regresion")


def test_tasks_are_distinct_and_not_none():
    tasks = [Task("a"), Task("b")]
    assert distinct(tasks) == tuple(tasks)
    with pytest.raises(UserError, match="no task given"):
        distinct([])
    with pytest.raises(UserError, match="'a' is named twice"):
        distinct([Task("a"), Task("b"), Task("a", kind="regression")])


NAN = float("nan")


def outputs_of(*names: str) -> dict[str, torch.Tensor]:
    return {name: draw(4, i + 1)[:, i].clone().requires_grad_() for i, name in enumerate(names)}


def test_task_loss_is_the_weighted_sum_of_means_over_labelled_rows():
    """Computed by hand: cross-entropy of a logit, and squared error."""
    tasks = [Task("b", weight=2.5), Task("r", kind="regression", weight=0.5)]
    outputs = outputs_of("b", "r")
    labels = {"b": torch.tensor([1.0, NAN, 0.0, 1.0]).double(), "r": torch.tensor([NAN, 2.0, NAN, -1.0]).double()}
    p = [1 / (1 + math.exp(-z)) for z in outputs["b"].tolist()]
    r = outputs["r"].tolist()
    binary = -(math.log(p[0]) + math.log(1 - p[2]) + math.log(p[3])) / 3
    squared = ((r[1] - 2) ** 2 + (r[3] + 1) ** 2) / 2
    assert task_loss(tasks, outputs, labels).item() == pytest.approx(2.5 * binary + 0.5 * squared, rel=1e-10)


def test_unlabelled_rows_get_a_gradient_of_exactly_zero():
    """And the others get the same as if those rows were not there."""
    for kind in ("binary", "regression"):
        out = outputs_of("t")["t"]
        task_loss([Task("t", kind)], {"t": out}, {"t": torch.tensor([1.0, NAN, 0.0, NAN]).double()}).backward()
        assert out.grad[[1, 3]].tolist() == [0.0, 0.0]
        short = out.detach()[[0, 2]].requires_grad_()
        task_loss([Task("t", kind)], {"t": short}, {"t": torch.tensor([1.0, 0.0]).double()}).backward()
        assert torch.equal(out.grad[[0, 2]], short.grad)
        assert bool((short.grad != 0).all())


def test_a_task_without_labels_adds_exactly_nothing():
    """Neither to the loss nor to a gradient, and no NaN anywhere."""
    outputs = outputs_of("a", "b")
    labels = {"a": torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), "b": torch.full((4,), NAN).double()}
    both, alone = (task_loss(tasks, outputs, labels) for tasks in ([Task("a"), Task("b")], [Task("a")]))
    assert both.item() == alone.item() > 0
    both.backward()
    assert outputs["b"].grad.tolist() == [0.0] * 4
    assert bool(torch.isfinite(outputs["a"].grad).all())
    none = task_loss([Task("b")], outputs, labels)
    assert none.item() == 0.0


def test_a_weight_scales_its_task_only():
    outputs = outputs_of("a", "b")
    labels = {name: torch.tensor([1.0, 0.0, 1.0, NAN]).double() for name in outputs}
    parts = [task_loss([Task(name)], outputs, labels).item() for name in outputs]
    loss = task_loss([Task("a", weight=3.0), Task("b", weight=0.0)], outputs, labels)
    assert loss.item() == pytest.approx(3 * parts[0], rel=1e-12)
    loss.backward()
    assert outputs["b"].grad.abs().sum().item() == 0.0


# Training.


class Small(nn.Module):
    """A network with batch normalisation for a binary task and a regression."""

    def __init__(self):
        super().__init__()
        self.tasks = (Task("b"), Task("r", kind="regression"))
        self.body = Bank(["body"], (3, 4), seed=0, last="swish")
        self.heads = Bank(["b", "r"], (4, 1), seed=0, last="linear")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.heads(self.body(x)[:, 0]).squeeze(-1)
        return {"b": out[:, 0], "r": out[:, 1]}


def made(rows: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = draw(rows, 3).float()
    return x, {"b": (x[:, 0] > 0).float(), "r": x[:, 1] - x[:, 2]}


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (4, 4), (5, 4), (23, 5), (24, 5), (25, 5), (26, 5), (7, 100)])
def test_batches_cover_each_row_once_in_even_sizes(rows, size):
    """No batch is above the size, and none is a small rest."""
    inputs = {"row": torch.arange(rows), "twice": 2 * torch.arange(rows)}
    found = list(Batches(inputs, {"y": -torch.arange(rows)}, size))
    sizes = [len(labels["y"]) for _, labels in found]
    assert len(found) == math.ceil(rows / size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([part["row"] for part, _ in found]).tolist()) == list(range(rows))
    for part, labels in found:
        assert torch.equal(part["twice"], 2 * part["row"])
        assert torch.equal(labels["y"], -part["row"])


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x, x], lambda x: (x, {"deep": x})], ids=["one", "list", "nest"]
)
def test_batches_keep_the_form_of_their_inputs(wrap):
    x = torch.arange(6)
    part, _ = next(iter(Batches(wrap(x), {"y": x}, size=3)))
    assert type(part) is type(wrap(x))
    flat = torch.utils._pytree.tree_leaves(part)
    assert all(torch.equal(leaf, flat[0]) and len(leaf) == 3 for leaf in flat)


def orders(seed: int, epochs: int = 3) -> list[list[int]]:
    batches = Batches(torch.arange(20), {"y": torch.zeros(20)}, size=6, seed=seed)
    return [torch.cat([part for part, _ in batches]).tolist() for _ in range(epochs)]


def test_batches_have_a_new_order_each_epoch_and_the_same_for_a_seed():
    first, second, third = orders(seed=0)
    assert first != second != third != first
    assert orders(seed=0) == [first, second, third]
    assert orders(seed=1)[0] != first


def test_train_yields_after_each_epoch_and_counts_what_it_cost(monkeypatch):
    """Epochs, rows, passes and seconds exactly; what the caller does in between is not training."""
    clock = [100.0]
    monkeypatch.setattr("koinon.nn.train.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model, (x, labels) = Small(), made(23)

    def loss(model, batch):
        assert model.training
        clock[0] += 1
        return shared_loss(model, batch)

    costs = []
    for cost in train(model, Batches(x, labels, size=5), loss, epochs=3):
        costs.append(cost)
        model.eval()  # the caller measures, which takes its time
        clock[0] += 50
    assert [(c.epochs, c.samples, c.passes) for c in costs] == [(1, 23, 5), (2, 46, 10), (3, 69, 15)]
    assert [c.seconds for c in costs] == [5, 10, 15]


def test_train_stops_where_the_caller_stops():
    """Nothing happens after the last epoch that was asked for."""
    models = [Small(), Small()]
    x, labels = made(23)
    steps = train(models[0], Batches(x, labels, size=5), shared_loss, epochs=5)
    next(steps)
    held = {name: value.clone() for name, value in models[0].state_dict().items()}
    steps.close()
    fit(models[1], Batches(x, labels, size=5), shared_loss, epochs=1)
    assert all(torch.equal(value, models[0].state_dict()[name]) for name, value in held.items())
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in held.items())


def test_training_learns_and_leaves_frozen_parameters_alone():
    model, (x, labels) = Small(), made(64)
    model.heads.biases[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    start = shared_loss(model, (x, labels)).item()
    fit(model, Batches(x, labels, size=16), shared_loss, epochs=40, lr=0.03)
    assert shared_loss(model, (x, labels)).item() < start / 3
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == ["heads.biases.0"]


def test_first_step_is_adams():
    """Adam's first step is the learning rate times the gradient's sign."""
    model, (x, labels) = Small(), made(8)
    before = model.heads.weights[0].detach().clone()
    shared_loss(model, (x, labels)).backward()
    slope = model.heads.weights[0].grad.sign()
    fit(model, [(x, labels)], shared_loss, lr=0.01)
    torch.testing.assert_close(before - 0.01 * slope, model.heads.weights[0].detach(), rtol=0, atol=1e-5)


def test_accelerate_changes_nothing_on_one_processor():
    """The same parameters to the bit and the same cost, so that one loop serves one device and many."""
    models, costs = [Small(), Small()], []
    for model, accelerator in zip(models, (None, Accelerator(cpu=True)), strict=True):
        x, labels = made(23)
        costs.append(fit(model, Batches(x, labels, size=5), shared_loss, epochs=2, lr=0.01, accelerator=accelerator))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    assert not torch.equal(models[0].heads.weights[0], Small().heads.weights[0])
    assert [(c.epochs, c.samples, c.passes) for c in costs] == [(2, 46, 10)] * 2


@pytest.mark.parametrize("training", [True, False])
def test_predict_gives_the_model_back_as_it_was(training):
    """In its mode, with its statistics, and without gradients; a probability for a binary task, a value otherwise."""
    model, (x, _) = Small().train(training), made(11)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, parts = predict(model, x), predict(model, x, size=4)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    out = model.eval()(x)
    torch.testing.assert_close(whole["b"], 1 / (1 + torch.exp(-out["b"].detach())))
    torch.testing.assert_close(whole["r"], out["r"].detach())
    assert not whole["b"].requires_grad
    for name in ("b", "r"):
        assert whole[name].shape == (11,)
        torch.testing.assert_close(whole[name], parts[name])


# Meters.


class Made(nn.Module):
    """Gates that mix whatever values they are given."""

    def __init__(self, gates: Gates):
        super().__init__()
        self.gates = gates

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.gates(*batch)


def mixture(shares: list[list[float]], sees=None, names=None) -> Made:
    """Gates that give each reader the same shares on every row: weights 0, biases their logarithms."""
    names = names or experts_of(1, ["shared"], len(shares[0]))
    readers = ["task a", "task b", "task c"][: len(shares)]
    gates = Gates(readers, names, sees or [["shared"]] * len(shares), 2, seed=0)
    with torch.no_grad():
        gates.weight.zero_()
        gates.bias.copy_(torch.tensor(shares).log().clamp(min=-1e4))
    return Made(gates)


def values_of(experts: int, rows: int = 8) -> torch.Tensor:
    return draw(rows, experts, 4).float()


def health(model: Made, values: torch.Tensor) -> dict[str, float]:
    """In batches of different sizes, which must not matter."""
    x = torch.ones(len(values), 2)
    return expert_health(model, [(x[:3], values[:3]), (x[3:], values[3:])])


def test_collapse_is_the_largest_share_of_exact_zeros():
    values = values_of(3)
    values[:, 1, :3] = 0  # three of four features in every row
    values[:4, 2] = 0  # half of the rows
    assert health(mixture([[1 / 3] * 3]), values)["collapse"] == pytest.approx(0.75)
    assert health(mixture([[1 / 3] * 3]), values_of(3))["collapse"] == 0.0


def test_spread_is_the_ratio_of_standard_deviations():
    values = values_of(2)
    values[:, 1] = 5 * values[:, 0] + 7
    assert health(mixture([[0.5, 0.5]]), values)["spread"] == pytest.approx(5, rel=1e-5)
    values[:, 1] = values[:, 0]
    assert health(mixture([[0.5, 0.5]]), values)["spread"] == pytest.approx(1, rel=1e-9)


def test_degradation_is_zero_at_even_use_and_one_at_sole_ownership():
    assert health(mixture([[0.3, 0.7]] * 3), values_of(2))["degradation"] == pytest.approx(0, abs=1e-6)
    assert health(mixture([[1, 0], [0, 1]]), values_of(2))["degradation"] == pytest.approx(1, abs=1e-6)
    # The largest part of one expert's use: 0.6 of 0.6 + 0.2, from 1/2 to 1, is halfway.
    assert health(mixture([[0.6, 0.4], [0.2, 0.8]]), values_of(2))["degradation"] == pytest.approx(0.5, abs=1e-6)


def test_degradation_needs_two_readers():
    assert set(health(mixture([[0.5, 0.5]]), values_of(2))) == {"collapse", "spread"}


def test_underfitting_is_own_mass_over_its_fair_share():
    """1 where a task's experts get as much as the others, 0 where it ignores them."""
    names = experts_of(1, ["shared"], 2) + experts_of(1, ["task a", "task b"], 2)
    sees = [["shared", "task a"], ["shared", "task b"]]
    meters = health(mixture([[0.25] * 4, [0.5, 0.5, 0, 0]], sees, names), values_of(6))
    assert meters["underfitting.a"] == pytest.approx(1, rel=1e-6)
    assert meters["underfitting.b"] == pytest.approx(0, abs=1e-6)
    meters = health(mixture([[0.3, 0.3, 0.3, 0.1], [0, 0, 0.5, 0.5]], sees, names), values_of(6))
    assert meters["underfitting.a"] == pytest.approx(0.4 * 4 / 2, rel=1e-6)
    assert meters["underfitting.b"] == pytest.approx(2, rel=1e-6)


def test_of_several_gates_the_worst_counts():
    """The largest collapse, the smallest share of own experts."""
    names = experts_of(1, ["shared", "task a"], 1)
    sees = [["shared", "task a"]]
    one, other = mixture([[0.5, 0.5]], sees, names), mixture([[0.9, 0.1]], sees, names)
    model = nn.Sequential()
    model.one, model.other = one, other
    model.forward = lambda batch: (one(batch), other((batch[0], 0 * batch[1])))
    meters = health(model, values_of(2))
    assert meters["collapse"] == 1.0
    assert meters["underfitting.a"] == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_meters_leave_nothing_behind(training):
    """Hooks are removed and the mode is given back, also where the model stops with an error."""
    model = mixture([[0.5, 0.5]] * 2).train(training)
    health(model, values_of(2))
    with pytest.raises(RuntimeError):
        expert_health(model, [(torch.ones(3, 5), values_of(2))])
    assert model.training is model.gates.training is training
    assert not model.gates.given._forward_hooks


def test_a_model_without_gates_has_no_meters():
    assert expert_health(nn.Linear(2, 1), [torch.ones(3, 2)]) == {}


def test_losses_of_kinds_are_torchs():
    """The stable form of the cross-entropy: finite where the sigmoid is 0 or 1 in floating point."""
    out = torch.tensor([-200.0, 200.0, 3.0])
    labels = torch.tensor([1.0, 0.0, 1.0])
    loss = task_loss([Task("t")], {"t": out}, {"t": labels})
    assert loss.item() == pytest.approx((200 + 200 + F.softplus(torch.tensor(-3.0)).item()) / 3)


def test_predicting_gives_every_module_its_mode_back():
    """A part the user has frozen in evaluation mode stays so, also where predicting stops with an error."""
    model, (x, _) = Small(), made(11)
    model.body.eval()
    predict(model, x)
    assert [m.training for m in (model, model.body, model.heads)] == [True, False, True]
    with pytest.raises(RuntimeError):
        predict(model, x[:, :2])
    assert [m.training for m in (model, model.body, model.heads)] == [True, False, True]
