"""Each method against its published equations written out, and what makes HoME the system it is."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from oracles.compare import ROWS, TASKS, TINY, TWO_GROUPS, WIDTH, assert_equals_equations, built, encoder, inputs
from torch import nn
from torch.nn import functional as F

from koinon.core import names
from koinon.nn.experts import Bank, Gates
from koinon.nn.params import stream, trained
from koinon.nn.tasks import Task, task_loss
from koinon.share.home import HoME
from koinon.share.mmoe import MMoE
from koinon.share.ple import PLE
from koinon.share.shared_bottom import SharedBottom
from koinon.share.single_task import SingleTask

ORACLES = Path(__file__).parent / "oracles"


def labels(tasks, seed: int = 0) -> dict[str, torch.Tensor]:
    numbers = stream(seed, "labels")
    return {task.name: (torch.randn(ROWS, generator=numbers) > 0).double() for task in tasks}


def give(model, theirs) -> None:
    """Give each parameter the value that ``theirs`` returns for its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs(name).view_as(parameter))


def equal(one, other) -> bool:
    """The same outputs to the bit, and not a single one."""
    return one.keys() == other.keys() and len(one) > 0 and all(torch.equal(one[name], other[name]) for name in one)


SETTINGS = [
    SharedBottom(bottom=(5,), tower=(4,)),
    SharedBottom(bottom=(6, 5), tower=()),
    SharedBottom(bottom=(6, 5, 4), tower=(9, 8), swish=True),
    SingleTask(bottom=(5,), tower=(4,)),
    SingleTask(bottom=(6, 5), tower=()),
    SingleTask(bottom=(6, 5, 4), tower=(9, 8), swish=True),
    MMoE(experts=1, **TINY),
    MMoE(experts=3, **TINY),
    MMoE(experts=4, expert=(6, 5), tower=(9, 8)),
    MMoE(experts=3, expert=(6, 5), tower=(), swish=True),
    PLE(levels=1, **TINY),
    PLE(levels=2, **TINY),
    PLE(levels=3, shared=1, specific=2, expert=(6, 5), tower=(9, 8)),
    PLE(levels=2, shared=0, specific=2, **TINY),
    PLE(levels=2, shared=3, specific=0, **TINY),
    PLE(levels=3, shared=2, specific=2, expert=(6, 5), tower=(), swish=True),
    HoME(**TINY),
    HoME(meta=False, **TINY),
    HoME(hierarchy=False, **TINY),
    HoME(meta=False, hierarchy=False, **TINY),
    HoME(self_gate=False, **TINY),
    HoME(swish=False, **TINY),
    HoME(meta_feature_gates=0, **TINY),
    HoME(task_feature_gates=0, **TINY),
    HoME(meta_feature_gates=3, task_feature_gates=1, **TINY),
    HoME(specific=2, per_group=1, **TINY),  # self gates: softmax over a task's experts, sigmoid of a category's
    HoME(specific=3, per_group=3, hierarchy=False, **TINY),
    HoME(per_group=0, **TINY),
    HoME(specific=0, **TINY),
    HoME(shared=0, **TINY),
    HoME(shared=3, expert=(6, 5), tower=(9, 8)),
    HoME(expert=(6, 5), tower=(), swish=False, meta=False, specific=2),
    HoME(**{**HoME.null, "shared": 2}, **TINY),
]


def test_every_method_has_an_oracle_and_every_oracle_a_method():
    """An oracle is a file of the method's name; none is missing and none is left over."""
    there = {f"share.{file.stem}" for file in (ORACLES / "share").glob("*.py")}
    assert there == set(names("share"))
    assert there == {type(method).__module__.removeprefix("koinon.") for method in SETTINGS}


def differs(method) -> str:
    """The settings that are not the defaults, as a name for a test."""
    default = type(method)()
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    turned = [f"{name}={value}" for name, value in values.items() if value != getattr(default, name)]
    return " ".join([type(method).__name__, *turned])


@pytest.mark.parametrize("method", SETTINGS, ids=differs)
def test_network_equals_its_equations(method):
    """Outputs of a training batch, and every gradient, are those of the equations written out."""
    assert_equals_equations(method, type(method).__module__.removeprefix("koinon."))


# HoME: normalised experts.


def test_expert_inputs_to_swish_are_normalised(monkeypatch):
    """What Swish reads has, per feature, the batch mean and variance that BN's shift and scale name."""
    seen = []
    monkeypatch.setattr(F, "silu", lambda z: seen.append(z) or z * torch.sigmoid(z))
    model = built(HoME(expert=(5, 4), tower=(3,)))
    model(inputs())
    banks = [m for m in model.modules() if isinstance(m, Bank) and m.last == "swish"]
    assert len(seen) == len(banks) == 5  # shared and category experts on both levels, task experts on the second
    for z, bank in zip(seen, banks, strict=True):
        torch.testing.assert_close(z.mean(0), bank.shift, rtol=0, atol=1e-9)
        torch.testing.assert_close(z.var(0, unbiased=False), bank.scale**2, rtol=1e-2, atol=1e-9)


def zero_shares(method) -> list[float]:
    """The share of exact zeros in the outputs of each bank of experts, in training."""
    model = built(method, randomised=False)
    shares = []
    banks = [m for m in model.modules() if isinstance(m, Bank) and m.last in ("swish", "relu")]
    for bank in banks:
        bank.register_forward_hook(lambda _bank, _args, out: shares.append(float((out == 0).double().mean())))
    model(inputs())
    return shares


def test_normalised_experts_have_no_exact_zeros():
    """Swish is zero at zero only; ReLU experts have many zeros, the first of the three anomalies."""
    assert zero_shares(HoME(**TINY)) == [0.0] * 5
    relu = zero_shares(HoME(swish=False, **TINY))
    assert len(relu) == 5
    assert min(relu) > 0.1


# HoME: which experts a task's loss reaches.

BANKS = ("shared", "group", "task")


def reached(model, tasks, task: Task) -> dict[tuple[int, str, int], bool]:
    """(level, kind of owner, number of the expert in its bank) to whether the loss of one task moves that expert."""
    model.zero_grad()
    task_loss([task], model(inputs()), labels(tasks)).backward()
    found = {}
    for level, part in enumerate(model.trunk, start=1):
        for kind, bank in zip(BANKS, part.experts.banks):
            experts = len(bank.names)
            for i in range(experts):
                slices = [p.grad[i] for p in (*bank.weights, *bank.biases)]
                if bank.last == "swish":
                    slices += [p.grad.view(experts, -1)[i] for p in (bank.scale, bank.shift)]
                moved = [bool(s.any()) for s in slices]
                assert all(moved) or not any(moved), "an expert is reached in part"
                found[level, kind, i] = moved[0]
    return found


@pytest.mark.parametrize("task", TWO_GROUPS, ids=lambda task: task.name)
@pytest.mark.parametrize("swish", [True, False])
def test_gradients_follow_the_hierarchy(task, swish):
    """Level 2: nothing but the shared, the category's and the task's own experts. Level 1: every expert."""
    method = HoME(per_group=2, specific=2, swish=swish, expert=(9,), tower=(4,))
    model = built(method, TWO_GROUPS)
    place, category = TWO_GROUPS.index(task), int(task.group == "negative")
    for (level, kind, i), hit in reached(model, TWO_GROUPS, task).items():
        its = {"shared": True, "group": level == 1 or i // 2 == category, "task": i // 2 == place}[kind]
        assert hit is its, f"level {level}, {kind} expert {i}: reached {hit}"


def cut_z_shared(_level, _args, z: torch.Tensor) -> torch.Tensor:
    """The meta level's output without the gradient of its first state."""
    return torch.cat([z[:, :1].detach(), z[:, 1:]], 1)


@pytest.mark.parametrize("task", TWO_GROUPS, ids=lambda task: task.name)
def test_other_categories_are_reached_through_z_shared_only(task):
    """With z_shared cut, the other category's meta experts get a gradient of exactly zero, all others keep theirs."""
    model = built(HoME(per_group=2, specific=1, **TINY), TWO_GROUPS)
    open_ = reached(model, TWO_GROUPS, task)
    model.trunk[0].register_forward_hook(cut_z_shared)
    cut = reached(model, TWO_GROUPS, task)
    category = int(task.group == "negative")
    others = {(1, "group", i) for i in range(4) if i // 2 != category}
    assert all(open_[key] for key in others)
    assert {key for key in open_ if open_[key] != cut[key]} == others


def test_without_the_mask_all_categories_are_reached():
    """The mask is what keeps a task from the other category's experts."""
    model = built(HoME(hierarchy=False, **TINY), TWO_GROUPS)
    found = reached(model, TWO_GROUPS, TWO_GROUPS[0])
    assert all(hit for (_level, kind, _i), hit in found.items() if kind != "task")
    assert [hit for (_level, kind, _i), hit in found.items() if kind == "task"] == [True, False, False, False]


# HoME: the feature gate.


def feature_gates(method):
    model = built(method, TWO_GROUPS)
    return [part.experts.feature_gates for part in model.trunk]


def test_feature_gate_is_the_identity_where_the_low_rank_product_is_zero():
    """FG = 1 if B = 0 or A = 0, whatever the mixing weights; a new network starts so."""
    x = torch.randn(ROWS, WIDTH, generator=stream(0, "x"), dtype=torch.float64)
    for factor in ("down", "up"):
        gates = feature_gates(HoME(**TINY))[0]
        nn.init.zeros_(getattr(gates, factor).weights[0])
        torch.testing.assert_close(gates(x), x[:, None].expand(-1, 3, -1), rtol=1e-12, atol=0)
    fresh = built(HoME(meta_feature_gates=3, **TINY), TWO_GROUPS, randomised=False).trunk[0].experts.feature_gates
    torch.testing.assert_close(fresh(x), x[:, None].expand(-1, 3, -1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_feature_gate_lies_between_zero_and_two(count):
    """FG is a mean of 2 sigmoid(.), for each owner one of its own."""
    meta, task = feature_gates(HoME(meta_feature_gates=count, task_feature_gates=count, **TINY))
    x = torch.randn(ROWS, WIDTH, generator=stream(0, "x"), dtype=torch.float64)
    gate = meta(x) / x[:, None]
    assert gate.shape == (ROWS, 3, WIDTH)  # shared and two categories
    assert bool((gate > 0).all())
    assert bool((gate < 2).all())
    assert gate.std() > 0.05
    z = torch.randn(ROWS, 7, 5, generator=stream(0, "z"), dtype=torch.float64)
    gate = task(z) / z  # shared, two categories, four tasks
    assert bool(((gate > 0) & (gate < 2)).all())
    assert gate.std() > 0.05


# HoME: self gates.


@pytest.mark.parametrize("specific", [1, 2])
@pytest.mark.parametrize("self_gate", [True, False])
def test_self_gates_keep_ignored_experts_learning(self_gate, specific):
    """The main gates give a task's own experts exactly 0: they learn if, and only if, there are self gates."""
    model = built(HoME(self_gate=self_gate, specific=specific, **TINY), TWO_GROUPS)
    level = model.trunk[1]
    with torch.no_grad():
        level.gates.bias[:, -specific:] = -1e4
    given = []
    level.gates.given.register_forward_hook(lambda _given, args, _out: given.append(args[0]))
    bank = level.experts.banks[2]
    task_loss(TWO_GROUPS, model(inputs()), labels(TWO_GROUPS)).backward()
    assert bool((given[0][:, :, -4 * specific :] == 0).all())
    assert bool((given[0][:, :, : -4 * specific] > 0).any())
    for gradient in bank.weights[0].grad:
        assert bool(gradient.any()) is self_gate


@pytest.mark.parametrize("self_gate", [True, False])
def test_self_gates_keep_ignored_categories_learning(self_gate):
    """The same on the meta level, where z_shared is cut so that only the category's own gates are left."""
    model = built(HoME(self_gate=self_gate, **TINY), TWO_GROUPS)
    level = model.trunk[0]
    with torch.no_grad():
        level.group_gates.bias[:, -2:] = -1e4
    level.register_forward_hook(cut_z_shared)
    task_loss(TWO_GROUPS, model(inputs()), labels(TWO_GROUPS)).backward()
    for gradient in level.experts.banks[1].weights[0].grad:
        assert bool(gradient.any()) is self_gate


# HoME: degenerate cases, to the bit. No parameter is copied unless the test says so.


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_home_with_shared_experts_only_is_mmoe(experts, swish):
    home = HoME(**{**HoME.null, "shared": experts, "swish": swish}, **TINY)
    mmoe = MMoE(experts=experts, swish=swish, **TINY)
    one, other = (built(method, randomised=False) for method in (home, mmoe))
    torch.testing.assert_close(one(inputs()), other(inputs()), rtol=1e-12, atol=1e-14)  # products of other widths


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize(("shared", "specific"), [(1, 1), (2, 1), (3, 2), (0, 2)])
def test_home_with_shared_and_specific_experts_is_cgc(shared, specific, swish):
    home = HoME(**{**HoME.null, "shared": shared, "specific": specific, "swish": swish}, **TINY)
    cgc = PLE(levels=1, shared=shared, specific=specific, swish=swish, **TINY)
    one, other = (built(method, randomised=False) for method in (home, cgc))
    torch.testing.assert_close(one(inputs()), other(inputs()), rtol=1e-12, atol=1e-14)  # products of other widths


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("kind", [MMoE, PLE, HoME])
def test_one_expert_is_the_shared_bottom(kind, swish):
    """Up to rounding: experts and gates are one product, whose width is another than the shared bottom's."""
    method = replace(kind(**kind.null), swish=swish, **TINY)
    one, other = (built(m, randomised=False) for m in (method, SharedBottom(bottom=(5,), tower=(4,), swish=swish)))
    torch.testing.assert_close(one(inputs()), other(inputs()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("swish", [True, False])
def test_one_task_alone_is_the_shared_bottom(swish):
    """Once it has the shared bottom's parameters, which are drawn from other streams."""
    alone = built(SingleTask(swish=swish), TASKS[:1])
    shared = built(SharedBottom(swish=swish), TASKS[:1], seed=1)
    assert not equal(alone(inputs()), shared(inputs()))
    theirs = dict(alone.named_parameters())
    give(
        shared, lambda name: theirs[name.replace("encoder.", "encoder.encoders.0.").replace("trunk.bottom.", "trunk.")]
    )
    assert equal(alone(inputs()), shared(inputs()))


@pytest.mark.parametrize("swish", [True, False])
def test_every_task_alone_is_a_shared_bottom(swish):
    """Single task is as many shared bottoms side by side as there are tasks, each with one task."""
    alone = built(SingleTask(swish=swish))
    answers = alone(inputs())
    theirs = dict(alone.named_parameters())

    def part(name: str, t: int) -> torch.Tensor:
        if name.startswith("encoder."):
            return theirs[name.replace("encoder.", f"encoder.encoders.{t}.")]
        return theirs[name.replace("trunk.bottom.", "trunk.")].view(len(TASKS), -1)[t]  # one slice a task

    for t, task in enumerate(TASKS):
        shared = built(SharedBottom(swish=swish), [task], seed=1)
        give(shared, lambda name, t=t: part(name, t))
        torch.testing.assert_close(shared(inputs())[task.name], answers[task.name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("swish", [True, False])
def test_two_levels_with_one_category_are_ple(swish):
    """With one category, no feature and self gates and no task experts, HoME is for each task a two-level PLE.

    That PLE's one task has the category's experts as its own; HoME's level 2 gate must not read z_shared (its columns
    are 0), because PLE's reads the task's state alone. HoME's level 1 is then common to the tasks, PLE's is not.
    """
    tasks = [Task("like"), Task("hate"), Task("stars", kind="regression")]
    plain = {"meta_feature_gates": 0, "task_feature_gates": 0, "self_gate": False, "specific": 0}
    home = built(HoME(shared=2, per_group=3, swish=swish, **plain, **TINY), tasks)
    with torch.no_grad():
        home.trunk[1].gates.weight[:, :, 5:] = 0
    answers = home(inputs())
    theirs = dict(home.named_parameters())

    def part(name: str, t: int) -> torch.Tensor:
        name = name.replace(".shared.", ".experts.banks.0.").replace(".specific.", ".experts.banks.1.")
        if name.startswith("trunk.0.task_gates"):
            return theirs[name.replace("task_gates", "group_gates")]
        if name.startswith("trunk.1.task_gates"):
            gates = theirs[name.replace("task_gates", "gates")][t]
            return gates[:, :5] if name.endswith("weight") else gates
        return theirs[name][t] if name.startswith("towers.") else theirs[name]

    for t, task in enumerate(tasks):
        ple = built(PLE(levels=2, shared=2, specific=3, swish=swish, **TINY), [task], seed=1)
        give(ple, lambda name, t=t: part(name, t))
        torch.testing.assert_close(ple(inputs())[task.name], answers[task.name], rtol=1e-9, atol=1e-12)


# Sizes.


def mlps(number: int, *sizes: int, swish: bool = False) -> int:
    """Parameters of ``number`` MLPs: weights and biases; with BN, scale and shift instead of the last bias."""
    weights = sum(width * out for width, out in itertools.pairwise(sizes))
    return number * (weights + sum(sizes[1:]) + (sizes[-1] if swish else 0))


def gate_parameters(readers: int, visible: int, width: int) -> int:
    return readers * visible * (width + 1)


def sizes_of(count: int) -> list[tuple[object, int]]:
    """Methods, and the parameters they have above the encoder by hand, for T = ``count`` tasks in two categories."""
    d, h, w = WIDTH, 5, 4
    towers = mlps(count, h, w, 1)

    def gated(owners: int, number: int, width: int) -> int:
        """Feature gates: for each owner L times B and A of rank width / L, and the mixing layer."""
        return owners * (number * 2 * width * (width // number) + number * (width + 1)) if number else 0

    def meta(shared: int, group: int, number: int, swish: bool, self_gate: bool = True) -> int:
        experts = mlps(shared + 2 * group, d, h, swish=swish) + gated(3, number, d)
        gates = gate_parameters(1, shared + 2 * group, d) + gate_parameters(2, shared + group, d)
        return experts + gates + (gate_parameters(2, group, d) if self_gate else 0)

    def task(shared: int, group: int, specific: int, number: int, swish: bool, self_gate: bool = True) -> int:
        experts = mlps(shared + 2 * group + count * specific, h, h, swish=swish) + gated(3 + count, number, h)
        gates = gate_parameters(count, shared + group + specific, 2 * h)
        return experts + gates + (gate_parameters(count, specific, 2 * h) if self_gate else 0)

    return [
        (SharedBottom(bottom=(h,), tower=(w,)), mlps(1, d, h) + towers),
        (SharedBottom(bottom=(9, h), tower=(w,), swish=True), mlps(1, d, 9, h, swish=True) + towers),
        (MMoE(experts=3, **TINY), mlps(3, d, h) + gate_parameters(count, 3, d) + towers),
        (
            PLE(levels=2, shared=2, specific=1, **TINY),
            mlps(2 + count, d, h)
            + gate_parameters(count, 3, d)
            + gate_parameters(1, 2 + count, d)
            + mlps(2 + count, h, h)
            + gate_parameters(count, 3, h)
            + towers,
        ),
        (HoME(**TINY), meta(2, 2, 2, True) + task(2, 2, 1, 2, True) + towers),
        (
            HoME(shared=3, per_group=1, specific=2, swish=False, self_gate=False, meta_feature_gates=0, **TINY),
            meta(3, 1, 0, False, self_gate=False) + task(3, 1, 2, 2, False, self_gate=False) + towers,
        ),
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_parameter_counts_equal_the_formula(count):
    """Counted by hand from the equations; a number of parameters is what comparisons are made equal by."""
    for method, expected in sizes_of(count):
        model = method.share(encoder(), TASKS[:count], WIDTH)
        assert trained(model) - trained(model.encoder) == expected, method


@pytest.mark.parametrize("count", [1, 3])
def test_single_task_has_the_parameters_of_as_many_networks(count):
    """An encoder, a bottom and a tower for each task."""
    model = SingleTask(bottom=(5,), tower=(4,)).share(encoder(), TASKS[:count], WIDTH)
    assert trained(model) == count * (trained(encoder()) + mlps(1, WIDTH, 5) + mlps(1, 5, 4, 1))


def test_gates_of_every_method_are_recorded_for_health():
    """Meters read gates by their readers' names, so every gated method names its task gates after the tasks."""
    for method in (MMoE(), PLE(), HoME()):
        readers = [g.readers for g in method.share(encoder(), TASKS, WIDTH).modules() if isinstance(g, Gates)]
        assert tuple(f"task {task.name}" for task in TASKS) in readers
