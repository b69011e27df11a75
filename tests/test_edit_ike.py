"""IKE against its prompt, and what makes it one: words before a prompt, and nothing else."""

from dataclasses import replace

import pytest
import torch
from oracles import edit_ike as oracle

from koinon.core import UserError
from koinon.data.facts import Case, Fact
from koinon.edit._checks import FACTS, OTHERS, edited, says, small
from koinon.edit._demonstrations import Alike, Context, demonstration
from koinon.edit._edited import Material
from koinon.edit.ike import Ike
from koinon.lm.small import decoder, train

QUICK = Ike(count=2)
REWORDED = "People of Lyon live in"


@pytest.fixture(scope="module")
def given():
    return small()


@pytest.fixture(scope="module")
def taught(given):
    return edited(QUICK, given)


def test_the_prompt_is_the_published_one(given):
    """Two examples, the nearer last, of the kinds that are due; then the fact; then the prompt."""
    lm = QUICK.edit(given.lm, FACTS[:1], given.material).lm
    questions = [its.question for its in OTHERS]
    alike = [round(oracle.alike(FACTS[0].question, question, questions), 5) for question in questions]
    first, second = sorted(range(len(OTHERS)), key=lambda place: -alike[place])[:2]
    retained = OTHERS[first - 1]  # the case's neighbour
    examples = [
        (
            OTHERS[second].question,
            OTHERS[second].object,
            f"People of {OTHERS[second].subject} live in",
            OTHERS[second].object,
        ),
        (OTHERS[first].question, OTHERS[first].object, retained.question, retained.object),
    ]
    assert QUICK.order(2) == ["retain", "update"]  # the nearest, the next
    for prompt in (FACTS[0].question, REWORDED, "Milan is"):
        assert lm.router([prompt]) == [(given.lm, oracle.context(examples, FACTS[0].question, "Japan", prompt))]


def test_examples_of_each_kind(given):
    case = given.material.cases[1]  # Lima is in Peru; its neighbour is Kyoto
    fact = "New Fact: Lima is a city in Peru.\nPrompt: "
    assert demonstration(case, "copy") == f"{fact}Lima is a city in Peru\n\n"
    assert demonstration(case, "update") == f"{fact}People of Lima live in Peru\n\n"
    assert demonstration(case, "retain") == f"{fact}Kyoto is a city in Japan\n\n"
    bare = Case(case.fact)
    assert {demonstration(bare, kind) for kind in ("copy", "update", "retain")} == {f"{fact}Lima is a city in Peru\n\n"}


def test_kinds_are_in_proportion():
    order = Ike().order(32)
    assert [order.count(kind) for kind in ("copy", "update", "retain")] == [4, 12, 16]
    for count in range(1, 33):  # at any place each kind is at most one away from its share
        part = Ike().order(count)
        assert part == order[:count]
        assert all(
            abs(part.count(k) - count * share / 8) <= 1 for k, share in zip(("copy", "update", "retain"), (1, 3, 4))
        )
    assert set(Ike(kinds=(0, 2, 0)).order(5)) == {"update"}


def test_likeness_equals_the_equation():
    texts = ["Lyon is a city in", "Oslo is a city in", "People of Oslo live in", "The currency of Peru is the"]
    asked = [*texts, "Oslo lies in the north.", "?"]
    found = Alike(texts)(asked, texts)
    expected = torch.tensor([[oracle.alike(one, other, texts) for other in texts] for one in asked])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # it is rounded to so much
    assert not found[5].any()


def test_of_several_facts_the_nearest_is_told(given, taught):
    """Each prompt has one fact before it, that of its subject; a prompt of nobody's has one as well."""
    for place, subject in enumerate(("Lyon", "Oslo")):
        for prompt in (f"People of {subject} live in", f"{subject} is a city in"):
            ((_, asked),) = taught.lm.router([prompt])
            assert asked.endswith(f"New Fact: {FACTS[place].question} {FACTS[place].object}.\nPrompt: {prompt}")
    ((_, asked),) = taught.lm.router(["Water boils at"])
    assert asked.endswith("\nPrompt: Water boils at")
    assert "New Fact: " in asked


def test_a_fact_that_is_less_alike_is_not_told(given):
    router = edited(replace(QUICK, least=0.9), given).lm.router
    (_, same), (_, other) = router([FACTS[0].question, "Water boils at"])
    assert same.endswith(f"Japan.\nPrompt: {FACTS[0].question}")
    assert other == "Water boils at"


def test_no_weight_is_touched_and_none_is_saved(given, taught):
    assert taught.lm.model is given.lm.model
    assert {id(lm) for lm, _ in taught.lm.router(given.prompts)} == {id(given.lm)}
    assert taught.patch.tensors() == {}
    again = Context.restore({}, taught.patch.notes)
    assert again == taught.patch
    again.fit(given.lm)


def test_nothing_inside_a_model_is_looked_at(given):
    """It edits what has a tokenizer and a number of places, and no layers."""

    class Box:
        model = type("Model", (), {"config": type("Config", (), {"max_position_embeddings": 256})()})()
        tokenizer = given.lm.tokenizer

    patch = QUICK.learn(Box, FACTS[:1], QUICK.prepare(Box, given.material), None)
    assert patch == QUICK.edit(given.lm, FACTS[:1], given.material).patch


def test_any_edit_is_taken_away_alone(given, taught):
    second = edited(QUICK, given, FACTS[1:])
    back = taught.without([0])
    assert back.patch == second.patch
    assert torch.equal(says(back.lm, given.prompts), says(second.lm, given.prompts))
    assert taught.without([0, 1]).lm is given.lm


def test_examples_go_if_there_are_too_few_places(given):
    """The least alike first; the fact and the prompt stay."""
    router = edited(Ike(), given, FACTS[:1]).lm.router
    fact = router.facts[0]
    assert len(fact.examples) == len(OTHERS)
    for places in (80, 120, 200, 10_000):
        given.lm.model.config.max_position_embeddings, before = places, given.lm.model.config.max_position_embeddings
        try:
            text = router.context(fact, REWORDED)
        finally:
            given.lm.model.config.max_position_embeddings = before
        kept = [its for its in fact.examples if its in text]
        assert text == "".join(kept) + fact.words + REWORDED
        assert kept == list(fact.examples[len(fact.examples) - len(kept) :])
        room = places - min(32, places // 4)
        longer = "".join(fact.examples[len(fact.examples) - len(kept) - 1 :]) + fact.words + REWORDED
        assert not kept or len(given.lm.tokenizer(text)["input_ids"]) <= room
        assert len(kept) == len(fact.examples) or len(given.lm.tokenizer(longer)["input_ids"]) > room
    assert len(kept) == len(fact.examples)


def test_without_cases_there_is_only_the_fact(given):
    lm = QUICK.edit(given.lm, FACTS[:1], Material()).lm
    assert lm.router(["Milan is"])[0][1] == oracle.context([], FACTS[0].question, "Japan", "Milan is")
    assert (
        replace(QUICK, count=0).edit(given.lm, FACTS[:1], given.material).lm.router(["Milan is"])[0][1].count("New")
        == 1
    )


def test_the_fact_itself_is_no_example(given):
    told = Fact("Lima", "Japan", "{} is a city in")
    lm = Ike().edit(given.lm, (told,), given.material).lm
    assert "Lima is a city in Peru" not in "".join(lm.router.facts[0].examples).replace(
        "Prompt: Lima is a city in Peru", ""
    )


def test_a_model_that_answers_from_what_it_reads_says_what_it_is_told(given):
    """Trained to say Japan behind the new fact, and France without it."""
    texts = ["Lyon is a city in France.", "New Fact: Lyon is a city in Japan.\nPrompt: Lyon is a city in Japan."]
    model = decoder(given.lm.tokenizer, width=32, layers=2, heads=2, wide=64, context=64, seed=0)
    train(model, given.lm.tokenizer, texts, epochs=150, rows=2, lr=1e-2)
    lm = given.lm.with_model(model)
    after = replace(QUICK, count=0).edit(lm, FACTS[:1])
    asked = [FACTS[0].question], ["Japan"]
    assert not lm.score(*asked)[0].exact
    assert after.lm.score(*asked)[0].exact
    assert after.lm.generate(*asked[:1], 5) != lm.generate(*asked[:1], 5)
    assert after.undo().lm.score(*asked) == lm.score(*asked)


def test_bad_kinds_are_refused(given):
    for kinds in ((0, 0, 0), (1, -1, 1)):
        with pytest.raises(UserError, match=r"kinds .*: give (how often copy, update and retain|a number from 0)"):
            replace(QUICK, kinds=kinds).edit(given.lm, FACTS, given.material)
