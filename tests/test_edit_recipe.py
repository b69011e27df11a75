"""The comparison of editors: what they are given, and how they are judged."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from koinon.bench.statistics import Measured, Resampling
from koinon.core import UserError
from koinon.data import factlab
from koinon.data.factlab import shown
from koinon.data.facts import Case
from koinon.edit._measures import measure
from koinon.edit.finetune import Finetune
from koinon.lm.language import LM
from koinon.lm.small import decoder, tokenizer_of
from koinon.lm.tracing import best_layer
from koinon.recipes import _editing
from koinon.recipes._editing import (
    ASPECTS,
    EditWorld,
    Lesson,
    Sizes,
    agreement,
    figures,
    gone,
    over_tasks,
    pool_of,
    score,
    values,
)
from koinon.recipes.edit import ALONE, SCALES, SETTINGS, EditRecipe, Entrant, Setting, entrants, families

TASKS = Setting.tasks
SIZES = Sizes(single=3, stream=(1, 3), batch=3, valid=2, material=6, probes=2)


@pytest.fixture(scope="module")
def world() -> EditWorld:
    """Made facts, and a model that knows none of them: what is asked is what counts here."""
    lab = factlab.made()
    tokenizer = tokenizer_of(lab.statements(), 400)
    lm = LM.of(decoder(tokenizer, width=16, layers=2, heads=2, wide=32, context=96), tokenizer)
    made = EditWorld(lm, lab, factlab.made(towns=36))
    made.__dict__["known"] = lab.taught  # as if it knew them
    return made


def test_pools_are_of_different_subjects_and_do_not_change():
    names = {pool_of(f"subject {number}") for number in range(100)}
    assert names == {"train", "valid", "test"}
    assert [pool_of(name) for name in ("Lyon", "Oslo", "gold")] == [pool_of(name) for name in ("Lyon", "Oslo", "gold")]


def test_what_editors_look_at_is_not_what_they_are_judged_by(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    judged = [*lesson.stream, *lesson.valid, *(case for cases in lesson.tasks.values() for case in cases)]
    asked = {probe.prompt for case in judged for probe in case.probes} | {case.fact.question for case in judged}
    material = lesson.material
    assert material.cases
    assert material.unrelated
    assert not set(material.unrelated) & asked
    assert not {its.prompt for case in material.cases for its in case.probes} & asked
    pools = [{pool_of(case.fact.subject) for case in cases} for cases in (lesson.stream, lesson.valid, material.cases)]
    assert pools == [{"test"}, {"valid"}, {"train"}]


def test_facts_are_exchanged_for_others_of_their_relation(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    assert len(lesson.stream) == 3
    for case in lesson.stream:
        assert case.fact.object != case.fact.was
        assert case.fact.object in {its.object for its in world.lab.related(case.fact.relation)}
        assert {probe.aspect for probe in case.probes} >= {"generality", "locality"}
    assert len({case.fact.subject for case in lesson.stream}) == 3


def test_new_facts_are_of_subjects_the_model_never_saw(world):
    tasks = Lesson(world, SIZES, 0, TASKS).tasks
    taught = {fact.subject for fact in world.lab.facts}
    assert not {case.fact.subject for case in tasks["insertion"]} & taught
    assert all(case.fact.was for case in tasks["erasure"])
    assert set(tasks) <= set(TASKS)


def test_texts_are_ended_where_the_model_makes_things_up(world):
    """Each about another subject to report on; none that the model ends rightly."""
    sizes = dataclasses.replace(SIZES, single=8)
    cases = Lesson(world, sizes, 0, ("passage",)).tasks["passage"]
    assert 1 < len(cases) <= 8
    assert len({case.fact.subject for case in cases}) == len(cases)
    assert {pool_of(case.fact.subject) for case in cases} == {"test"}
    said = world.lm.score([its.fact.question for its in cases], [its.fact.object for its in cases])
    assert not any(its.exact for its in said)
    for case in cases:
        true = {its.object for its in world.lab.about(case.fact.subject, case.fact.relation)}
        assert true == {case.fact.object}


def test_a_text_that_the_model_ends_rightly_needs_no_edit(world, monkeypatch):
    lesson = Lesson(world, SIZES, 0, ("passage", "style"))
    right = [SimpleNamespace(exact=True)]
    monkeypatch.setattr(lesson._plain, "score", lambda asked, answers: right * len(asked))
    assert set(lesson.tasks) == {"style"}


def test_what_does_not_fit_behind_its_fact_is_not_asked(world, monkeypatch):
    """Some editors tell the fact before each question."""
    lesson = Lesson(world, SIZES, 0, ("passage",))
    (case, *_) = lesson.stream
    assert lesson._fitting([case]) == [case]

    def tokens(probe):
        (ids,) = world.lm.tokenizer([shown(case.fact, f"{probe.prompt} {probe.answer}")])["input_ids"]
        return len(ids)

    longest = max(case.probes, key=tokens)
    monkeypatch.setattr(type(world.lm), "limit", tokens(longest) - 1)
    (left,) = lesson._fitting([case])
    assert left.probes == tuple(its for its in case.probes if tokens(its) < tokens(longest))
    monkeypatch.setattr(type(world.lm), "limit", 3)
    assert lesson._fitting([case]) == []


def test_topics_are_those_to_report_on(world):
    cases = Lesson(world, SIZES, 0, ("style",)).tasks["style"]
    assert {pool_of(case.fact.subject) for case in cases} == {"test"}
    assert {case.fact.object for case in cases} == {"Good."}


def test_means_over_tasks(world):
    """Of those that have an aspect; resamplings are averaged one by one."""
    made = {f"alone.{name}": Measured(value, np.array([value, 0.0])) for name, value in (
        ("one_of_several.reliability", 0.25), ("erasure.reliability", 0.75), ("erasure.locality", 0.5)
    )}  # fmt: skip
    found = over_tasks(made, ("one of several", "erasure", "style"))
    assert {name: its.value for name, its in found.items()} == {"alone.reliability": 0.5, "alone.locality": 0.5}
    assert found["alone.reliability"].draws.tolist() == [0.5, 0.0]
    assert found["alone.locality"].draws.tolist() == [0.5, 0.0]


def test_seeds_draw_other_facts_and_one_seed_the_same(world):
    one, again, other = (Lesson(world, SIZES, seed, TASKS).stream for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_figures_are_means_over_cases(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    judged = measure(world.lm, world.lm, lesson.stream)
    found = figures(judged, "x", draws=3)
    assert found["x.locality"].value == 1.0
    for aspect in ASPECTS[:2]:
        each = [its.score(aspect, "teacher") for its in judged]
        assert found[f"x.{aspect}.teacher"].value == pytest.approx(np.mean(each))
    three = [found[f"x.{aspect}"].value for aspect in ASPECTS[:3]]
    assert found["x.triangle"].value == pytest.approx(np.mean(three)) == pytest.approx(score(judged))
    assert found["x.harmonic"].value == pytest.approx(0 if 0 in three else 3 / sum(1 / its for its in three), abs=1e-9)
    assert len(found["x.locality"].draws) == 3


def test_a_case_without_probes_of_an_aspect_does_not_count_for_it(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    bare = [dataclasses.replace(case, probes=()) for case in lesson.stream]
    judged = measure(world.lm, world.lm, bare)
    assert np.isnan(values(judged, "locality", "exact")).all()
    assert "x.locality" not in figures(judged, "x")
    assert "x.triangle" not in figures(judged, "x")


def test_all_facts_so_far_are_asked_again_at_each_mark(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    editor = lesson.editor(Finetune(layer=0, steps=3, rate=1e-2, bound=0.0))
    rows = lesson.in_a_row(editor, lesson.stream, (1, 3))
    assert {mark: len(judged) for mark, judged in rows.items()} == {1: 1, 3: 3}
    assert lesson.edits == 3
    first = editor.edit([lesson.stream[0].fact])
    last = editor.edit([its.fact for its in lesson.stream[1:]], first)
    assert last.steps != first.steps
    asked = ([lesson.stream[0].fact.question], [lesson.stream[0].fact.object])
    then, now = (rows[mark][0].answered[0].after.logprob for mark in (1, 3))
    assert then == pytest.approx(first.lm.score(*asked)[0].logprob, abs=1e-5)
    assert abs(now - then) > 1e-3, "the first fact was not asked again"


@pytest.mark.filterwarnings("ignore:tracing")
def test_tracing_and_editing_are_compared_layer_by_layer(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    method = Finetune(layer="auto", rate=1e-2, bound=0.0, steps=3)
    effects, success = lesson.by_layer(method, lesson.stream)
    assert effects.shape == success.shape == (3, 2)
    traced = [best_layer(world.lm, [case.fact]) for case in lesson.stream]
    assert effects.argmax(1).tolist() == traced
    at = lesson.alone(lesson.editor(dataclasses.replace(method, layer=1)), lesson.stream)
    assert success[:, 1] == pytest.approx((values(at, "reliability", "exact") + values(at, "generality", "exact")) / 2)


def test_agreement_is_a_rank_correlation_of_means():
    one = np.array([[1.0, 2.0, 4.0], [0.0, 9.0, 3.0]])
    assert agreement(one, one**3).value == pytest.approx(1.0)
    assert agreement(one, -one).value == pytest.approx(-1.0)
    other = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 5.0]])
    assert agreement(one, other, draws=7).value == pytest.approx(spearmanr(one.mean(0), other.mean(0)).statistic)
    assert len(agreement(one, other, draws=7).draws) == 7


def test_what_must_go_is_gone_when_it_is_no_longer_said(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    cases = lesson.tasks["erasure"][:1]
    (said,) = world.lm.generate([cases[0].fact.question], 1)
    kept = [dataclasses.replace(cases[0], fact=dataclasses.replace(cases[0].fact, was=said.strip() or "x"))]
    editor = lesson.editor(Finetune(layer=0, steps=0))
    same = editor.edit([kept[0].fact])
    assert gone(same, kept[0]) == (not said.strip())
    assert gone(same, cases[0])
    seen: list[Case] = []
    lesson.alone(editor, cases, lambda edited, case: seen.append(case))
    assert seen == cases


def test_the_best_point_on_other_facts_is_taken(world, monkeypatch):
    lesson = Lesson(world, SIZES, 0, TASKS)
    judged = []

    def reliability(found):
        judged.append([its.case for its in found])
        return float(values(found, "reliability", "sampled").mean())

    monkeypatch.setattr(_editing, "score", reliability)
    method, point = lesson.chosen(Finetune(layer=0, bound=0.0, steps=12), ({"rate": 1e-9}, {"rate": 3e-2}))
    assert judged == [lesson.valid, lesson.valid]
    assert point == {"rate": 3e-2}
    assert method.rate == 3e-2
    only, _ = lesson.chosen(Finetune(), ({"layer": 1},))
    assert only.layer == 1


def test_a_row_of_every_part(world):
    recipe = EditRecipe("world", "tiny")
    settings = recipe.settings(world)
    entrant = Entrant(Finetune(layer=0, rate=1e-2, bound=0.0, steps=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        row = recipe.cell(world, entrant, 0)
    metrics = row["metrics"]
    for name in (settings["main"], *settings["shown"]):
        if not name.endswith("portability"):
            assert name in metrics, name
    assert settings["main"] == "row.4.triangle"
    assert {name.split(".")[0] for name in metrics} == {"alone", "row", "batch"}
    assert "alone.erasure.gone" in metrics
    assert row["cost"]["kept_bytes"] == 16 * 32 * 4
    assert row["cost"]["edits"] >= 4 + 3
    assert set(row["draws"]) <= {settings["main"], *settings["shown"]}
    assert len(row["draws"][settings["main"]]) == 100


@pytest.mark.filterwarnings("ignore:tracing")
def test_a_row_of_tasks_taught_alone(world):
    """Settings are chosen on facts that are taught alone as well."""
    recipe = EditRecipe("tasks", "tiny")
    settings = recipe.settings(world)
    row = recipe.cell(world, Entrant(Finetune(layer=0, bound=0.0, steps=4), ({"rate": 1e-2}, {"rate": 1e-3})), 0)
    assert settings["main"] == "alone.triangle"
    assert {name.split(".")[0] for name in row["metrics"]} == {"alone"}
    assert {"alone.passage.generality", "alone.style.locality.other_topic", "alone.locality"} <= row["metrics"].keys()
    assert row["cost"]["edits"] == 2 * 2 + sum(
        len(its) for its in Lesson(world, ALONE["tiny"].sizes, 0, SETTINGS["tasks"].tasks).tasks.values()
    )
    assert {name for name in settings["shown"] if name in row["metrics"]} <= row["draws"].keys()
    assert "alone.modification.traced" not in row["metrics"]
    traced = recipe.cell(world, Entrant(Finetune(layer="auto", steps=1), traced=True), 0)
    assert "alone.modification.traced" in traced["metrics"]


def test_the_unedited_model_changes_nothing(world):
    row = EditRecipe("world", "tiny").cell(world, entrants(2, 2)["base"], 0)
    assert row["metrics"]["row.4.locality"] == 1.0
    assert row["metrics"]["alone.modification.locality"] == 1.0
    assert row["metrics"]["batch.3.locality"] == 1.0


def test_contestants_are_those_of_the_cards():
    found = entrants(1_000, 4)
    assert {
        "base",
        "finetune_m",
        "finetune_l",
        "lora",
        "rome",
        "memit",
        "alphaedit",
        "mend",
        "serac",
        "ike",
        "grace",
    } <= (set(found))
    assert len({repr(its) for its in found.values()}) == len(found)
    assert all(len(its.points) in (1, 2, 3, 6) for its in found.values())


def test_one_of_each_family_is_asked_for_the_tasks():
    found = families(1_000, 4)
    assert {"base", "finetune_m", "finetune_l", "lora", "rome", "rome_traced", "memit", "alphaedit", "kn", "mend",
            "serac", "ike", "grace", "wise"} == set(found)  # fmt: skip
    assert [name for name, its in found.items() if its.traced] == ["rome_traced"]
    assert found["rome_traced"].method.layer == "auto"
    assert all("layer" in point for point in found["rome"].points)
    assert "layer" not in found["rome_traced"].points[0]


def test_a_slow_model_is_asked_less_and_trains_nothing_beforehand():
    slow = SETTINGS["smollm2"]
    found = slow.entrants(0, 30)
    assert not {"mend", "serac"} & set(found)
    assert {"finetune_m", "rome", "memit", "ike", "grace", "wise"} <= set(found)
    assert len({repr(its) for its in found.values()}) == len(found)
    assert slow.scales["small"].sizes.single < SCALES["small"].sizes.single


def test_wise_is_changed_in_one_part_at_a_time(world):
    found = SETTINGS["wise"].entrants(0, 4)
    side, fours = (dataclasses.asdict(found[name].method) for name in ("wise", "wise_fours"))
    changes = {}
    for name, its in found.items():
        if name not in ("finetune_m", "wise"):
            start = side if its.method.shards != 4 or name == "wise_fours" else fours
            now = dataclasses.asdict(its.method)
            changes[name] = {field: value for field, value in now.items() if value != start[field]}
            assert its.points == found["wise"].points
    assert changes == {
        "wise_first_layer": {"layer": 0},
        "wise_last_layer": {"layer": 3},
        "wise_fours": {"shards": 4},
        "wise_fours_same_mask": {"masks": "shared"},
        "wise_fours_disjoint": {"masks": "disjoint"},
        "wise_fours_averaged": {"trim": 1.0, "elect": False},
        "wise_merged": {"retrieve": False},
    }
    assert found["wise"].method.layer == 2


def test_a_row_of_facts_in_a_row_only(world):
    """What they take in a folder grows with them, where each has a memory of its own, and is packed."""
    recipe = EditRecipe("wise", "tiny")
    settings = recipe.settings(world)
    assert settings["shown"] == ["row.4.reliability", "row.4.generality", "row.4.locality", "row.1.triangle"]
    side = dataclasses.replace(SETTINGS["wise"].entrants(0, 2)["wise"].method, steps=2, count=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        row = recipe.cell(world, Entrant(side), 0)
    assert {name.split(".")[0] for name in row["metrics"]} == {"row"}
    assert {settings["main"], *settings["shown"]} <= row["metrics"].keys()
    count = 16 * 32
    assert row["cost"]["kept_bytes"] == count / 8 + round(0.2 * count) * 4
    assert row["cost"]["row_bytes"] == 4 * row["cost"]["kept_bytes"]


def test_a_method_of_ones_own_must_be_an_editor(world):
    with pytest.raises(UserError, match="no way of editing"):
        EditRecipe("world", "tiny", ("merge.ties",)).contestants(world)
    assert "finetune" in EditRecipe("world", "tiny", ("edit.finetune",)).contestants(world)


def test_wrong_names_are_told():
    with pytest.raises(UserError, match="scale"):
        EditRecipe("world", "huge").prepare()
    with pytest.raises(UserError, match="data set"):
        EditRecipe("wrld", "small").prepare()
    assert SCALES["small"].seeds == 5


def test_resamplings_are_of_cases(world):
    lesson = Lesson(world, SIZES, 0, TASKS)
    judged = measure(world.lm, world.lm, lesson.stream)
    each = values(judged, "reliability", "sampled")
    counts = Resampling(None, len(judged), 5).counts
    expected = counts @ each / counts.sum(1)
    found = figures(judged, "x", draws=5)["x.reliability.sampled"]
    assert found.value == pytest.approx(expected[0])
    assert found.draws == pytest.approx(expected[1:])
