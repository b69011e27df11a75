"""A person's own triples become probes: what is read, what is refused, and what the commands make of them."""

import json
from pathlib import Path

import made
import pytest

from koinon.core import UserError
from koinon.data.factfiles import read_cases, write_cases
from koinon.data.facts import Case, Fact, Probe
from koinon.data.probes import refuse_overlap
from koinon.data.triples import read_table
from koinon.data.wordings import Wording, read_wordings
from koinon.edit import _checks as tiny
from koinon.edit._given import Given
from koinon.edit._measures import measure
from koinon.edit._scores import scored
from koinon.lm.folders import write

WORDINGS = {
    "country": {
        "prompts": ["{} is a city in", "People of {} live in"],
        "phrase": "the country that {} is in",
        "inverses": "A city in {} is",
    },
    "capital": "The capital of {} is",
}
TABLE = """subject,relation,object,aliases,until
Lyon,country,France,Lugdunum|Lugdun,
Nice,country,France,,
Oslo,country,Norway,,
Kyoto,country,Japan,,
Lima,country,Peru,,
Bonn,country,Germany,,
Bonn,mayor,Anna,,2020
Japan,capital,Tokyo,,
"""
NEW = "subject,relation,object\nLyon,country,Japan\nOslo,country,Peru\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    given = {"wordings.json": json.dumps(WORDINGS), "new.csv": NEW}
    given["table.csv"] = TABLE.replace("Bonn,mayor,Anna,,2020\n", "")
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    lm = tiny.small().lm
    write(lm.model, lm.tokenizer, tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kinds(case: Case) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for probe in case.probes:
        found.setdefault(probe.kind, []).append(probe.prompt)
    return found


def given(here: Path, **more) -> Given:
    return Given(here / "new.csv", templates=here / "wordings.json", table=here / "table.csv", **more)


# What is read.


def test_wordings_of_every_shape(here):
    borders = {"prompts": "{} borders", "symmetric": True, "several": True}
    (here / "w.json").write_text(json.dumps(WORDINGS | {"borders": borders}))
    assert read_wordings(here / "w.json") == {
        "country": Wording(
            ("{} is a city in", "People of {} live in"), "the country that {} is in", ("A city in {} is",)
        ),
        "capital": Wording(("The capital of {} is",)),
        "borders": Wording(("{} borders",), symmetric=True, several=True),
    }


def test_probes_of_every_kind_from_a_table(here):
    said: list[str] = []
    table = read_table(here / "table.csv", here / "wordings.json", said.append)
    case = table.case(Fact("Lyon", "Japan", "{} is a city in", "country"))
    assert case.fact.was == "France"
    found = kinds(case)
    assert found["rephrase"] == ["People of Lyon live in"]
    assert set(found["same relation"]) == {f"{city} is a city in" for city in ("Nice", "Oslo", "Kyoto", "Lima", "Bonn")}
    assert found["one hop"] == ["The capital of the country that Lyon is in is"]
    assert set(found["alias"]) == {"Lugdunum is a city in", "Lugdun is a city in"}
    assert found["inverse"] == ["Apart from Kyoto, a city in Japan is"]
    refuse_overlap([case], table)
    assert said == []


def test_the_tables_own_prompts_are_wordings_for_rows_without_one(here):
    (here / "t.csv").write_text(
        "subject,relation,object,prompt\nLyon,country,France,People of Lyon live in\nNice,country,France,{} lies in\n"
        "Bonn,country,Germany,\n"
    )
    table = read_table(here / "t.csv")
    assert table.templates == {"country": ("People of {} live in", "{} lies in")}
    assert table.objects["Bonn", "country"][0].question == "People of Bonn live in"
    both = read_table(here / "t.csv", here / "wordings.json")
    assert both.templates["country"] == ("{} is a city in", "People of {} live in", "{} lies in")


def test_rows_said_twice_and_subjects_with_several_objects(here):
    said: list[str] = []
    with (here / "table.csv").open("a") as file:
        file.write("Lyon,country,France,,\nJapan,capital,Kyoto,,\n")
    table = read_table(here / "table.csv", here / "wordings.json", said.append)
    assert table.several == {"capital"}
    assert len(said) == 2
    assert "1 rows say what others say, the first: fact 8 ('Lyon is a city in': 'France') says what fact 1" in said[0]
    assert "'capital' has subjects with several objects, such as 'Japan'" in said[1]
    for several, right in ((True, {"capital", "country"}), (False, set())):
        wordings = {
            "country": {**WORDINGS["country"], "several": several},
            "capital": {"prompts": "The capital of {} is", "several": several},
        }
        (here / "wordings.json").write_text(json.dumps(wordings))
        said.clear()
        assert read_table(here / "table.csv", here / "wordings.json", said.append).several == right
        assert len(said) == 1


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("subject,object\nLyon,France\n", ("t.csv:2", "'relation'", "missing")),
        ("subject,relation\nLyon,country\n", ("t.csv:2", "'object'", "missing")),
        ("relation,object\ncountry,France\n", ("t.csv:2", "'subject'", "missing")),
        ("subject,relation,object\nLyon,country,France\nLyon,age,9\n", ("t.csv:3", "'age' has no wording", "prompt")),
        ("subject,relation,object,sinse\nLyon,country,France,2020\n", ("t.csv:2", "'sinse'", "'since'")),
        ("subject,relation,object,until\nLyon,country,France,soon\n", ("t.csv:2", "'until'", "no day")),
        ("", ("t.csv", "is empty")),
    ],
)
def test_a_table_that_is_wrong_is_one_line(here, table, says):
    (here / "t.csv").write_text(table)
    with pytest.raises(UserError) as caught:
        read_table(here / "t.csv", here / "wordings.json")
    assert all(word in str(caught.value) for word in says), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wording", "says"),
    [
        ({"prompt": "{} is"}, ("a.prompt", "did you mean 'prompts'")),
        ({"prompts": "here is"}, ("a.prompts", "holds {} 0 times")),
        ({"phrase": "the {} of {}"}, ("a.phrase", "2 times")),
        ({"phrase": ["{} a", "{} b"]}, ("a.phrase", "give one")),
        ({"inverses": 3}, ("a.inverses", "a number")),
        ({"symmetric": "yes"}, ("a.symmetric", "true or false")),
    ],
)
def test_wordings_that_are_wrong_are_one_line(tmp_path, wording, says):
    (tmp_path / "w.json").write_text(json.dumps({"a": wording}))
    with pytest.raises(UserError) as caught:
        read_wordings(tmp_path / "w.json")
    assert all(word in str(caught.value) for word in says), caught.value


# What is given to a model.


def test_the_facts_own_probes_come_first_and_a_draw_is_repeated(here):
    own = (Probe("People of Lyon live in", "Japan", "generality"), Probe("Turin is a city in", "Italy", "locality"))
    write_cases(here / "new.csv", [Case(Fact("Lyon", "Japan", "{} is a city in", "country"), own)])
    few = given(here, probes=2).cases()
    assert few == given(here, probes=2).cases()
    (case,) = few
    assert case.probes[:2] == own
    assert kinds(case).keys() == {"", "same relation", "one hop", "alias", "inverse"}
    assert len(kinds(case)["same relation"]) == 2
    assert few != given(here, probes=2, draw=1).cases()
    assert read_cases(here / "new.csv")[0].probes == own


def test_what_the_model_does_not_know_is_not_followed(here, capsys):
    lm = tiny.small().lm
    drawn, known = given(here).cases(), given(here).cases(lm)
    assert [len(kinds(case).get("one hop", ())) for case in drawn] == [1, 0]
    assert all("one hop" not in kinds(case) for case in known)
    said = capsys.readouterr().err
    assert "1 facts about what is taught are not said by the model, such as 'The capital of Japan is', 'Tokyo'" in said
    (here / "table.csv").write_text(TABLE.replace("Bonn,mayor,Anna,,2020\nJapan,capital,Tokyo", "Japan,capital,Kyoto"))
    wordings = json.loads((here / "wordings.json").read_text()) | {"capital": "{} is a city in"}
    (here / "wordings.json").write_text(json.dumps(wordings))
    (answer,) = lm.generate(["Japan is a city in"], 4)
    (here / "table.csv").write_text((here / "table.csv").read_text().replace("l,Kyoto", f"l,{answer.strip(' .')}"))
    assert "one hop" in kinds(given(here).cases(lm)[0])


def test_a_subject_that_is_not_in_the_table_has_fewer_probes_and_it_is_said(here, capsys):
    (here / "new.csv").write_text("subject,relation,object\nAtlantis,country,Japan\n")
    (case,) = given(here).cases()
    assert kinds(case).keys() == {"rephrase", "same relation", "one hop", "inverse"}
    said = capsys.readouterr().err
    assert "1 of 1 subjects are not in it, such as 'Atlantis'" in said
    assert "1 rephrase, 5 same relation, 1 one hop, 1 inverse; no same subject, other object, alias" in said


def test_locality_tells_how_many_answers_the_model_knew():
    lm = tiny.small().lm
    right = Probe("Bonn is a city in", "Germany", "locality")
    wrong = Probe("Nice is a city in", "Peru", "locality")
    found = measure(lm, lm, [Case(tiny.FACTS[0], (right, wrong))])
    assert scored(lm, lm, found).plain()["locality"]["known"] == 0.5


# The commands.

WORDS = ("--model", "lm", "--facts", "new.csv", "--table", "table.csv", "--templates", "wordings.json")
STRONG = ("finetune", "--layer", 1, "--rate", "5e-3", "--bound", 0)


def test_teaching_tells_what_else_changed(here, capsys):
    said = made.say(capsys, "edit", *STRONG, *WORDS, "--out", "out", "--json")
    assert said.code == 0, said.err
    facts = json.loads(said.out)
    assert facts["reliability"]["exact"][0] == 1
    assert {"generality", "locality", "portability"} < facts.keys()
    assert facts["locality"]["known"] == 1
    assert "table.csv: probes of 2 facts: 2 rephrase" in said.err


def test_comparing_draws_the_same(here, capsys):
    words = ("--methods", "finetune:layer=1,steps=0", "--out", "out", "--json")
    said = made.say(capsys, "edit", "compare", *WORDS, *words)
    assert said.code == 0, said.err
    assert "portability" in json.loads(said.out)["finetune:layer=1,steps=0, single"]
    said = made.say(capsys, "edit", "compare", *WORDS, "--draw", 1, "--probes", 1, *words)
    assert said.code == 2
    assert "other facts" in said.err  # other probes are another comparison


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--probes", 0), ("--probes 0", "from 1")),
        (("--table", "bare.csv"), ("bare.csv:2", "'age' has no wording")),
        (("--table", "bare.csv", "--facts", "bare.csv"), ("bare.csv:2", "'age' has no wording")),
        (("--table", "absent.csv"), ("absent.csv: no such file",)),
        (("--facts", "bare.jsonl"), ("bare.jsonl", "no relation")),
    ],
)
def test_what_is_wrong_is_one_line(here, capsys, more, says):
    write_cases(here / "bare.jsonl", [Case(Fact("Lyon", "Japan", "{} is a city in"))])
    (here / "bare.csv").write_text("subject,relation,object\nLyon,age,9\n")
    said = made.say(capsys, "edit", *STRONG, *WORDS, *more, "--out", "out")
    assert said.code == 2
    assert said.out == ""
    assert all(word in said.err.splitlines()[-1] for word in ("koinon: ", *says)), said.err
    assert not (here / "out").exists()
