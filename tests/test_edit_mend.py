"""MEND against its equations, and what makes it one: a network over the parts of a gradient, trained to stay local."""

from dataclasses import replace

import pytest
import torch
from oracles import edit_mend as oracle

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._checks import FACTS, OTHERS, edited, says, small
from koinon.edit._edited import Material
from koinon.edit._hypernetwork import Hypernetwork, factors, living
from koinon.edit._lessons import Lesson, Lessons
from koinon.edit._losses import moved, unlikely
from koinon.edit.mend import Mend, _pairs
from koinon.lm.language import LM
from koinon.nn.params import stream

QUICK = Mend(layers=2, rank=4, rate=1e-3, step=1e-3, step_rate=1e-3, edits=6, together=3)


@pytest.fixture(scope="module")
def given():
    return small()


@pytest.fixture(scope="module")
def trained(given):
    return QUICK.prepare(given.lm, given.material)


def asked(lm, fact):
    return lm.encode([fact.question], [fact.object])


def test_the_parts_of_a_gradient_are_the_gradient(given):
    """sum_tokens delta u^T is what autograd gives for the matrix itself; beside other texts as alone."""
    places = QUICK.prepare(given.lm, given.material).places
    found = factors(given.lm, places, given.lm.encode([f.question for f in FACTS], [f.object for f in FACTS]))
    for row, fact in enumerate(FACTS):
        encoded = asked(given.lm, fact)
        for its in places:
            into, delta = found[its.parameter]
            whole = oracle.gradient(given.lm.model, its.parameter, encoded.ids[0], int(encoded.prompt.sum()))
            torch.testing.assert_close(delta[row].T @ into[row], whole, rtol=1e-3, atol=1e-6)


def test_tokens_without_a_part_in_the_gradient_are_left_out():
    pair = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [1.0], [0.0]]])
    into, delta = living(pair)
    assert into.tolist() == [[1.0, 2.0]]
    assert delta.tolist() == [[1.0]]


def test_an_edit_equals_the_equations(given, trained):
    """A gradient's parts, put through the trained networks by hand, token by token, for every matrix."""
    encoded = asked(given.lm, FACTS[0])
    pairs = {name: living(its) for name, its in factors(given.lm, trained.places, encoded).items()}
    lm = given.lm.with_model(edited_model(given, trained))
    for its, (net, matrix), alpha in zip(trained.places, trained.where, trained.alpha):
        state = trained.nets[net].state_dict()
        us, deltas = pairs[its.parameter]
        expected = oracle.edited(its.weight, us, deltas, state, matrix, alpha)
        torch.testing.assert_close(lm.model.get_parameter(its.parameter), expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(expected, its.weight, rtol=1e-4, atol=1e-6), its.parameter


def edited_model(given, trained):
    return QUICK.learn(given.lm, FACTS[:1], trained, None).attach(given.lm).model


def test_the_network_starts_as_normalisation_and_is_not_linear():
    net = Hypernetwork(3, 2, 2, rank=4, seed=0)
    net.measure(torch.randn(9, 5, generator=stream(0, "tokens")) * 3 + 1)
    u, delta = torch.randn(2, 3, generator=stream(0, "u")), torch.randn(2, 2, generator=stream(0, "delta"))
    normal = (torch.cat([u, delta], 1) - net.mean) / (net.deviation + 1e-7)
    assert torch.equal(torch.cat(net(u, delta, 1), 1), normal)
    state = {name: torch.randn(its.shape, generator=stream(0, name)) for name, its in net.named_parameters()}
    net.load_state_dict(state, strict=False)
    for matrix in range(2):  # random numbers everywhere, so that each term of the equations counts
        expected = [oracle.transformed(*its, net.state_dict(), matrix) for its in zip(u, delta)]
        for mine, theirs in zip(net(u, delta, matrix), zip(*expected)):
            torch.testing.assert_close(mine, torch.stack(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(u, delta, 0)[0], net(u, delta, 1)[0])


def test_the_network_learns_from_its_very_start():
    """Its first products are 0: a rectifier with no gradient there would never wake up."""
    net = Hypernetwork(3, 2, 1, rank=4, seed=0)
    left, right = net(torch.ones(1, 3), torch.ones(1, 2), 0)
    (left.sum() + right.sum()).backward()
    assert all(its.grad.any() for its in net.wide)


def test_matrices_of_one_shape_share_a_network(trained):
    """Two blocks, each with two matrices up and one down: two networks, of four and of two matrices."""
    assert len(trained.nets) == 2
    assert sorted(len(its.scale[0]) for its in trained.nets) == [2, 4]
    assert sorted(trained.where) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert [its.name.split(".")[2] for its in trained.places] == ["1"] * 3 + ["2"] * 3  # the last two blocks of three


def test_with_no_step_it_is_the_identity(given):
    method = replace(QUICK, step=0.0, edits=0)
    lm = edited(method, given).lm
    assert torch.equal(says(lm, given.prompts), says(given.lm, given.prompts))


def test_the_rank_of_an_edit_is_the_tokens_of_its_fact_at_most(given, trained):
    step = QUICK.learn(given.lm, FACTS[:1], trained, None).steps[0]
    tokens = int(asked(given.lm, FACTS[0]).mask.sum())
    for name, its in step.items():
        assert 1 <= its.left.shape[1] == its.right.shape[1] <= tokens, name


def test_several_facts_at_once_are_the_sum_of_their_edits(given, trained):
    both = QUICK.learn(given.lm, FACTS, trained, None).steps[0]
    alone = [QUICK.learn(given.lm, [fact], trained, None).steps[0] for fact in FACTS]
    for name, its in both.items():
        expected = sum(step[name].left @ step[name].right.T for step in alone)
        torch.testing.assert_close(its.left @ its.right.T, expected, rtol=1e-3, atol=1e-6)


def test_the_loss_is_of_another_wording_and_of_what_must_stay(given, trained):
    """c_edit and c_loc times the two losses of a model that is edited outright."""
    lesson = Lesson(FACTS[0], "People of Lyon live in", ("Bonn is a city in", "Germany"))
    (pairs,) = _pairs(given.lm, trained.places, [FACTS[0]])
    after = given.lm.with_model(edited_model(given, trained))
    reworded, stays = (given.lm.encode([a], [b]) for a, b in ((lesson.reworded, "Japan"), lesson.elsewhere))
    nll = -after.score([lesson.reworded], ["Japan"])[0].logprob / int(reworded.answer.sum())
    with torch.no_grad():
        before, now = (lm.logits(stays)[0] for lm in (given.lm, after))
        kl = oracle.divergence(before, now)
        assert kl > 1e-6
        for change, keep in ((0.1, 1.0), (1.0, 0.0), (0.0, 1.0)):
            harm = replace(QUICK, change=change, keep=keep).harm(given.lm, trained, lesson, pairs)
            assert float(harm) == pytest.approx(change * nll + keep * kl, rel=1e-3, abs=1e-6)


def test_training_lowers_the_loss(given):
    """On the cases' own edits, against the same networks before training."""
    method = replace(QUICK, edits=60, together=6, rate=3e-3)
    losses = []
    for edits in (0, 60):
        trained = replace(method, edits=edits).prepare(given.lm, given.material)
        lessons = Lessons(given.material, stream(9, "test")).take(12)
        pairs = _pairs(given.lm, trained.places, [its.fact for its in lessons])
        with torch.no_grad():
            losses.append(sum(float(method.harm(given.lm, trained, *its)) for its in zip(lessons, pairs)) / 12)
    assert losses[1] < 0.9 * losses[0]


def test_a_model_with_gradients_of_its_own_is_left_as_it_is(given):
    lm = LM(given.lm.model, given.lm.tokenizer)
    weight = lm.model.model.layers[2].mlp.down_proj.weight
    weight.requires_grad_()
    try:
        QUICK.edit(lm, FACTS[:1], given.material)
        assert weight.grad is None
    finally:
        weight.requires_grad_(False)


def test_it_says_what_it_needs(given):
    with pytest.raises(UserError, match="0 cases to train on: at least 2"):
        QUICK.edit(given.lm, FACTS[:1], Material())


def test_it_edits_a_model_that_stores_its_weights_the_other_way_round(given):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        config = GPT2Config(vocab_size=len(given.lm.tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
        lm = LM.of(GPT2LMHeadModel(config), given.lm.tokenizer)
    result = replace(QUICK, edits=3).edit(lm, FACTS[:1], given.material)
    before = {name: its.clone() for name, its in lm.model.named_parameters()}
    (step,) = result.patch.steps
    name = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(
        result.lm.model.get_parameter(name),
        before[name] + (step[name].left @ step[name].right.T).T,
        rtol=1e-4,
        atol=1e-6,
    )


# What it is trained on.


def test_lessons_teach_objects_of_the_relation_and_keep_what_must_stay(given):
    taken = Lessons(given.material, stream(0, "x")).take(200)
    by_subject = {its.subject: its for its in OTHERS}
    assert {its.fact.subject for its in taken} == set(by_subject)
    assert {its.fact.object for its in taken} == {its.object for its in OTHERS}
    assert any(its.fact.object != by_subject[its.fact.subject].object for its in taken)
    for its in taken:
        assert its.reworded == f"People of {its.fact.subject} live in"
        question, answer = its.elsewhere
        assert its.fact.subject not in question
        assert by_subject[question.removesuffix(" is a city in")].object == answer


def test_a_fact_without_a_relation_keeps_its_object(given):
    cases = tuple(replace(case, fact=replace(case.fact, relation="")) for case in given.material.cases)
    known = {its.subject: its.object for its in OTHERS}
    for its in Lessons(Material(cases=cases), stream(0, "x")).take(50):
        assert its.fact.object == known[its.fact.subject]


def test_without_probes_there_are_other_cases(given):
    cases = tuple(replace(case, probes=()) for case in given.material.cases)
    for its in Lessons(Material(cases=cases), stream(0, "x")).take(50):
        assert its.reworded == its.fact.question
        assert its.elsewhere[0] != its.fact.question
    for its in Lessons(Material(cases=cases, unrelated=("It rains in",)), stream(0, "x")).take(5):
        assert its.elsewhere == ("It rains in", "")


def test_losses_look_at_answers_and_at_real_tokens_only(given):
    facts = [Fact("Lyon", "Japan", "{} is a city in"), Fact("Oslo", "the north of Japan", "{} is a city in")]
    encoded = given.lm.encode([f.question for f in facts], [f.object for f in facts])
    with torch.no_grad():
        logits = given.lm.logits(encoded)
    alone = [-given.lm.score([f.question], [f.object])[0].logprob / int(a.sum()) for f, a in zip(facts, encoded.answer)]
    assert float(unlikely(logits, encoded)) == pytest.approx(sum(alone) / 2, rel=1e-4)
    other = logits + torch.randn(logits.shape, generator=stream(0, "noise"))
    rows = [its[encoded.mask] for its in (logits, other)]
    assert float(moved(logits, other, encoded)) == pytest.approx(oracle.divergence(*rows), rel=1e-3)
