"""Twin-Merging against its equations, and what makes it the system it is."""

import copy
import importlib.util
import io
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles import merge_twin as oracle
from torch import nn

from koinon.core import UserError
from koinon.merge._checks import small
from koinon.merge._contract import Pool
from koinon.merge._live import features, outputs, taken
from koinon.merge.average import Average
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.twin import TwinMerging
from koinon.nn.lowrank import CUTS, largest, thinned, truncated
from koinon.nn.params import stream
from koinon.nn.router import trained_router

QUICK = {"epochs": 1}
"""Where it does not matter how well the router routes."""


class Every(nn.Module):
    """A net with every kind of leaf: convolution, batch and layer normalisation, embedding, linear."""

    def __init__(self):
        super().__init__()
        make = nn.utils.skip_init
        self.look = make(nn.Conv2d, 2, 6, 3)
        self.level = nn.BatchNorm2d(6)
        self.word = make(nn.Embedding, 11, 6)
        self.scale = nn.LayerNorm(6)
        self.think = make(nn.Linear, 6, 8)
        self.head = make(nn.Linear, 8, 3)

    def forward(self, image, token):
        seen = torch.relu(self.level(self.look(image))).mean((2, 3))
        read = self.scale(self.word(token) + seen[:, None])
        return self.head(torch.tanh(self.think(read)).mean(1))


class Words(nn.Module):
    """A language model as Hugging Face makes them: keywords, an output with logits, positions for all rows, a tie."""

    def __init__(self):
        super().__init__()
        self.word, self.place = nn.utils.skip_init(nn.Embedding, 13, 8), nn.utils.skip_init(nn.Embedding, 9, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.utils.skip_init(nn.Linear, 8, 8)
        self.head = nn.utils.skip_init(nn.Linear, 8, 13, bias=False)
        self.head.weight = self.word.weight

    def forward(self, input_ids, attention_mask):
        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1])[None])
        x = torch.tanh(self.mix(input=self.norm(x))) * attention_mask[..., None]
        return SimpleNamespace(logits=self.head(x.cumsum(1)))


def hugging_face():
    """A tiny GPT-2, whose linear layers are transposed and whose head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=9, n_embd=8, n_layer=2, n_head=2))


LANGUAGE = [Words, hugging_face] if importlib.util.find_spec("transformers") else [Words]


def tuned_from(base, count=3, seed=0, spread=0.3):
    """The base with numbers drawn anew, and models tuned from it; running variances stay above 0."""
    numbers = stream(seed, "test")

    def moved(module, far):
        module = copy.deepcopy(module)
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    change = far * torch.randn(value.shape, generator=numbers)
                    value.add_(change.abs() if name.endswith("var") else change)
        return module

    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    base = moved(base, 0.5)
    return base.eval(), {f"task {number}": moved(base, spread).eval() for number in range(count)}


def every_pool(seed=0):
    base, tuned = tuned_from(Every(), seed=seed)
    numbers = stream(seed, "inputs")
    data = {
        task: {
            "image": torch.randn(12, 2, 5, 5, generator=numbers) + number,
            "token": torch.randint(11, (12, 4), generator=numbers),
        }
        for number, task in enumerate(tuned)
    }
    return Pool(base, tuned, data)


def small_pool():
    return small().pool


def language_pool(made):
    base, tuned = tuned_from(made())
    numbers = stream(0, "inputs")
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    return Pool(
        base,
        tuned,
        {t: {"input_ids": torch.randint(13, (8, 6), generator=numbers), "attention_mask": mask} for t in tuned},
    )


def separable(heads=(3, 4, 2)):
    """Three tasks with heads of their own, whose inputs lie apart."""
    base, tuned = tuned_from(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)))
    numbers = stream(1, "separable")
    for model, width in zip(tuned.values(), heads, strict=True):
        model[2] = nn.utils.skip_init(nn.Linear, 10, width)
        with torch.no_grad():
            for parameter in model[2].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    apart = 3 * torch.eye(6)[:3]
    data = {task: torch.randn(80, 6, generator=numbers) * 0.3 + its for task, its in zip(tuned, apart, strict=True)}
    return Pool(base, tuned, data, own=("2.*",))


def mixed_batch(pool, each=2):
    """Rows of all tasks in one batch."""
    parts = [taken(inputs, slice(0, each)) for inputs in pool.data.values()]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def states(pool):
    return pool.base.state_dict(), [module.state_dict() for module in pool.tuned.values()]


def floating(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_states_equal(one, other, atol=1e-5):
    assert len(other)
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=atol, msg=name)


ONE_HOT = torch.eye(3)
SOME = torch.tensor([0.7, 0.1, 0.2])


# The weights, against the equations.


@pytest.mark.parametrize("rank", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("made", [every_pool, small_pool], ids=["every", "small"])
def test_merged_weights_equal_their_equations(made, rank):
    pool = made()
    twin = TwinMerging(rank=rank, **QUICK).merge(pool)
    base, experts = (floating(states(pool)[0]), [floating(state) for state in states(pool)[1]])
    star = oracle.shared(base, experts, 0.3)
    vectors = oracle.twins(star, experts, rank)
    for weights in (ONE_HOT[0], SOME, -SOME, torch.zeros(3)):
        found = twin.materialize(weights[: len(experts)])
        assert type(found) is type(pool.base)
        assert_states_equal(found.state_dict(), oracle.merged(star, vectors, weights[: len(experts)]))


def test_twins_have_low_rank_and_take_little():
    pool = every_pool()
    twin = TwinMerging(rank=0.4, **QUICK).merge(pool)
    star, numbers = twin.materialize(torch.zeros(3)).state_dict(), 0
    for task in range(3):
        for name, value in twin.materialize(ONE_HOT[task]).state_dict().items():
            if value.ndim > 1:
                matrix = (value - star[name]).flatten(1).double()
                rank = int(0.4 * min(matrix.shape))
                assert int(torch.linalg.matrix_rank(matrix, atol=1e-5)) == rank
                numbers += rank * sum(matrix.shape)
            elif value.is_floating_point():
                numbers += value.numel()
    assert twin.stored_numbers == numbers
    assert twin.stored_bytes == 4 * numbers


def test_weights_are_linear():
    twin = TwinMerging(rank=0.5, **QUICK).merge(every_pool())
    zero, one, other, both = (
        floating(twin.materialize(w).state_dict())
        for w in (torch.zeros(3), ONE_HOT[0], SOME, 2 * ONE_HOT[0] - 0.5 * SOME)
    )
    due = {name: zero[name] + 2 * (one[name] - zero[name]) - 0.5 * (other[name] - zero[name]) for name in zero}
    assert_states_equal(both, due)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_one_hot_at_full_rank_is_the_expert(scale):
    pool = every_pool()
    twin = TwinMerging(scale=scale, rank=1.0, **QUICK).merge(pool)
    inputs = mixed_batch(pool)
    for number, model in enumerate(pool.tuned.values()):
        assert_states_equal(twin.materialize(ONE_HOT[number]).state_dict(), floating(model.state_dict()))
        found = twin.with_weights(inputs, ONE_HOT[number].expand(6, 3))
        torch.testing.assert_close(found, model(**inputs), rtol=1e-5, atol=1e-5)


def test_without_weights_or_rank_it_is_task_arithmetic():
    pool = every_pool()
    inputs = mixed_batch(pool)
    due = TaskArithmetic(scale=0.3).merge(pool).eval()(**inputs)
    found = TwinMerging(**QUICK).merge(pool).with_weights(inputs, torch.zeros(6, 3))
    torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-5)
    empty = TwinMerging(rank=0.0, **QUICK).merge(pool)
    assert torch.equal(empty(inputs), due)
    assert empty.stored_numbers == 0


def test_equal_weights_at_full_rank_are_the_average():
    pool = every_pool()
    found = TwinMerging(rank=1.0, **QUICK).merge(pool).materialize(torch.full((3,), 1 / 3))
    assert_states_equal(found.state_dict(), floating(Average().merge(pool).state_dict()))


def test_experts_equal_to_the_base_have_empty_twins():
    pool = every_pool()
    pool = replace(pool, tuned={task: copy.deepcopy(pool.base) for task in pool.tuned})
    for compress in CUTS:
        twin = TwinMerging(rank=0.5, compress=compress, **QUICK).merge(pool)
        assert not any(bool(value.any()) for value in twin.branches.buffers())
        assert_states_equal(twin.materialize(SOME).state_dict(), floating(pool.base.state_dict()), atol=0)


def test_one_expert_at_scale_1_is_itself():
    pool = every_pool()
    (task, model), *_ = pool.tuned.items()
    pool = replace(pool, tuned={task: model})
    twin = TwinMerging(scale=1.0, **QUICK).merge(pool)
    assert_states_equal(twin.shared.state_dict(), floating(model.state_dict()))
    torch.testing.assert_close(twin(pool.data[task]), model(**pool.data[task]), rtol=1e-5, atol=1e-5)


def test_elements_kept_by_size_or_at_random():
    tensor = torch.randn(40, 30, generator=stream(0, "tensor"))
    kept = largest(tensor, 100)
    assert int((kept != 0).sum()) == 100
    assert kept[kept != 0].abs().min() >= tensor[kept == 0].abs().max()
    assert torch.equal(kept[kept != 0], tensor[kept != 0])
    kept = thinned(tensor, 0.25, stream(0, "kept"))
    torch.testing.assert_close(kept[kept != 0], 4 * tensor[kept != 0])
    assert 0.2 < (kept != 0).float().mean() < 0.3
    assert not thinned(tensor, 0.0, stream(0, "kept")).any()
    left, right = truncated(tensor, 30)
    torch.testing.assert_close(left @ right, tensor, rtol=1e-4, atol=1e-5)


# Side branches: rows with weights of their own.


def assert_rows_meet_their_weights(pool, method, atol=1e-5):
    twin, inputs = method.merge(pool), mixed_batch(pool)
    weights = torch.rand(6, 3, generator=stream(0, "weights")) - 0.2
    weights[0] = ONE_HOT[2]
    found = twin.with_weights(inputs, weights)
    for row in range(6):
        due = outputs(twin.materialize(weights[row]), taken(inputs, slice(row, row + 1)))
        torch.testing.assert_close(found[row : row + 1], due, rtol=1e-5, atol=atol)
    assert float((found - outputs(twin.shared, inputs)).abs().max()) > 0.01
    routed = twin.with_weights(inputs, twin.route(inputs))
    assert torch.equal(twin(inputs), routed)
    return twin


@pytest.mark.parametrize("compress", CUTS)
@pytest.mark.parametrize("rank", [0.3, 1.0])
def test_side_branches_equal_merged_weights_row_by_row(compress, rank):
    assert_rows_meet_their_weights(every_pool(), TwinMerging(rank=rank, compress=compress, **QUICK))


@pytest.mark.parametrize("made", LANGUAGE)
def test_a_language_model(made):
    pool = language_pool(made)
    twin = assert_rows_meet_their_weights(pool, TwinMerging(rank=0.5, **QUICK), atol=1e-4)
    inputs = mixed_batch(pool)
    assert torch.equal(twin(**inputs), twin(inputs))
    names = [name for its in twin.branches.places.values() for name in its.values()]
    assert (
        len(names) == len(set(names)) + 1 == len(twin.branches.stacks) + 1
    )  # the tied matrix has one twin, used twice


def test_tensors_outside_of_leaves():
    """A module with children and a tensor of its own, as the first token of a vision transformer."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.zeros(1, 1, 6)), nn.utils.skip_init(nn.Linear, 6, 6)

        def forward(self, x):
            return torch.cat([self.token.expand(len(x), -1, -1), self.inner(x[:, None])], 1)

    base, tuned = tuned_from(nn.Sequential(First(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(12, 3)))
    data = {task: torch.randn(9, 6, generator=stream(0, task)) for task in tuned}
    twin = assert_rows_meet_their_weights(Pool(base, tuned, data), TwinMerging(rank=0.5, **QUICK))
    assert twin.branches.places["0"] == {"token": "0.token"}


class Squared(nn.Module):
    """Not affine in its tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight**2


class Flat(nn.Module):
    """Hands its leaf more rows than there are."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x.reshape(-1, 3)).reshape(len(x), 6)


class Borrowed(nn.Module):
    """Uses its leaf's tensor without calling the leaf."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x @ self.inner.weight.T


@pytest.mark.parametrize(
    ("kind", "named", "skip"),
    [
        (Squared, r"0: its output is not affine in its weight; .* 0\.weight", "0.weight"),
        (Flat, r"0\.inner: it runs with \[4\] rows in a batch of 2", "0.inner.*"),
        (Borrowed, r"put 0\.inner into `skip`", "0.inner.*"),
    ],
)
def test_a_module_without_side_branch_is_named_and_can_be_skipped(kind, named, skip):
    base, tuned = tuned_from(nn.Sequential(kind(), nn.LayerNorm(6), nn.Linear(6, 3)))
    pool = Pool(base, tuned, {task: torch.randn(9, 6, generator=stream(0, task)) for task in tuned})
    with pytest.raises(UserError, match=named):
        TwinMerging(rank=0.5, **QUICK).merge(pool)
    twin = TwinMerging(rank=0.5, skip=(skip,), **QUICK).merge(pool)
    shared, found = twin.shared.state_dict(), twin.materialize(SOME).state_dict()
    assert {name for name, value in found.items() if not torch.equal(value, shared[name])} == {
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    }


def test_attention_of_torch_is_refused_until_skipped():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base, tuned = tuned_from(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)))
    pool = Pool(base, tuned, {task: torch.randn(9, 3, 8, generator=stream(0, task)) for task in tuned})
    with pytest.raises(UserError, match=r"0\.self_attn: its output is no tensor"):
        TwinMerging(**QUICK).merge(pool)
    with pytest.raises(UserError, match="out_proj into `skip`"):
        TwinMerging(rank=0.5, skip=("*.in_proj_*",), **QUICK).merge(pool)
    assert_rows_meet_their_weights(pool, TwinMerging(rank=0.5, skip=("*.self_attn.*",), **QUICK))


def test_weights_of_another_shape_are_refused():
    pool = every_pool()
    twin = TwinMerging(**QUICK).merge(pool)
    with pytest.raises(UserError, match=r"weights \[3\]: give \[6, 3\]"):
        twin.with_weights(mixed_batch(pool), SOME)


# The router.


def test_router_equals_its_equations_and_sees_only_the_shared_expert():
    pool = separable()
    twin = TwinMerging(**QUICK).merge(pool)
    inputs = mixed_batch(pool)
    shared = TaskArithmetic(scale=0.3).merge(pool).eval()
    weights = twin.route(inputs)
    torch.testing.assert_close(weights, oracle.routed(twin.router, shared[:2](inputs)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    for value in twin.branches.buffers():
        value.fill_(7.0)
    assert torch.equal(twin.route(inputs), weights)


def test_router_learns_to_tell_tasks_apart():
    pool = separable()
    twin = TwinMerging().merge(pool)
    fresh = torch.randn(60, 6, generator=stream(5, "fresh")) * 0.3 + (3 * torch.eye(6)[:3]).repeat_interleave(20, 0)
    assert (twin.route(fresh).argmax(1) == torch.arange(3).repeat_interleave(20)).float().mean() > 0.95


def test_router_is_that_of_its_best_epoch_on_rows_held_out():
    numbers = stream(0, "rows")
    rows = {name: torch.randn(20, 5, generator=numbers) + shift for name, shift in (("b", 0.0), ("a", 0.3))}
    held = {name: its[torch.randperm(20, generator=stream(0, "held out", name))[:6]] for name, its in rows.items()}
    losses = []
    for epochs in (1, 3, 9, 27, 81):
        router = trained_router(rows, 0, (0.5, 0.5), holdout=0.3, lr=1e-2, batch=8, epochs=epochs)
        answers = torch.tensor([0] * 6 + [1] * 6)
        losses.append(float(nn.functional.cross_entropy(router(torch.cat([held["b"], held["a"]])), answers)))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-2] == losses[-1]  # it has overfitted since, and nothing later is taken


def test_hard_routing_at_full_rank_is_model_switching():
    pool = separable(heads=(3, 3, 3))
    pool = replace(pool, own=())
    twin = TwinMerging(rank=1.0, hard=True).merge(pool)
    for number, (task, model) in enumerate(pool.tuned.items()):
        inputs = pool.data[task]
        assert bool((twin.route(inputs)[:, number] == 1).all())
        torch.testing.assert_close(twin(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_heads_are_routed_with_the_rows():
    pool = separable()
    twin = TwinMerging(rank=1.0).merge(pool)
    inputs = torch.cat([pool.data[task][:3] for task in pool.tuned])[torch.tensor([0, 3, 6, 1, 4, 7, 2, 5, 8])]
    chosen = torch.tensor([0, 1, 2] * 3)
    assert torch.equal(twin.route(inputs).argmax(1), chosen)
    for found, exact in ((twin(inputs), False), (twin.with_weights(inputs, ONE_HOT[chosen]), True)):
        assert found.shape == (9, 4)
        for row, task in enumerate(chosen):
            model = pool.tuned[f"task {task}"]
            width = model[2].out_features
            assert bool((found[row, width:] == -torch.inf).all())
            assert bool(found[row, :width].isfinite().all())
            if exact:
                torch.testing.assert_close(found[row, :width], model(inputs[row]), rtol=1e-5, atol=1e-5)
    one = twin.materialize(ONE_HOT[1])
    assert one[2].out_features == 4
    torch.testing.assert_close(one(inputs), pool.tuned["task 1"](inputs), rtol=1e-5, atol=1e-5)
    assert twin.with_weights(inputs[:2], ONE_HOT[:2]).shape == (2, 4)
    assert twin.with_weights(inputs[:0], ONE_HOT[:0]).shape == (0, 4)


def test_biases_may_stay_the_tasks_own():
    """As in the paper's runs on GLUE: heads and all biases are each task's."""
    pool = replace(separable(), own=("2.*", "*.bias"))
    twin = TwinMerging(rank=1.0, **QUICK).merge(pool)
    for number, (task, model) in enumerate(pool.tuned.items()):
        inputs = pool.data[task][:4]
        found = twin.with_weights(inputs, ONE_HOT[number].expand(4, 3))
        torch.testing.assert_close(found[:, : model[2].out_features], model(inputs), rtol=1e-5, atol=1e-5)


def test_features_are_means_over_tokens_that_count():
    pool = language_pool(Words)
    inputs, model = pool.data["task 0"], pool.base
    found = features(model, "mix", inputs, size=3)
    seen = model.mix(model.norm(model.word(inputs["input_ids"]) + model.place(torch.arange(6))))
    for row in range(8):
        count = int(inputs["attention_mask"][row].sum())
        torch.testing.assert_close(found[row], seen[row, :count].mean(0))
    net, _ = tuned_from(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3)))
    image = torch.randn(5, 2, 5, 5, generator=stream(0, "image"))
    torch.testing.assert_close(features(net, "0", image), net[0](image).mean((2, 3)))
    assert torch.equal(features(net, "0:input", image), image.mean((2, 3)))
    assert torch.equal(features(net, "", image), net[:2](image))
    with pytest.raises(UserError, match="no module is called 'nose'"):
        features(net, "nose", image)


def test_wrong_features_are_refused():
    class Idle(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 3))
            self.idle = nn.Linear(3, 3)

        def forward(self, x):
            return self[0](x)

    with pytest.raises(UserError, match="features: idle: it does not run"):
        features(Idle(), "", torch.zeros(4, 6))
    with pytest.raises(UserError, match=r"features: inner: what it has is \[8, 3\], for 4 rows"):
        features(Flat(), "inner", torch.zeros(4, 6))


@pytest.mark.parametrize("turned", [{"batch": 16}, {"epochs": 5}, {"dropout": (0.2, 0.7)}, {"features": "0"}])
def test_the_router_is_trained_as_told(turned):
    given = small()
    one, other = (TwinMerging(**its).merge(given.pool).route(given.inputs) for its in ({}, turned))
    assert not torch.equal(one, other)


def test_too_little_data_is_refused():
    pool = every_pool()
    with pytest.raises(UserError, match="no data in the pool; the router needs"):
        TwinMerging().merge(replace(pool, data={}))
    with pytest.raises(UserError, match="'task 0': 3 rows of data in batches of 1024: the router needs 4"):
        TwinMerging().merge(replace(pool, data={task: taken(its, slice(0, 3)) for task, its in pool.data.items()}))
    with pytest.raises(UserError, match="dropout 2: give a number from 0 to 1"):
        TwinMerging(dropout=(2.0,)).merge(pool)


def test_heads_that_only_some_have_are_refused():
    pool = separable()
    pool.tuned["task 1"][2] = nn.Linear(10, 4, bias=False)
    with pytest.raises(UserError, match=r"'task 1'.*2\.bias"):
        TwinMerging().merge(pool)


# As a module.


@pytest.mark.parametrize("made", [every_pool, separable])
def test_all_state_is_saved(made):
    pool = made()
    twin, inputs = TwinMerging(rank=0.5).merge(pool), mixed_batch(pool)
    due = twin(inputs)
    for copied in (pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin)):
        assert torch.equal(copied(inputs), due)
    kept = io.BytesIO()
    torch.save(twin.state_dict(), kept)
    other = replace(pool, data={task: taken(its, slice(4, None)) for task, its in pool.data.items()})
    changed = {task: copy.deepcopy(model) for task, model in pool.tuned.items()}
    with torch.no_grad():
        for model in changed.values():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    fresh = TwinMerging(rank=0.5, seed=3, **QUICK).merge(replace(other, tuned=changed))
    assert not torch.equal(fresh(inputs), due)
    fresh.load_state_dict(torch.load(io.BytesIO(kept.getvalue())))
    assert torch.equal(fresh(inputs), due)


def test_it_only_predicts():
    pool = separable()
    twin = TwinMerging(**QUICK).merge(pool)
    inputs = mixed_batch(pool)
    due = twin(inputs)
    assert not twin.train().training
    assert torch.equal(twin(inputs), due)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not any(module._forward_hooks for module in twin.modules())
