"""Merging that looks at unlabelled data, against its equations written out, and what each method must be."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from oracles import merge_data as oracle
from torch import nn

from koinon.core import UserError
from koinon.merge._coefficients import predictor, task_vectors
from koinon.merge._contract import Pool
from koinon.merge.adamerging import AdaMerging
from koinon.merge.average import Average
from koinon.merge.dam import DAM, Search, concrete
from koinon.merge.fisher import Fisher, information
from koinon.merge.regmean import RegMean, inner_products
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.nn.params import stream

ROWS = 6
METHODS = [Fisher(), RegMean(), AdaMerging(steps=2), DAM(steps=2, tuning_steps=2)]


def drawn(module: nn.Module, *words, scale: float = 1.0) -> nn.Module:
    """The module in double precision, with numbers added to its parameters."""
    numbers = stream(0, *words)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=numbers), alpha=scale)
    return module


def two_layers(classes: int) -> nn.Module:
    return nn.Sequential(nn.utils.skip_init(nn.Linear, 3, 4), nn.Tanh(), nn.utils.skip_init(nn.Linear, 4, classes))


def zeroed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def made(heads: bool = False, linear: bool = False) -> Pool:
    """Two tasks' models in double precision; with heads the second layers are theirs, and of different widths."""
    base = drawn(zeroed(nn.Sequential(nn.Linear(3, 3)) if linear else two_layers(3)), "base")
    tuned = {task: drawn(copy.deepcopy(base), task, scale=0.3) for task in ("a", "b")}
    if heads:
        tuned["b"][2] = drawn(zeroed(nn.Linear(4, 2)), "head")
    data = {
        task: torch.randn(ROWS, 3, generator=stream(0, task, "x"), dtype=torch.float64) + shift
        for task, shift in zip(tuned, (0.5, -0.2), strict=True)
    }
    return Pool(base, tuned, data, ("2.*",) if heads else ())


def states(pool: Pool):
    """Base, tuned models and heads as the oracles take them."""
    own = [name for name in pool.base.state_dict() if pool.own and name.startswith("2.")]
    whole = {task: dict(module.state_dict()) for task, module in pool.tuned.items()}
    base = {name: value for name, value in pool.base.state_dict().items() if name not in own}
    heads = {task: {name: state[name] for name in own} for task, state in whole.items()}
    return base, {task: {name: state[name] for name in base} for task, state in whole.items()}, heads


def assert_holds(module: nn.Module, expected, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    held = module.state_dict()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(held[name], value, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# What holds for all four.


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_data_of_every_task_is_needed(method):
    pool = made()
    with pytest.raises(UserError, match="model 'b': no data"):
        method.merge(replace(pool, data={"a": pool.data["a"]}))
    with pytest.raises(UserError, match="model 'a': no data"):
        method.merge(replace(pool, data=pool.data | {"a": pool.data["a"][:0]}))


@pytest.mark.parametrize("method", [*METHODS, DAM(steps=2, tuning_steps=2, adv_weight=0.0)], ids=repr)
def test_heads_may_differ_and_nothing_given_is_changed(method):
    pool = made(heads=True)
    for module in pool.tuned.values():
        module.train()
    before = pickle.dumps(pool)
    result = method.merge(pool)
    assert pickle.dumps(pool) == before
    assert_holds(result, {name: its for name, its in pool.base.state_dict().items() if name.startswith("2.")})


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_running_statistics_are_averaged_and_tied_weights_stay_tied(method):
    def model(*words):
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        net[2].weight = net[0].weight
        net = drawn(net, *words, scale=0.5)
        net[1].running_var.copy_(torch.rand(3, generator=stream(0, *words, "variance")))
        return net

    tuned = {task: model(task) for task in ("a", "b")}
    result = method.merge(replace(made(), base=model("base"), tuned=tuned))
    mean = (tuned["a"][1].running_var + tuned["b"][1].running_var) / 2
    torch.testing.assert_close(result[1].running_var, mean)
    assert result[0].weight is result[2].weight
    assert not torch.equal(result[0].weight, model("base")[0].weight)


class Bag(nn.Module):
    """Token ids by keyword, as of a language model; ``logits`` on the output."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        z = self.out(input=self.embed(input_ids) * attention_mask[..., None])
        return type("Output", (), {"logits": z.mean(1)})()


def tokens() -> Pool:
    base = drawn(Bag(), "bag", scale=0.1)
    tuned = {task: drawn(copy.deepcopy(base), task, scale=0.5) for task in ("a", "b")}
    ids = {task: torch.randint(7, (5, 4), generator=stream(0, task)) for task in tuned}
    return Pool(base, tuned, {t: {"input_ids": i, "attention_mask": torch.ones_like(i)} for t, i in ids.items()})


@pytest.mark.parametrize("method", [*METHODS[:3], DAM(steps=2, tuning_steps=2, adv_weight=0.0)], ids=repr)
def test_inputs_by_keyword_are_taken(method):
    pool = tokens()
    result, average = method.merge(pool).state_dict(), Average().merge(pool).state_dict()
    assert all(bool(value.isfinite().all()) for value in result.values())
    assert not torch.equal(result["out.weight"], average["out.weight"])


# Fisher merging.


def test_fisher_of_a_linear_model_is_its_closed_form():
    pool = made(linear=True)
    names = list(pool.base.state_dict())
    for task, module in pool.tuned.items():
        expected = oracle.linear_fisher(module.state_dict(), pool.data[task])
        found = dict(zip(names, information(module, names, pool.data[task]), strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        assert not any(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "method", [Fisher(), Fisher(floor=0.0, weights=(0.3, 2.0)), Fisher(floor=0.02), Fisher(normalize=True)], ids=repr
)
def test_fisher_equals_its_equations(method, heads):
    pool = made(heads)
    base, tuned, own = states(pool)
    infos = []
    for task, model in tuned.items():
        info = {
            name: its for name, its in oracle.fisher({**model, **own[task]}, pool.data[task]).items() if name in base
        }
        norm = sum(float((its**2).sum()) for its in info.values()) ** 0.5 if method.normalize else 1
        infos.append({name: its / norm for name, its in info.items()})
    weights = method.weights * (2 if len(method.weights) == 1 else 1)
    expected = oracle.weighted(list(tuned.values()), infos, weights, method.floor)
    assert_holds(method.merge(pool), expected, rtol=1e-5, atol=1e-7)


def test_fisher_of_equal_information_averages():
    """A shift of all logits changes no prediction, so that the models have equal Fisher information."""
    pool = made(linear=True)
    other = copy.deepcopy(pool.tuned["a"])
    with torch.no_grad():
        other[0].bias += 2.5
    same = replace(pool, tuned={"a": pool.tuned["a"], "b": other}, data=dict.fromkeys("ab", pool.data["a"]))
    assert_holds(Fisher().merge(same), Average().merge(same).state_dict())


def test_fisher_where_no_model_cares_averages():
    pool = made()
    blind = {task: torch.zeros_like(x) for task, x in pool.data.items()}  # the first layer's weights see no input
    result = Fisher(floor=0.0).merge(replace(pool, data=blind))
    assert_holds(result, {"0.weight": Average().merge(pool).state_dict()["0.weight"]})


def test_sampled_classes_have_the_exact_expectation():
    """Of one row, whose classes all have a fair chance, seen a thousand times."""
    pool = made(linear=True)
    names, row = list(pool.base.state_dict()), 0.1 * pool.data["a"][:1]
    exact = information(zeroed(copy.deepcopy(pool.base)), names, row)
    found = information(zeroed(copy.deepcopy(pool.base)), names, row.expand(1000, -1), stream(0))
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)
    assert not torch.equal(found[0], exact[0])
    one, again, other = (Fisher(sampled=True, seed=seed).merge(pool).state_dict()["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# RegMean.


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "method", [RegMean(), RegMean(shrink=0.3, ridge=0.1), RegMean(shrink=1.0, ridge=1e-3)], ids=repr
)
def test_regmean_equals_its_equations(method, heads):
    pool = made(heads)
    _, tuned, _ = states(pool)
    settings = (method.shrink, method.ridge)
    expected = {
        "0.weight": oracle.regmean([m["0.weight"] for m in tuned.values()], list(pool.data.values()), *settings),
        "0.bias": sum(m["0.bias"] for m in tuned.values()) / 2,
    }
    if not heads:
        hidden = [torch.tanh(x @ m["0.weight"].T + m["0.bias"]) for m, x in zip(tuned.values(), pool.data.values())]
        expected["2.weight"] = oracle.regmean([m["2.weight"] for m in tuned.values()], hidden, *settings)
    assert_holds(method.merge(pool), expected, rtol=1e-7, atol=1e-9)


def test_regmean_of_one_layer_minimises_the_squared_differences_of_outputs():
    base = nn.Linear(3, 2, bias=False).double()
    pool = made()
    tuned = {task: drawn(copy.deepcopy(base), task) for task in pool.tuned}
    result = RegMean(shrink=1.0, ridge=0.0).merge(replace(pool, base=base, tuned=tuned))
    x = torch.cat(list(pool.data.values()))
    y = torch.cat([tuned[task](pool.data[task]) for task in tuned]).detach()
    assert_holds(result, {"weight": torch.linalg.lstsq(x, y).solution.T})


def test_regmean_without_off_diagonal_weighs_each_feature_by_its_mean_square():
    pool = made(linear=True)
    squares = [(x**2).mean(0) for x in pool.data.values()]
    weights = [module[0].weight.detach() for module in pool.tuned.values()]
    expected = sum(s * w for s, w in zip(squares, weights, strict=True)) / sum(squares)
    assert_holds(RegMean(shrink=0.0, ridge=0.0).merge(pool), {"0.weight": expected})


def test_regmean_weighs_models_alike_whatever_their_number_of_rows():
    pool = made()
    more = replace(pool, data=pool.data | {"a": pool.data["a"].repeat(100, 1)})  # more than are run at a time
    assert_holds(RegMean().merge(more), RegMean().merge(pool).state_dict())


def test_regmean_averages_a_feature_that_nobody_sees():
    pool = made(linear=True)
    blind = replace(pool, data={task: x * torch.tensor([1.0, 1.0, 0.0]) for task, x in pool.data.items()})
    mean = Average().merge(pool).state_dict()["0.weight"][:, 2]
    torch.testing.assert_close(RegMean().merge(blind).state_dict()["0.weight"][:, 2], mean)
    with pytest.raises(UserError, match=r"0\.weight.*ridge above 0"):
        RegMean(ridge=0.0).merge(blind)


def test_regmean_counts_all_calls_of_a_layer_and_averages_what_is_not_called():
    layer = nn.Linear(3, 3).double()
    twice, x = nn.Sequential(layer, layer), made().data["a"]
    seen = torch.cat([x, layer(x)]).detach()
    (found,) = inner_products(twice, x).values()
    torch.testing.assert_close(found, seen.T @ seen / len(seen))
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    tuned = {task: drawn(copy.deepcopy(block), task, scale=0.1) for task in "ab"}
    data = {task: torch.randn(5, 3, 4, generator=stream(0, task), dtype=torch.float64) for task in tuned}
    pool = Pool(block, tuned, data)
    result, mean = RegMean().merge(pool).state_dict(), Average().merge(pool).state_dict()
    differ = {name for name in result if not torch.allclose(result[name], mean[name])}
    assert differ == {"linear1.weight", "linear2.weight"}


@pytest.mark.parametrize("method", [Fisher(), RegMean()], ids=repr)
def test_one_model_is_itself(method):
    pool = made()
    alone = replace(pool, tuned={"a": pool.tuned["a"]})
    assert_holds(method.merge(alone), pool.tuned["a"].state_dict())


# AdaMerging.


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("per", ["tensor", "task"])
def test_adamerging_equals_its_equations(per, heads):
    pool = made(heads)
    base, tuned, own = states(pool)
    method = AdaMerging(per=per, steps=5, rate=0.02, batch=ROWS)
    expected = oracle.adamerging(base, tuned, own, pool.data, 5, 0.02, per=per)
    assert_holds(method.merge(pool), expected, rtol=1e-7, atol=1e-9)


def test_adamerging_makes_predictions_surer_and_coefficients_of_tensors_differ():
    pool = made()
    predict, vectors = predictor(pool), task_vectors(pool)

    def unsure(module):
        return sum(float(oracle.entropy(predict(module.state_dict(), task, x))) for task, x in pool.data.items())

    whole, by_task, by_tensor = (
        AdaMerging(steps=steps, per=per, rate=0.01, batch=ROWS).merge(pool)
        for steps, per in ((0, "task"), (60, "task"), (60, "tensor"))
    )
    assert unsure(by_tensor) < unsure(by_task) < unsure(whole)
    assert vectors.coefficients(0.3, "tensor").shape == (4, 2)
    assert vectors.coefficients(0.3, "task").shape == (1, 2)
    assert_holds(whole, TaskArithmetic(scale=0.3).merge(pool).state_dict())


# DAM.


def uniforms(pool: Pool, seed: int, count: int):
    """What the masks are drawn from, tensor by tensor."""
    base, _, _ = states(pool)
    numbers, sizes = stream(seed, "mask"), [its.numel() for its in base.values()]
    for _ in range(count):
        pieces = torch.rand(sum(sizes), generator=numbers, dtype=torch.float64).split(sizes)
        yield {name: piece.view(its.shape) for (name, its), piece in zip(base.items(), pieces, strict=True)}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "turned",
    [
        {},
        {"adv_weight": 0.0},  # Concrete AdaMerging
        {"adv_weight": 0.0, "learn": False},  # Concrete task arithmetic
        {"learn": False, "low": -1.0, "adv_weight": 2.0},
        {"per": "task", "temperature": 2.0, "init": 0.6, "high": 0.5},
    ],
    ids=str,
)
def test_dam_equals_its_equations(turned, heads):
    pool = made(heads)
    base, tuned, own = states(pool)
    rates = (0.05, 0.03, 0.7, 0.01)
    names = ("rate", "adv_rate", "inner_rate", "tuning_rate")
    method = DAM(steps=4, samples=3, tuning_steps=3, batch=ROWS, seed=5, **dict(zip(names, rates)), **turned)
    draws = list(uniforms(pool, 5, 4 + 3))
    settings = {"weight" if key == "adv_weight" else key: value for key, value in turned.items()}
    expected = oracle.dam(base, tuned, own, pool.data, draws[:4], draws[4:], 3, rates=rates, **settings)
    assert_holds(method.merge(pool), expected, rtol=1e-6, atol=1e-8)


def test_dam_mask_is_between_0_and_1_and_then_of_mean_1():
    logits = torch.linspace(-3, 3, 5000, dtype=torch.float64)
    m = concrete(logits, 0.5, stream(0))
    assert bool(((m > 0) & (m < 1)).all())
    assert float(m[:500].mean()) < 0.2 < 0.8 < float(m[-500:].mean())
    search = Search(DAM(samples=3), made())
    for mask in (search.mask(), search.final_mask()):
        assert list(mask) == list(search.vectors.base)
        for its in mask.values():
            assert bool((its > 0).all())
            torch.testing.assert_close(its.mean(), torch.ones((), dtype=its.dtype))
            assert float(its.detach().std()) > 0.1


def test_dam_without_mask_and_with_lambda_fixed_is_task_arithmetic():
    pool = made()
    method = DAM(temperature=1e9, learn=False, steps=3)
    assert_holds(method.merge(pool), TaskArithmetic(scale=0.3).merge(pool).state_dict())


def test_dam_without_mask_and_perturbation_is_adamerging():
    pool = made()
    for per in ("tensor", "task"):
        method = DAM(temperature=1e9, adv_weight=0.0, steps=3, tuning_steps=7, tuning_rate=0.02, batch=4, per=per)
        expected = AdaMerging(steps=7, rate=0.02, batch=4, per=per).merge(pool).state_dict()
        assert_holds(method.merge(pool), expected)


def test_dam_of_models_equal_to_the_base_is_the_base():
    pool = made()
    same = replace(pool, tuned={task: copy.deepcopy(pool.base) for task in pool.tuned})
    assert_holds(DAM(steps=3, tuning_steps=3).merge(same), pool.base.state_dict(), rtol=0, atol=0)


def test_each_step_of_dam_changes_one_thing():
    pool = made()
    given = pickle.dumps(pool)
    search = Search(DAM(batch=ROWS, rate=0.1, adv_rate=0.1), pool)

    def now():
        return {
            "lam": search.lam.detach().clone(),
            "noise": torch.stack(list(search.noise.values())).detach(),
            "logits": search.logits.detach().clone(),
        }

    def changed(step):
        before = now()
        slopes = [search.lam.grad, search.logits.grad, *(its.grad for its in search.noise.values())]
        before_slopes = [None if its is None else its.clone() for its in slopes]
        step()
        after = now()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        after_slopes = [search.lam.grad, search.logits.grad, *(its.grad for its in search.noise.values())]
        pairs = zip(before_slopes, after_slopes, strict=True)
        told = [a is not b and (a is None or b is None or not torch.equal(a, b)) for a, b in pairs]
        return moved, {n for n, t in zip(("lam", "logits", "noise", "noise"), told, strict=True) if t}

    for _ in range(2):
        mask = search.mask()
        assert changed(lambda m=mask: search.tune(m, pool.data)) == ({"lam"}, {"lam"})
        assert float((search.lam.detach() - 0.3).abs().max()) <= 1.1  # from its start, wherever it was
        state = search.vectors.merged(search.lam.detach(), mask)
        assert changed(lambda s=state: search.attack(s, pool.data)) == ({"noise"}, {"noise"})
        assert changed(lambda s=state: search.learn_mask(s, pool.data)) == ({"logits"}, {"logits"})
    assert pickle.dumps(pool) == given


@pytest.mark.parametrize("seed", range(5))
def test_step_2_of_dam_makes_perturbed_predictions_worse(seed):
    """Of fixed weights, on one batch, for each task: the cross-entropy to what is said unperturbed rises."""
    pool = made()
    search = Search(DAM(seed=seed, adv_rate=1e-3), pool)
    state = search.vectors.merged(search.lam, search.mask())
    for _ in range(5):
        before = {task: search.harm(state, {task: x}).item() for task, x in pool.data.items()}
        search.attack(state, pool.data)
        assert all(search.harm(state, {task: x}).item() > before[task] for task, x in pool.data.items())


def test_dam_without_weight_perturbs_nothing():
    pool = made()
    method = DAM(adv_weight=0.0, steps=3, tuning_steps=2)
    assert Search(method, pool).noise == {}
    turned = replace(method, adv_rate=7.0, low=-3.0, high=0.1)
    assert_holds(turned.merge(pool), method.merge(pool).state_dict(), rtol=0, atol=0)


def test_dam_perturbs_no_token_ids():
    with pytest.raises(UserError, match=r"model 'a': its data are a mapping.*token ids.*--adv-weight 0"):
        DAM().merge(tokens())
    pool = made()
    whole = {task: x.long() for task, x in pool.data.items()}
    with pytest.raises(UserError, match="model 'a': its data are whole numbers"):
        DAM().merge(replace(pool, data=whole))


def test_dam_hangs_less_on_the_seed_with_more_samples():
    pool = made()

    def spread(samples):
        method = DAM(steps=0, learn=False, samples=samples)
        results = [replace(method, seed=seed).merge(pool).state_dict()["0.weight"] for seed in range(8)]
        return float(torch.stack(results).std(0).mean())

    assert spread(64) < spread(1) / 4


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (DAM(temperature=0.0), "temperature 0"),
        (DAM(samples=0), "samples 0"),
        (DAM(batch=0), "batch 0"),
        (AdaMerging(batch=-1), "batch -1"),
        (Fisher(weights=(1.0, 2.0, 3.0)), "3 values for 2 models"),
    ],
    ids=repr,
)
def test_settings_that_mean_nothing_are_refused(method, said):
    with pytest.raises(UserError, match=said):
        method.merge(made())
