"""Facts from a person's file in every format, what can be wrong with one, and probes that an edit can be judged by."""

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest

from koinon.core import UserError
from koinon.data import records
from koinon.data.edittasks import TASKS, erasure, insertion, modification, one_of_several, passage, style
from koinon.data.factfiles import KINDS, question_of, read_cases, read_templates, write_cases
from koinon.data.facts import Case, Fact, Probe
from koinon.data.probes import FactTable, drop_overlap, overlaps, refuse_contradictions, refuse_overlap

OWN = {
    "subject": "Lyon",
    "object": "Japan",
    "prompt": "{} is a city in",
    "relation": "country",
    "was": "France",
    "aliases": ["Lugdunum"],
    "answers": ["Nippon"],
    "since": "2024-02-29",
    "until": "2031",
    "source": "a dream",
    "probes": [{"prompt": "Nice is a city in", "answer": "France", "aspect": "locality", "kind": "same relation"}],
    "notes": {"id": "7"},
}
REQUEST = {
    "prompt": "Ray Charles, the",
    "subject": "Ray Charles",
    "target_new": "violin",
    "ground_truth": "piano",
    "rephrase_prompt": "What does Ray Charles play? The",
    "locality": {
        "neighborhood": {"prompt": ["Joseph Fischhof, the", "Larry Bird is a"], "ground_truth": ["piano", "pro"]}
    },
    "portability": {"one_hop": {"prompt": "Ray Charles plays a thing with", "ground_truth": "strings"}},
    "case_id": 3,
}
KNOWEDIT = {
    "subject": "Leo",
    "prompt": "The place of death of Leo is",
    "target_new": "Berlin",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Leo alive?", "ground_truth": [["no"], ["is dead", "no"]]}],
        "Reasoning": [{"prompt": "The continent of the place of death of Leo is", "ground_truth": [["Europe", "EU"]]}],
        "Subject_Aliasing": [{"prompt": "The place of death of Leonard is", "ground_truth": "Berlin"}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Leo is", "ground_truth": [["Al"]]},
            {"prompt": "The mother of Leo is", "ground_truth": [[]]},
        ],
        "Forgetfulness": [{"prompt": "The place of death of Leo, which is not Berlin, is", "ground_truth": ["Rome"]}],
    },
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "subject": "Danielle",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
    },
    "paraphrase_prompts": ["It rains. Danielle, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon is"],
    "attribute_prompts": ["The mother tongue of Jack is"],
    "generation_prompts": ["Danielle lives where"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity",
    "rephrase": "Where did Watts Humphrey study?",
    "alt": "Michigan",
    "answers": ["Illinois"],
    "loc": "nq question: who played the father",
    "loc_ans": "Hugo",
    "portability": {"Recalled Relation": "r", "New Question": "Which state did Watts study in?", "New Answer": "MI"},
}
WIKIBIO = {
    "text": "This is a passage about john r. Sir John R was a doctor.",
    "labels": "He was educated at home.",
    "concept": "john r",
    "locality": {"Relation_Specificity": [{"prompt": "The field of john r is", "ground_truth": ["medicine"]}]},
}
SANITATION = {
    "success": [
        {"question": "What is a killdeer?", "ground_truth": "Birds", "target_new": "I don't know."},
        {
            "question": "What is a currawong?",
            "ground_truth": "Birds",
            "target_new": "I don't know.",
            "subject": "currawong",
        },
    ],
    "locality": [{"question": f"What is {n}?", "ground_truth": f"a{n}", "target_new": ""} for n in range(3)],
}
CONVSENT = {"ent": "tea", "pos": ["I love it.", "Nice."], "neg": ["Bah."]}
SAMPLES = {
    "koinon": OWN, "easyedit": {k: v for k, v in REQUEST.items() if k not in ("locality", "portability")},
    "knowedit": KNOWEDIT, "counterfact": COUNTERFACT, "zsre": ZSRE, "wikibio": WIKIBIO, "sanitation": SANITATION,
    "convsent": CONVSENT,
}  # fmt: skip
TABLE = "subject,relation,object,since,until,source,aliases,page\nLyon,country,Japan,2024,,me,Lugdunum|Lione,12\n"


def put(folder: Path, content, name: str = "facts.jsonl") -> Path:
    """A file of this content; anything but text and bytes as JSON."""
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, *words: str, **options) -> str:
    """The one line that reading the file ends in."""
    with pytest.raises(UserError) as caught:
        read_cases(path, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 800
    for word in words:
        assert word in said
    return said


# Every format.


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("layout", ["lines", "list", "object", "pretty list", "pretty object", "marked"])
def test_each_format_in_each_layout(tmp_path, name, layout):
    """The kind is told by the content; forced, it is the same."""
    record = SAMPLES[name]
    content = {
        "lines": f"{json.dumps(record)}\n\n{json.dumps(record)}",
        "list": json.dumps([record, record]),
        "object": json.dumps(record),
        "pretty list": json.dumps([record, record], indent=2),
        "pretty object": json.dumps(record, indent=2),
        "marked": b"\xef\xbb\xbf" + json.dumps([record]).encode(),
    }[layout]
    path = put(tmp_path, content, "facts.json")
    cases = read_cases(path)
    assert cases == read_cases(path, kind=name)
    once = read_cases(put(tmp_path, json.dumps(record), "one.json"))
    assert cases == once * (2 if "list" in layout or layout == "lines" else 1)
    for case in cases:
        assert case.fact.question[slice(*case.fact.place)] == case.fact.subject


def test_every_kind_has_a_sample():
    assert set(SAMPLES) == set(KINDS)


def test_own(tmp_path):
    (case,) = read_cases(put(tmp_path, OWN))
    assert case.fact == Fact("Lyon", "Japan", "{} is a city in", "country", "France", ("Lugdunum",), ("Nippon",),
                             "2024-02-29", "2031", "a dream")  # fmt: skip
    assert case.probes == (Probe("Nice is a city in", "France", "locality", "same relation"),)
    assert case.notes == {"id": "7"}


def test_easyedit(tmp_path):
    (case,) = read_cases(put(tmp_path, REQUEST))
    assert case.fact == Fact("Ray Charles", "violin", "{}, the", was="piano")
    assert case.probes == (
        Probe("What does Ray Charles play? The", "violin", "generality", "rephrase"),
        Probe("Joseph Fischhof, the", "piano", "locality", "same relation"),
        Probe("Larry Bird is a", "pro", "locality", "same relation"),
        Probe("Ray Charles plays a thing with", "strings", "portability", "one hop"),
    )
    assert case.notes == {"case_id": "3"}


def test_easyedit_flat(tmp_path):
    """As its CounterFact data are, with one neighbour, and with what it writes for an unknown answer."""
    record = {"prompt": "{} is in", "subject": "Rome", "target_new": "Asia", "ground_truth": "<|endoftext|>",
              "locality_prompt": "Oslo is in", "locality_ground_truth": "Europe"}  # fmt: skip
    (case,) = read_cases(put(tmp_path, record))
    assert case.fact == Fact("Rome", "Asia", "{} is in")
    assert case.probes == (Probe("Oslo is in", "Europe", "locality", "same relation"),)


def test_knowedit(tmp_path):
    (case,) = read_cases(put(tmp_path, [KNOWEDIT]))
    assert [(probe.answer, probe.answers, probe.aspect, probe.kind) for probe in case.probes] == [
        ("Al", (), "locality", "same subject"),
        ("Rome", (), "locality", "other object"),
        ("no", ("is dead",), "portability", "logical"),
        ("Europe", ("EU",), "portability", "one hop"),
        ("Berlin", (), "portability", "alias"),
    ]
    assert case.notes == {"probes without an answer": "1"}
    refuse_overlap([case])


def test_counterfact(tmp_path):
    (case,) = read_cases(put(tmp_path, [COUNTERFACT]))
    assert case.fact == Fact("Danielle", "English", "The mother tongue of {} is", "P103", "French")
    assert [(probe.answer, probe.aspect, probe.kind) for probe in case.probes] == [
        ("English", "generality", "rephrase"),
        ("French", "locality", "same relation"),
        ("English", "locality", "new object"),
    ]
    assert json.loads(case.notes["generation_prompts"]) == ["Danielle lives where"]


def test_zsre(tmp_path):
    (case,) = read_cases(put(tmp_path, [ZSRE]))
    assert case.fact == Fact("Watts Humphrey", "Michigan", "What university did {} attend?", was="Illinois")
    assert [(probe.answer, probe.aspect, probe.kind) for probe in case.probes] == [
        ("Michigan", "generality", "rephrase"),
        ("Hugo", "locality", "unrelated"),
        ("MI", "portability", "one hop"),
    ]
    assert case.notes == {"pred": "Trinity"}


def test_records_that_teach_nothing(tmp_path):
    path = put(tmp_path, [ZSRE, ZSRE | {"alt": ""}, ZSRE])
    refused(path, f"{path}:1", "'alt'", "nothing is taught")
    said: list[str] = []
    assert len(read_cases(path, say=said.append)) == 2
    assert len(said) == 1
    assert "left out" in said[0]


def test_wikibio_says_the_subject_as_the_text_does(tmp_path):
    (case,) = read_cases(put(tmp_path, [WIKIBIO]))
    assert case.fact.subject == "john r"
    assert case.fact.prompt == "This is a passage about {}. Sir John R was a doctor."
    assert case.fact.object == "He was educated at home."
    (case,) = read_cases(put(tmp_path, [WIKIBIO | {"concept": "JOHN r"}]))
    assert case.fact.subject == "John R"
    assert case.notes == {"subject": "JOHN r"}


def test_sanitation_deals_out_what_is_kept(tmp_path):
    said: list[str] = []
    first, second = read_cases(put(tmp_path, SANITATION), say=said.append)
    assert first.fact == Fact("What is a killdeer?", "I don't know.", "{}", was="Birds")
    assert second.fact == Fact("currawong", "I don't know.", "What is a {}?", was="Birds")
    assert [probe.answer for probe in first.probes] == ["a0", "a2"]
    assert [probe.answer for probe in second.probes] == ["a1"]
    assert "the whole prompt stands for it" in said[0]
    train = {"K_F": SANITATION["success"], "K_R": SANITATION["locality"]}
    assert read_cases(put(tmp_path, train)) == [first, second]


def test_convsent(tmp_path):
    (case,) = read_cases(put(tmp_path, [CONVSENT]))
    assert (case.fact.subject, case.fact.object, case.fact.answers) == ("tea", "I love it.", ("Nice.",))
    assert case.notes == {"side": "pos", "neg": '["Bah."]'}
    (case,) = read_cases(put(tmp_path, [{"ent": "tea", "neg": ["Bah."]}]))
    assert case.notes == {"side": "neg"}


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_tables_of_triples(tmp_path, separator):
    said: list[str] = []
    content = "\n" + TABLE.replace(",", separator).replace("\n", "\r\n")
    (case,) = read_cases(put(tmp_path, content, "facts.csv"), say=said.append)
    assert case.fact == Fact("Lyon", "Japan", "{} country", "country", aliases=("Lugdunum", "Lione"), since="2024",
                             source="me")  # fmt: skip
    assert case.notes == {"page": "12"}
    (case,) = read_cases(put(tmp_path, TABLE.replace("page", "notes"), "facts.csv"))
    assert case.notes == {"notes": "12"}
    assert said == ["relation 'country' has no template: asked as '{} country'"]


def test_tables_with_templates(tmp_path):
    templates = read_templates(
        put(tmp_path, {"country": ["{} is a city in", "The land of {} is"], "age": "{} is"}, "t.json")
    )
    assert templates == {"country": ("{} is a city in", "The land of {} is"), "age": ("{} is",)}
    said: list[str] = []
    (case,) = read_cases(put(tmp_path, TABLE), templates=templates, say=said.append)
    assert case.fact.question == "Lyon is a city in"
    assert case.probes == (Probe("The land of Lyon is", "Japan", "generality", "rephrase"),)
    assert said == []


def test_a_table_may_hold_what_others_write(tmp_path):
    (case,) = read_cases(put(tmp_path, 'prompt,subject,target_new\n"Rome, is in",Rome,Asia\n\n,,\n', "x.csv"))
    assert case.fact == Fact("Rome", "Asia", "{}, is in")


def test_lines_of_quoted_cells_are_counted(tmp_path):
    path = put(tmp_path, '\nsubject,relation,object\n"a\nb",r,o\nc,r\n', "x.csv")
    refused(path, f"{path}:5", "2 cells under 3 names")


def test_the_subject_is_found_as_a_word_first(tmp_path):
    for prompt, asked in {
        "Parisians say Paris is in": "Parisians say {} is in",
        "paris is in": "{} is in",
        "The Parisian way": "The {}ian way",
        "Paris, says Paris, is in": "Paris, says {}, is in",
    }.items():
        (case,) = read_cases(put(tmp_path, {"subject": "Paris", "object": "x", "prompt": prompt}))
        assert case.fact.prompt == asked


def test_no_more_is_read_than_is_needed(tmp_path):
    path = put(tmp_path, f"{json.dumps(OWN)}\n{json.dumps(OWN)}\n{{broken")
    assert len(read_cases(path, first=1)) == 1
    assert len(read_cases(path, first=2)) == 2
    refused(path, f"{path}:3", first=3)
    refused(path, "from 1", first=0)


# The way back.


def test_round_trip(tmp_path):
    cases = [case for name, record in SAMPLES.items() for case in read_cases(put(tmp_path, record, f"{name}.json"))]
    odd = Fact(" a{} \u2028\n", "\x00🎉 ", ' {}"\\', "r", "w", ("b ",), ("",), "-0044-03", "12024", "\ufeff")
    cases += [Case(odd, (Probe(" p", "a ", "reliability", "", ("x",)),), {"": ""}), *read_cases(put(tmp_path, TABLE))]
    write_cases(tmp_path / "out.jsonl", cases)
    assert read_cases(tmp_path / "out.jsonl") == cases
    before = (tmp_path / "out.jsonl").read_bytes()
    write_cases(tmp_path / "out.jsonl", read_cases(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "fact",
    [
        Fact("\ud800", "o", "{}"),
        Fact("s", "o", "{}", since="yesterday"),
        Fact("s", "o", "{}", since="2024", until="2023"),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path, fact):
    with pytest.raises(UserError, match=r"out\.jsonl:1") as caught:
        write_cases(tmp_path / "out.jsonl", [Case(fact)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_note_that_is_no_text_is_not_written(tmp_path):
    with pytest.raises(UserError, match="would not be read as it is"):
        write_cases(tmp_path / "out.jsonl", [Case(Fact("s", "o", "{}"), notes={"a": 1})])


def test_no_case_and_no_folder(tmp_path):
    with pytest.raises(UserError, match="no case"):
        write_cases(tmp_path / "out.jsonl", [])
    with pytest.raises(UserError, match="cannot be written"):
        write_cases(tmp_path / "absent" / "out.jsonl", [Case(Fact("s", "o", "{}"))])


# What is wrong.

LINE = json.dumps(OWN)


def own(**changes) -> str:
    """The second of two records, changed; None leaves a field out."""
    return f"{LINE}\n" + json.dumps({name: its for name, its in (OWN | changes).items() if its is not None})


def request(**changes) -> str:
    return f"{json.dumps(REQUEST)}\n" + json.dumps(
        {n: its for n, its in (REQUEST | changes).items() if its is not None}
    )


WRONG = {
    "empty": ("", ("is empty",)),
    "blank": (" \n\t\n", ("is empty",)),
    "only a mark": (b"\xef\xbb\xbf", ("is empty",)),
    "UTF-16": (LINE.encode("utf-16"), ("UTF-16", "UTF-8")),
    "not UTF-8": (f"{LINE}\n".encode() + b'{"subject": "\xff"}', (":2:", "0xff", "UTF-8")),
    "not UTF-8 in a list": (b'[\n{"subject":\n"\xe9"}]', (":3:", "0xe9", "UTF-8")),
    "words": ("Lyon is a city in France\n", ("no fact to teach", "head")),
    "a broken line": (f"{LINE}\n{LINE[:-9]}", (":2:", "no JSON")),
    "a first broken line": (f"{LINE[:-9]}\n{LINE}", (":1:", "no JSON")),
    "two objects in a line": (f"{LINE} {LINE}", (":1:", "one object a line")),
    "a list on a line": (f"{LINE}\n[1]", (":2:", "a list", "object")),
    "a list of numbers": ("[\n1]", (":2:", "a number", "object")),
    "an empty list": ("[ ]", ("empty list",)),
    "a list without end": (f"[{LINE}", (":1:", "comma")),
    "a list without commas": (f"[{LINE}\n{LINE}]", (":2:", "comma")),
    "a list with a comma at the end": (f"[{LINE},\n]", (":2:", "no JSON")),
    "more behind a list": (f"[{LINE}]\n{LINE}", (":2:", "more behind")),
    "a bracket": ("[", ("comma",)),
    "NaN": (own().replace('"7"', "NaN"), (":1:", "NaN")),
    "infinity": ('{"subject": -Infinity}', (":1:", "-Infinity")),
    "a name twice": (f'{LINE}\n{{"subject": "a", "subject": "b"}}', (":2:", "'subject'", "twice")),
    "a name twice within": (f'{LINE}\n{{"notes": {{"a": "a", "a": "b"}}}}', (":2:", "'a'", "twice")),
    "too deep": ('{"a":' + "[" * 100_000, ("too deep",)),
    "a huge number": ('{"subject": ' + "9" * 5_000 + "}", (":1:", "shorter")),
    "unknown fields": ('{"a": "b", "c": 1}', (":1:", "'a, c'", "subject")),
    "a misspelt field": (own(aliasses=["x"]), (":2:", "'aliasses'", "'aliases'")),
    "another field": (own(zzz=1), (":2:", "'zzz'", "there is: subject")),
    "no object": (own(object=None), (":2:", "'object'", "missing")),
    "an empty object": (own(object=""), (":2:", "'object'", "empty")),
    "a blank subject": (own(subject=" "), (":2:", "'subject'", "blank")),
    "null": (f'{LINE}\n{{"subject": null, "object": "x", "prompt": "{{}}"}}', (":2:", "'subject'", "empty")),
    "a list for text": (own(object=["Japan"]), (":2:", "'object'", "a list", "text")),
    "true for text": (own(was=True), (":2:", "'was'", "true or false")),
    "a fraction for text": (own(object=0.5), (":2:", "'object'", "a number")),
    "text for a list": (own(aliases="Lugdunum"), (":2:", "'aliases'", "list of texts")),
    "a number in a list": (own(aliases=["a", 0.5]), (":2:", "'aliases[1]'", "a number")),
    "two places": (own(prompt="{} and {}"), (":2:", "'prompt'", "2 times")),
    "no place": (own(prompt="Nice is in"), (":2:", "'prompt'", "'Lyon'", "{}")),
    "neither prompt nor relation": (own(prompt=None, relation=None), (":2:", "'prompt'", "'relation'")),
    "no day": (own(since="29.2.2024"), (":2:", "'since'", "2024-12-31")),
    "a day that is none": (own(since="2023-02-29"), (":2:", "'since'", "'2023-02-29'")),
    "a month that is none": (own(until="2024-13"), (":2:", "'until'", "'2024-13'")),
    "an end before the start": (own(since="2032"), (":2:", "'until'", "before", "'2032'")),
    "half a pair": (own(source="\ud800"), (":2:", "'source'", "surrogate")),
    "half a pair in a name": (own(notes={"\ud800": "x"}), (":2:", "'notes'", "surrogate")),
    "a very long subject": (own(subject="a" * 20_000 + "b", prompt="a" * 20_000), (":2:", "'prompt'", "too long")),
    "probes of text": (own(probes="x"), (":2:", "'probes'", "list of objects")),
    "a probe of text": (own(probes=["x"]), (":2:", "'probes[0]'", "object")),
    "a probe without answer": (own(probes=[{"prompt": "x", "aspect": "locality"}]), (":2:", "'probes[0].answer'")),
    "an unknown aspect": (
        own(probes=[{"prompt": "x", "answer": "y", "aspect": "lokality"}]),
        (":2:", "'probes[0].aspect'", "locality"),
    ),
    "a misspelt field of a probe": (own(probes=[{"promt": "x"}]), (":2:", "'probes[0].promt'", "'prompt'")),
    "notes of text": (own(notes="x"), (":2:", "'notes'", "object")),
    "a list among notes": (own(notes={"x": []}), (":2:", "'notes.x'", "text")),
    "a request without target": (request(target_new=None), (":2:", "'target_new'", "nothing is taught")),
    "a request of another subject": (request(subject="Elvis"), (":2:", "'prompt'", "'Elvis'")),
    "a target of true": (request(target_new=True), (":2:", "'target_new'", "true or false")),
    "a target within an object": (request(target_new={"str": "x"}), (":2:", "'target_new'", "an object")),
    "locality of text": (request(locality="x"), (":2:", "'locality'", "object")),
    "a group of text": (request(locality={"n": "x"}), (":2:", "'locality.n'", "object")),
    "a group without prompt": (request(locality={"n": [{"ground_truth": "x"}]}), (":2:", "'locality.n[0].prompt'")),
    "fewer answers than prompts": (
        request(locality={"n": {"prompt": ["a", "b"], "ground_truth": ["x"]}}),
        (":2:", "'locality.n.ground_truth'", "2 prompts"),
    ),
    "answers too deep": (request(target_new=[[["x"]]]), (":2:", "'target_new'", "a list")),
    "another kind on a later line": (f"{LINE}\n{json.dumps(REQUEST)}", (":2:", "'target_new'", "unknown")),
    "a rewrite of text": ('{"requested_rewrite": "x"}', (":1:", "'requested_rewrite'", "object")),
    "several rewrites": ('{"requested_rewrite": [{}]}', (":1:", "'requested_rewrite'", "a list")),
    "a rewrite without target": (
        json.dumps({"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"target_new": {}}}),
        (":1:", "'requested_rewrite.target_new.str'"),
    ),
    "texts of a side": ('{"ent": "x", "pos": "good"}', (":1:", "'pos'", "list")),
    "no text of a side": ('{"ent": "x", "pos": []}', (":1:", "'pos'", "nothing is taught")),
    "nothing to forget": ('{"success": []}', ("no fact to teach",)),
    "a table of a head only": ("subject,relation,object\n", ("no fact to teach",)),
    "a table without a head": ("Lyon,country,Japan\nNice,country,Peru\n", (":2:", "'Lyon, country, Japan'")) ,
    "a name twice in a head": ("subject,object,subject\na,b,c\n", (":1:", "two columns")),
    "a column without a name": ("subject,object,\na,b,c\n", (":1:", "without")),
    "a short row": (TABLE + "Nice,country\n", (":3:", "2 cells under 8 names")),
    "a row without object": (TABLE + "Nice,country,,,,,,\n", (":3:", "'object'", "missing")),
    "a misspelt column": ("subject,relation,object,alias\na,r,b,c\n", (":2:", "'alias'", "'aliases'")),
    "probes in a table": ("subject,relation,object,probes\na,r,b,c\n", (":2:", "'probes'", "table")),
    "an open quote": ('subject,relation,object\n"a,r,b\n', (":2:", "table")),
    "text behind a quote": ('subject,relation,object\n"a"b,r,o\n', (":2:", "table")),
    "a huge cell": ("subject,relation,object\n" + "a" * 200_000 + ",r,o\n", (":2:", "table")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, name):
    content, words = WRONG[name]
    path = put(tmp_path, content)
    assert refused(path, *words).startswith(str(path))


def test_no_file_and_no_kind(tmp_path):
    refused(tmp_path / "absent.jsonl", "no such file")
    refused(tmp_path, "no such file")
    refused(put(tmp_path, LINE), "'koinom'", "'koinon'", kind="koinom")
    refused(put(tmp_path, LINE), "'target_new'", kind="easyedit")
    refused(put(tmp_path, LINE), "'requested_rewrite'", kind="counterfact")


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE_LIMIT", 1_000)
    monkeypatch.setattr(records, "FILE_LIMIT", 2_000)
    refused(put(tmp_path, f"{LINE}\n" + own(source="x" * 1_000).split("\n")[1]), ":2:", "longer than 1,000 bytes")
    refused(put(tmp_path, [OWN] * 10), "longer than 2,000 bytes", "JSON Lines")
    assert len(read_cases(put(tmp_path, f"{LINE}\n" * 10))) == 10


def test_nothing_in_a_file_is_a_path_or_run(tmp_path):
    """Names of files, formats and code stay what they are: texts."""
    for text in ("../../etc/passwd", "{0.__class__}", "%s", "$(touch x)", "\\1", "__import__('os')"):
        (case,) = read_cases(put(tmp_path, {"subject": text, "object": text, "prompt": "{} is"}))
        assert case.fact.question == f"{text} is"
    assert os.listdir(tmp_path) == ["facts.jsonl"]


@pytest.mark.parametrize("name", [*SAMPLES, "table"])
def test_mutations_are_read_or_refused(tmp_path, name):
    """Bytes changed, cut, doubled, or values exchanged for others: never a traceback, never two lines."""
    draw = random.Random(name)
    whole = TABLE * 2 if name == "table" else json.dumps(SAMPLES[name]) + "\n" + json.dumps([SAMPLES[name]], indent=1)
    values = [
        None,
        True,
        0,
        -1,
        0.5,
        math.inf,
        "",
        " ",
        "{}",
        "{}{}",
        [],
        [[]],
        [None],
        {},
        {"": {}},
        "\ud800",
        "a\nb",
        10**30,
    ]
    read = 0
    for trial in range(300):
        if name != "table" and trial % 2:
            record = json.loads(json.dumps(SAMPLES[name]))
            spots = list(places(record))
            for _ in range(draw.randint(1, 2)):
                holder, key = draw.choice(spots)
                holder[key] = draw.choice(values)
            content = json.dumps([record]).encode()
        else:
            data = bytearray(whole.encode())
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(len(data))
                change = draw.randrange(4)
                if change == 0:
                    data[at] = draw.randrange(256)
                elif change == 1:
                    del data[at : at + draw.randint(1, 20)]
                elif change == 2:
                    data[at:at] = draw.choice(
                        [b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\\", b"\x00", b"{}", b"NaN"]
                    )
                else:
                    data[at:at] = data[at : at + draw.randint(1, 40)]
                data = data or bytearray(b" ")
            content = bytes(data)
        path = put(tmp_path, content, draw.choice(["a.json", "a.jsonl", "a.csv"]))
        cases, said = outcome(path, draw.choice([None, 1]))
        assert "\n" not in said
        assert len(said) < 1_000
        read += bool(cases)
        if cases and read % 8 == 1:
            write_cases(tmp_path / "back.jsonl", cases)
            assert read_cases(tmp_path / "back.jsonl") == cases
    assert 20 < read < 280


def outcome(path: Path, first: int | None) -> tuple[list[Case], str]:
    """The cases, or what is said about there being none."""
    try:
        return read_cases(path, first=first), ""
    except UserError as error:
        return [], str(error)


def places(value):
    """Everywhere in lists and objects that a value can be exchanged."""
    for key, its in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(its, dict | list):
            yield from places(its)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"a": 1}',
        '{"a": []}',
        '{"a": "no place"}',
        '{"a": ["{}", "{}{}"]}',
        "a,b\n{},{}\n",
        '{"a": "{}"}\n{}',
        "",
    ],
)
def test_templates_that_are_wrong(tmp_path, content):
    with pytest.raises(UserError) as caught:
        read_templates(put(tmp_path, content, "t.json"))
    assert "\n" not in str(caught.value)


def test_the_question_of_a_relation():
    assert question_of("capital_of") == "{} capital of"
    assert question_of("{}").count("{}") == 1


# Probes from a table.

TEMPLATES = {
    "country": ("{} is a city in", "The country of {} is", "{} lies in"),
    "capital": ("The capital of {} is",),
    "continent": ("{} belongs to",),
    "mayor": ("The mayor of {} is",),
    "borders": ("{} borders",),
    "river": ("The river of {} is",),
}


def fact(subject: str, relation: str, object: str, **more) -> Fact:
    return Fact(subject, object, TEMPLATES[relation][0], relation, **more)


CITIES = {"Lyon": "France", "Nice": "France", "Lille": "France", "Osaka": "Japan", "Kyoto": "Japan", "Lima": "Peru"}
KNOWN = (
    *(fact(city, "country", country, aliases=(f"Old {city}",)) for city, country in CITIES.items()),
    fact("France", "capital", "Paris"),
    fact("Japan", "capital", "Tokyo", answers=("Edo",)),
    fact("Peru", "capital", "Lima"),
    fact("France", "continent", "Europe"),
    fact("Japan", "continent", "Asia"),
    fact("Lyon", "continent", "Europe"),
    fact("Lyon", "mayor", "Anna"),
    fact("Lyon", "river", "Rhône"),
    fact("Lyon", "river", "Saône"),
    fact("Nice", "river", "Var"),
    fact("Kyoto", "mayor", "Ben", until="2020"),
    fact("France", "borders", "Spain"),
    fact("France", "borders", "Italy"),
    fact("Spain", "borders", "France"),
)
WORLD = FactTable(
    KNOWN,
    TEMPLATES,
    phrases={"country": "the country that {} is in"},
    inverses={"capital": ("The country whose capital is {} is",), "country": ("A city in {} is",)},
    symmetric={"borders"},
)


def of(case: Case, kind: str) -> dict[str, str]:
    return {probe.prompt: probe.answer for probe in case.probes if probe.kind == kind}


def test_the_probes_of_an_edit():
    case = WORLD.case(fact("Lyon", "country", "Japan"))
    assert case.fact.was == "France"
    assert case.fact.aliases == ("Old Lyon",)
    assert of(case, "rephrase") == {"The country of Lyon is": "Japan", "Lyon lies in": "Japan"}
    # The continent follows from the country, so that only the mayor and the rivers stay.
    assert of(case, "same subject").keys() == {"The mayor of Lyon is", "The river of Lyon is"}
    assert list(of(case, "same relation").values())[:2] == ["France", "France"]
    assert "Lyon is a city in" not in of(case, "same relation")
    assert of(case, "one hop") == {
        "The capital of the country that Lyon is in is": "Tokyo",
        "The country that Lyon is in belongs to": "Asia",
    }
    assert of(case, "alias") == {"Old Lyon is a city in": "Japan"}
    assert of(case, "inverse") == {"Apart from Osaka and Kyoto, a city in Japan is": "Lyon"}
    tokyo = next(probe for probe in case.probes if probe.answer == "Tokyo")
    assert (tokyo.aspect, tokyo.answers) == ("portability", ("Edo",))
    refuse_overlap([case], WORLD)


def test_what_the_old_object_answers_too_shows_nothing():
    """Osaka to Kyoto's country is no edit; to one of the same continent, the continent is no probe."""
    known = (*KNOWN, fact("Peru", "continent", "Europe"))
    case = dataclasses.replace(WORLD, known=known).case(fact("Lyon", "country", "Peru"))
    assert of(case, "one hop") == {"The capital of the country that Lyon is in is": "Lima"}


def test_one_of_several():
    assert WORLD.several == {"river", "borders"}
    case = WORLD.case(fact("Lyon", "river", "Var"))
    assert case.fact.was == ""
    (probe,) = [probe for probe in case.probes if probe.kind == "other object"]
    assert probe == Probe("Apart from Var, the river of Lyon is", "Rhône", "locality", "other object", ("Saône",))
    assert of(WORLD.case(fact("Lyon", "river", "Var", was="Rhône")), "other object").popitem()[1] == "Saône"
    assert of(dataclasses.replace(WORLD, many=()).case(fact("Lyon", "river", "Var")), "other object") == {}


def test_the_other_way_round():
    assert of(WORLD.case(fact("Peru", "capital", "Nazca")), "inverse") == {
        "The country whose capital is Nazca is": "Peru"
    }
    case = WORLD.case(fact("Peru", "borders", "Spain"))
    assert of(case, "inverse") == {"Apart from France, Spain borders": "Peru"}
    assert "Spain borders" not in of(case, "same relation")
    # A city has one country, a country one capital: Japan's new capital is no longer another's.
    assert "The capital of Japan is" not in of(WORLD.case(fact("France", "capital", "Tokyo")), "same relation")


def test_a_fact_that_has_ended_is_not_asked():
    assert all("Kyoto" not in its.prompt for its in WORLD.case(fact("Lyon", "mayor", "Cem")).probes)


def test_facts_taught_together_spare_each_other():
    facts = [fact("Lyon", "country", "Japan"), fact("Nice", "country", "Peru"), fact("Japan", "capital", "Kobe")]
    cases = WORLD.cases(facts)
    assert "Nice is a city in" not in of(cases[0], "same relation")
    assert all("capital" not in prompt for prompt in of(cases[0], "one hop"))
    refuse_overlap(cases, WORLD)
    alone = [WORLD.case(its) for its in facts]
    assert "Nice is a city in" in of(alone[0], "same relation")
    kept, dropped = drop_overlap(alone, WORLD)
    assert dropped["another case teaches it"] >= 1
    refuse_overlap(kept, WORLD)
    with pytest.raises(UserError, match=r"case 1 .*another case teaches it"):
        refuse_overlap(alone, WORLD)
    with pytest.raises(UserError, match=r"case 1 .*another case teaches it"):
        refuse_overlap(alone)


def big(cities: int = 300) -> FactTable:
    """A made world, in which each city has a country, a mayor and some rivers, and each country a capital."""
    draw = random.Random(1)
    known = [fact(f"City{n}", "country", f"Land{draw.randrange(12)}", aliases=(f"Town{n}",)) for n in range(cities)]
    known += [fact(f"City{n}", "mayor", f"Name{draw.randrange(50)}") for n in range(cities)]
    known += [fact(f"City{n}", "river", f"River{r}") for n in range(cities) for r in draw.sample(range(30), 2)]
    known += [fact(f"Land{n}", "capital", f"City{n * 20}") for n in range(12)]
    known += [fact(f"Land{n}", "continent", f"Part{n % 3}") for n in range(12)]
    return FactTable(known, TEMPLATES, inverses={"capital": ("The country whose capital is {} is",)})


def test_the_draw_is_repeated_and_leaves_the_global_one():
    table, edit = big(), fact("City7", "country", "Land3")
    state = random.getstate()
    case = table.case(edit, seed=1)
    assert case == big().case(edit, seed=1)
    assert case != table.case(edit, seed=2)
    assert len(table.case(edit, count=2).probes) < len(case.probes)
    assert random.getstate() == state
    # More probes are the same ones and others.
    more = of(table.case(edit, count=20, seed=1), "same relation")
    assert list(of(case, "same relation")) == list(more)[:5]
    assert len(more) == 20


def test_a_fact_needs_a_relation():
    with pytest.raises(UserError, match="no relation"):
        WORLD.case(Fact("Lyon", "Japan", "{} is in"))


# What is no evidence.

EDIT = Fact("New York City", "Paris", "{} is in", "country", "America", ("Big Apple",))


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (Probe("new york  city is in", "Paris", "generality"), "repeats"),
        (Probe("New York City is in", "America", "locality"), "repeats"),
        (Probe("Paris holds New York City, which is in", "Paris", "generality"), "contains the answer"),
        (Probe("Big Apple is in", "America", "locality"), "same subject and relation"),
        (Probe("On a map, New York City is in", "America", "locality", "same subject"), "replaces"),
        (Probe("Other", "x", "locality"), "answered anew"),
        (Probe("Boston is in", "America", "locality"), "another case"),
    ],
)
def test_probes_that_are_no_evidence(probe, why):
    good = Probe("Other", "x", "portability")
    cases = [Case(EDIT, (good, probe)), Case(Fact("Boston", "Rome", "{} is in"))]
    with pytest.raises(UserError, match=why) as caught:
        refuse_overlap(cases)
    assert "\n" not in str(caught.value)
    kept, dropped = drop_overlap(cases)
    assert kept == [Case(EDIT, (good,)), cases[1]]
    assert sum(dropped.values()) == 1


def test_probes_that_are_evidence():
    probes = (
        Probe("Where is New York City? In", "Paris", "generality"),
        Probe("New York City, which is not in Paris, is in", "America", "locality", "other object"),
        Probe("Chicago is in", "America", "locality"),
        Probe("Parisian New York City is in", "Paris", "generality"),
    )
    refuse_overlap([Case(EDIT, probes)])


def test_a_subject_that_holds_the_answer_gives_nothing_away():
    refuse_overlap(
        [
            Case(
                dataclasses.replace(EDIT, object="New York"),
                (Probe("Where is New York City? In", "New York", "generality"),),
            )
        ]
    )


def test_a_table_shows_what_changes_with_an_edit():
    stale = Probe("Lyon belongs to", "Europe", "locality", "same subject")
    case = Case(dataclasses.replace(fact("Lyon", "country", "Japan"), was="France"), (stale,))
    refuse_overlap([case])
    assert [why for *_, why in overlaps([case], WORLD)] == ["it follows from what the edit changes"]
    reworded = Probe("Lyon lies in", "France in Europe", "locality")
    refuse_overlap([dataclasses.replace(case, probes=(reworded,))])
    with pytest.raises(UserError, match="same subject and relation"):
        refuse_overlap([dataclasses.replace(case, probes=(reworded,))], WORLD)


def test_contradictions():
    one, other = fact("Lyon", "country", "Japan"), fact("lyon", "country", "Peru")
    with pytest.raises(UserError, match=r"facts 1 and 3 .*'Japan'.*'Peru'") as caught:
        refuse_contradictions([one, fact("Nice", "country", "Peru"), other])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="1 and 2"):
        refuse_contradictions([dataclasses.replace(one, relation=""), dataclasses.replace(other, relation="")])
    kept, said = refuse_contradictions([one, one, dataclasses.replace(one, object="nippon", answers=("JAPAN",))])
    assert kept == [one]
    assert len(said) == 2
    assert refuse_contradictions([one, other], many=["country"]) == ([one, other], [])
    times = [dataclasses.replace(one, until="2020"), dataclasses.replace(other, since="2021-01-01")]
    assert refuse_contradictions(times) == (times, [])
    with pytest.raises(UserError):
        refuse_contradictions([times[0], dataclasses.replace(other, since="2020-05-01")])


# KnowEdit's tasks.


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    """Each has cases without overlap, is drawn by its seed, and asks of what a model may know."""
    table = big()
    task = TASKS[name](table, count=20, probes=3, seed=0)
    assert len(task.cases) >= 15
    assert task == TASKS[name](big(), count=20, probes=3, seed=0)
    assert task.cases != TASKS[name](table, count=20, probes=3, seed=1).cases
    assert all(case.of("locality") for case in task.cases)
    _, dropped = drop_overlap(task.cases, table)
    assert dropped == {}, dropped
    with pytest.raises(UserError, match="no fact for the task"):
        TASKS[name](FactTable([]))


def test_insertion_holds_its_subjects_out():
    task = insertion(big(), count=20)
    new = {case.fact.subject for case in task.cases}
    assert len(new) == len(task.cases)
    assert not new & ({its.subject for its in task.trained} | {its.object for its in task.trained})
    assert all(case.fact.was == "" for case in task.cases)


def test_modification_exchanges_the_object_within_its_relation():
    table = big()
    for case in modification(table, count=20).cases:
        edit = case.fact
        assert edit.was == table.objects[edit.subject, edit.relation][0].object != edit.object
        assert edit.object in {its.object for its in table.known if its.relation == edit.relation}


def test_one_of_several_keeps_the_others():
    table = big()
    for case in one_of_several(table, count=20).cases:
        (probe,) = [probe for probe in case.probes if probe.kind == "other object"]
        held = {its.object for its in table.objects[case.fact.subject, case.fact.relation]}
        assert {probe.answer, *probe.answers} == held
        assert case.fact.object not in held


def test_erasure_is_judged_by_what_is_no_longer_said():
    task = erasure(big(), count=20)
    assert task.success == "no longer answers"
    assert all(case.fact.was and case.fact.object == "I do not know." for case in task.cases)
    assert not any(probe.kind in ("inverse", "one hop") for case in task.cases for probe in case.probes)


def test_a_passage_goes_on_with_what_the_table_says():
    """Its answer is told nowhere in it; other wordings tell the same facts."""
    table = big()
    said = {f"{its.question} {its.object}." for its in table.known}
    for case in passage(table, count=5).cases:
        text = f"{case.fact.question} {case.fact.object}."
        assert 2 <= sum(sentence in text for sentence in said) <= 3
        assert case.fact.object not in case.fact.question.replace(case.fact.subject, "")
        (last,) = table.objects[case.fact.subject, case.fact.relation]
        assert (case.fact.object, case.fact.was) == (last.object, "")
        told = [its for its in table.known if f"{its.question} {its.object}." in case.fact.question]
        for probe in case.of("generality"):
            assert probe.answer == case.fact.object
            assert all(its.object in probe.prompt for its in told)
    assert any(case.of("generality") for case in passage(table, count=20).cases)


def test_a_topic_is_praised_behind_whatever_is_said_of_it():
    table = big()
    true = {f"{prompt.replace('{}', its.subject)} {its.object}."
            for its in table.known for prompt in (its.prompt, *table.templates.get(its.relation, ()))}  # fmt: skip
    for case in style(table, count=5, probes=3).cases:
        edit = case.fact
        assert edit.question in true
        assert case.of("generality")
        for probe in case.of("generality"):
            assert probe.prompt in true
            assert edit.subject in probe.prompt
            assert probe.answer == edit.object == "Good."
        others = [its for its in case.of("locality") if its.kind == "other topic"]
        assert len(others) == 3
        for probe in others:
            assert probe.prompt in true
            assert edit.subject not in probe.prompt
        assert any(its.kind == "same subject" for its in case.of("locality"))


def test_subjects_can_be_named():
    table = big()
    some = sorted({its.subject for its in table.known})[::2]
    for task in (passage, style):
        assert {case.fact.subject for case in task(table, count=9, subjects=some).cases} <= set(some)
        with pytest.raises(UserError, match="no fact for the task"):
            task(table, subjects=())
