"""What must be true of every way of merging, tried on two tiny models tuned from one."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from koinon.bench.checks import Fixture, Outcome
from koinon.core import Method, UserError
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import outputs
from koinon.merge.average import Average
from koinon.nn.params import stream


@dataclass
class Small:
    """Inputs of a tiny merge."""

    pool: Pool
    inputs: Tensor


def small() -> Small:
    """A network of two layers, two models tuned from it for tasks of their own, 40 unlabelled rows of each task."""
    numbers = stream(0, "small")
    base = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 6, 8), nn.Tanh(), nn.LayerNorm(8), nn.utils.skip_init(nn.Linear, 8, 3)
    )
    tuned = {}
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
        for task in ("one", "other"):
            tuned[task] = copy.deepcopy(base)
            for parameter in tuned[task].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.3)
    shift = torch.randn(2, 1, 6, generator=numbers)
    data = {task: torch.randn(40, 6, generator=numbers) + its for task, its in zip(tuned, shift, strict=True)}
    return Small(Pool(base, tuned, data), torch.randn(12, 6, generator=numbers))


def merged(method: Method, pool: Pool) -> nn.Module:
    """The method's model."""
    assert isinstance(method, Merge)
    return method.merge(pool).eval()


def apply(method: Method, given: Small) -> Outcome:
    """What the merged model says."""
    with torch.no_grad():
        return {"logits": outputs(merged(method, given.pool), given.inputs)}


def _order_does_not_matter(method: Method) -> None:
    given = small()
    turned = replace(given.pool, tuned=dict(reversed(list(given.pool.tuned.items()))))
    one, other = (apply(method, replace(given, pool=pool))["logits"] for pool in (given.pool, turned))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg="the result changes with the order of the models")


def _models_equal_to_the_base_change_nothing(method: Method) -> None:
    given = small()
    same = replace(given.pool, tuned={task: copy.deepcopy(given.pool.base) for task in given.pool.tuned})
    with torch.no_grad():
        expected = given.pool.base(given.inputs)
    found = apply(method, replace(given, pool=same))["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg="merging the base with itself changes it")


def _own_tensors_stay_their_own(method: Method) -> None:
    given = small()
    pool = replace(given.pool, own=("3.*",))
    before = [copy.deepcopy(module.state_dict()) for module in (pool.base, *pool.tuned.values())]
    assert isinstance(method, Merge)
    result = method.merge(pool)
    for module, state in zip((pool.base, *pool.tuned.values()), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    heads = [value for name, value in result.state_dict().items() if name.endswith("3.weight")]
    known = [module.state_dict()["3.weight"] for module in (pool.base, *pool.tuned.values())]
    assert heads, "the result has lost its own tensors"
    assert all(any(torch.equal(head, its) for its in known) for head in heads), "a tensor named in `own` was merged"


def _an_empty_pool_is_refused(method: Method) -> None:
    assert isinstance(method, Merge)
    try:
        method.merge(replace(small().pool, tuned={}))
    except UserError:
        return
    raise AssertionError("a pool without models is no UserError")


def _a_model_that_does_not_fit_is_named(method: Method) -> None:
    given = small()
    wrong = copy.deepcopy(given.pool.tuned["other"])
    assert isinstance(wrong, nn.Sequential)
    wrong[3] = nn.Linear(8, 4)
    assert isinstance(method, Merge)
    said = ""
    try:
        method.merge(replace(given.pool, tuned=dict(given.pool.tuned) | {"other": wrong}))
    except UserError as error:
        said = str(error)
    assert "3.weight" in said, f"models of different shapes: no UserError that names the tensor, but {said!r}"
    assert "other" in said, f"the error does not name the model: {said}"


FIXTURE = Fixture(
    contract=Merge,
    arguments=small,
    apply=apply,
    baseline=Average,
    properties={
        "order_does_not_matter": _order_does_not_matter,
        "models_equal_to_the_base_change_nothing": _models_equal_to_the_base_change_nothing,
        "own_tensors_stay_their_own": _own_tensors_stay_their_own,
        "an_empty_pool_is_refused": _an_empty_pool_is_refused,
        "a_model_that_does_not_fit_is_named": _a_model_that_does_not_fit_is_named,
    },
)
