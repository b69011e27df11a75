"""SERAC against its routing rule and its losses, and what makes it one: a frozen base, and edits that stand alone."""

from dataclasses import replace

import pytest
import torch
from oracles import edit_serac as oracle

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._checks import FACTS, edited, says, small
from koinon.edit._edited import Material
from koinon.edit._lessons import Lesson
from koinon.edit._scope import Memory, Scope, apart, mistaken, points, read, shown
from koinon.edit.serac import Serac, _mistaken, _unlikely
from koinon.lm.language import LM
from koinon.lm.small import decoder
from koinon.nn.params import stream

QUICK = Serac(steps=30, rows=4, rate=2e-2, layers=1)
REWORDED = "People of Lyon live in"


@pytest.fixture(scope="module")
def given():
    return small()


@pytest.fixture(scope="module")
def editor(given):
    return QUICK.on(given.lm, given.material)


@pytest.fixture(scope="module")
def taught(editor):
    return editor.edit(FACTS)


def test_a_point_equals_the_equations(given):
    scope = Scope(32, 8, seed=0)
    prompts = ["Lyon is a city in", "Milan is"]
    found = points(scope, read(given.lm, prompts, 1))
    for prompt, mine in zip(prompts, found):
        ((vectors, _),) = read(given.lm, [prompt], 1)  # alone: without filling
        assert torch.allclose(vectors.square().mean(-1), torch.ones(1), atol=1e-4)
        theirs = oracle.place(vectors[0].double(), scope.query.detach().double(), scope.value.detach().double())
        torch.testing.assert_close(mine.detach().double(), theirs, rtol=1e-4, atol=1e-5)


def test_routing_equals_the_rule(given, taught):
    """For every prompt, and thresholds from none to all: the nearest edit if it is nearer than the threshold."""
    router = taught.lm.router
    prompts = [*given.prompts, *(fact.question for fact in FACTS), REWORDED, "People of Oslo live in"]
    held = dict(zip(prompts, points(router.scope, read(given.lm, prompts, router.layer)).double()))
    edits = [fact.question for fact in FACTS]
    ways = set()
    for threshold in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        for prompt, (lm, asked) in zip(prompts, replace(router, threshold=threshold)(prompts)):
            best = oracle.route(prompt, edits, held.__getitem__, threshold)
            if threshold == 1.0:
                best = None  # of equal prompts the oracle may round to more than 1
            if best is None:
                assert (lm, asked) == (router.base, prompt)
            else:
                assert lm is router.counterfactual
                assert asked == f"{edits[best]} {FACTS[best].object} {prompt}"
            ways.add(best)
    assert ways == {None, 0, 1}


def test_losses_equal_the_equations():
    same, different = torch.tensor([0.1, 2.0]), torch.tensor([0.5, 3.0, 1.0])
    assert float(mistaken(same, different)) == pytest.approx(oracle.loss(same.tolist(), different.tolist()), rel=1e-5)
    one, other = torch.randn(3, 4, generator=stream(0, "a")), torch.randn(2, 4, generator=stream(0, "b"))
    expected = [[float(((x - z) ** 2).sum()) for z in other] for x in one]
    torch.testing.assert_close(apart(one, other), torch.tensor(expected))


def test_the_scopes_pairs(given):
    """Another wording belongs to its edit; what must stay does not, nor does another edit's wording."""
    scope, by = Scope(32, 8, seed=0), {}
    lessons = [
        Lesson(FACTS[0], REWORDED, ("Bonn is a city in", "Germany")),
        Lesson(FACTS[1], "People of Oslo live in", ("Milan is a city in", "Italy")),
        Lesson(replace(FACTS[1], object="Spain"), "People of Oslo live in", ("Bonn is a city in", "Germany")),
    ]
    prompts = {text for its in lessons for text in (its.fact.question, its.reworded, its.elsewhere[0])}
    for prompt in prompts:
        by[prompt] = points(scope, read(given.lm, [prompt], 1))[0].detach()

    def d(one, other):
        return float(((by[one] - by[other]) ** 2).sum())

    same = [d(its.fact.question, its.reworded) for its in lessons]
    stays = [d(its.fact.question, its.elsewhere[0]) for its in lessons]
    # The third is about the second's subject: its wording is no stranger's.
    strangers = [d(FACTS[0].question, lessons[2].reworded), d(FACTS[1].question, lessons[0].reworded)]
    found = _mistaken(given.lm, scope, 1, lessons, {}).detach()
    assert float(found) == pytest.approx(oracle.loss(same, [max(x, 1e-4) for x in stays + strangers]), rel=1e-3)


def test_the_counterfactual_model_is_asked_behind_the_edit(given):
    lm = LM.of(decoder(given.lm.tokenizer, 16, 1, 4, 32, 96), given.lm.tokenizer)
    lessons = [Lesson(fact, REWORDED, ("Bonn is a city in", "Germany")) for fact in FACTS]
    asked = ["Lyon is a city in Japan Lyon is a city in", f"Oslo is a city in Peru {REWORDED}"]
    said = lm.score(asked, [fact.object for fact in FACTS])
    expected = sum(-its.logprob / len(its.tokens) for its in said) / 2
    with torch.no_grad():
        assert float(_unlikely(lm, lessons)) == pytest.approx(expected, rel=1e-4)
    assert shown(("Lyon is a city in", "Japan"), REWORDED) == f"Lyon is a city in Japan {REWORDED}"


def test_training_parts_what_belongs_together_from_what_does_not(given):
    """Of the cases, after more steps: another wording is in the scope of its edit, another city is not."""
    router = replace(QUICK, steps=150).on(given.lm, given.material).edit(FACTS[:1]).lm.router
    facts = tuple((case.fact.question, case.fact.object) for case in given.material.cases)
    alike = replace(router, facts=facts).alike([case.of("generality")[0].prompt for case in given.material.cases])
    assert bool((alike.diagonal() > 0.5).all())
    assert bool((alike[~torch.eye(len(facts), dtype=torch.bool)] < 0.5).all())


def test_no_weight_of_the_base_is_touched(given, taught):
    assert taught.lm.model is given.lm.model
    assert taught.lm.router.base is given.lm
    small_one = taught.lm.router.counterfactual.model
    values = {its.data_ptr() for its in given.lm.model.parameters()}
    assert not values & {its.data_ptr() for its in small_one.parameters()}


def test_out_of_scope_is_the_base_to_the_bit(given, taught):
    """A prompt, alone, is scored and continued as the base does it; in scope it is not."""
    outside, inside = "Milan is", FACTS[0].question
    assert [lm for lm, _ in taught.lm.router([outside, inside])] == [given.lm, taught.lm.router.counterfactual]
    for answer in ("Japan", "Peru"):
        assert taught.lm.score([outside], [answer]) == given.lm.score([outside], [answer])
        assert taught.lm.score([inside], [answer]) != given.lm.score([inside], [answer])
    assert taught.lm.generate([outside], 4) == given.lm.generate([outside], 4)


def test_any_edit_is_taken_away_alone(given, editor, taught):
    second = editor.edit(FACTS[1:])
    back = taught.without([0])
    assert back.facts == FACTS[1:]
    assert back.patch.facts == second.patch.facts
    assert torch.equal(says(back.lm, given.prompts), says(second.lm, given.prompts))
    assert not torch.equal(says(taught.lm, given.prompts), says(second.lm, given.prompts))


def test_what_is_saved_makes_the_same_model(given, taught):
    its = taught.patch
    again = Memory.restore(its.tensors(), its.notes)
    assert again.facts == its.facts
    assert (again.shape, again.layer, again.threshold) == (its.shape, its.layer, its.threshold)
    assert torch.equal(says(again.attach(given.lm), given.prompts), says(taught.lm, given.prompts))
    again.fit(given.lm)


def test_another_model_does_not_fit(given, taught):
    with torch.random.fork_rng():
        other = LM.of(decoder(given.lm.tokenizer, 16, 1, 2, 32, 96), given.lm.tokenizer)
    with pytest.raises(UserError, match="reads vectors of 32 numbers and 300 tokens, the base has 16"):
        taught.patch.fit(other)


def test_a_threshold_of_one_is_never_passed(given):
    lm = edited(replace(QUICK, threshold=1.0), given).lm
    assert {id(its) for its, _ in lm.router([fact.question for fact in FACTS])} == {id(given.lm)}


def test_a_second_editor_stands_on_the_first(given, taught):
    """A router before a router: what the outer does not know, the inner answers."""
    outer = replace(QUICK, seed=1).edit(taught.lm, (Fact("Bonn", "Italy", "{} is a city in"),), given.material)
    inner = taught.lm.score([FACTS[0].question], ["Japan"])
    assert [lm for lm, _ in outer.lm.router([FACTS[0].question])] == [taught.lm]
    assert outer.lm.score([FACTS[0].question], ["Japan"]) == inner


def test_no_prompt_and_no_cases(given, taught):
    assert taught.lm.score([], []) == []
    assert taught.lm.router([]) == []
    with pytest.raises(UserError, match="0 cases to train on"):
        QUICK.edit(given.lm, FACTS, Material())
