"""What can be wrong with facts, models and edits is one line that says what and where; nothing is left or touched."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import made
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_edit_job import STRONG, WORDS, cases
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from koinon.core import UserError
from koinon.data.factfiles import write_cases
from koinon.data.facts import Fact
from koinon.edit import _checks as tiny
from koinon.edit._edited import Material
from koinon.edit._requests import teachable
from koinon.edit.finetune import Finetune
from koinon.edit.grace import Grace
from koinon.edit.job import save
from koinon.edit.wise import Wise
from koinon.lm.folders import write
from koinon.lm.language import LM


class Wrong(NamedTuple):
    """A command that must fail: its words, what it says, and how the folder is made wrong beforehand."""

    words: tuple
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None


def edit(
    *more: object, method: tuple = WORDS, model: str = "lm", facts: str = "facts.jsonl", out: str = "out"
) -> tuple:
    return ("edit", *method, "--model", model, "--facts", facts, "--out", out, *more)


def compared(*methods: str, out: str = "o") -> tuple:
    return ("edit", "compare", "--model", "lm", "--facts", "facts.jsonl", "--out", out, "--methods", *methods)


def ask(folder: str = "edited", model: str = "lm") -> tuple:
    return ("edit", "ask", folder, "Lyon is a city in", "--model", model)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """The tiny model in a folder, another one, and edits of the first."""
    folder = tmp_path_factory.mktemp("made")
    given = tiny.small()
    write(given.lm.model, given.lm.tokenizer, folder / "lm")
    other = tiny.edited(STRONG, given)
    write(other.lm.model, other.lm.tokenizer, folder / "other")
    write_cases(folder / "facts.jsonl", cases())
    lm = LM.load(folder / "lm")
    for name, method in {
        "edited": STRONG,
        "sides": Wise(layer=1, steps=1, count=0),
        "codes": Grace(layer=1, steps=1),
    }.items():
        save(method.edit(lm, tiny.FACTS, Material(unrelated=tiny.TEXTS)), folder / name, "lm")
    return folder


@pytest.fixture
def here(made_once, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made_once, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setenv("KOINON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "x"


# Ways to make things wrong.


def says(*facts: dict, file: str = "facts.jsonl") -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text("".join(json.dumps(its) + "\n" for its in facts))


def fact(subject: str = "Lyon", object: str = "Japan", prompt: str = "{} is a city in", **more: object) -> dict:
    return {"subject": subject, "object": object, "prompt": prompt, **more}


def without(*names: str, folder: str = "lm") -> Callable[[Path], object]:
    def prepare(here: Path) -> None:
        for name in names:
            for file in (here / folder).glob(name):
                file.unlink()

    return prepare


def pickled(here: Path) -> None:
    without("*.safetensors")(here)
    (here / "lm" / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def masked(here: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(here / "lm")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 1.0,
    }
    shutil.rmtree(here / "lm")
    write(
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes)),
        tokenizer,
        here / "lm",
    )


def with_tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: str = "edited"
) -> Callable[[Path], object]:
    def prepare(here: Path) -> None:
        file = here / folder / "edit.safetensors"
        save_file(change(load_file(file)), file)

    return prepare


def with_about(change: Callable[[dict], object], folder: str = "edited") -> Callable[[Path], object]:
    def prepare(here: Path) -> None:
        file = here / folder / "koinon.json"
        about = json.loads(file.read_text())
        change(about)
        file.write_text(json.dumps(about))

    return prepare


NAME = "model.layers.1.mlp.down_proj.weight"
FACTS = {
    "subject not in the prompt": Wrong(
        edit(), ("facts.jsonl:1", "does not hold the subject 'Lyon'"), says(fact(prompt="Oslo is a city in"))
    ),
    "empty target": Wrong(edit(), ("facts.jsonl:1", "object"), says(fact(object=" "))),
    "several sentences": Wrong(
        edit(), ("'Lyon is a city in'", "several sentences"), says(fact(object="Japan. It lies in the east of Asia."))
    ),
    "several lines": Wrong(edit(), ("several sentences",), says(fact(object="Japan\nand Asia"))),
    "target in the prompt": Wrong(
        edit(), ("says the object 'in' already",), says(fact(object="in"))
    ),
    "a token that prompt and target share": Wrong(
        edit(),
        ("'Lyon is a city in '", "become one token", "without a blank"),
        says(fact(object="Peru", prompt="{} is a city in ")),
    ),
    "columns of other names": Wrong(
        edit(), ("facts.jsonl:", "'head, relation, tail'", "call them subject, object and prompt (or relation)"),
        lambda here: (here / "facts.jsonl").write_text("head,relation,tail\nLyon,country,Japan\n"),
    ),
    "contradiction": Wrong(
        edit(), ("facts.jsonl", "facts 1 and 2 contradict each other"), says(fact(), fact(object="Italy"))
    ),
    "unknown layer": Wrong(edit(method=("rome", "--layer", 7)), ("layer 7", "from 0 to 2")),
    "no facts": Wrong(edit(), ("facts.jsonl: is empty",), says()),
    "no such file": Wrong(edit(facts="absent.jsonl"), ("absent.jsonl",)),
    "a probe among what must stay": Wrong(
        edit("--unrelated", "u.txt"), ("u.txt", "'Kyoto is a city in' is a probe"),
        lambda here: (here / "u.txt").write_text("Kyoto is a city in\n"),
    ),
    "taught facts to train on": Wrong(
        edit("--train", "facts.jsonl"), ("'Lyon is a city in' is taught", "train on other facts")
    ),
    "no texts": Wrong(edit("--corpus", "c.txt"), ("c.txt", "holds no text"), lambda here: (here / "c.txt").touch()),
    "a corpus that is not there": Wrong(edit("--corpus", "c.txt"), ("c.txt: cannot be read",)),
    "nothing to train on": Wrong(edit(method=("mend",)), ("cases to train on",)),
}  # fmt: skip
MODELS = {
    "no tokenizer": Wrong(edit(), ("lm: no tokenizer in it",), without("tok*", "vocab*")),
    "only pickled weights": Wrong(edit(), ("lm: only pickled weights",), pickled),
    "a masked model": Wrong(edit(), ("lm", "fills in what is hidden"), masked),
    "no such folder": Wrong(edit(model="./absent"), ("./absent: no such folder",)),
    "no model": Wrong(edit(), ("lm: no config.json",), without("config.json")),
    "damaged weights": Wrong(
        edit(), ("lm: no language model",), lambda here: (here / "lm" / "model.safetensors").write_bytes(b"x" * 9)
    ),
}
PLACES = {
    "output exists": Wrong(edit(out="edited"), ("edited: exists already",)),
    "output in a file": Wrong(edit(out="facts.jsonl/x"), ("facts.jsonl is a file",)),
    "the whole exists": Wrong(edit("--whole", "lm"), ("lm: exists already",)),
    "no whole of a codebook": Wrong(
        edit("--whole", "w", method=("grace", "--layer", 1)), ("--whole", "Grace", "beside the model")
    ),
    "no place for a report": Wrong(edit("--report", "absent/r.html"), ("absent/r.html", "there is no folder")),
    "nothing to go on from": Wrong(edit("--after", "lm"), ("lm: holds no edits",)),
    "another method before": Wrong(
        edit("--after", "edited", method=("rome", "--layer", 1)), ("edited", "by Finetune(")
    ),
    "undone to where something is": Wrong(("edit", "undo", "edited", "--out", "lm"), ("lm: exists already",)),
    "more undone than there is": Wrong(("edit", "undo", "edited", "--last", 3, "--out", "o"), ("undo 3",)),
    "figure of an unknown kind": Wrong(
        ("edit", "locate", "--model", "lm", "--facts", "facts.jsonl", "--out", "t.txt"), ("t.txt", ".png")
    ),
    "unknown method": Wrong(edit(method=("rom",)), ("'rom'", "'rome'")),
    "unknown method to compare": Wrong(
        ("edit", "compare", "--model", "lm", "--facts", "facts.jsonl", "--out", "o", "--methods", "rom"), ("'rome'",)
    ),
    "unknown setting to compare": Wrong(
        ("edit", "compare", "--model", "lm", "--facts", "facts.jsonl", "--out", "o", "--methods", "rome:layr=1"),
        ("'layr'", "'layer'"),
    ),
    "a word for a number": Wrong(
        ("edit", "compare", "--model", "lm", "--facts", "facts.jsonl", "--out", "o", "--methods", "rome:steps=few"),
        ("rome:steps=few: steps 'few'", "a whole number"),
    ),
    "a folder of something else": Wrong(compared("rome:layer=1", out="edited"), ("edited: holds something else",)),
    "nothing to compare": Wrong(compared(), ("nothing to compare", "give one method or more")),
    "no batch to compare": Wrong(compared("rome", "--ways", "batch"), ("--methods rome", "learns a batch")),
    "nothing that can be taught": Wrong(compared("rome:layer=77"), ("o: nothing could be taught", "layer 77")),
    "a comparison within the model": Wrong(compared("rome", out="lm/o"), ("lm/o: is lm or within it",)),
    "a report that is a folder": Wrong(edit("--report", "edited"), ("edited: is a folder",)),
    "output and whole in one place": Wrong(edit("--whole", "out"), ("out: is the same as out", "places apart")),
    "the report within the output": Wrong(edit("--report", "./out"), ("out: is the same as out",)),
    "the whole within the output": Wrong(edit("--whole", "out/w"), ("out/w: is the same as out, or", "within")),
    "a whole where none can be": Wrong(edit("--whole", "/proc/x"), ("/proc/x: cannot be written",)),
    "a report over the weights": Wrong(
        edit("--report", "lm/model.safetensors"), ("lm/model.safetensors: is lm or within it, which is read",)
    ),
    "a report over the facts": Wrong(edit("--report", "facts.jsonl"), ("facts.jsonl: is facts.jsonl or within it",)),
    "output within the model": Wrong(edit(out="lm/o5"), ("lm/o5: is lm or within it",)),
    "output within the earlier edits": Wrong(edit("--after", "edited", out="edited/o"), ("edited/o: is edited",)),
    "undone within the edits": Wrong(("edit", "undo", "edited", "--out", "edited/o"), ("edited/o: is edited",)),
    "a figure over the model": Wrong(
        ("edit", "locate", "--model", "lm", "--facts", "facts.jsonl", "--out", "lm/t.png"), ("lm/t.png: is lm",)
    ),
    "locality that nobody measured": Wrong(("edit", "advise", "--keep-locality", 0.9), ("--measured",)),
    "a share above all": Wrong(("edit", "advise", "--keep-locality", 1.1), ("from 0 to 1",)),
    "nothing measured": Wrong(("edit", "advise", "--measured", "lm"), ("lm: holds no locality",)),
}  # fmt: skip
EDITS = {
    "NaN": Wrong(
        ask(), (f"{NAME} holds NaN",), with_tensors(lambda its: {name: its[name] * torch.nan for name in its})
    ),
    "another base": Wrong(ask(model="other"), ("edited: made on another base, 'lm'",)),
    "another shape": Wrong(
        ask(), (f"{NAME}: the edit is for 31 x 64, the base has 32 x 64",),
        with_tensors(lambda its: {name: value[1:] for name, value in its.items()}),
    ),
    "an unknown parameter": Wrong(
        ask(), ("edited: damaged", "other tensors than were written"),
        with_tensors(lambda its: {"model.layer.weight": next(iter(its.values()))}),
    ),
    "no tensors in the file": Wrong(
        ask(), ("edited: damaged", "other tensors than were written"), with_tensors(lambda its: {})
    ),
    "more steps than the edits have": Wrong(
        ask(), ("edited: damaged", "3 steps, and edits of 1"),
        with_about(lambda its: its.update(steps=its["steps"] * 3))
    ),
    "a probe of no kind": Wrong(
        ask(), ("edited: aspect 'x': give 'reliability' or",),
        with_about(lambda its: its["steps"][0][0].update(probes=[{"prompt": "a", "answer": "b", "aspect": "x"}])),
    ),
    "a matrix of sides turned": Wrong(
        ask("sides"), (f"{NAME}: the edit is for 64 x 32, the base has 32 x 64",),
        with_about(lambda its: its["packed"].update({"side 0": [64, 32]}), "sides"),
    ),
    "a matrix of sides without end": Wrong(
        ask("sides"), ("sides: damaged", "bits of 256 bytes for 1000000000000 entries"),
        with_about(lambda its: its["packed"].update({"side 0": [10**6, 10**6]}), "sides"),
    ),
    "a packed matrix that lacks": Wrong(
        ask("sides"), ("sides: damaged",), with_about(lambda its: its["packed"].update({"side 1": [32, 64]}), "sides")
    ),
    "values that lack": Wrong(
        ask("sides"), ("sides: damaged", "410 places"),
        with_tensors(lambda its: its | {"side 0:values": its["side 0:values"][:9].contiguous()}, "sides"),
    ),
    "a score that is none": Wrong(
        ask("sides"), ("sides: scores nan",),
        with_about(lambda its: its["patch"]["sides"][0].update(scores=[float("nan")] * 2), "sides"),
    ),
    "a step that is none": Wrong(
        ask("sides"), ("sides: damaged", "steps that are in no side"),
        with_about(lambda its: its["patch"]["sides"][0].update(steps=[0, 7]), "sides"),
    ),
    "no way of asking": Wrong(
        ask("sides"), ("sides: over 'x': give 'mean' or",),
        with_about(lambda its: its["patch"]["asking"]["excitement"].update(over="x"), "sides"),
    ),
    "a codebook's values cut": Wrong(
        ask("codes"), ("the edit is for 5 x 64, the base has 32 x 64",),
        with_tensors(lambda its: its | {"values": its["values"][:, :5].contiguous()}, "codes"),
    ),
    "infinity in the scores": Wrong(
        ask(), ("edited: damaged",), with_about(lambda its: its.update(scores={"reliability": float("inf")}))
    ),
    "truncated": Wrong(
        ask(), ("edit.safetensors: damaged",),
        lambda here: (here / "edited" / "edit.safetensors").write_bytes(b"\x10" + bytes(20)),
    ),
    "a pickle": Wrong(
        ask(), ("edit.safetensors: damaged",),
        lambda here: (here / "edited" / "edit.safetensors").write_bytes(pickle.dumps({"a": 1})),
    ),
    "no tensors": Wrong(ask(), ("edited: holds no edits",), without("edit.safetensors", folder="edited")),
    "a foreign folder": Wrong(ask("lm"), ("lm: holds no edits",)),
    "no JSON": Wrong(
        ask(), ("cannot be read as JSON",), lambda here: (here / "edited" / "koinon.json").write_text("{")
    ),
    "another format": Wrong(ask(), ("of format 99",), with_about(lambda its: its.update(format=99))),
    "a part lacks": Wrong(ask(), ("edited: damaged",), with_about(lambda its: its.pop("steps"))),
    "no facts in a step": Wrong(ask(), ("edited: damaged",), with_about(lambda its: its.update(steps=[[]]))),
    "a number for a text": Wrong(
        ask(), ("edited: subject 3: give a text",), with_about(lambda its: its["steps"][0][0].update(subject=3))
    ),
    "a method that is a path": Wrong(
        ask(), ("is none of koinon's",), with_about(lambda its: its["method"].update(method="../evil.py"))
    ),
    "an unknown setting": Wrong(
        ask(), ("'colour'",), with_about(lambda its: its["method"]["settings"].update(colour=1))
    ),
}  # fmt: skip
WRONG = (
    *("finetune --rate nan", "finetune --rate -1", "finetune --rate inf", "lora --rate nan", "lora --rank 0"),
    *("rome --lengths 0", "rome --steps -1", "memit --weight -1", "alphaedit --spread 0", "kn --steps 0"),
    *("dilute --spacing 0", "dilute --steps -1", "dilute --longest 0", "mend --together 0", "mend --layers 0"),
    *("serac --layers 0", "serac --rate nan", "ike --count -1", "ike --kinds 0 -1 1", "grace --radius -1"),
    *("wise --share -1", "wise --share 2", "wise --shard 0", "wise --shards 0", "wise --quantile -1"),
)
SETTINGS = (
    {
        words: Wrong(
            edit(method=tuple(words.split()), model="./absent"), (words.split()[1].strip("-"), "give a number from")
        )
        for words in WRONG
    }
    | {
        f"compare {word}": Wrong(
            ("edit", "compare", "--model", "./absent", "--facts", "facts.jsonl", "--out", "o", "--methods", word), right
        )
        for word, right in {
            "rome:layer=x": ("layer 'x'", "a whole number or 'auto'"),
            "rome:keys=banana": ("keys 'banana'", "'mean' or 'release'"),
            "rome:lengths=5": ("lengths 5", "(a whole number, ...)"),
            "rome:lengths=(5,0)": ("lengths 0", "from 1"),
            "rome:lengths=(5,10),whiten=1": ("whiten 1", "True or False"),
            "wise:over=banana": ("over 'banana'",),
        }.items()
    }
    | {
        "more layers than there are": Wrong(edit(method=("mend", "--layers", 9)), ("layers 9", "has 3")),
        "no such device": Wrong(edit("--device", "ipu"), ("device 'ipu': cannot be used",)),
    }
)
"""Before a model is read, where that is possible."""
ALL = FACTS | MODELS | PLACES | EDITS | SETTINGS


@pytest.mark.parametrize("wrong", ALL.values(), ids=ALL)
def test_it_is_one_line_and_nothing_is_touched(wrong, capsys, here):
    wrong.prepare(here)
    before = made.held(here)
    made.assert_one_line(made.say(capsys, *wrong.words), *wrong.says)
    assert made.held(here) == before


def test_evil_in_a_folder_is_not_run(capsys, here):
    """A method's file named by a folder would run as code."""
    (here / "evil.py").write_text("open('was here', 'w')")
    with_about(lambda its: its["method"].update(method="evil.py"))(here)
    with_about(lambda its: its["base"].update(name=str(here / "other")))(here)
    made.assert_one_line(made.say(capsys, *ask()), "is none of koinon's")
    assert not (here / "was here").exists()


def test_a_method_that_diverges_leaves_nothing(capsys, here, monkeypatch):
    plain = Finetune.harm
    monkeypatch.setattr(Finetune, "harm", lambda *given: plain(*given) * torch.nan)
    before = made.held(here)
    made.assert_one_line(made.say(capsys, *edit()), "diverged", f"{NAME} holds NaN or infinity", "model is unchanged")
    assert made.held(here) == before


def test_what_is_written_first_goes_where_the_rest_cannot_be(capsys, here, monkeypatch):
    """The folder for the report is taken away while the method learns."""
    (here / "later").mkdir()
    plain = Finetune.harm

    def harm(*given):
        shutil.rmtree(here / "later", ignore_errors=True)
        return plain(*given)

    monkeypatch.setattr(Finetune, "harm", harm)
    words = edit("--whole", "whole", "--report", "later/r.html")
    made.assert_one_line(made.say(capsys, *words), "later/r.html: cannot be written")
    assert not (here / "out").exists()
    assert not (here / "whole").exists()


def test_a_fact_said_twice_is_left_out_and_said(capsys, here):
    says(fact(), fact())(here)
    said = made.say(capsys, *edit("--json"))
    assert json.loads(said.out)["facts"] == 1
    assert "fact 2 ('Lyon is a city in': 'Japan') says what fact 1 says: left out" in said.err


def test_a_small_sample_of_statistics_is_said(capsys, here):
    (here / "c.txt").write_text("Lyon is a city.\n")
    words = ("rome", "--layer", 1, "--count", 0, "--steps", 2)
    said = made.say(capsys, *edit("--corpus", "c.txt", method=words))
    assert said.code == 0, said.err
    lines = [line for line in said.err.splitlines() if "diagonal" in line]
    assert len(lines) == 1
    assert lines[0].startswith("koinon: model.layers.1.mlp.down_proj: ")
    assert "larger corpus" in json.loads((here / "out" / "koinon.json").read_text())["warnings"][0]


def test_the_advice_on_contradictions_can_be_followed(capsys, here):
    says(fact(until="2020", prompt="In 2020 {} was a city in"), fact(object="Peru", since="2021"))(here)
    assert made.say(capsys, *edit()).code == 0


def test_no_chat_template_is_needed(capsys, here):
    assert LM.load(here / "lm").tokenizer.chat_template is None
    assert made.say(capsys, *edit()).code == 0


@pytest.mark.parametrize(
    "object",
    [
        *("Japan. Big.", "Japan. It's big", "日本。大きいです。", "in 1990. It is old.", "Япония. Она большая."),
        *("Washington D.C. That is far. Too far.", "जापान। बड़ा", "Who said that? Nobody knows."),
    ],
)
def test_two_sentences_are_no_answer(object):
    with pytest.raises(UserError, match="several sentences"):
        teachable(tiny.small().lm, [Fact("Lyon", object, "{} is a city in")])


@pytest.mark.parametrize(
    "object",
    [
        *("St. Louis", "Dr. No", "the U.S. Army Air Forces", "Prof. Max Planck", "Yahoo! Inc", "Yahoo! Inc.", "No. 5"),
        *("J. R. R. Tolkien", "Washington D.C.", "Washington, D.C.", "Japan.", "in 1990.", "日本。", "1. FC Köln 1948"),
        *("Warner Bros. Discovery", "Sammy Davis Jr.", "Mrs. Dalloway by Woolf", "3.500 km of coast", "Corp. Ltd."),
    ],
)
def test_a_stop_in_a_name_ends_no_sentence(object):
    its = Fact("Lyon", object, "{} is a city in")
    assert teachable(tiny.small().lm, [its]) == [its]
