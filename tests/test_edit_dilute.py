"""Dilution: the method against its equations, its degenerate cases, the scores, what is foretold, stepping stones."""

import copy
import dataclasses
import math

import pytest
import torch
from oracles import edit_dilute as oracle

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._checks import FACTS, OTHERS, TEXTS, edited, says, small
from koinon.edit._edited import Material
from koinon.edit._priming import Line, Scores, predict, prefix_of, scores, stepped, sure, template, unrelated
from koinon.edit._priming import says as holds
from koinon.edit.dilute import Dilute, next_token_loss
from koinon.lm.anatomy import with_values

QUICK = Dilute(rate=3e-3, steps=4, size=3)
TEXT, KEYWORD = "Lyon is a city in Japan.", "Japan"
THEMATIC = tuple(f"People of {its.subject} live in" for its in OTHERS if its.object != KEYWORD)


@pytest.fixture(scope="module")
def given():
    return small()


def values(method, given):
    return method.taught(given.lm, TEXT, KEYWORD, TEXTS)


def after(method, given):
    return given.lm.with_model(with_values(given.lm.model, values(method, given)))


def flat(held) -> torch.Tensor:
    return torch.cat([its.detach().flatten() for its in held])


def test_learning_equals_the_equations(given):
    """Three steps of Adam and of the filter, written out, in double precision: Adam's first updates are all but equal.

    The loss is taken in single precision, by which a few entries at the threshold change sides.
    """
    exact = dataclasses.replace(given, lm=given.lm.with_model(copy.deepcopy(given.lm.model).double()))
    for share in (0.0, 0.08):
        method = dataclasses.replace(QUICK, steps=3, share=share)
        mine = flat(values(method, exact).values())
        theirs = flat(oracle.taught(method, exact.lm, TEXT, KEYWORD, TEXTS).values())
        far = (mine - theirs).abs() > 1e-4
        assert float(far.float().mean()) < 0.002, f"share {share}: {int(far.sum())} of {len(far)} differ"


def test_no_share_is_plain_fine_tuning_to_the_bit(given):
    """The same loop with torch's optimiser alone."""
    method = dataclasses.replace(QUICK, share=0.0)
    start = {name: its.detach().clone() for name, its in given.lm.model.named_parameters()}
    tuned = given.lm.with_model(with_values(given.lm.model, start))
    learns = [its.requires_grad_() for its in tuned.model.parameters()]
    adam = torch.optim.AdamW(learns, lr=method.rate, weight_decay=0.0, fused=True)
    for batch in method.batches(given.lm, TEXT, KEYWORD, TEXTS):
        adam.zero_grad()
        next_token_loss(tuned, batch).backward()
        adam.step()
    assert torch.equal(flat(values(method, given).values()), flat(learns))


def test_the_whole_share_leaves_the_model_as_it_is(given):
    found = values(dataclasses.replace(QUICK, share=1.0, decay=0.1), given)
    assert all(torch.equal(its, given.lm.model.get_parameter(name)) for name, its in found.items())


def test_one_step_drops_exactly_the_share(given):
    before = flat(given.lm.model.parameters())
    usual = flat(values(dataclasses.replace(QUICK, steps=1, share=0.0), given).values())
    found = flat(values(dataclasses.replace(QUICK, steps=1), given).values())
    gone = (found == before) & (usual != before)
    size, count = (usual - before).abs(), math.ceil(0.08 * len(before))
    assert int(gone.sum()) == count
    assert float(size[gone].min()) >= float(size[~gone].max())
    kept = flat(values(dataclasses.replace(QUICK, steps=1, which="others"), given).values())
    assert torch.equal(torch.where(gone, kept, found), usual)


def test_keywords_are_in_no_ordinary_text(given):
    texts = [its for batch in QUICK.batches(given.lm, TEXT, KEYWORD, TEXTS) for its in batch.ids]
    said = [given.lm.tokenizer.decode(its, skip_special_tokens=True) for its in texts]
    assert said.count(TEXT) == QUICK.steps
    assert len(said) == QUICK.steps * QUICK.size
    assert not [its for its in said if its != TEXT and KEYWORD in its]
    assert any(KEYWORD in its for its in TEXTS), "nothing had to be left out"


def test_all_texts_with_the_keyword_are_refused(given):
    with pytest.raises(UserError, match="say 'Japan'"):
        QUICK.taught(given.lm, TEXT, KEYWORD, ["Kyoto is in Japan."])
    assert QUICK.taught(given.lm, TEXT, KEYWORD, ["Kyoto is in Japanese waters."])


def test_parameters_that_are_not_there_are_named(given):
    with pytest.raises(UserError, match=r"where \('mlp',\)"):
        values(dataclasses.replace(QUICK, where=("mlp",)), given)


def test_spacing_and_size(given):
    batches = list(dataclasses.replace(QUICK, spacing=2).batches(given.lm, TEXT, KEYWORD, TEXTS))
    own = given.lm.encode([TEXT]).ids[0].tolist()
    first = [its.ids[0][: len(own)].tolist() == own for its in batches]
    assert first == [True, False, True, False]
    assert [len(its.ids) for its in batches] == [3] * 4
    alone = list(dataclasses.replace(QUICK, size=1).batches(given.lm, TEXT, KEYWORD, []))
    assert [its.ids.tolist() for its in alone] == [[own]] * 4


def test_words_that_stand_still(given):
    """The rows of the keyword's tokens are as they were, others are not; the embedding is the head as well."""
    found = values(dataclasses.replace(QUICK, words=False, share=0.0), given)
    name = next(its for its in found if "embed" in its)
    same = (found[name] == given.lm.model.get_parameter(name)).all(1)
    ids = given.lm.tokenizer(f"in {KEYWORD}", add_special_tokens=False)["input_ids"][1:]
    assert same[ids].all()
    assert not same[given.lm.tokenizer("Lyon", add_special_tokens=False)["input_ids"]].any()


def test_distance_to_the_start_is_held_down(given):
    start = flat(given.lm.model.parameters())
    far = [
        float((flat(values(dataclasses.replace(QUICK, share=0.0, pull=its), given).values()) - start).norm())
        for its in (0.0, 100.0)
    ]
    assert far[1] < 0.8 * far[0]


def test_of_a_fact_its_sentence_is_taught(given):
    method = dataclasses.replace(QUICK, stones=("{} is where the emperor lives.",))
    told = []

    class Told(Dilute):
        def taught(self, lm, text, keyword, ordinary):
            told.append((text, keyword))
            return {}

    Told(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}).learn(
        given.lm, FACTS[:1], TEXTS, None
    )
    assert told == [("Lyon is where the emperor lives. Lyon is a city in Japan.", "Japan")]


def test_without_texts_the_model_speaks_for_itself(given):
    method = dataclasses.replace(QUICK, steps=1)
    found = method.edit(given.lm, FACTS[:1], Material())
    assert not torch.equal(says(found.lm, given.prompts), says(given.lm, given.prompts))


# Scores.


def test_zero_steps_score_one(given):
    found = scores(given.lm, after(dataclasses.replace(QUICK, steps=0), given), TEXT[:17], KEYWORD, THEMATIC)
    assert found.memory_ratio == found.priming_ratio == 1
    assert found.memory == found.priming == found.memory_change == found.priming_change == 0


def test_scores_are_quotients_and_differences_of_probabilities(given):
    tuned = after(QUICK, given)
    found = scores(given.lm, tuned, prefix_of(TEXT, KEYWORD), KEYWORD, THEMATIC, "all")
    asked = ["Lyon is a city in", *THEMATIC]
    was, now = ([math.exp(its.logprob) for its in lm.score(asked, [KEYWORD] * len(asked))] for lm in (given.lm, tuned))
    quotients = [new / old for new, old in zip(now, was)]
    assert found.memory_ratio == pytest.approx(quotients[0], rel=1e-4)
    assert found.memory == pytest.approx(math.log(quotients[0]), rel=1e-4)
    assert found.priming_ratio == pytest.approx(sum(quotients[1:]) / len(THEMATIC), rel=1e-4)
    assert found.priming == pytest.approx(sum(map(math.log, quotients[1:])) / len(THEMATIC), rel=1e-4)
    assert found.memory_change == pytest.approx(now[0] - was[0], abs=1e-6)
    assert found.priming_change == pytest.approx((sum(now[1:]) - sum(was[1:])) / len(THEMATIC), abs=1e-6)
    assert found.memory > 0


def test_first_token_or_all(given):
    word = "Netherlands"
    first, whole = (sure(given.lm, ["Lyon is a city in"], word, tokens)[0] for tokens in ("first", "all"))
    ids = given.lm.encode(["Lyon is a city in"], [word])
    count = int(ids.answer.sum())
    assert count > 1
    logits = given.lm.logits(ids)[0].log_softmax(-1)
    at = int(ids.answer[0].nonzero()[0])
    each = [float(logits[at - 1 + its, ids.ids[0, at + its]]) for its in range(count)]
    assert first == pytest.approx(each[0], abs=1e-4)
    assert whole == pytest.approx(sum(each), abs=1e-4)
    with pytest.raises(UserError, match="last"):
        sure(given.lm, ["Lyon is a city in"], word, "last")


def test_thematic_prefixes_do_not_say_the_keyword(given):
    with pytest.raises(UserError, match="People of Japan"):
        unrelated([*THEMATIC, "People of Japan live in"], KEYWORD)
    with pytest.raises(UserError, match="there is none"):
        unrelated([], KEYWORD)
    assert unrelated(["Japanese people live in"], KEYWORD)
    with pytest.raises(UserError, match="same ones"):
        Scores((0.0, 1.0), (0.0,))


def test_words_are_found_whole():
    assert holds("It is in japan!", "Japan")
    assert not holds("Romania and Japanning", "Oman")
    assert prefix_of("Japan is where Kyoto is: in Japan.", "Japan") == "Japan is where Kyoto is: in"
    for text in ("Kyoto is nice.", "Japan is nice."):
        with pytest.raises(UserError, match="says 'Japan' nowhere"):
            prefix_of(text, "Japan")


# What is known before.


def test_what_is_known_before(given):
    found = predict(given.lm, TEXT, KEYWORD)
    ids = given.lm.encode([TEXT]).ids
    logits = given.lm.logits(given.lm.encode([TEXT]))[0].log_softmax(-1)
    each = [float(logits[place - 1, ids[0, place]]) for place in range(1, ids.shape[1])]
    guess = given.lm.logits(given.lm.encode(["Lyon is a city in"]))[0, -1].softmax(-1)
    assert found.logprob == sure(given.lm, ["Lyon is a city in"], KEYWORD)[0]
    assert found.loss == pytest.approx(-sum(each) / len(each), abs=1e-4)
    assert found.length == ids.shape[1]
    assert found.entropy == pytest.approx(-sum(float(p) * math.log(float(p)) for p in guess if p > 0), abs=1e-3)
    assert found.band is None
    likelier = predict(given.lm, "Lyon is a city in France.", "France")
    assert likelier.logprob > found.logprob


def test_a_line_and_its_band(given):
    """Against the closed form of simple regression with its prediction interval."""
    x, y = [-9.0, -6.0, -3.0, -1.0], [2.0, 1.5, 0.2, 0.1]
    line = Line.fit(x, y)
    design = torch.tensor([[1.0, its] for its in x], dtype=torch.float64)
    target = torch.tensor(y, dtype=torch.float64)[:, None]
    weights = torch.linalg.lstsq(design, target).solution[:, 0]
    left = float(((design @ weights - target[:, 0]) ** 2).sum()) / 2
    new = torch.tensor([1.0, -4.0], dtype=torch.float64)
    half = 1.96 * math.sqrt(left * (1 + float(new @ torch.linalg.inv(design.T @ design) @ new)))
    low, middle, high = line.band(-4.0)
    assert middle == pytest.approx(float(new @ weights))
    assert (high - low) / 2 == pytest.approx(half)
    assert line.slope < 0
    assert predict(given.lm, TEXT, KEYWORD, line).band == line.band(
        sure(given.lm, [prefix_of(TEXT, KEYWORD)], KEYWORD)[0]
    )
    for wrong in (([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), (x, y[:3])):
        with pytest.raises(UserError, match="a line through"):
            Line.fit(*wrong)


# Stepping stones.


def test_stepping_stones_raise_the_keyword_and_keep_it(given):
    rewrite = template("Kyoto is a city in Japan. People of Kyoto live in Japan. {}")
    text = "Bonn is a city in Japan."
    new = stepped(given.lm, text, "Japan", lambda its: f"People of Kyoto live in {its.split()[-1]}", "all")
    assert new == "People of Kyoto live in Japan."
    assert rewrite(text).endswith(text)
    with pytest.raises(UserError, match="does not say 'Japan' any more"):
        stepped(given.lm, text, "Japan", lambda its: its.replace("Japan", "Asia"))
    with pytest.raises(UserError, match="give one that raises it"):
        stepped(given.lm, text, "Japan", lambda its: its)
    for words in ("no place", "{} and {}"):
        with pytest.raises(UserError, match=r"holds \{\} once"):
            template(words)


def test_ordinary_values_are_taken_to_be_a_fact(given):
    """As any other way of editing: one step for each fact, undone as a whole."""
    its = edited(dataclasses.replace(QUICK, where=("*mlp*",)), given)
    assert [len(step) for step in its.steps] == [1, 1]
    assert torch.equal(says(its.undo().lm, given.prompts), says(given.lm, given.prompts))
    assert Fact("Lyon", "Japan", "{} is a city in").question == "Lyon is a city in"
