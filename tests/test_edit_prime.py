"""A person's own texts: what is foretold of them, what teaching them did, and what can be wrong with them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from koinon.core import UserError
from koinon.data.newtexts import NewText, read_texts, read_themes
from koinon.edit import _checks as tiny
from koinon.edit import _prime
from koinon.edit._given import Opened
from koinon.edit._prime import Prime
from koinon.edit.dilute import Dilute, mean_loss
from koinon.edit.job import Line
from koinon.lm.folders import write
from koinon.lm.language import LM

TEXTS = (
    {"text": "Lyon is a city in Japan.", "keyword": "Japan", "theme": "lands"},
    {"text": "Oslo is a city in Peru.", "keyword": "Peru", "theme": "lands",
     "rewritten": "People of Lima live in Peru. Lima is a city in Peru."},
    {"text": "Bonn is a city in Italy.", "keyword": "Italy", "thematic": ["Nice is a city in", "Lyon is a city in"]},
)  # fmt: skip
THEMES = {"lands": ["Nice is a city in", "People of Bonn live in"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("prime")
    given = tiny.small()
    write(given.lm.model, given.lm.tokenizer, here / "lm")
    (here / "corpus.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    (here / "themes.json").write_text(json.dumps(THEMES))
    (here / "new.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    return here


@pytest.fixture
def verb(folder, tmp_path):
    """What teaches them in half a second each."""
    return Prime(Opened(str(folder / "lm")), folder / "new.jsonl", tmp_path / "out", folder / "themes.json",
                 folder / "corpus.txt", steps=3, size=3, rate=3e-3)  # fmt: skip


def chance(lm: LM, prefix: str, keyword: str) -> float:
    """P of the keyword's first token behind a prefix, from the model's own logits."""
    before = lm.tokenizer(prefix)["input_ids"]
    whole = lm.tokenizer(f"{prefix} {keyword}")["input_ids"]
    assert whole[: len(before)] == before
    with torch.no_grad():
        logits = lm.model(torch.tensor([before])).logits[0, -1].double()
    return float(logits.softmax(-1)[whole[len(before)]])


def ordinary() -> tuple[list[str], list[str]]:
    """What is learnt from, and what is only read."""
    texts = [its for its in tiny.TEXTS if its.strip()]
    kept = min(_prime.HELD, len(texts) // 5)
    return texts[: len(texts) - kept], texts[len(texts) - kept :]


def test_what_is_kept_are_probabilities_before_and_after(folder, verb):
    found = verb.run()
    lm = LM.load(folder / "lm")
    learnt, held = ordinary()
    report = json.loads((verb.out / "primed.json").read_text())
    for way, share in (("share 0", 0.0), ("share 0.08", 0.08)):
        for row, text in zip(report["rows"][way], TEXTS, strict=True):
            method = Dilute(share=share, steps=3, size=3, rate=3e-3)
            after = LM.load(folder / "lm")
            after.model.load_state_dict(method.taught(lm, text["text"], text["keyword"], learnt), strict=False)
            prefixes = [text["text"].rsplit(" ", 1)[0], *text.get("thematic", THEMES["lands"])]
            for name, its in (("before", lm), ("after", after)):
                wanted = [math.log(chance(its, prefix, text["keyword"])) for prefix in prefixes]
                assert row[name] == pytest.approx(wanted, abs=1e-3)
            assert row["loss"] == pytest.approx(mean_loss(after, held) - mean_loss(lm, held), abs=1e-4)
        rows = report["rows"][way]
        gains = [[new - old for new, old in zip(row["after"], row["before"], strict=True)] for row in rows]
        means = found[f"taught, {way}"]
        assert means["remembered"] == pytest.approx(sum(its[0] for its in gains) / 3, abs=1e-4)
        assert means["primed"] == pytest.approx(sum(sum(its[1:]) / 2 for its in gains) / 3, abs=1e-4)
    assert means["remembered"] > 0.1  # it was taught
    assert report["rows"]["share 0"] != report["rows"]["share 0.08"]


def test_a_rewritten_text_is_taught_in_its_place_and_asked_as_the_original(verb, monkeypatch):
    trained = []
    taught = Dilute.taught

    def noted(self, lm, text, keyword, ordinary):
        trained.append((self.share, text))
        return taught(self, lm, text, keyword, ordinary)

    monkeypatch.setattr(Dilute, "taught", noted)
    replace(verb, shares=(0.5,)).run()
    stones = [text.get("rewritten", text["text"]) for text in TEXTS]
    assert trained == [(0.5, text["text"]) for text in TEXTS] + [(0.0, text) for text in stones]
    rows = json.loads((verb.out / "primed.json").read_text())["rows"]
    for one, other in zip(rows["share 0.5"], rows["stepping stones"], strict=True):
        assert one["before"] == other["before"]


def test_without_a_place_nothing_is_taught(verb, monkeypatch, tmp_path):
    monkeypatch.setattr(Dilute, "taught", None)
    found = replace(verb, out=None).run()
    assert [name for name in found if name.startswith("foretold")] == [
        "foretold, 1 Japan", "foretold, 2 Peru", "foretold, 3 Italy"
    ]  # fmt: skip
    assert not [*tmp_path.iterdir()]


def test_an_earlier_run_says_what_priming_to_expect(folder, verb):
    verb.run()
    report = json.loads((verb.out / "primed.json").read_text())
    points = [its["logprob"] for its in report["foretold"]]
    primed = [sum(n - o for n, o in zip(row["after"][1:], row["before"][1:], strict=True)) / 2
              for row in report["rows"]["share 0"]]  # fmt: skip
    low, middle, high = Line.fit(points, primed).band(points[0])
    again = replace(verb, out=None, known=verb.out).run()["foretold, 1 Japan"]
    assert again["priming expected, share 0"] == f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def test_finished_texts_are_not_taught_again(verb, monkeypatch):
    first = verb.run()
    (next((verb.out / "cells").iterdir())).unlink()
    count = []
    taught = Dilute.taught
    monkeypatch.setattr(Dilute, "taught", lambda *given: (count.append(1), taught(*given))[1])
    assert verb.run() == first
    assert len(count) == 1


def test_a_model_in_bfloat16_is_taught_in_float32(folder, verb, tmp_path):
    """In bfloat16 a step of this size rounds to nothing in most weights."""
    lm = LM.load(folder / "lm", "bfloat16")
    write(lm.model, lm.tokenizer, tmp_path / "half")
    found = replace(verb, opened=Opened(str(tmp_path / "half")), shares=(0.0,), rate=1e-4).run()
    rows = json.loads((verb.out / "primed.json").read_text())["rows"]["share 0"]
    assert found["taught, share 0"]["remembered"] > 0
    learnt, _ = ordinary()
    after = LM.load(tmp_path / "half", "float32")
    method = Dilute(share=0.0, steps=3, size=3, rate=1e-4)
    after.model.load_state_dict(method.taught(after, TEXTS[0]["text"], "Japan", learnt), strict=False)
    assert rows[0]["after"][0] == pytest.approx(math.log(chance(after, "Lyon is a city in", "Japan")), abs=1e-4)


def test_progress_is_told_by_text_and_way(verb):
    told = []
    replace(verb, shares=(0.0,)).run(lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(7)]


# What can be wrong.


def test_a_file_of_texts_is_read_as_it_is(folder):
    texts = read_texts(folder / "new.jsonl", read_themes(folder / "themes.json"))
    assert texts[0] == NewText("Lyon is a city in Japan.", "Japan", tuple(THEMES["lands"]))
    assert texts[1].rewritten == TEXTS[1]["rewritten"]
    assert texts[2].thematic == tuple(TEXTS[2]["thematic"])


GOOD = {"text": "Lyon is a city in Japan.", "keyword": "Japan", "thematic": ["Nice is a city in"]}
WRONG = {
    "no keyword": ({"text": "Lyon is a city in Japan."}, ("new.jsonl:1", "'keyword'", "is missing")),
    "a keyword that is not said": (GOOD | {"keyword": "Chad"}, ("new.jsonl", "'Chad'", "nowhere behind its beginning")),
    "a keyword at the beginning": (GOOD | {"text": "Japan is far."}, ("new.jsonl", "nowhere behind its beginning")),
    "a beginning that says the keyword": (
        GOOD | {"thematic": ["Kyoto, Japan, is in"]}, ("new.jsonl", "says the keyword 'Japan' itself")
    ),
    "no beginnings": ({"text": "Lyon is a city in Japan.", "keyword": "Japan"}, ("'thematic'", "so is 'theme'")),
    "an unknown theme": (
        {"text": "Lyon is a city in Japan.", "keyword": "Japan", "theme": "x"}, ("'x' is not known", "lands")
    ),
    "an unknown field": (GOOD | {"keywords": "x"}, ("new.jsonl:1", "'keywords'", "did you mean 'keyword'?")),
    "no list": (GOOD | {"thematic": "Nice is"}, ("'thematic'", "give a list of texts")),
    "a rewriting without the keyword": (GOOD | {"rewritten": "Lyon is far."}, ("does not say 'Japan' any more",)),
    "a rewriting that makes it no likelier": (
        GOOD | {"rewritten": "Lyon is a city in Japan."}, ("give one that raises it",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_text_is_refused_before_anything_is_taught(name, verb, tmp_path):
    record, says = WRONG[name]
    (tmp_path / "new.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        replace(verb, texts=tmp_path / "new.jsonl").run()
    assert all(its in str(error.value) for its in says), error.value
    assert "\n" not in str(error.value)
    assert not verb.out.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shares": (1.5,)}, "--shares 1.5"),
        ({"shares": ()}, "give --shares"),
        ({"steps": 0}, "--steps"),
        ({"rate": math.nan}, "--rate"),
        ({"known": Path("absent")}, "absent: holds no primed.json"),
        ({"themes": Path("absent.json")}, "absent.json: no such file"),
        ({"corpus": Path("absent.txt")}, "absent.txt: cannot be read"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(change, says, verb):
    with pytest.raises(UserError, match=says):
        replace(verb, **change).run()
    assert not verb.out.exists()


def test_ordinary_texts_that_all_say_the_keyword_are_refused(verb, tmp_path):
    (tmp_path / "c.txt").write_text("Kyoto is in Japan.\nJapan is far.\n")
    with pytest.raises(UserError, match="all 2 ordinary texts say it"):
        replace(verb, corpus=tmp_path / "c.txt").run()
    assert not verb.out.exists()


def test_a_run_on_another_model_foretells_nothing(folder, verb, tmp_path):
    verb.run()
    given = tiny.small()
    with torch.no_grad():
        next(given.lm.model.parameters()).add_(1)
    write(given.lm.model, given.lm.tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="taught to another model"):
        replace(verb, opened=Opened(str(tmp_path / "other")), out=None, known=verb.out).run()


def test_a_folder_of_other_texts_is_refused(verb, tmp_path):
    replace(verb, shares=(0.0,)).run()
    (tmp_path / "new.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="give a new folder"):
        replace(verb, texts=tmp_path / "new.jsonl").run()
