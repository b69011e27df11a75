"""A model kept from one's own table: files, predictions, replacement, damage; and the lines of Python that do it."""

import json
import math
import os
import shutil
import sys

import made
import numpy as np
import polars as pl
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from koinon import core
from koinon.data.schema import Schema
from koinon.data.tables import read_table
from koinon.nn.tasks import Task, shared_loss
from koinon.nn.train import Batches, fit, predict
from koinon.share import job
from koinon.share.home import HoME
from koinon.share.mmoe import MMoE

FILES = ["model.json", "weights.safetensors"]
SMALL = ["--expert", "4", "--tower", "4", *made.QUICK]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with ``ratings.csv`` and a small HoME kept in ``model``."""
    folder = tmp_path_factory.mktemp("trained")
    made.table(folder)
    train(folder)
    return folder


def train(folder, *more, method="home", out="model", table="ratings.csv"):
    core_arguments = ["share", method, "--table", folder / table, *made.TASKS, *made.COLUMNS, "--out", folder / out]
    made.main([str(argument) for argument in [*core_arguments, *SMALL, *more]])


def predicted(capsys, trained, table, out, *more) -> pl.DataFrame:
    said = made.say(capsys, "share", "predict", trained / "model", "--table", table, "--out", out, *more)
    assert said.code == 0
    return read_table(out)


def test_a_model_is_exactly_two_files(trained):
    assert sorted(path.name for path in (trained / "model").iterdir()) == FILES
    description = json.loads((trained / "model" / "model.json").read_text(encoding="utf-8"))
    assert description["method"]["method"] == "share.home"
    assert description["method"]["settings"]["expert"] == [4]
    assert [task["name"] for task in description["tasks"]] == ["like", "hate", "stars"]
    assert [path.name for path in trained.iterdir() if path.name.startswith(".")] == []


def test_training_tells_what_it_read_and_how_well_it_does(capsys, tmp_path):
    made.table(tmp_path)
    train(tmp_path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["read as"] == {"categories": ["user_id", "city"], "numbers": ["x0", "x1", "x2"]}
    assert facts["split"] == "by each group's own time 80/10/10"
    assert facts["method"].startswith("HoME(")
    assert facts["test"].keys() >= {"like.auc", "like.gauc", "stars.rmse", "stars.r2", "mean.score"}
    model, _ = job.kept(tmp_path / "model")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    train(tmp_path, out="other")
    assert "epoch: 1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_predictions_are_those_of_python_in_the_order_of_the_rows(capsys, trained, tmp_path, kind):
    rows = made.frame(150, seed=7).drop("like", "hate", "stars").sample(fraction=1, shuffle=True, seed=1)
    table, out = tmp_path / f"new.{kind}", tmp_path / f"scores.{kind}"
    rows.write_csv(table) if kind == "csv" else rows.write_parquet(table)
    found = predicted(capsys, trained, table, out)
    assert found.columns == ["like", "hate", "stars"]
    assert len(found) == 150

    model, schema = job.kept(trained / "model")
    inputs = {name: torch.from_numpy(value) for name, value in schema.encode(read_table(table)).items()}
    expected = schema.in_units({name: value.numpy() for name, value in predict(model, inputs).items()})
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].to_numpy(), values)
    first = {name: value[:1] for name, value in inputs.items()}
    assert found["like"][0] == pytest.approx(float(predict(model, first)["like"]), rel=1e-6)
    assert found["like"].is_between(0, 1).all()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_predictions(capsys, trained, tmp_path, kind):
    rows = made.frame(50, seed=7).drop("like", "hate", "stars")
    table = tmp_path / f"new.{kind}"
    match kind:
        case "csv":
            rows.write_csv(table)
        case "tsv":
            rows.write_csv(table, separator="\t")
        case "jsonl":
            rows.write_ndjson(table)
        case "parquet":
            rows.write_parquet(table)
    rows.write_parquet(tmp_path / "same.parquet")
    one = predicted(capsys, trained, table, tmp_path / "one.parquet")
    assert one.equals(predicted(capsys, trained, tmp_path / "same.parquet", tmp_path / "other.parquet"))


def test_a_regression_is_predicted_in_the_units_of_the_table(capsys, tmp_path):
    """Stars lie around 30 with a spread of about 11, far from what a network puts out."""
    made.table(tmp_path)
    train(tmp_path, "--epochs", "10", "--batch", "32", "--rates", "0.01", method="mmoe")
    found = predicted(capsys, tmp_path, tmp_path / "ratings.csv", tmp_path / "scores.csv")
    truth = made.frame()["stars"].to_numpy()
    error = math.sqrt(np.mean((found["stars"].to_numpy() - truth) ** 2))
    assert error < 0.6 * truth.std()
    assert abs(found["stars"].mean() - truth.mean()) < 3


def test_extra_columns_and_their_order_do_not_matter(capsys, trained, tmp_path):
    rows = made.frame(30, seed=7)
    rows.write_csv(tmp_path / "new.csv")
    rows.with_columns(more=pl.lit("x")).select(sorted([*rows.columns, "more"])).write_csv(tmp_path / "turned.csv")
    one = predicted(capsys, trained, tmp_path / "new.csv", tmp_path / "one.csv")
    assert one.equals(predicted(capsys, trained, tmp_path / "turned.csv", tmp_path / "other.csv"))


def test_unseen_and_empty_categories_are_read_as_other(capsys, trained, tmp_path):
    rows = made.frame(3, seed=7).drop("like", "hate", "stars")
    rows.with_columns(city=pl.Series(["Delphi", "Elis", None])).write_csv(tmp_path / "unseen.csv")
    rows.with_columns(user_id=pl.lit(999)).write_csv(tmp_path / "stranger.csv")
    found = predicted(capsys, trained, tmp_path / "unseen.csv", tmp_path / "one.csv")
    assert len(found) == 3
    assert all(math.isfinite(value) for row in found.iter_rows() for value in row)
    assert len(predicted(capsys, trained, tmp_path / "stranger.csv", tmp_path / "other.csv")) == 3
    _, schema = job.kept(trained / "model")
    codes = schema.encode(read_table(tmp_path / "unseen.csv"))["categories"]
    assert codes[:, 1].tolist() == [0, 0, 0]


def test_predictions_replace_a_file_whole(capsys, trained, tmp_path, monkeypatch):
    (tmp_path / "scores.csv").write_text("old")
    found = predicted(capsys, trained, trained / "ratings.csv", tmp_path / "scores.csv")
    assert len(found) == 400
    before = made.held(tmp_path)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said = made.say(
        capsys,
        "share",
        "predict",
        trained / "model",
        "--table",
        trained / "ratings.csv",
        "--out",
        tmp_path / "scores.csv",
    )
    made.assert_one_line(said, "scores.csv", "No space left")
    assert made.held(tmp_path) == before


def test_a_kept_model_is_not_replaced_unasked(capsys, tmp_path):
    made.table(tmp_path)
    train(tmp_path)
    capsys.readouterr()
    first = made.held(tmp_path)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, method="mmoe")
    made.assert_one_line(made.Said(end.value.code, *capsys.readouterr()), "exists already", "--overwrite")
    assert made.held(tmp_path) == first

    train(tmp_path, "--overwrite", method="mmoe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "ratings.csv"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == FILES
    assert json.loads((tmp_path / "model" / "model.json").read_text())["method"]["method"] == "share.mmoe"


def test_a_folder_that_holds_something_else_is_never_replaced(capsys, tmp_path):
    made.table(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    before = made.held(tmp_path)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--overwrite", out="photos")
    made.assert_one_line(made.Said(end.value.code, *capsys.readouterr()), "something else than a model")
    assert made.held(tmp_path) == before


def test_an_empty_folder_is_used(tmp_path):
    made.table(tmp_path)
    (tmp_path / "model").mkdir()
    train(tmp_path, out="model")
    train(tmp_path, out="new/folders/model")
    assert sorted(path.name for path in (tmp_path / "new" / "folders" / "model").iterdir()) == FILES


FAILURES = {
    "disk full": (OSError(28, "No space left on device"), SystemExit),
    "disk full, as safetensors says it": (SafetensorError("No space left on device"), SystemExit),
    "stopped": (KeyboardInterrupt(), SystemExit),
    "a bug": (RuntimeError("a bug"), RuntimeError),
}


@pytest.mark.parametrize("where", ["save_file", "os.replace"])
@pytest.mark.parametrize(("failure", "seen"), FAILURES.values(), ids=FAILURES)
def test_an_interrupted_keep_leaves_what_was_there(capsys, tmp_path, monkeypatch, failure, seen, where):
    """Neither a half-written model, nor none where there was one."""
    made.table(tmp_path)
    train(tmp_path)
    before = made.held(tmp_path)
    capsys.readouterr()
    moves = []
    replace = os.replace

    def fail(*arguments, **options):
        raise failure

    def fail_once_the_old_one_is_aside(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise failure
        replace(source, target)

    if where == "save_file":
        monkeypatch.setattr(job, "save_file", fail)
    else:
        monkeypatch.setattr(os, "replace", fail_once_the_old_one_is_aside)
    for out in ("model", "fresh") if where == "save_file" else ("model",):
        with pytest.raises(seen) as end:
            train(tmp_path, "--overwrite", method="mmoe", out=out)
        assert made.held(tmp_path) == before
        err = capsys.readouterr().err
        if isinstance(failure, OSError | SafetensorError):
            made.assert_one_line(made.Said(end.value.code, "", err), out, "No space left")


DAMAGE = {
    "no folder": lambda model: shutil.rmtree(model),
    "no weights": lambda model: (model / FILES[1]).unlink(),
    "no description": lambda model: (model / FILES[0]).unlink(),
    "empty description": lambda model: (model / FILES[0]).write_text(""),
    "cut description": lambda model: (model / FILES[0]).write_text((model / FILES[0]).read_text()[:300]),
    "other description": lambda model: (model / FILES[0]).write_text('{"format": 1}'),
    "list for a description": lambda model: (model / FILES[0]).write_text("[]"),
    "binary description": lambda model: (model / FILES[0]).write_bytes(b"\xff\xfe\x00"),
    "cut weights": lambda model: (model / FILES[1]).write_bytes((model / FILES[1]).read_bytes()[:-100]),
    "empty weights": lambda model: (model / FILES[1]).write_bytes(b""),
    "unknown setting": lambda model: change(model, lambda d: d["method"]["settings"].update(expertt=3)),
    "unknown method": lambda model: change(model, lambda d: d["method"].update(method="share.hom")),
    "other widths": lambda model: change(model, lambda d: d["method"]["settings"].update(expert=[5])),
    "a task less": lambda model: change(model, lambda d: d["tasks"].pop()),
    "nonsense task": lambda model: change(model, lambda d: d["tasks"][0].update(kind="ordinal")),
}


def change(model, how):
    description = json.loads((model / FILES[0]).read_text())
    how(description)
    (model / FILES[0]).write_text(json.dumps(description))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_one_line(capsys, trained, tmp_path, damage):
    shutil.copytree(trained / "model", tmp_path / "model")
    damage(tmp_path / "model")
    before = made.held(tmp_path)
    table = trained / "ratings.csv"
    said = made.say(capsys, "share", "predict", tmp_path / "model", "--table", table, "--out", tmp_path / "scores.csv")
    made.assert_one_line(said, str(tmp_path / "model"))
    assert made.held(tmp_path) == before


def test_nothing_that_a_model_names_is_run(capsys, trained, tmp_path, monkeypatch):
    """A model comes from someone else as often as not: its description may not choose what Python imports."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    for name in (str(tmp_path / "planted.py"), "planted"):
        change(tmp_path / "model", lambda d, name=name: d["method"].update(method=name))
        table, out = trained / "ratings.csv", tmp_path / "scores.csv"
        said = made.say(capsys, "share", "predict", tmp_path / "model", "--table", table, "--out", out)
        made.assert_one_line(said, "--own")
        assert not (tmp_path / "ran").exists()
        assert not out.exists()


def test_a_method_of_ones_own_is_kept_and_applied(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (core.PACKAGE / "share" / "mmoe.py").read_text(encoding="utf-8")
    own = tmp_path / "kept_own.py"
    own.write_text(text.replace("class MMoE", "class KeptOwn"), encoding="utf-8")
    made.table(tmp_path)
    train(tmp_path, method=own)
    capsys.readouterr()
    table, out = tmp_path / "ratings.csv", tmp_path / "scores.csv"
    said = made.say(capsys, "share", "predict", tmp_path / "model", "--table", table, "--out", out)
    made.assert_one_line(said, "kept_own", "--own")
    assert len(predicted(capsys, tmp_path, table, out, "--own", own)) == 400


def test_the_schema_survives_json(trained):
    _, schema = job.kept(trained / "model")
    assert Schema.rebuild(json.loads(json.dumps(schema.describe()))) == schema


# In Python, on an encoder of one's own.


class Pair(nn.Module):
    """An encoder whose input is a dict or a tuple of two tensors."""

    def __init__(self):
        super().__init__()
        self.word, self.number = nn.Embedding(5, 4), nn.Linear(3, 4)

    def forward(self, inputs):
        words, numbers = inputs.values() if isinstance(inputs, dict) else inputs
        return torch.cat([self.word(words), torch.tanh(self.number(numbers))], 1)


@pytest.mark.parametrize("method", [HoME(expert=(8,)), MMoE(expert=(8,))], ids=["home", "mmoe"])
@pytest.mark.parametrize("kind", [dict, tuple])
def test_six_lines_of_python_share_ones_own_encoder(kind, method):
    numbers = torch.Generator().manual_seed(0)
    words, x = torch.randint(5, (200,), generator=numbers), torch.randn(200, 3, generator=numbers)
    inputs = {"words": words, "numbers": x} if kind is dict else (words, x)
    score = x[:, 0] + (words > 2)
    labels = {"click": (score > 0.5).float(), "like": (score > 1).float(), "time": score}
    encoder = Pair()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    tasks = [Task("click"), Task("like"), Task("time", kind="regression", group="long")]
    model = method.share(encoder, tasks, width=8)
    cost = fit(model, Batches(inputs, labels, size=50), shared_loss, epochs=60, lr=0.01)
    found = predict(model, inputs)

    assert (cost.epochs, cost.samples, cost.passes) == (60, 12_000, 240)
    assert list(found) == ["click", "like", "time"]
    for name in ("click", "like"):
        assert ((found[name] > 0.5) == (labels[name] > 0.5)).float().mean() > 0.9
    assert torch.nn.functional.mse_loss(found["time"], labels["time"]) < 0.2 * labels["time"].var()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
