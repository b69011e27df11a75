"""Priming compared: the texts, what is measured of them, what is matched, and a tiny comparison from end to end."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from koinon.bench.compare import compare
from koinon.bench.report import Report
from koinon.bench.statistics import Resampling
from koinon.core import UserError
from koinon.data import factlab
from koinon.data.sentences import KINDS, SENTENCES, THEMES
from koinon.data.surprises import WAYS, keywords, of_facts, sentences
from koinon.edit._priming import Foreseen, Scores, says
from koinon.edit.dilute import Dilute
from koinon.recipes import _teaching
from koinon.recipes._spreading import MAIN, SHOWN, measure, over_texts, percent, spearman
from koinon.recipes._teaching import Outcome, Teaching, matched
from koinon.recipes.prime import SETTINGS, Contestant, PrimeRecipe, options

LAB = factlab.made(12, 4)
TINY = PrimeRecipe("world", "tiny")


@pytest.fixture(scope="module")
def world():
    return TINY.prepare()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOINON_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def given(world, cache):
    size = TINY.size
    return Teaching(world.lm(), world.texts(0), size.rates, size.changes, "first", 0)


# The texts.


def test_texts_about_facts_are_what_they_are_called():
    texts = of_facts(LAB, 2, 1)
    true = {(its, fact.object) for fact in LAB.taught for its in (*LAB.trained(fact), *LAB.held(fact))}
    trained = set(LAB.statements())
    subjects = {fact.subject for fact in LAB.facts}
    kinds = Counter(its.kind for its in texts.report)
    assert set(kinds) == set(WAYS)
    for its in texts.report:
        assert ((its.prefix, its.keyword) in true) == (its.kind in ("true", "reworded")), its.text
        assert (its.text in trained) == (its.kind == "true"), its.text
        assert any(name in its.prefix for name in subjects) == (its.kind != "unknown"), its.text
        assert its.stone.endswith(its.prefix)
        assert its.stone.count(its.keyword) >= 1
        assert its.rewritten.endswith(its.text)


def test_thematic_prefixes_are_of_other_subjects_and_do_not_say_the_keyword():
    right = {its: fact.object for fact in LAB.taught for its in LAB.trained(fact)}
    for its in of_facts(LAB, 2, 1).report:
        assert len(its.thematic) >= 6
        assert not [prefix for prefix in its.thematic if says(prefix, its.keyword) or prefix == its.prefix]
        assert not [prefix for prefix in its.thematic if right.get(prefix) == its.keyword]


def test_no_text_is_in_two_parts_and_seeds_draw_others():
    texts = of_facts(LAB, 2, 1)
    assert not {its.text for its in texts.report} & {its.text for its in texts.choose}
    assert not set(texts.ordinary) & set(texts.held)
    assert texts == of_facts(LAB, 2, 1)
    assert texts.fingerprint != of_facts(LAB, 2, 1, seed=1).fingerprint
    assert texts.held == of_facts(LAB, 2, 1, seed=1).held


def test_keywords_are_common_and_rare():
    found = keywords(LAB, "country")
    counts = Counter(fact.object for fact in LAB.related("country"))
    assert counts[found[0]] == max(counts.values())
    assert counts[found[-1]] == min(counts.values())


def test_sentences_are_whole():
    """Four themes of three words, each said in four ways; the word itself is in none of it."""
    assert [len(words) for words in SENTENCES.values()] == [3] * 4
    assert SENTENCES.keys() == THEMES.keys()
    for theme, words in SENTENCES.items():
        assert len(THEMES[theme]) == 5
        for word, its in words.items():
            assert len(its) == len(KINDS)
            for one in its:
                assert not says(one.before, word), one
                assert not says(one.stone, word), one
                assert one.before[-1] not in " .", one
                assert len(one.stone) > len(one.before), one
            assert not [prefix for prefix in THEMES[theme] if says(prefix, word)]


def test_sentences_to_choose_by_are_others():
    for seed in range(4):
        report, choose = sentences(36, seed)
        assert len({its.text for its in (*report, *choose)}) == 48
    report, choose = sentences(12)
    assert len({its.keyword for its in report}) == 12
    assert Counter(its.kind for its in report) == dict.fromkeys(KINDS, 3)
    assert len(choose) == 4
    assert {its.kind for its in sentences(12, 1)[0]} == set(KINDS)
    for count in (2, 37):
        with pytest.raises(UserError, match="sentences to report on"):
            sentences(count)


# Measuring.


def scored(memory: float, *priming: float) -> Outcome:
    return Outcome(Scores((-5.0,) * (1 + len(priming)), (-5 + memory, *(-5 + its for its in priming))), 0.25, False)


def foreseen(logprob: float, loss: float) -> Foreseen:
    return Foreseen(logprob, loss, 7, 1.0, None)


def test_metrics_are_what_they_say():
    plain = [scored(4, 2, 4), scored(3, 1, 1), scored(2, 0, 0)]
    found = [scored(3.9, 1, 1), scored(2.5, 0, 1), scored(2, 0, 0)]
    known = [foreseen(-20, 1.0), foreseen(-5, 3.0), foreseen(-1, 2.0)]
    by = {its: measure(found, plain, known, its, ["a", "b", "c"]) for its in ("probability", "loss")}
    its = {name: value.value for name, value in by["probability"].items()}
    assert its["memory"] == pytest.approx(2.5)
    assert its["priming"] == pytest.approx(0.5)
    assert its["specificity"] == pytest.approx(2.0)
    assert its["diluted"] == pytest.approx(0.5)
    assert its["reduction"] == pytest.approx(50.0)
    assert its["kept"] == pytest.approx(2 / 3)  # exp(-0.1) is over 0.8, exp(-0.5) is not
    assert its["held"] == pytest.approx(0.25)
    assert its["raised"] == 0
    assert its["spearman"] == pytest.approx(-1)
    assert its["foretold"] == pytest.approx(1)
    assert its["spearman.likely"] == 0  # one of three is left out, two tell nothing
    assert its["priming.ratio"] == pytest.approx((math.e + (1 + math.e) / 2 + 1) / 3)
    assert its["memory.ratio"] == pytest.approx((math.exp(3.9) + math.exp(2.5) + math.exp(2)) / 3)
    assert by["loss"]["spearman"].value == pytest.approx(spearman(np.array([1.0, 3.0, 2.0]), np.array([1, 0.5, 0])))
    assert set(its) >= {MAIN, *SHOWN}


def test_rank_correlation_shares_ties():
    assert spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 4.0, 4.0, 9.0])) == pytest.approx(1)
    one, other = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 5.0])
    assert spearman(one, other) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(one, np.ones(5)) == 0
    assert math.isnan(percent(1.0, 0.0))


def test_resamplings_are_of_whole_keywords():
    """Two texts of one keyword are drawn equally often."""
    resampling = Resampling(np.array([0, 0, 1, 1]), 4, draws=20)
    counted = [over_texts(lambda texts, its=its: float((texts == its).sum()), resampling) for its in range(4)]
    assert [its.value for its in counted] == [1] * 4
    assert np.array_equal(counted[0].draws, counted[1].draws)
    assert np.array_equal(counted[0].draws + counted[2].draws, np.full(20, 2.0))
    assert counted[0].draws.std() > 0


def test_what_is_matched_comes_nearest():
    asked = []

    def measured(value):
        asked.append(value)
        return value**2

    assert matched(measured, 30.0, list(range(1, 21))) == 5
    assert len(set(asked)) < 9
    assert matched(lambda value: value, 100.0, [1.0, 2.0, 3.0]) == 3.0
    assert matched(lambda value: value, -1.0, [1.0, 2.0, 3.0]) == 1.0


# Teaching.


def test_untaught_scores_one_and_the_rate_is_the_lowest_that_learns(given):
    nothing = given.taught(Dilute(steps=0))
    assert {its.scores.gains for its in nothing.outcomes} == {
        (0.0,) * len(its.scores.gains) for its in nothing.outcomes
    }
    assert {its.held for its in nothing.outcomes} == {0.0}
    learnt = {}
    for rate in given.rates:
        found = given.taught(given._at(rate, share=0.0), part="choose").outcomes
        learnt[rate] = np.mean([math.exp(its.scores.after[0]) for its in found if its.scores.before[0] < math.log(0.5)])
    enough = [rate for rate in given.rates if learnt[rate] >= 0.5]
    assert given.rate == min(enough, default=max(given.rates))


def test_outcomes_are_kept_and_learnt_anew_by_other_code(given, cache, monkeypatch):
    method = given.method(share=0.5)
    first = given.taught(method, part="choose")
    monkeypatch.setattr(Teaching, "_outcome", lambda *its: pytest.fail("learnt again"))
    assert given.taught(method, part="choose").outcomes == first.outcomes
    (file,) = [its for its in (cache / "teaching").iterdir() if its.stem == given._key(method, "taught", "choose")]
    for broken in ("{", json.dumps({"outcomes": [{}]})):
        file.write_text(broken)
        with pytest.raises(pytest.fail.Exception, match="learnt again"):
            given.taught(method, part="choose")
    monkeypatch.setattr(_teaching.inspect, "getsource", lambda its: "other code")
    assert given._key(method, "taught", "choose") != file.stem


def test_stones_that_raise_nothing_are_not_used(given):
    found = given.taught(given.method(share=0.0), "rewritten").outcomes
    usual = given.taught(given.method(share=0.0)).outcomes
    raised = [its.raised for its in found]
    assert any(raised)
    assert not all(raised)
    for one, other in zip(found, usual):
        assert (one.scores.after != other.scores.after) == one.raised
        assert one.scores.before == other.scores.before  # the original prefix is scored


def test_scales_keep_what_a_contestant_is_about():
    its = Contestant(Dilute(size=1, every=20)).at({"steps": 4, "size": 3}).method
    assert (its.size, its.steps, its.every) == (1, 4, 4)
    assert Contestant(Dilute(steps=0)).at({"steps": 4}).method.steps == 0


# From end to end.


def test_a_tiny_comparison(world, cache, tmp_path):
    """Each label runs, is repeated exactly, and is reported; a rate is matched on texts that nothing is reported of."""
    labels = ["untaught", "plain", "ignore_8", "slower", "in_context", "by_loss"]
    rows = compare(TINY, world, [0], tmp_path, labels, jobs=1, backend="loky")
    assert {row["label"] for row in rows} == set(labels)
    by = {row["label"]: row for row in rows}
    for row in rows:
        assert set(row["metrics"]) >= {MAIN, *SHOWN}
        assert len(row["draws"][MAIN]) == 100
    assert by["untaught"]["metrics"]["memory"] == by["untaught"]["metrics"]["priming"] == 0
    assert by["plain"]["metrics"]["memory"] > 0
    assert by["plain"]["metrics"]["kept"] == 1
    assert by["plain"]["metrics"]["diluted"] == 0
    assert by["ignore_8"]["metrics"]["priming"] != by["plain"]["metrics"]["priming"]
    assert by["slower"]["cost"]["rate"] / by["plain"]["cost"]["rate"] in TINY.size.factors
    assert by["in_context"]["metrics"]["held"] == 0
    assert by["by_loss"]["metrics"]["priming"] == by["plain"]["metrics"]["priming"]
    assert by["by_loss"]["metrics"]["spearman"] != by["plain"]["metrics"]["spearman"]
    report = Report(TINY.name, TINY.settings(world), rows)
    assert "plain" in report.text(160)
    assert any("Bounds" in its for its in report.sentences)


def test_sentences_run_as_well(cache):
    recipe = PrimeRecipe("sentences", "tiny")
    world = recipe.prepare()
    row = recipe.cell(world, recipe.contestants(world)["stones"], 0)
    assert 0 <= row["metrics"]["raised"] <= 1
    assert row["cost"]["passes"] == 4 * 12


def test_labels_are_those_of_the_settings(world):
    usual = set(TINY.contestants(world))
    assert set(SETTINGS["sentences"].contestants()) <= usual
    settings = TINY.settings(world)
    assert {settings["baseline"], *settings["bounds"]} <= usual
    assert options([])().recipe() == PrimeRecipe()
    with pytest.raises(UserError, match="small"):
        PrimeRecipe("world", "smal").prepare()
    with pytest.raises(UserError, match="--data sentences"):
        PrimeRecipe("world", "tiny", model="there").prepare()
