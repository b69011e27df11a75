"""Each tensor-wise way of merging against its equations written out, and what must hold whatever the numbers are."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch
from oracles import merge_vectors as oracle
from torch import nn

from koinon.core import UserError
from koinon.data.checkpoints import Loaded
from koinon.merge import _engine
from koinon.merge._contract import Pool
from koinon.merge._engine import CHUNK, Part, Sources
from koinon.merge._vectors import consensus, cutoffs
from koinon.merge.average import Average
from koinon.merge.breadcrumbs import Breadcrumbs
from koinon.merge.dare import Dare
from koinon.merge.slerp import Slerp
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.ties import Ties

SHAPES = {"matrix": (13, 17), "vector": (70,), "one": (1,), "scalar": (), "empty": (0, 3), "cube": (3, 4, 5)}
KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SMALL = 64
"""Elements in a chunk while methods are compared with their equations, so that tensors have several."""


class Held(nn.Module):
    """Nothing but named tensors."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            self.register_buffer(name, value)


def state(seed: int, kind: torch.dtype = torch.float32, shapes=SHAPES, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Multiples of 1/64, so that sums and halves of them are exact and many magnitudes are equal."""
    numbers = np.random.default_rng(seed)
    return {
        name: torch.tensor(np.round(numbers.normal(0, spread, shape) * 64) / 64).to(kind)
        for name, shape in shapes.items()
    }


def models(many: int = 3, kind: torch.dtype = torch.float32, shapes=SHAPES):
    base = state(0, kind, shapes)
    tuned = {}
    for number in range(many):
        moved = state(number + 1, kind, shapes, 0.25)
        tuned[f"m{number}"] = {name: (base[name].double() + moved[name].double()).to(kind) for name in base}
    return base, tuned


def merge(method, base, tuned) -> dict[str, torch.Tensor]:
    pool = Pool(Held(base), {name: Held(its) for name, its in tuned.items()})
    return method.merge(pool).state_dict()


def arrays(tensors) -> dict[str, np.ndarray]:
    return {name: (its.float() if its.dtype == torch.bfloat16 else its).numpy() for name, its in tensors.items()}


def expected(method, base, tuned):
    """What the equations say."""
    base, tuned = arrays(base), {name: arrays(its) for name, its in tuned.items()}
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    match method:
        case Average():
            return oracle.average(list(tuned.values()), **settings)
        case Slerp():
            return oracle.slerp(*tuned.values(), **settings)
        case Dare():
            return oracle.dare(base, tuned, SMALL, **settings)
        case TaskArithmetic():
            return oracle.task_arithmetic(base, list(tuned.values()), **settings)
        case Ties():
            return oracle.ties(base, list(tuned.values()), **settings)
        case Breadcrumbs():
            return oracle.breadcrumbs(base, list(tuned.values()), **settings)


def assert_equal(found, wanted, kind: torch.dtype = torch.float32) -> None:
    """To the rounding of the kind, and of float32 on the way."""
    assert list(found) == list(wanted)
    near = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.1e-3, torch.bfloat16: 8e-3}[kind]
    for name, its in found.items():
        assert its.dtype == kind
        assert its.shape == wanted[name].shape
        np.testing.assert_allclose(its.double().numpy(), wanted[name], rtol=near, atol=near, err_msg=name)


METHODS = [
    Average(),
    Average(weights=(1.0, 2.0, 0.5)),
    Average(weights=(1.0, -2.0, 0.5), normalize=False),
    TaskArithmetic(),
    TaskArithmetic(scale=-0.5, weights=(1.0, 0.0, 2.0)),
    TaskArithmetic(scale=0.5, weights=(1.0, 0.5, 2.0), normalize=True),
    Ties(),
    Ties(density=(0.5,), scale=0.5),
    Ties(density=(0.3, 0.0, 1.0), weights=(1.0, 0.5, 2.0)),
    Ties(density=(0.4,), scope="tensor"),
    Ties(density=(0.25, 0.5, 0.75), scope="tensor", mean=False),
    Ties(density=(0.6,), elect=False),
    Ties(density=(0.6,), elect=False, mean=False, scale=0.25),
    Ties(density=(0.9,), weights=(1.0, -1.0, 1.0)),
    Ties(density=(1.0,), weights=(2.0, 1.0, 1.0), mean=False),
    Breadcrumbs(),
    Breadcrumbs(density=0.5, outliers=0.1, weights=(1.0, 2.0, 0.5)),
    Breadcrumbs(density=0.9, outliers=0.1, elect=True, mean=True, scale=1.0),
    Breadcrumbs(density=0.5, outliers=0.0),
    Breadcrumbs(density=0.0, outliers=0.5),
    Dare(),
    Dare(density=(0.5,), seed=7),
    Dare(density=(0.2, 0.0, 1.0), weights=(1.0, 2.0, 0.5)),
    Dare(density=(0.5,), rescale="none", elect=True, mean=True, scale=1.0),
    Dare(density=(0.3,), rescale="mass"),
    Dare(density=(0.5,), elect=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_equals_its_equations(monkeypatch, method, kind):
    """On tensors of several chunks, one chunk, one element and none, with many equal magnitudes."""
    monkeypatch.setattr(_engine, "CHUNK", SMALL)
    base, tuned = models(3, kind)
    assert_equal(merge(method, base, tuned), expected(method, base, tuned), kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_equals_its_equations(monkeypatch, t, kind):
    monkeypatch.setattr(_engine, "CHUNK", SMALL)
    base, tuned = models(2, kind)
    assert_equal(merge(Slerp(t), base, tuned), expected(Slerp(t), base, tuned), kind)


def random(seed: int, kind: torch.dtype, shape=(SMALL * 5 + 3,), spread: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(spread).to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("many", [1, 2, 3])
@pytest.mark.parametrize("method", [Ties(density=(0.2,)), Ties(density=(0.2,), scope="tensor"),
                                    Breadcrumbs(0.3, 0.1), Ties(density=(0.001,))], ids=repr)  # fmt: skip
def test_as_many_elements_are_kept_as_there_should_be(monkeypatch, method, many, kind):
    """With numbers that are not short in binary; in float64 too, where magnitudes differ below float32."""
    monkeypatch.setattr(_engine, "CHUNK", SMALL)
    base = {"a": random(0, kind), "b": random(1, kind, ())}
    tuned = {
        f"m{i}": {name: its + random(10 + i, kind, its.shape, 0.01) for name, its in base.items()} for i in range(many)
    }
    assert_equal(merge(method, base, tuned), expected(method, base, tuned), kind)


# Order statistics.


def part_of(deltas: dict[str, torch.Tensor], names=("w",)) -> Part:
    """Models that differ from a base of zeros by the deltas; several names cut them into tensors."""
    cut = {model: dict(zip(names, its.tensor_split(len(names)))) for model, its in deltas.items()}
    base = {name: torch.zeros_like(its) for name, its in next(iter(cut.values())).items()}
    return Part(Sources(Loaded(base), {model: Loaded(its) for model, its in cut.items()}), names)


def several_chunks(kind: str) -> torch.Tensor:
    numbers = np.random.default_rng(3)
    count = 2 * CHUNK + 12_345
    values = numbers.standard_normal(count).astype(np.float32)
    match kind:
        case "normal":
            pass
        case "short":  # as the differences of bfloat16 models are: few distinct values
            values = (torch.from_numpy(values * 1e-3).bfloat16().float()).numpy()
        case "equal":
            values = np.where(values > 0, np.float32(0.1), np.float32(-0.1))
        case "two values":
            values = np.where(np.arange(count) % 3 == 0, np.float32(0.25), np.float32(-1e-7))
        case "mostly zeros":
            values[numbers.random(count) < 0.99] = 0
        case "zeros":
            values[:] = 0
        case "negative zeros":
            values[:] = -0.0
        case "denormal":
            values *= np.float32(1e-42)
        case "wide":
            values = (values * np.exp(numbers.uniform(-80, 80, count))).astype(np.float32)
    return torch.from_numpy(values)


@pytest.mark.parametrize("names", [("w",), ("w", "x", "y")], ids=["one tensor", "three tensors"])
@pytest.mark.parametrize(
    "kind",
    ["normal", "short", "equal", "two values", "mostly zeros", "zeros", "negative zeros", "denormal", "wide"],
)
def test_magnitudes_at_ranks_are_exact(kind, names):
    values = several_chunks(kind)
    count = len(values)
    other = several_chunks("normal")
    ranks = [0, 1, 2, 777, count // 100, count // 3, count // 2, count - 1, count]
    found, its = cutoffs(part_of({"m": values, "other": other}, names), [ranks, [count // 2]])
    rising = np.sort(np.abs(values.numpy()))
    assert found == [math.inf if rank == 0 else float(rising[-rank]) for rank in ranks]
    assert its == [float(np.sort(np.abs(other.numpy()))[-(count // 2)])]


@pytest.mark.parametrize("count", [1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1])
def test_magnitudes_at_ranks_are_exact_at_the_edges_of_chunks(count):
    values = several_chunks("normal")[:count]
    ranks = [rank for rank in (0, 1, 2, count // 2, count - 1, count) if rank <= count]
    (found,) = cutoffs(part_of({"m": values}), [ranks])
    rising = np.sort(np.abs(values.numpy()))
    assert found == [math.inf if rank == 0 else float(rising[-rank]) for rank in ranks]


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_order_statistics_take_no_memory_for_each_chunk(monkeypatch, scope):
    """300 chunks: what is kept of each would be seen."""
    monkeypatch.setattr(_engine, "CHUNK", SMALL)
    values = several_chunks("normal")[: 300 * SMALL]
    part = part_of({"m": values}, ("w", "x") if scope == "model" else ("w",))
    cutoffs(part, [[1000]])
    tracemalloc.start()
    try:
        cutoffs(part, [[1000]])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000


def test_nothing_has_no_magnitudes():
    assert cutoffs(part_of({"m": torch.empty(0)}), [[0, 1]]) == [[math.inf, math.inf]]


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0), (1.0, 0.0, 1.0), (1.0, -1.0, 0.5)], ids=str)
def test_consensus_equals_its_equation(elect, mean, weights):
    """Every triple of a few values, so that all signs, zeros and sums of exactly 0 are there."""
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    vectors = list(torch.cartesian_prod(values, values, values).T.contiguous())
    found = consensus((its.clone() for its in vectors), weights, elect, mean)
    rows = zip(*(its.tolist() for its in vectors), strict=True)
    wanted = [oracle.agreed(row, weights, elect, mean) for row in rows]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-7)


# Properties.

ON_BASE = [
    TaskArithmetic(),
    Ties(),
    Ties(scope="tensor"),
    Dare(),
    Dare(rescale="mass"),
    Dare(elect=True),
    Breadcrumbs(),
]


def floats(many: int, kind: torch.dtype = torch.float32):
    """A base and models with numbers that are not short in binary."""
    base = {name: random(number, kind, shape) for number, (name, shape) in enumerate(SHAPES.items())}
    tuned = {
        f"m{model}": {name: (its + random(model + 50, kind, its.shape, 0.01)).to(kind) for name, its in base.items()}
        for model in range(many)
    }
    return base, tuned


def same(one, other) -> bool:
    """To the bit."""
    return (
        one.keys() == other.keys() and len(one) > 0 and all(torch.equal(its, other[name]) for name, its in one.items())
    )


@pytest.mark.parametrize("method", [TaskArithmetic(scale=1.0), Ties(density=(1.0,)), Dare(density=(1.0,), scale=1.0),
                                    Breadcrumbs(1.0, 0.0, scale=1.0), Average()], ids=repr)  # fmt: skip
def test_one_model_merged_is_itself(method):
    base, tuned = floats(1, torch.bfloat16)
    assert same(merge(method, base, tuned), tuned["m0"])
    base, tuned = floats(1)
    torch.testing.assert_close(merge(method, base, tuned), tuned["m0"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("method", ON_BASE, ids=repr)
def test_models_equal_to_the_base_change_nothing(method, kind):
    base, _ = floats(0, kind)
    assert same(merge(method, base, dict.fromkeys("abc", base)), base)


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), Ties(), Ties(scope="tensor"), Dare(), Breadcrumbs()],
                         ids=repr)  # fmt: skip
def test_the_order_of_models_does_not_matter(method):
    """To the bit with two models, whose sum is the same in either order; to rounding with more."""
    base, tuned = floats(2)
    assert same(merge(method, base, tuned), merge(method, base, dict(reversed(tuned.items()))))
    base, tuned = floats(4)
    found = merge(method, base, tuned)
    torch.testing.assert_close(found, merge(method, base, dict(reversed(tuned.items()))), rtol=1e-5, atol=1e-6)
    base, tuned = models(4)  # exact sums
    one, other = merge(method, base, tuned), merge(method, base, dict(reversed(tuned.items())))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [Ties(density=(0.0,)), Ties(density=(0.0,), scope="tensor"), Dare(density=(0.0,)),
                                    Breadcrumbs(0.0, 0.0), TaskArithmetic(scale=0.0)], ids=repr)  # fmt: skip
def test_nothing_kept_is_the_base(method):
    base, tuned = floats(3)
    assert same(merge(method, base, tuned), base)


def test_everything_kept_and_no_election_is_the_mean():
    base, tuned = floats(3)
    mean = merge(Average(), base, tuned)
    for method in (Ties(density=(1.0,), elect=False), Dare(density=(1.0,), mean=True, scale=1.0),
                   TaskArithmetic(scale=1 / 3), Breadcrumbs(1.0, 0.0, mean=True, scale=1.0)):  # fmt: skip
        torch.testing.assert_close(merge(method, base, tuned), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ON_BASE, ids=repr)
def test_what_is_added_grows_with_the_scale(method):
    base, tuned = floats(3, torch.float64)
    one, two = (merge(dataclasses.replace(method, scale=scale), base, tuned) for scale in (0.5, 2.0))
    for name, its in base.items():
        torch.testing.assert_close(two[name] - its, 4 * (one[name] - its), rtol=1e-9, atol=1e-12)


def test_a_weight_of_zero_leaves_a_model_out():
    base, tuned = floats(3)
    fewer = {name: its for name, its in tuned.items() if name != "m1"}
    for kind in (TaskArithmetic, Ties, Dare, Breadcrumbs):
        found = merge(kind(weights=(1.0, 0.0, 0.5)), base, tuned)
        torch.testing.assert_close(found, merge(kind(weights=(1.0, 0.5)), base, fewer), rtol=1e-6, atol=1e-6)


# DARE's chance.


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_is_task_arithmetic_on_average(density):
    """The mean over seeds, element by element, within five standard errors of an element's own chance."""
    numbers = torch.linspace(-1, 1, 4096)
    base, tuned = {"w": torch.zeros(4096)}, {"m": {"w": numbers}, "n": {"w": numbers.flip(0)}}
    seeds = 40
    found = (
        sum(merge(Dare(density=(density,), scale=1.0, seed=seed), base, tuned)["w"] for seed in range(seeds)) / seeds
    )
    wanted = merge(TaskArithmetic(scale=1.0), base, tuned)["w"]
    error = math.sqrt((1 - density) / density / seeds * float((numbers**2).mean()) * 2 / 4096)
    assert abs(float((found - wanted).mean())) < 5 * error
    spread = ((1 - density) / density / seeds * (numbers**2 + numbers.flip(0) ** 2)).sqrt()
    assert float(((found - wanted).abs() > 6 * spread).sum()) <= 4


def test_dare_keeps_the_share_it_should_and_other_ones_for_each_model_tensor_and_seed():
    count = CHUNK + 1000  # two chunks
    ones = {"v": torch.ones(count), "w": torch.ones(count)}
    base = {name: torch.zeros(count) for name in ones}
    masks = []
    for model in ("a", "b"):
        for seed in (0, 1):
            found = merge(Dare(density=(0.25,), scale=1.0, rescale="none", seed=seed), base, {model: ones})
            masks += [found["v"], found["w"]]
    masks += [masks[0][:1000].repeat(count // 1000 + 1)[:count]]
    for mask in masks[:-1]:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert abs(float(mask.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)
        assert float((mask[:1000] * mask[CHUNK:]).mean()) < 0.15  # the second chunk is no repetition of the first
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert abs(float((one * other).mean()) - 0.0625) < 0.02


def test_dare_by_mass_keeps_the_mass():
    base, tuned = {"w": torch.zeros(5000)}, {"m": {"w": random(0, torch.float32, (5000,))}}
    found = merge(Dare(density=(0.1,), scale=1.0, rescale="mass"), base, tuned)["w"]
    assert 0 < int((found != 0).sum()) < 1000
    torch.testing.assert_close(found.abs().sum(), tuned["m"]["w"].abs().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rescale", ["density", "mass", "none"])
def test_dare_drops_what_is_not_finite(rescale, kind):
    """What is dropped is 0, whatever it was; what is kept stays what it was."""
    values = random(0, kind, (4000,))
    values[::2] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf]).to(kind).repeat(500)
    sources = Sources(Loaded({"w": torch.zeros(4000, dtype=kind)}), {"m": Loaded({"w": values})}, allow_nonfinite=True)
    method = Dare(density=(0.3,), scale=1.0, rescale=rescale)
    chunk = sources.chunk("w", 0)
    found = method.blend(chunk, method.measure(Part(sources, ["w"])))
    kept = found != 0  # as is NaN
    assert 1000 < int(kept.sum()) < 1400
    factor = found[1::2][kept[1::2]] / values[1::2][kept[1::2]]
    torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=0.02, atol=0)
    assert float(factor[0]) == pytest.approx(1.0 if rescale == "none" else 1 / 0.3, rel=0.1)
    wanted = values[::2].to(found.dtype)[kept[::2]]
    torch.testing.assert_close(found[::2][kept[::2]], wanted, rtol=0, atol=0, equal_nan=True)


# SLERP's arcs.


def arc(t: float, first, second) -> torch.Tensor:
    base = {"w": torch.zeros(len(first))}
    return merge(Slerp(t), base, {"a": {"w": torch.tensor(first)}, "b": {"w": torch.tensor(second)}})["w"]


def test_slerp_walks_on_the_arc():
    half = math.sqrt(0.5)
    torch.testing.assert_close(arc(0.5, [1.0, 0.0], [0.0, 1.0]), torch.tensor([half, half]))
    third = arc(1 / 3, [2.0, 0.0, 0.0], [0.0, 0.0, 2.0])
    torch.testing.assert_close(third, torch.tensor([math.sqrt(3), 0.0, 1.0]))
    obtuse = arc(0.5, [1.0, 0.0], [-half, half])
    torch.testing.assert_close(obtuse, torch.tensor([math.cos(math.pi * 3 / 8), math.sin(math.pi * 3 / 8)]))


@pytest.mark.parametrize("second", [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 1e-3]], ids=str)
def test_slerp_ends_at_its_models(second):
    assert torch.equal(arc(0.0, [1.0, 0.0], second), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(arc(1.0, [1.0, 0.0], second), torch.tensor(second), rtol=1e-6, atol=1e-7)


def test_slerp_is_a_line_where_there_is_no_arc():
    """Parallel and opposite vectors; a vector of zeros is taken to stand at a right angle, as mergekit does."""
    assert arc(0.5, [1.0, 0.0], [3.0, 0.0]).tolist() == [2.0, 0.0]
    assert arc(0.5, [1.0, 0.0], [-3.0, 0.0]).tolist() == [-1.0, 0.0]
    assert arc(0.5, [1.0, 0.0], [-1.0, 0.0]).tolist() == [0.0, 0.0]
    torch.testing.assert_close(arc(0.25, [0.0, 0.0], [4.0, 0.0]), torch.tensor([4 * math.sin(math.pi / 8), 0.0]))
    assert arc(0.5, [0.0, 0.0], [0.0, 0.0]).tolist() == [0.0, 0.0]
    assert arc(0.5, [1e-30, 0.0], [0.0, 1e-30]).isfinite().all()
    assert arc(0.5, [1e30, 0.0], [0.0, 1e30]).isfinite().all()


# What is refused.


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Ties(density=(-0.1,)), ("density", "-0.1", "0 to 1")),
        (Ties(density=(1.5,)), ("density", "1.5")),
        (Ties(density=(math.nan,)), ("density", "nan")),
        (Ties(density=(0.5, 0.5)), ("density", "2 values for 3 models")),
        (Ties(weights=(1.0, 1.0)), ("weights", "2 values for 3 models")),
        (Dare(density=(-0.1,)), ("density", "-0.1")),
        (Dare(density=(math.nan,)), ("density", "nan")),
        (Dare(density=(1.1,)), ("density", "1.1")),
        (Dare(weights=(1.0,) * 4), ("weights", "4 values for 3 models")),
        (Breadcrumbs(density=-0.1), ("density", "-0.1")),
        (Breadcrumbs(outliers=2.0), ("2",)),
        (Breadcrumbs(density=0.9, outliers=0.2), ("density 0.9", "outliers 0.2")),
        (Average(weights=(1.0, 2.0)), ("weights", "2 values for 3 models")),
        (Average(weights=(1.0, -2.0, 1.0)), ("sum to 0",)),
        (TaskArithmetic(weights=()), ("weights", "0 values")),
        (Slerp(), ("two models", "3")),
    ],
    ids=repr,
)  # fmt: skip
def test_settings_that_cannot_be_are_named(method, words):
    base, tuned = models(3)
    with pytest.raises(UserError) as error:
        merge(method, base, tuned)
    for word in words:
        assert word in str(error.value)
