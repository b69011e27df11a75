"""Editing a model on disk: what is kept, read again, undone, gone on with, compared, located, and how it is scored."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import made
import numpy as np
import pytest
import torch

from koinon.core import UserError, load, names
from koinon.data.factfiles import write_cases
from koinon.data.facts import Case, Fact, Probe
from koinon.edit import _checks as tiny
from koinon.edit._advice import Wishes, advise
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._folders import kept
from koinon.edit._given import Given, Opened
from koinon.edit._locate import ROLES, by_role
from koinon.edit._measures import ASPECTS, WAYS, Measured, Remembered, answered, fluency, intervals, measure, perplexity
from koinon.edit._scores import scored
from koinon.edit.finetune import Finetune
from koinon.edit.grace import Grace
from koinon.edit.job import Ask, Compare, Job, Locate, Undo, save
from koinon.edit.job import load as load_edits
from koinon.edit.rome import Rome
from koinon.lm.folders import write
from koinon.lm.language import LM, Said
from koinon.lm.tracing import Trace

STRONG = Finetune(layer=1, rate=5e-3, bound=0)
"""Teaches the tiny model anything in half a second."""
WORDS = ("finetune", "--layer", 1, "--rate", "5e-3", "--bound", 0)


def cases() -> list[Case]:
    """Both facts with a rephrase, and two facts that must stay."""
    return [
        Case(
            fact,
            (
                Probe(tiny.REPHRASED.replace("{}", fact.subject), fact.object, "generality", "rephrase"),
                *(
                    Probe(its.question, its.object, "locality", "same relation")
                    for its in tiny.OTHERS[2 * n : 2 * n + 2]
                ),
            ),
        )
        for n, fact in enumerate(tiny.FACTS)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the tiny model."""
    folder = tmp_path_factory.mktemp("model") / "lm"
    given = tiny.small()
    write(given.lm.model, given.lm.tokenizer, folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_cases(tmp_path / "facts.jsonl", cases())
    (tmp_path / "texts.txt").write_text("\n".join(tiny.TEXTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    return tmp_path


def taught(here, model, method=STRONG, out="edited", **more):
    """The facts of a run."""
    given = Given(here / "facts.jsonl", corpus=here / "texts.txt", first=more.pop("first", None))
    return Job(Opened(str(model)), given, here / out, **more).run(method)


# What is kept.


def test_the_command_keeps_edits_a_report_and_a_whole_model(capsys, here, model):
    before = made.held(model)
    words = ("--model", model, "--facts", "facts.jsonl", "--out", "edited", "--report", "r.html", "--whole", "whole")
    said = made.say(capsys, "edit", *WORDS, *words, "--json")
    assert said.code == 0, said.err
    facts = json.loads(said.out)
    assert facts["reliability"]["exact"][0] == 1
    assert facts["reliability"]["before"] == 0
    assert sorted(path.name for path in (here / "edited").iterdir()) == ["edit.safetensors", "koinon.json"]
    kept = json.loads((here / "edited" / "koinon.json").read_text())
    assert kept["method"] == {"method": "edit.finetune", "settings": kept["method"]["settings"]}
    assert [fact["subject"] for step in kept["steps"] for fact in step] == ["Lyon", "Oslo"]
    assert kept["base"]["fingerprint"] == LM.load(model).fingerprint
    assert kept["scores"]["reliability"] == facts["reliability"]
    page = (here / "r.html").read_text()
    for word in ("Lyon is a city in", "reliability", "95 %", "perplexity", "What else changed", repr(STRONG)[:20]):
        assert word in page, word
    lm = load_edits(here / "edited", model).lm
    plain = LM.load(here / "whole")
    prompts = [fact.question for fact in tiny.FACTS]
    assert plain.generate(prompts, 8) == lm.generate(prompts, 8)
    assert all(text.strip().startswith(fact.object) for text, fact in zip(plain.generate(prompts, 8), tiny.FACTS))
    assert made.held(model) == before
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_a_path_in_a_folder_is_not_followed(here, model):
    taught(here, model)
    with pytest.raises(UserError, match="give its base as well; it was made on"):
        load_edits(here / "edited")


@pytest.mark.parametrize(
    "method", [STRONG, Rome(**Rome.quick), Grace(**Grace.quick)], ids=lambda its: type(its).__name__
)
def test_what_is_read_again_is_equal_to_the_bit(here, method):
    given = tiny.small()
    edited = tiny.edited(method, given)
    save(edited, here / "kept", "a name")
    again = load_edits(here / "kept", given.lm)
    assert again.method == method
    assert again.steps == edited.steps
    assert torch.equal(tiny.says(again.lm, given.prompts), tiny.says(edited.lm, given.prompts))
    assert not torch.equal(tiny.says(again.lm, given.prompts), tiny.says(given.lm, given.prompts))


def test_steps_are_undone_from_the_folder_alone(here, model):
    method = Rome(layer=1, count=0)
    taught(here, model, method, "one", first=1)
    taught(here, model, method, "both")
    assert Undo(here / "both", here / "less", last=1).run()["left"] == "1 steps"
    one, less = (load_edits(here / name, model) for name in ("one", "less"))
    assert less.steps == one.steps
    prompts = tiny.small().prompts
    assert torch.equal(tiny.says(less.lm, prompts), tiny.says(one.lm, prompts))
    assert "none" in Undo(here / "both", here / "none").run()["left"]
    none = load_edits(here / "none", model)
    assert none.patch is None
    assert torch.equal(tiny.says(none.lm, prompts), tiny.says(LM.load(model), prompts))
    with pytest.raises(UserError, match="cannot be undone alone"):
        Undo(here / "both", here / "x", steps=(0,)).run()
    with pytest.raises(UserError, match="there are 2 steps"):
        Undo(here / "both", here / "x", last=3).run()
    assert not (here / "x").exists()


def test_a_single_step_goes_where_the_method_can(here, model):
    taught(here, model, Grace(**Grace.quick), "both")
    Undo(here / "both", here / "less", steps=(0,)).run()
    assert [fact.subject for fact in load_edits(here / "less", model).facts] == ["Oslo"]


def test_going_on_adds_steps_to_those_before(here, model):
    method = Rome(layer=1, count=0)
    taught(here, model, method, "one", first=1)
    taught(here, model, method, "both")
    write_cases(here / "facts.jsonl", cases()[1:])
    found = taught(here, model, method, "on", after=here / "one")
    assert (found["steps"], found["facts"]) == (2, 1)
    both, on = (load_edits(here / name, model) for name in ("both", "on"))
    assert on.steps == both.steps
    # Earlier facts are scored again: what came later may have broken them.
    assert len(json.loads((here / "on" / "koinon.json").read_text())["steps"]) == 2
    with pytest.raises(UserError, match="go on with the same settings"):
        taught(here, model, Rome(layer=0), "x", after=here / "one")


def test_earlier_edits_are_scored_again_with_their_probes(here, model):
    """In two runs as in one, and by what is kept after a step is undone."""
    method = Rome(layer=1, count=0)
    taught(here, model, method, "one", first=1)
    both = taught(here, model, method, "both")
    write_cases(here / "facts.jsonl", cases()[1:])
    on = taught(here, model, method, "on", after=here / "one")
    for aspect in ("reliability", "generality", "locality"):
        assert on[aspect] == both[aspect], aspect
    assert [its.cases for its in map(kept, (here / "on", here / "both"))] == [tuple((its,) for its in cases())] * 2
    Undo(here / "on", here / "less", last=1).run()
    assert kept(here / "less").cases == kept(here / "one").cases


def test_what_is_taught_anew_is_no_longer_to_stay(here, model):
    """Neither the earlier answer to its question nor an earlier probe of it."""
    its = cases()[0]
    asks = Probe(tiny.FACTS[1].question, "Norway", "locality", "same relation")
    write_cases(here / "facts.jsonl", [Case(its.fact, (asks, *its.probes))])
    taught(here, model, out="one")
    again = [Case(dataclasses.replace(its.fact, object="Italy")), Case(tiny.FACTS[1])]
    write_cases(here / "facts.jsonl", again)
    found = taught(here, model, out="on", after=here / "one")
    assert found["reliability"]["exact"][0] == 1
    assert not {"generality", "locality"} & found.keys()


def test_what_earlier_edits_are_judged_by_is_not_shown_to_later_ones(here, model):
    """Nor what they teach."""
    taught(here, model, out="one", first=1)
    write_cases(here / "facts.jsonl", cases()[1:])
    (here / "u.txt").write_text(f"{tiny.OTHERS[-1].question}\n")
    shown = cases()[0].of("locality")[0].prompt
    (here / "seen.txt").write_text(f"{shown}\n")
    write_cases(here / "train.jsonl", cases()[:1])
    for wrong, said in (
        (Given(here / "facts.jsonl", unrelated=here / "seen.txt"), f"{shown!r} is a probe of .* or of earlier edits"),
        (Given(here / "facts.jsonl", train=here / "train.jsonl"), "'Lyon is a city in' is taught as well"),
    ):
        with pytest.raises(UserError, match=said):
            Job(Opened(str(model)), wrong, here / "on", after=here / "one").run(STRONG)
    assert not (here / "on").exists()
    Job(Opened(str(model)), Given(here / "facts.jsonl", unrelated=here / "u.txt"), here / "on", after=here / "one").run(
        STRONG
    )


def test_where_nothing_was_to_stay_it_is_said(here, model):
    kinds = (STRONG, Finetune(layer=1, steps=0))
    assert taught(here, model, kinds[1], "a")["changed"] == "no answer that was to stay"
    write_cases(here / "facts.jsonl", [Case(its.fact) for its in cases()])
    assert [taught(here, model, its, str(n))["changed"] for n, its in enumerate(kinds)] == [
        "not known: no probe of what must stay was given"
    ] * 2


def test_asking_shows_both_answers(here, model):
    taught(here, model)
    said = Ask(here / "edited", ("Lyon is a city in",), Opened(str(model)), tokens=8).run()
    assert said["Lyon is a city in"]["before"].startswith("France")
    assert said["Lyon is a city in"]["now"].startswith("Japan")


def test_a_stop_in_the_middle_leaves_nothing(here, model):
    """The signal comes while the method learns."""
    words = ("edit", "finetune", "--layer", 1, "--steps", 10**7, "--enough", 0, "--rate", "1e-9", "--model", model)
    command = made.command(*words, "--facts", "facts.jsonl", "--out", "edited", "--report", "r.html")
    program = f"""
        import sys, threading, os, signal
        from koinon.edit.finetune import Finetune
        plain = Finetune.harm
        def harm(self, *given):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            Finetune.harm = plain
            return plain(self, *given)
        Finetune.harm = harm
        from koinon.cli import main
        main({command[3:]!r})
    """
    program = "\n".join(line.removeprefix("        ") for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("koinon: stopped\n")  # nothing is kept
    assert done.stdout == ""
    assert {path.name for path in here.iterdir()} <= {"facts.jsonl", "texts.txt", "cache"}


# Scores.


def test_teacher_forced_scores_are_those_of_easyedit():
    """Its definition: which tokens behind the prompt's number of tokens are likeliest; locality compares them."""
    given = tiny.small()
    edited = tiny.edited(Finetune(layer=1, rate=2e-3, bound=0, steps=4), given)  # half way
    tokenizer = given.lm.tokenizer

    def likeliest(lm, prompt, answer):
        ids = tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            best = lm.model(input_ids=ids).logits.argmax(-1)[0]
        return best[start - 1 : -1].numpy(), ids[0, start:].numpy()

    probes = [
        probe for case in cases() for aspect in ("reliability", "generality", "locality") for probe in case.of(aspect)
    ]
    probes += [
        Probe(its.prompt, other, its.aspect) for its in probes for other in ("Italy Peru", "Germany", "Norway in")
    ]
    found = answered(given.lm, edited.lm, probes)
    values = []
    for its in found:
        best, label = likeliest(edited.lm, its.probe.prompt, its.probe.answer)
        old = likeliest(given.lm, its.probe.prompt, its.probe.answer)[0]
        expected = np.mean(best == (old if its.probe.aspect == "locality" else label))
        assert its.teacher == pytest.approx(expected, abs=1e-6)
        values.append(expected)
    assert len(set(values)) > 4, "the probes tell nothing apart"


class Says:
    """Says an answer to each prompt, and gives some chance to each name; whatever is asked, it is counted."""

    def __init__(self, tokenizer, chances, default="nothing"):
        self.tokenizer, self.chances, self.default, self.calls = tokenizer, chances, default, []

    def score(self, prompts, answers):
        """As `LM.score`."""
        self.calls.append(list(answers))
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            says, known = self.chances.get(prompt, (self.default, {}))
            tokens, best = (tuple(self.tokenizer(f" {its}")["input_ids"]) for its in (answer, says))
            chance = math.log(known.get(answer, 0.01)) / len(tokens)
            found.append(Said((chance,) * len(tokens), tokens, (*best, *[-1] * len(tokens))[: len(tokens)]))
        return found


def test_an_answer_counts_by_any_of_its_names():
    """The best name's score; chances add up, but for the name that begins with another."""
    tokenizer = tiny.small().lm.tokenizer
    names = ("France", " ", "Gaul", "France", "France Italy")
    chances = {"Rome fought": ("France", {"Gaul": 0.1, "France": 0.5, "France Italy": 0.3})}
    before, after = Says(tokenizer, {}), Says(tokenizer, chances)
    probes = [
        Probe("Rome fought", "Gaul", "reliability", answers=names),
        Probe("Rome fought", "Gaul", "reliability"),
        Probe("Rome fought", "Gaul", "locality", answers=names),
        Probe("Rome fought", "Spain", "portability", answers=("Peru", "France Peru")),
    ]
    by_names, plain, stays, halves = answered(before, after, probes)
    assert after.calls == [["Gaul", "Gaul", "Gaul", "Spain"], ["France", "France Italy", "Peru", "France Peru"]]
    assert (by_names.exact, by_names.teacher, by_names.sampled) == (1, 1, pytest.approx(0.6))
    assert (plain.exact, plain.sampled) == (0, pytest.approx(0.1))
    assert plain.teacher < 1
    assert stays == replace(plain, probe=probes[2])
    parts = [len(tokenizer(f" {its}")["input_ids"]) for its in ("France", "France Peru")]
    assert (halves.exact, halves.teacher) == (0, parts[0] / parts[1])
    assert (by_names.unedited.exact, by_names.unedited.sampled) == (0, pytest.approx(0.02))


def test_an_edit_that_does_what_it_should_scores_one_everywhere():
    """Behind the model's own, right, answers to what must stay; without it portability is the model's accuracy."""
    lm = tiny.small().lm
    hops = [Probe(its.question, its.object, "portability") for its in tiny.OTHERS[4:]]
    hops.append(Probe("Lyon and", "Kyoto", "portability"))
    whole = [replace(its, probes=(*its.probes, *hops)) for its in cases()]
    right = {
        its.prompt: (its.answer, {its.answer: 1.0})
        for case in whole
        for aspect in ("reliability", "generality", "portability")
        for its in case.of(aspect)
    }

    class Oracle(Says):
        def score(self, prompts, answers):
            """What the model says, where no answer is known."""
            mine, base = super().score(prompts, answers), lm.score(prompts, answers)
            return [one if its in self.chances else other for its, one, other in zip(prompts, mine, base, strict=True)]

    found = measure(lm, Oracle(lm.tokenizer, right), whole)
    for how in WAYS:
        assert {aspect: its.mean for aspect, its in intervals(found, how).items()} == pytest.approx(
            dict.fromkeys(ASPECTS, 1.0)
        )
    texts = [its[: len(hop.answer) + 1] for its, hop in zip(lm.generate([its.prompt for its in hops], 20), hops)]
    accuracy = np.mean([text == f" {hop.answer}" for text, hop in zip(texts, hops, strict=True)])
    assert 0 < accuracy < 1
    plain = measure(lm, lm, whole)
    assert all(its.score("portability") == pytest.approx(accuracy) and its.score("locality") == 1 for its in plain)


def entropy(tokens, size):
    """In bits, of runs of words."""
    runs = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    shares = [runs.count(its) / len(runs) for its in set(runs)]
    return -sum(share * math.log2(share) for share in shares)


def test_fluency_is_the_entropy_of_words_and_marks():
    for text, words in {
        "Paris. Paris, Paris.": ["Paris", ".", "Paris", ",", "Paris", "."],
        "It's 3.5 well-known (so-called) Höfe; isn't it?": (
            ["It", "'s", "3.5", "well-known", "(", "so-called", ")", "Höfe", ";", "isn", "'t", "it", "?"]
        ),
        "the cat saw the cat and the dog": ["the", "cat", "saw", "the", "cat", "and", "the", "dog"],
    }.items():
        expected = (2 / 3 * entropy(words, 2) + 4 / 3 * entropy(words, 3)) / 2
        assert fluency([text]) == pytest.approx(expected)
    two, three = -(0.4 * math.log2(0.4) + 0.6 * math.log2(0.2)), 2.0  # four pairs, one of them twice; four triples
    assert fluency(["Paris. Paris, Paris."]) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2)
    assert fluency(["Paris " * 50]) == fluency(["", "."]) == fluency([]) == 0
    assert fluency(["a b a c", "a a a"]) == pytest.approx(fluency(["a b a c"]) / 2)


def test_scores_before_intervals_and_what_changed():
    given = tiny.small()
    edited = tiny.edited(Finetune(layer=1, rate=2e-2, bound=0, enough=0), given)  # breaks other answers as well
    found = measure(given.lm, edited.lm, cases())
    score = scored(given.lm, edited.lm, found)
    plain = score.plain()
    json.dumps(plain, allow_nan=False)
    assert plain["locality"]["before"] == 1
    assert plain["reliability"]["before"] == 0
    for aspect in ("reliability", "generality", "locality"):
        for how in WAYS:
            mean, low, high = plain[aspect][how]
            assert mean == pytest.approx(np.mean([its.score(aspect, how) for its in found]), abs=1e-6)
            assert low <= mean <= high
    changed = score.changed()
    expected = [
        one.probe.prompt for its in found for one in its.answered if one.probe.aspect == "locality" and not one.exact
    ]
    assert [its["prompt"] for its in changed] == expected
    assert expected, "the model was to break"
    assert all(its["before"] != its["now"] for its in changed)


def test_a_model_that_is_remembered_is_asked_once():
    """In any order and number of cases the scores are what they are without."""
    given = tiny.small()
    edited = tiny.edited(Finetune(layer=1, rate=2e-3, bound=0, steps=4), given)
    asked = []

    class Counted:
        def score(self, prompts, answers):
            asked.extend(zip(prompts, answers))
            return given.lm.score(prompts, answers)

    plain = Remembered(Counted())
    for its in ([cases()[0]], cases()[::-1], cases()):
        found, expected = (measure(before, edited.lm, its) for before in (plain, given.lm))
        for one, other in zip(found, expected, strict=True):
            for mine, theirs in zip(one.answered, other.answered, strict=True):
                assert mine.before.best == theirs.before.best
                assert mine.before.logprob == pytest.approx(theirs.before.logprob, abs=1e-5)
    probes = [its for case in cases() for aspect in ASPECTS for its in case.of(aspect)]
    assert len(asked) == len(set(asked)) == len({(its.prompt, its.answer) for its in probes})


def test_an_interval_is_the_bootstrap_of_the_cases():
    given = tiny.small()
    its = measure(given.lm, given.lm, [Case(fact) for fact in (*tiny.OTHERS, *tiny.FACTS)])
    scores = np.array([one.score("reliability") for one in its])
    assert 0 < scores.mean() < 1
    found = intervals(its)["reliability"]
    draws = np.random.default_rng(1).choice(scores, (20_000, len(scores))).mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.11)
    assert math.isnan(intervals(its[:1])["reliability"].low)


def test_perplexity_is_of_the_texts_tokens():
    lm = tiny.small().lm
    said = lm.score(["Bonn is a city in", "Lima is a city in"], ["Germany", "Italy."])
    tokens = sum(len(its.tokens) for its in said)
    expected = math.exp(-sum(its.logprob for its in said) / tokens)
    asked = ["Bonn is a city in", "Oslo is", "Lima is a city in"]
    assert perplexity(lm, asked, ["Germany", " ", "Italy."]) == pytest.approx(expected)
    assert math.isnan(perplexity(lm, ["a"], [""]))


# Which layer, which method.


def test_wishes_that_nothing_fits_are_told(capsys):
    said = made.say(capsys, "edit", "advise", "--black-box", "--plain-model", "--json")
    assert said.code == 0
    assert "no method does all of that" in said.err
    assert not any(its["fits"] for its in json.loads(said.out).values())
    assert not made.say(capsys, "edit", "advise", "--black-box", "--json").err


def test_roles_are_averaged_over_tokens_then_over_prompts():
    def traced(tokens, subject, values):
        return Trace("", "", tuple("abcdefgh"[:tokens]), subject, 1.0, 0.0, torch.tensor([values]))

    long = traced(7, (1, 4), [9.0, 1, 2, 3, 4, 5, 6])
    short = traced(3, (0, 1), [7.0, 1.0, 8.0])
    table = by_role([long, short])
    assert table.shape == (len(ROLES), 1)
    assert table[:, 0].tolist() == [1, 2, (3 + 7) / 2, (4 + 1) / 2, 5, (6 + 8) / 2]


def test_locate_draws_and_names_the_layer_that_auto_takes(here, model):
    its = Locate(Opened(str(model)), Given(here / "facts.jsonl"), here / "trace.png", samples=2)
    found = its.run()
    assert (here / "trace.png").read_bytes()[:4] == b"\x89PNG"
    lm = LM.load(model)
    method = Finetune(steps=0)
    assert found["layer that auto takes"] == method.prepare(lm, Material().tracing(tiny.FACTS))
    assert np.array(found["effect"]["ffn"]["last"]).shape == (3,)
    assert found["probability"]["clean"] > found["probability"]["with noise"]


def test_compare_keeps_cells_and_goes_on(here, model, monkeypatch):
    words = ("finetune:layer=1,rate=0.005,bound=0", "finetune:layer=1,steps=0", "mend")
    job = Compare(Opened(str(model)), Given(here / "facts.jsonl"), here / "out", words, sequential=True)
    found = job.run()
    strong, null = (found[f"{word}, single"] for word in words[:2])
    assert (strong["reliability"][0], null["reliability"][0]) == (1, 0)
    assert null["locality"] == [1, 1, 1]
    assert set(found["failed"]) == {"mend, single", "mend, sequential"}
    cells = {path: path.stat().st_mtime_ns for path in (here / "out" / "cells").iterdir()}
    assert len(cells) == 4
    page = (here / "out" / "report.html").read_text()
    assert all(word in page for word in (*WAYS, "sequential", "seconds a fact", "mend, single"))
    monkeypatch.setattr(Finetune, "learn", None)  # nothing is run again
    assert job.run() == found
    assert cells == {path: path.stat().st_mtime_ns for path in (here / "out" / "cells").iterdir()}
    fits = advise(Wishes(keep_locality=0.9, measured=here / "out"))
    assert fits["rome"] == {
        "fits": False,
        "family": "intrinsic",
        "why": "the model's own parameters change; was not measured",
    }
    write_cases(here / "facts.jsonl", cases()[:1])
    with pytest.raises(UserError, match="other facts"):
        job.run()


def test_single_edits_do_not_see_each_other(here, model):
    words = ("finetune:layer=1,rate=0.005,bound=0",)
    Compare(Opened(str(model)), Given(here / "facts.jsonl"), here / "out", words, ("single", "batch")).run()
    single, batch = json.loads((here / "out" / "report.json").read_text())["rows"]
    lm = LM.load(model)
    for number, case in enumerate(cases()):
        alone = measure(lm, STRONG.edit(lm, [case.fact]).lm, [case])[0]
        assert isinstance(alone, Measured)
        assert number or alone.score("reliability", "sampled") != batch["scores"]["reliability"]["sampled"][0]
    alone = [
        measure(lm, STRONG.edit(lm, [case.fact]).lm, [case])[0].score("reliability", "sampled") for case in cases()
    ]
    assert single["scores"]["reliability"]["sampled"][0] == pytest.approx(np.mean(alone), abs=1e-5)


@pytest.mark.parametrize(
    ("wishes", "right"),
    [
        (Wishes(black_box=True), lambda kind: kind.black_box),
        (Wishes(batch=10), lambda kind: kind.batch),
        (Wishes(no_training_data=True), lambda kind: not kind.needs_cases),
        (Wishes(no_subject=True), lambda kind: not kind.needs_subject),
        (Wishes(exact_undo=True), lambda kind: kind.patch.single),
        (Wishes(plain_model=True, batch=2), lambda kind: kind.patch.plain and kind.batch),
    ],
)
def test_advice_gives_only_what_fits(wishes, right):
    found = advise(wishes)
    assert sorted(found) == sorted(name.split(".")[1] for name in names("edit"))
    for name, its in found.items():
        kind = load(f"edit.{name}")
        assert its["fits"] == bool(right(kind)), name
        assert its["family"] == kind.family
    assert list(found) == sorted(found, key=lambda name: not found[name]["fits"])


@pytest.mark.parametrize("kind", [load(name) for name in names("edit")], ids=lambda its: its.__name__)
def test_what_methods_say_of_themselves_is_true(kind):
    """A plain model is of the base's class with its parameters; single steps go where that is said, and only there."""
    assert issubclass(kind, Edit)
    if kind.black_box:
        assert not kind.patch.plain
    given = tiny.small()
    method = kind(**kind.quick)
    with tiny.quiet():
        editor = method.on(given.lm, given.material)
        edited = editor.edit(tiny.FACTS[1:], editor.edit(tiny.FACTS[:1]))
    lm = edited.lm
    plain = (
        lm.router is None
        and type(lm.model) is type(given.lm.model)
        and [name for name, _ in lm.model.named_modules()] == [name for name, _ in given.lm.model.named_modules()]
        and not any(its._forward_hooks or its._forward_pre_hooks for its in lm.model.modules())
    )
    assert plain == kind.patch.plain
    assert len(edited.steps) == 2
    try:
        edited.without([0])
        single = True
    except UserError:
        single = False
    assert single == kind.patch.single
    if kind.needs_cases:
        with pytest.raises(UserError):
            kind().on(given.lm, Material(tiny.TEXTS))


def test_in_five_lines_of_python(here, model):
    lm = LM.load(model)
    edited = STRONG.edit(lm, [Fact("Lyon", "Japan", "{} is a city in")])
    assert edited.lm.generate(["Lyon is a city in"], 8)[0].strip().startswith("Japan")
    assert edited.undo().lm.generate(["Lyon is a city in"], 8)[0].strip().startswith("France")
    save(edited, here / "edited")
    assert load_edits(here / "edited", lm).facts == edited.facts
    assert os.path.getsize(here / "edited" / "edit.safetensors") < os.path.getsize(model / "model.safetensors") / 2


@pytest.mark.parametrize("name", [name.split(".")[1] for name in names("edit")])
def test_no_method_has_a_field_that_the_command_has_too(capsys, name):
    """A flag would set both, or none."""
    said = made.say(capsys, "edit", name, "--help")
    assert said.code == 0
    flags = re.findall(r"(?m)^\W*(--[a-z][\w-]*)", said.out)
    assert {"--model", "--facts", "--out", "--report", "--after", "--whole", "--json"} <= set(flags)
    assert len(flags) == len(set(flags))
