"""Methods that look at data, from the command line: Hugging Face folders in, Hugging Face folders out."""

import json
from pathlib import Path

import made
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from koinon.data.checkpoints import file_digest, open_weights
from koinon.merge._contract import Pool
from koinon.merge._files import digest_of
from koinon.merge._hub import load_model, load_tokenizer, load_twin, tokens
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.nn.params import stream

LABELS = {"base": 2, "colours": 2, "places": 3}
OWN = ("--own", "classifier.*")
QUICK = {"adamerging": ("--steps", "2"), "regmean": (), "fisher": (), "twin": ("--epochs", "2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT for two labels, two models tuned from it for two and three labels, and texts for each."""
    where = tmp_path_factory.mktemp("hub")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    numbers = stream(0, "hub")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shared: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng():
        for name, labels in LABELS.items():
            config = transformers.BertConfig(vocab_size=32, max_position_embeddings=32, num_labels=labels, **sizes)
            model = transformers.BertForSequenceClassification(config)
            state = model.state_dict()
            for tensor, value in state.items():
                if not tensor.startswith("classifier"):
                    start = shared.setdefault(tensor, torch.randn(value.shape, generator=numbers) * 0.3)
                    step = 0.0 if name == "base" else 0.1
                    value.copy_(start + step * torch.randn(value.shape, generator=numbers))
                else:
                    value.copy_(torch.randn(value.shape, generator=numbers))
            model.save_pretrained(where / name)
            kept.save_pretrained(where / name)
    for task, first in (("colours", 0), ("places", 15)):
        lines = [" ".join(f"w{first + (i * j) % 15}" for j in range(1, 5)) for i in range(24)]
        (where / f"{task}.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = [json.dumps({"text": "w1 w2 w3"}), json.dumps({"text": "w20 w21"})]
    (where / "new.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return where


def merge(folder: Path, method: str, out: str, *words: str) -> tuple[str, ...]:
    experts, data = [[str(folder / f"{task}{end}") for task in ("colours", "places")] for end in ("", ".txt")]
    base = str(folder / "base")
    place = ("--out", str(folder / out))
    return ("merge", method, "--base", base, "--experts", *experts, "--data", *data, *OWN, *place, *words)


@pytest.mark.parametrize("method", [name for name in QUICK if name != "twin"])
def test_a_merged_model_is_a_hugging_face_folder(folder, capsys, method):
    said = made.say(capsys, *merge(folder, method, f"out-{method}", *QUICK[method], "--json"))
    assert said.code == 0, said
    out = folder / f"out-{method}"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    base = load_file(folder / "base" / "model.safetensors")
    state = model.state_dict()
    assert torch.equal(state["classifier.weight"], base["classifier.weight"])
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(state[query], base[query])
    assert load_tokenizer(out).vocab_size == 32
    heads = load_file(out / "own" / "places.safetensors")
    assert torch.equal(
        heads["classifier.weight"], load_file(folder / "places" / "model.safetensors")["classifier.weight"]
    )
    assert json.loads((out / "koinon.json").read_text())["methods"] == [json.loads(said.out)["method"]]


def test_a_twin_is_kept_and_answers(folder, capsys):
    assert made.say(capsys, *merge(folder, "twin", "twin", "--rank", "1.0", "--epochs", "2")).code == 0
    twin = load_twin(folder / "twin")
    inputs = tokens(load_tokenizer(folder / "twin"), ["w1 w2 w3", "w20 w21"], 16)
    # With all weight on a model, at full rank, a row meets that model.
    for task, labels in (("colours", 2), ("places", 3)):
        weights = torch.tensor([[float(task == its) for its in twin.tasks]] * 2)
        with torch.no_grad():
            expected = load_model(folder / task)(**inputs).logits
            found = twin.with_weights(inputs, weights)
        torch.testing.assert_close(found[:, :labels], expected, rtol=1e-3, atol=1e-4)
    answers = folder / "answers.jsonl"
    said = made.say(capsys, "merge", "predict", folder / "twin", "--texts", folder / "new.jsonl", "--out", answers)
    assert said.code == 0, said
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor([list(its["weights"].values()) for its in lines]), twin.route(inputs))
    assert [list(its["weights"]) for its in lines] == [["colours", "places"]] * 2
    one = folder / "one"
    said = made.say(capsys, "merge", "materialize", folder / "twin", "--weights", "0", "1", "--out", one)
    assert said.code == 0, said
    with torch.no_grad():
        one_says, place_says = (load_model(path)(**inputs).logits for path in (one, folder / "places"))
    torch.testing.assert_close(one_says, place_says, rtol=1e-3, atol=1e-4)


def test_the_command_line_merges_as_python_does(folder, capsys):
    pool = Pool(load_model(folder / "base"), {t: load_model(folder / t) for t in ("colours", "places")}, own=OWN[1:])
    live = TaskArithmetic().merge(pool).state_dict()
    words = [word for word in merge(folder, "task_arithmetic", "out-files") if not word.endswith(".txt")]
    for word in ("--data", *OWN):
        words.remove(word)
    assert made.say(capsys, *words, "--only", "bert.*").code == 0
    assert all(
        torch.equal(value, live[name]) for name, value in load_file(folder / "out-files/model.safetensors").items()
    )


def test_what_is_wrong_is_one_line(folder, capsys):
    before = made.held(folder)
    cases = {
        ("--data", str(folder / "colours.txt")): ("--data", "1 files for 2 models"),
        ("--data", str(folder / "colours.txt"), str(folder / "none.txt")): ("none.txt", "cannot be read"),
        ("--own", "nothing.*"): ("places", "classifier.bias", "a head"),
        ("--out", str(folder / "base")): ("is read",),
    }
    for words, says in cases.items():
        made.assert_one_line(made.say(capsys, *merge(folder, "adamerging", "out-wrong"), *words), *says)
    made.assert_one_line(made.say(capsys, "merge", "predict", folder / "base", "--texts", "x", "--out", "y"), "no twin")
    assert made.held(folder) == before


def test_damaged_twins_and_unknown_architectures_are_one_line(folder, capsys, tmp_path):
    assert made.say(capsys, *merge(folder, "twin", "twin-2", "--epochs", "1")).code == 0
    kept = folder / "twin-2" / "twin.safetensors"
    kept.write_bytes(kept.read_bytes()[:-100])
    words = ("--texts", folder / "new.jsonl", "--out", tmp_path / "answers.jsonl")
    made.assert_one_line(made.say(capsys, "merge", "predict", folder / "twin-2", *words), "twin-2", "damaged")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    (tmp_path / "odd" / "twin.json").write_text("{}")
    made.assert_one_line(made.say(capsys, "merge", "predict", tmp_path / "odd", *words), "NoSuchModel")


def changed(folder: Path, name: str, where: Path, change) -> Path:
    """A copy of a model with other tensors, where nothing else reads it."""
    where.mkdir()
    for file in (folder / name).iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    state = load_file(where / "model.safetensors")
    change(state)
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    return where


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DAMAGE = {
    "NaN": (lambda state: state[QUERY].fill_(torch.nan), ("odd", "NaN", QUERY)),
    "infinity": (lambda state: state[QUERY][0].fill_(torch.inf), ("odd", "infinity", QUERY)),
    "a tensor too few": (lambda state: state.pop(QUERY), ("odd", "no tensor", QUERY)),
    "a tensor too many": (lambda state: state.update(extra=torch.ones(2, 3)), ("odd", "extra")),
    "another shape": (lambda state: state.update({QUERY: torch.ones(4, 4)}), ("odd", QUERY, "4 x 4")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_models_that_do_not_fit_are_named_by_their_tensor(folder, capsys, tmp_path, kind):
    damage, says = DAMAGE[kind]
    odd = changed(folder, "places", tmp_path / "odd", damage)
    for method in ("regmean", "fisher", "adamerging"):
        words = [str(odd) if its == str(folder / "places") else its for its in merge(folder, method, "out-odd")]
        made.assert_one_line(made.say(capsys, *words), *says)
        assert not (folder / "out-odd").exists()


def test_a_dry_run_of_a_method_that_looks_at_data_writes_nothing(folder, capsys):
    before = made.held(folder)
    said = made.say(capsys, *merge(folder, "twin", "out-dry"), "--dry-run", "--json")
    assert said.code == 0, said
    told = json.loads(said.out)
    assert told["texts"] == {"colours": 24, "places": 24}
    assert told["tensors"]["merged"] == len(load_file(folder / "base" / "model.safetensors")) - 2
    assert made.held(folder) == before


WRONG = {
    ("--only", "bert.*"): ("--only", "whole models"),
    ("--workers", "2"): ("--workers",),
    ("--rounding", "every-step"): ("--rounding",),
    ("--missing",): ("--missing",),
    ("--shard-gb", "-1"): ("--shard-gb",),
    ("--steps", "-1"): ("steps -1", "from 0"),
    ("--rate", "-1"): ("rate -1",),
    ("--longest", "0"): ("--longest",),
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_settings_that_cannot_be_are_one_line(folder, capsys, words):
    before = made.held(folder)
    made.assert_one_line(made.say(capsys, *merge(folder, "adamerging", "out-set"), *words), *WRONG[words])
    assert made.held(folder) == before


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("regmean", ("--ridge", "-5"), "ridge -5"),
        ("regmean", ("--shrink", "2"), "shrink 2"),
        ("fisher", ("--floor", "-1"), "floor -1"),
        ("twin", ("--lr", "-1"), "lr -1"),
        ("twin", ("--epochs", "0"), "epochs 0"),
        ("dam", ("--adv-rate", "-1"), "adv_rate -1"),
    ],
)
def test_each_methods_settings_are_checked(folder, capsys, method, words, says):
    made.assert_one_line(made.say(capsys, *merge(folder, method, "out-range"), *words), says)
    assert not (folder / "out-range").exists()


def test_texts_longer_than_a_model_has_places_are_cut(folder, capsys, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(["w1"] * 60) + "\nw2 w3", encoding="utf-8")
    words = [
        str(tmp_path / "long.txt") if its.endswith("colours.txt") else its for its in merge(folder, "regmean", "cut")
    ]
    assert made.say(capsys, *words).code == 0


def test_the_manifest_tells_what_was_read(folder, capsys):
    assert made.say(capsys, *merge(folder, "regmean", "told")).code == 0
    found = json.loads((folder / "told" / "koinon.json").read_text())
    for name in ("colours", "places"):
        its = found["models"][name]
        assert its["tensors sha256"] == digest_of(open_weights(folder / name))
        assert its["texts sha256"] == file_digest(folder / f"{name}.txt")
    assert found["base"]["tensors sha256"] == digest_of(open_weights(folder / "base"))


def test_what_a_twin_is_asked_wrongly_is_one_line(folder, capsys, tmp_path):
    assert made.say(capsys, *merge(folder, "twin", "asked", "--epochs", "1")).code == 0
    predict = ("merge", "predict", folder / "asked", "--texts", folder / "new.jsonl", "--out")
    made.assert_one_line(made.say(capsys, *predict, tmp_path, "--longest", "8"), "is a folder")
    made.assert_one_line(made.say(capsys, *predict, tmp_path / "a.jsonl", "--longest", "-3"), "--longest")
    one = ("merge", "materialize", folder / "asked", "--out", tmp_path / "one", "--weights", "nan", "1")
    made.assert_one_line(made.say(capsys, *one), "finite")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(folder, capsys, monkeypatch):
    def full(*args, **settings):
        raise SafetensorError("Error while serializing: IoError(No space left on device)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    before = made.held(folder)
    made.assert_one_line(made.say(capsys, *merge(folder, "regmean", "full")), "cannot be written", "No space")
    assert made.held(folder) == before
