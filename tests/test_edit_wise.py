"""WISE against its equations written out, and what makes it the system it is."""

from dataclasses import replace

import pytest
import torch
from oracles import edit_wise as oracle
from test_edit_grace import gpt2, plain

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._checks import ASK, FACTS, quiet, small
from koinon.edit._edited import Material
from koinon.edit._shards import Masks, Prompts, Routing, scale_of
from koinon.edit._sides import MERGED, Asking, Excitement, Side, SideMemory, Sides
from koinon.edit.wise import Wise
from koinon.lm.anatomy import with_values
from koinon.nn.params import stream

QUICK = Wise(layer=1, steps=8, rate=0.1, share=0.4, count=1, bound=0.3)
MEAN = Excitement("mean", False)
ASKING = Asking(True, 0.88, 0.0, MEAN, 0.53, True, 0.6)
FIVE = tuple(
    Fact(*its, ASK)
    for its in [("Lyon", "Japan"), ("Oslo", "Peru"), ("Turin", "Spain"), ("Bonn", "Italy"), ("Nice", "Peru")]
)
MIXED = ("Lyon is a city in", "People of Bonn live in", "Porto is a city in", "Milan is", "People of Kyoto live in")

ALWAYS, NEVER = -1.0, 1e9
"""Levels that every prompt is above, and none."""


@pytest.fixture(scope="module")
def given():
    return small()


@pytest.fixture(scope="module")
def edited(given):
    """Two shards of one edit each, kept apart."""
    return learnt(given, replace(QUICK, shard=1, shards=9))


def learnt(given, method, facts=FACTS, material=None):
    with quiet():
        return method.edit(given.lm, facts, given.material if material is None else material)


def forced(given, patch, delta):
    """The model with a memory's matrix in place of its own."""
    name = f"{patch.name}.weight"
    weight = given.lm.model.get_parameter(name)
    return given.lm.with_model(with_values(given.lm.model, {name: weight.detach() + delta}))


def memory_of(lm) -> Sides:
    (found,) = [its for its in lm.model.modules() if isinstance(its, Sides)]
    return found


def with_levels(patch: SideMemory, *levels: float) -> SideMemory:
    sides = [replace(its, scores=(level,)) for its, level in zip(patch.sides, levels, strict=True)]
    return replace(patch, sides=tuple(sides), asking=replace(patch.asking, ratio=1.0, quantile=0.0))


def excited(given, side: Side, facts) -> list[float]:
    """How much the questions of facts excite a memory as it is."""
    falls = given.lm.anatomy.block(1).falls.module
    into = [given.lm.seen({"it": falls}, given.lm.encode([fact.question]), "in")["it"][0] for fact in facts]
    return [oracle.excitement(its, side.delta) for its in into]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "drawn", *shape))


# Its equations.


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("over", ["mean", "max", "last"])
def test_excitement_equals_its_equation(over, balanced):
    into, delta = drawn(3, 5, 4), drawn(2, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    wanted = [oracle.excitement(its[row], delta, over, balanced) for its, row in zip(into, mask)]
    assert Excitement(over, balanced).of(into, delta, mask).tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_routing_loss_equals_its_equation():
    delta, unit = drawn(2, 4), 0.5
    groups = [Prompts(drawn(count, 3, 4, seed=count), torch.ones(count, 3, dtype=torch.bool)) for count in (3, 2, 4, 1)]
    inside, outside, old, far = ([oracle.excitement(its, delta) / unit for its in group.into] for group in groups)
    alpha, beta, gamma = 2.0, 6.5, 3.0
    routing = Routing(alpha, beta, gamma, unit, MEAN)
    wanted = oracle.routing_loss(inside, outside, alpha, beta, gamma)
    assert float(routing.loss(delta, groups[0], groups[1], None, None)) == pytest.approx(wanted, rel=1e-5)
    wanted += sum(max(0, beta - its) for its in old) / 4 + max(0, far[0] - alpha)
    assert float(routing.loss(delta, *groups)) == pytest.approx(wanted, rel=1e-5)
    terms = [max(0, beta - its) for its in (*inside, *old)], [max(0, its - alpha) for its in (*outside, *far)]
    assert all(any(its > 0 for its in term) and wanted > 0 for term in terms)  # no term is trivial


@pytest.mark.parametrize(
    "settings", [{}, {"calibrated": False, "rate": 0.05}, {"share": 1.0, "bound": 1e-2, "decay": 0.1}]
)
def test_the_edit_equals_descent_by_whole_passes(given, settings):
    """Also that only the mask moves, that the box holds, and that leaving out the blocks below changes nothing."""
    method = replace(QUICK, irrelevant=2, **settings)
    fact = FACTS[0]
    with quiet():
        ready = method.prepare(given.lm, given.material)
        (side,) = method.learn(given.lm, [fact], ready, None).sides
    lm = small().lm
    falls = lm.anatomy.block(1).falls
    texts = []
    for before in ready.before:
        encoded = lm.encode([before + fact.question], [fact.object])
        texts.append((encoded.ids[0], int(encoded.prompt.sum())))
    order = torch.randperm(8, generator=stream(0, "irrelevant", fact.question))[:2]
    pool = [its for its in given.material.unrelated if "Lyon" not in its]
    outside = [lm.encode([pool[place]]).ids[0] for place in order]
    weight, gain = falls.module.weight, ready.scale.gain
    assert (gain == 1) is not method.calibrated
    found = oracle.edited(
        lm.model,
        weight,
        texts,
        outside,
        falls.module,
        ready.masks.of(0).float(),
        method.rate * gain**2,
        method.decay,
        method.bound,
        method.steps,
        (5.0, 20.0, 10.0),
        ready.scale.unit,
    )
    torch.testing.assert_close(weight.detach() + side.delta, found, rtol=1e-3, atol=1e-4)
    assert not bool(side.delta[~ready.masks.of(0)].any())
    assert method.bound / 2 < float(side.delta.abs().max()) <= method.bound + 1e-6
    into = lm.seen({"it": falls.module}, lm.encode([fact.question]), "in")["it"][0]
    assert side.scores == (pytest.approx(oracle.excitement(into, side.delta), rel=1e-3),)


def test_it_stops_where_the_loss_is_low(given):
    early, never = (learnt(given, replace(QUICK, enough=its), FACTS[:1]).patch.sides[0].delta for its in (9.0, 0.0))
    steps = [learnt(given, replace(QUICK, steps=its), FACTS[:1]).patch.sides[0].delta for its in range(QUICK.steps + 1)]
    same = [torch.equal(early, its) for its in steps]
    assert sum(same) == 1
    assert 0 < same.index(True) < QUICK.steps
    assert torch.equal(never, steps[-1])


def test_the_scale_is_the_median_over_tokens(given):
    falls = given.lm.anatomy.block(1).falls
    texts = given.material.unrelated[:3]
    into = torch.cat([given.lm.seen({"it": falls.module}, given.lm.encode([its]), "in")["it"][0] for its in texts])
    out = into @ falls.weight.T
    scale = scale_of(given.lm, falls, texts, False)
    assert scale.unit == pytest.approx(float(out.norm(dim=1).median()) / 20, rel=1e-4)
    assert scale_of(given.lm, falls, texts, True).unit == pytest.approx(scale.gain / 20)
    assert scale.gain == pytest.approx(float((out.norm(dim=1) / into.norm(dim=1)).median()), rel=1e-4)


# Masks.


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 1.0])
def test_exactly_a_share_of_the_entries_may_move(share):
    for masking in ("random", "shared", "disjoint"):
        masks = Masks((20, 30), share, masking, 0)
        assert [int(masks.of(shard).sum()) for shard in range(4)] == [round(share * 600)] * 4


def test_random_masks_overlap_as_often_as_chance_has_it():
    masks = Masks((200, 200), 0.2, "random", 0)
    both = masks.of(0) & masks.of(1)
    assert float(both.float().mean()) == pytest.approx(0.2**2, abs=0.005)
    assert float((both & masks.of(2)).float().mean()) == pytest.approx(0.2**3, abs=0.003)


def test_shared_masks_are_equal_and_disjoint_ones_do_not_touch():
    shared, disjoint = (Masks((10, 10), 0.25, its, 0) for its in ("shared", "disjoint"))
    assert torch.equal(shared.of(0), shared.of(7))
    assert torch.stack([disjoint.of(number) for number in range(4)]).sum(0).eq(1).all()
    assert torch.equal(disjoint.of(4), disjoint.of(0))


def test_nothing_moves_outside_the_union_of_masks(given):
    for retrieve in (True, False):
        patch = learnt(given, replace(QUICK, shard=2, shards=2, retrieve=retrieve), FIVE).patch
        masks = Masks((32, 64), QUICK.share, "random", QUICK.seed)
        union = masks.of(0) | masks.of(1) | masks.of(2)
        for side in patch.kept(given.lm):
            assert not bool(side.delta[~union].any())
            assert float(side.delta.abs().max()) <= QUICK.bound + 1e-6
        own = masks.of(2)
        assert not bool(patch.sides[-1].delta[~own].any())
        assert bool(patch.sides[-1].delta[own].any())


# Shards and merging.


def test_shards_are_filled_merged_and_kept_apart(given):
    apart = learnt(given, replace(QUICK, shard=1, shards=2), FIVE).patch
    assert [(its.steps, its.shard) for its in apart.sides] == [((0, 1), MERGED), ((2, 3), MERGED), ((4,), 4)]
    assert apart.kept(given.lm) == apart.sides
    one = learnt(given, replace(QUICK, shard=1, shards=2, retrieve=False), FIVE).patch
    assert [(its.steps, its.shard) for its in one.sides] == [((0, 1, 2, 3), MERGED), ((4,), 4)]
    assert [its.steps for its in one.kept(given.lm)] == [(0, 1, 2, 3, 4)]
    open_ = learnt(given, replace(QUICK, shard=3, shards=2), FIVE).patch
    assert [(its.steps, its.shard) for its in open_.sides] == [((0, 1, 2), 0), ((3, 4), 1)]


def test_a_merged_memory_is_ties_of_its_shards(given):
    shards = learnt(given, replace(QUICK, shard=1, shards=9), FIVE[:4]).patch.sides
    apart = learnt(given, replace(QUICK, shard=1, shards=2, trim=0.3), FIVE[:4]).patch.sides
    for number, side in enumerate(apart):
        both = [its.delta for its in shards[2 * number : 2 * number + 2]]
        torch.testing.assert_close(side.delta, oracle.ties(both, [0.5, 0.5], 0.3))
        assert side.scores == pytest.approx(excited(given, side, FIVE[2 * number : 2 * number + 2]), rel=1e-4)
    (one,) = learnt(given, replace(QUICK, shard=1, shards=2, trim=0.3, retrieve=False), FIVE[:4]).patch.sides
    vectors = [oracle.ties([its.delta for its in shards[:2]], [0.5, 0.5], 0.3), *[its.delta for its in shards[2:]]]
    torch.testing.assert_close(one.delta, oracle.ties(vectors, [0.6, 0.2, 0.2], 0.3))
    assert one.scores == pytest.approx(excited(given, one, FIVE[:4]), rel=1e-4)


@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("shards", [2, 4, 9])
def test_merged_memories_fire_for_all_their_edits(given, retrieve, shards):
    """Also where shards that are not full yet are merged as they are asked, and when a part is taken away."""
    edited = learnt(given, replace(QUICK, shard=1, shards=shards, retrieve=retrieve), FIVE[:4])
    patch = edited.patch
    assert min(patch.route(given.lm, patch.questions)) >= 0
    for side in patch.kept(given.lm):
        assert side.firing(patch.asking) == len(side.steps)
        facts = [FIVE[step] for step in side.steps]
        assert side.scores == pytest.approx(excited(given, side, facts), rel=1e-4)
        assert side.level(patch.asking) == pytest.approx(0.88 * min(side.scores))
    if not retrieve and shards == 9:
        (fewer,) = edited.undo(1).patch.kept(given.lm)
        assert fewer.scores == pytest.approx(excited(given, fewer, FIVE[:3]), rel=1e-4)


def test_edits_that_merging_silences_are_counted(given):
    """The highest quantile is the level: one edit is beyond 0.99 of it."""
    with pytest.warns(UserWarning, match="merged, 1 of 2 edits still fire"):
        replace(QUICK, shard=1, shards=2, quantile=1.0, ratio=0.99).edit(given.lm, FACTS, given.material)


def test_merging_linearly_is_the_mean_of_the_shards():
    sides = [Side(drawn(3, 4, seed=number), (1.0,), (number,), number) for number in range(4)]
    mean = torch.stack([its.delta for its in sides]).mean(0)
    torch.testing.assert_close(replace(ASKING, trim=1.0, elect=False).merged(sides), mean)
    assert not torch.allclose(ASKING.merged(sides), mean)


@pytest.mark.parametrize("elect", [True, False])
def test_merging_one_shard_or_nothing(elect):
    asking = replace(ASKING, elect=elect, trim=1.0)
    side = Side(drawn(3, 4), (1.0,), (0,), 0)
    assert torch.equal(asking.merged([side]), side.delta)
    zeros = [Side(torch.zeros(3, 4), (1.0,), (number,), number) for number in range(2)]
    assert not bool(asking.merged(zeros).any())


def test_a_later_shard_starts_from_the_model_and_the_same_one_goes_on(given):
    one, two = (learnt(given, replace(QUICK, shard=its, shards=9, steps=0), FACTS).patch for its in (1, 2))
    assert [len(its.sides) for its in (one, two)] == [2, 1]
    first = learnt(given, replace(QUICK, shard=2), FACTS[:1]).patch.sides[0]
    both = learnt(given, replace(QUICK, shard=2), FACTS).patch.sides[0]
    # With one step for the second fact, what the first left is still there.
    assert float((both.delta - first.delta).norm()) < float(both.delta.norm())
    second = learnt(given, replace(QUICK, shard=1, shards=9), FACTS).patch.sides[1]
    alone = learnt(given, replace(QUICK, shard=1, shards=9, masks="shared"), FACTS[1:]).patch.sides[0]
    same = learnt(given, replace(QUICK, shard=1, shards=9, masks="shared"), FACTS).patch.sides[1]
    assert torch.equal(alone.delta, same.delta)
    assert not torch.equal(second.delta, same.delta)


# Routing.


def test_what_excites_no_memory_is_the_model_to_the_bit(given, edited):
    patch = edited.patch
    never = with_levels(patch, NEVER, NEVER).attach(given.lm)
    assert torch.equal(plain(never, MIXED)[0], plain(given.lm, MIXED)[0])
    assert never.generate(MIXED, 5) == given.lm.generate(MIXED, 5)
    routes = patch.route(given.lm, MIXED)
    assert -1 in routes
    assert max(routes) >= 0
    together, before = plain(edited.lm, MIXED)[0], plain(given.lm, MIXED)[0]
    for row, route in enumerate(routes):
        assert torch.equal(together[row], before[row]) is (route == -1)


def test_at_its_level_a_memory_is_silent_and_above_it_speaks(given, edited):
    side = replace(edited.patch, sides=edited.patch.sides[:1], questions=edited.patch.questions[:1])
    falls = given.lm.anatomy.block(1).falls.module
    encoded = given.lm.encode(MIXED[:1])
    into = given.lm.seen({"it": falls}, encoded, "in")["it"]
    score = float(MEAN.of(into, side.sides[0].delta, encoded.mask))
    assert with_levels(side, score).route(given.lm, MIXED[:1]) == [-1]
    assert with_levels(side, score - 1e-4).route(given.lm, MIXED[:1]) == [0]


def test_always_asked_it_is_the_matrix_fine_tuned_in_a_box(given):
    patch = learnt(given, replace(QUICK, share=1.0), FACTS).patch
    always = with_levels(patch, ALWAYS).attach(given.lm)
    tuned = forced(given, patch, patch.sides[0].delta)
    torch.testing.assert_close(plain(always, MIXED)[0], plain(tuned, MIXED)[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain(always, MIXED)[0], plain(given.lm, MIXED)[0], atol=1e-2)


def test_a_memory_of_zeros_is_the_model(given, edited):
    sides = tuple(replace(its, delta=torch.zeros_like(its.delta)) for its in edited.patch.sides)
    always = with_levels(replace(edited.patch, sides=sides), ALWAYS, ALWAYS).attach(given.lm)
    assert torch.equal(plain(always, MIXED)[0], plain(given.lm, MIXED)[0])


def test_the_memory_excited_most_answers_of_those_beyond_their_own_level(given, edited):
    patch = edited.patch
    free = with_levels(patch, ALWAYS, ALWAYS)
    falls = given.lm.anatomy.block(1).falls.module
    scores = []
    for prompt in MIXED:
        into = given.lm.seen({"it": falls}, given.lm.encode([prompt]), "in")["it"][0]
        scores.append([oracle.excitement(into, its.delta) for its in patch.sides])
    assert free.route(given.lm, MIXED) == [its.index(max(its)) for its in scores]
    for closed, other in ((0, 1), (1, 0)):
        levels = [ALWAYS, ALWAYS]
        levels[closed] = NEVER
        assert with_levels(patch, *levels).route(given.lm, MIXED) == [other] * len(MIXED)


def test_the_level_is_a_part_of_the_least_or_of_a_quantile():
    side = Side(torch.zeros(1, 1), (4.0, 2.0, 8.0), (0, 1, 2))
    assert side.level(replace(ASKING, ratio=0.5)) == pytest.approx(1.0)
    assert side.level(replace(ASKING, ratio=0.5, quantile=0.5)) == pytest.approx(2.0)
    assert side.level(replace(ASKING, ratio=-torch.inf)) == -torch.inf  # without a router


def test_batches_and_single_prompts_are_routed_alike(given, edited):
    """With padding on either side; the release decides for a whole batch at once."""
    alone = [edited.patch.route(given.lm, [prompt])[0] for prompt in MIXED]
    assert edited.patch.route(given.lm, MIXED) == alone
    assert len(set(alone)) > 1
    single = [edited.lm.generate([prompt], 5)[0] for prompt in MIXED]
    assert edited.lm.generate(MIXED, 5) == single
    assert memory_of(edited.lm).route.tolist() == alone  # as the last batch was
    together, mask = plain(edited.lm, MIXED)
    for row, prompt in enumerate(MIXED):
        torch.testing.assert_close(together[row, mask[row]], plain(edited.lm, [prompt])[0][0], rtol=1e-4, atol=1e-4)


def test_an_answer_does_not_change_who_answers(given, edited):
    """The prompt decides, whatever is behind it: an answer that would excite a memory, or soothe it."""
    patch = edited.patch
    for answers in (["Japan is a city in Lyon Lyon Lyon"] * len(MIXED), ["Italy"] * len(MIXED)):
        edited.lm.score(MIXED, answers)
        lengths = given.lm.encode(MIXED, answers).mask.sum(1)
        order = lengths.argsort(descending=True, stable=True).tolist()  # the longest are read first
        routes = patch.route(given.lm, MIXED)
        assert memory_of(edited.lm).route.tolist() == [routes[place] for place in order]
    whole = [f"{prompt} Lyon is a city in Oslo Oslo" for prompt in MIXED]
    assert patch.route(given.lm, whole) != patch.route(given.lm, MIXED)  # as one prompt it would


def test_the_route_is_frozen_while_a_text_grows(given, edited):
    """A memory that other tokens would excite, or not: greedy text is that of one matrix from start to end."""
    side = replace(edited.patch.sides[0], delta=3 * edited.patch.sides[0].delta)
    loud = replace(edited.patch, sides=(side,), questions=edited.patch.questions[:1])
    falls = given.lm.anatomy.block(1).falls.module
    scores = []
    for prompt in MIXED:
        into = given.lm.seen({"it": falls}, given.lm.encode([prompt]), "in")["it"][0]
        scores.append(oracle.excitement(into, loud.sides[0].delta))
    level = sorted(scores)[2]
    patch = with_levels(loud, level * (1 + 1e-4))
    routes = patch.route(given.lm, MIXED)
    assert sorted(routes) == [-1, -1, -1, 0, 0]
    lm, tuned = patch.attach(given.lm), forced(given, patch, loud.sides[0].delta)
    whose = [
        tuned.generate([prompt], 8)[0] if route == 0 else given.lm.generate([prompt], 8)[0]
        for prompt, route in zip(MIXED, routes)
    ]
    assert lm.generate(MIXED, 8) == whose
    assert all(its.exact for its in lm.score(MIXED, whose))
    tokens = [given.lm.tokenizer(prompt)["input_ids"] for prompt in MIXED]
    longest = max(map(len, tokens))
    ids = torch.tensor([[given.lm._filling] * (longest - len(its)) + its for its in tokens])
    mask = torch.tensor([[0] * (longest - len(its)) + [1] * len(its) for its in tokens])
    for named in ({}, {"use_cache": False}):
        out = lm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **named)
        assert lm.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True) == whose
    # Beams of one prompt are routed as it is, with padding and in any order.
    for named in ({}, {"use_cache": False}):
        out = lm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, num_beams=3, **named)
        for place, route in enumerate(routes):
            its, one = tuned if route == 0 else given.lm, slice(place, place + 1)
            alone = its.model.generate(input_ids=ids[one], attention_mask=mask[one], max_new_tokens=8, num_beams=3)
            left, right = (lm.tokenizer.decode(row, skip_special_tokens=True) for row in (out[place], alone[0]))
            assert left == right
    # What is generated would be routed otherwise if it were asked, so that freezing matters.
    grown = [f"{prompt}{text}" for prompt, text in zip(MIXED, whose)]
    assert patch.route(given.lm, grown) != routes


# What it leaves alone, and what it looks at.


def test_the_models_values_are_shared_and_memories_are_all_that_is_added(given, edited):
    there = dict(edited.lm.model.named_parameters())
    for name, value in given.lm.model.named_parameters():
        assert there.pop(name) is value
    size = given.lm.anatomy.block(1).falls.weight.numel()
    assert {name.rpartition(".")[2]: its.numel() for name, its in there.items()} == {"deltas": 2 * size, "levels": 2}
    one = learnt(given, replace(QUICK, shard=1, shards=9, retrieve=False)).lm
    assert memory_of(one).deltas.numel() == size


def test_steps_that_share_a_memory_go_together(given):
    edited = learnt(given, replace(QUICK, shard=2, shards=9), FIVE)
    fewer = edited.without([0, 1])
    assert [its.steps for its in fewer.patch.sides] == [(0, 1), (2,)]
    assert [fact.subject for fact in fewer.facts] == ["Turin", "Bonn", "Nice"]
    assert torch.equal(fewer.patch.sides[0].delta, edited.patch.sides[1].delta)
    assert edited.undo(1).patch.sides == edited.patch.sides[:2]
    with pytest.raises(UserError, match=r"^steps 3 share a side memory with step 2: undo all of its steps or none$"):
        edited.without([3])
    with pytest.raises(UserError, match="share a side memory"):
        edited.undo(2)
    assert edited.undo(3).patch.sides == edited.patch.sides[:1]


def test_irrelevant_prompts_are_of_the_material_and_not_of_the_subject(given, monkeypatch):
    asked = []
    monkeypatch.setattr(Prompts, "of", classmethod(lambda cls, lm, projection, prompts: asked.append(prompts)))
    material = Material(unrelated=("Lyon sleeps in", "Porto is a city in", "Milan is"))
    learnt(given, replace(QUICK, irrelevant=3, replay=2, steps=1, shard=2), FIVE[:4], material)
    outside, old, far = asked[0::3], asked[1::3], asked[2::3]
    assert sorted(outside[0]) == ["Milan is", "Porto is a city in"]
    assert all(len(its) == 3 for its in outside[1:])
    questions = [fact.question for fact in FIVE]
    assert [sorted(its) for its in old] == [[], questions[:1], [], questions[2:3]]
    assert [sorted(its) for its in far] == [[], [], sorted(questions[:2]), sorted(questions[:2])]


def test_without_material_it_listens_to_the_model(given):
    edited = learnt(given, replace(QUICK, steps=2), FACTS[:1], Material())
    assert edited.patch.sides[0].scores[0] > 0


def test_it_works_where_matrices_are_stored_the_other_way_round(given):
    lm = gpt2(given.lm.tokenizer)
    method = replace(QUICK, steps=25, shard=1, shards=9)
    with quiet():
        edited = method.edit(lm, FACTS, Material(unrelated=given.material.unrelated))
    routes = edited.patch.route(lm, [fact.question for fact in FACTS])
    assert routes == [0, 1]
    asked = [f.question for f in FACTS], [f.object for f in FACTS]
    for before, after in zip(lm.score(*asked), edited.lm.score(*asked)):
        assert after.logprob > before.logprob
    tuned = lm.model.get_parameter(f"{edited.patch.name}.weight") + edited.patch.sides[0].delta.T
    alone = lm.with_model(with_values(lm.model, {f"{edited.patch.name}.weight": tuned}))
    question = [FACTS[0].question]
    torch.testing.assert_close(plain(edited.lm, question)[0], plain(alone, question)[0], rtol=1e-3, atol=1e-3)


def test_it_works_in_bfloat16(given):
    lm = given.lm.with_model(small().lm.model.to(torch.bfloat16))
    with quiet():
        edited = replace(QUICK, shard=1, shards=9).edit(lm, FACTS, given.material)
    assert edited.patch.route(lm, [fact.question for fact in FACTS]) == [0, 1]
    never = with_levels(edited.patch, NEVER, NEVER).attach(lm)
    assert torch.equal(plain(never, MIXED)[0], plain(lm, MIXED)[0])


def test_another_editor_may_stand_on_it(given, edited):
    again = learnt(replace(given, lm=edited.lm), replace(QUICK, layer=0, shard=1, shards=9), FIVE[2:3])
    assert sum(isinstance(its, Sides) for its in again.lm.model.modules()) == 2
