"""Train on a table of your own and keep the model; koinon share predict MODEL applies a kept one to new rows."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar

import polars as pl
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from koinon.bench.statistics import Resampling
from koinon.core import UserError, describe, names, rebuild
from koinon.data.schema import Schema, TableEncoder
from koinon.data.tables import TableFile, World, read_table
from koinon.nn.params import trained
from koinon.nn.tasks import Task
from koinon.nn.train import predict
from koinon.share._contract import Share, Shared
from koinon.share._tables import Budget, choose, measure, predict_rows
from koinon.terminal import Told, untold

FORMAT = 1
"""Version of the layout of a kept model's folder."""


@dataclass(frozen=True)
class Job:
    """Train on a table and keep the model."""

    unit: ClassVar[str] = "epochs"
    """What its progress is counted in."""

    file: TableFile
    out: Path
    """Folder to keep the model in; made new."""
    epochs: int = 10
    """Most passes over the training part; the best one on the validation part is kept."""
    batch: int = 1024
    """Examples a step."""
    rates: tuple[float, ...] = (0.005,)
    """Learning rates to choose from on the validation part."""
    embedding: int = 16
    """Width of each category's embedding."""
    seed: int = 0
    """Start of the random streams."""
    overwrite: bool = False
    """Replace the model that is in the folder already."""

    def run(self, method: Share, told: Told = untold) -> dict[str, Any]:
        """Train, keep, and tell how well it does on the test part."""
        _refuse_taken(self.out, self.overwrite)
        if self.epochs < 1 or self.batch < 3 or self.embedding < 1:
            raise UserError("--epochs and --embedding take a number from 1, --batch one from 3")
        if not (self.rates and all(0 < rate < 1 for rate in self.rates)):
            raise UserError("--rates takes one or more learning rates between 0 and 1")
        world = self.file.world()
        budget = Budget(self.epochs, batch=self.batch, rates=self.rates, embedding=self.embedding)
        chosen = choose(method, world, budget, self.seed, told)
        predictions = predict_rows(chosen.model, world, world.test.tensors()[0])
        measured = measure(world, world.test, predictions, Resampling(world.test.groups, len(world.test), 0))
        keep(chosen.model, method, world.schema, self.embedding, self.out)
        return {
            "out": str(self.out),
            "method": repr(method),
            "read as": _reading(world),
            "split": world.split,
            "parameters": trained(chosen.model),
            "learning rate": chosen.rate,
            "epoch": chosen.epoch,
            "test": {name: round(m.value, 4) for name, m in measured.items() if not math.isnan(m.value)},
        }


@dataclass(frozen=True)
class Predict:
    """Apply a kept model to a table."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a kept model."""
    table: Path
    """CSV, TSV, Parquet or JSON Lines file with the columns the model reads."""
    out: Path
    """CSV or Parquet file for the predictions: a column a task, in the order of the table's rows."""
    own: str | None = None
    """Module path or file of the method, if it is one of your own: nothing that a model names is run unasked."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Predict, and write the table of predictions whole."""
        if self.out.suffix not in (".csv", ".parquet"):
            raise UserError(f"{self.out}: predictions are written as .csv or .parquet")
        if not self.out.parent.is_dir():
            raise UserError(f"{self.out}: cannot be written (there is no folder {self.out.parent})")
        model, schema = kept(self.model, self.own)
        inputs = {name: torch.from_numpy(value) for name, value in schema.encode(read_table(self.table)).items()}
        predictions = schema.in_units({name: value.numpy() for name, value in predict(model, inputs).items()})
        frame = pl.DataFrame(predictions)
        beside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        try:
            frame.write_csv(beside) if self.out.suffix == ".csv" else frame.write_parquet(beside)
            os.replace(beside, self.out)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror or error})") from None
        finally:
            beside.unlink(missing_ok=True)
        return {"out": str(self.out), "rows": len(frame), "columns": frame.columns}


VERBS: Mapping[str, type] = {"predict": Predict}
"""What can be done besides training a method."""


def keep(model: Shared, method: Share, schema: Schema, embedding: int, out: Path) -> None:
    """Write ``weights.safetensors`` and ``model.json``, which together rebuild the model; whole or not at all."""
    description = {
        "format": FORMAT,
        "koinon": metadata.version("koinon"),
        "method": describe(method),
        "tasks": [asdict(task) for task in model.tasks],
        "embedding": embedding,
        "schema": schema.describe(),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    aside = beside.with_name(f"{beside.name}.old")
    try:
        (beside / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, beside / "weights.safetensors"
        )
        beside.chmod(0o755)
        if out.exists():
            os.replace(out, aside)
        os.replace(beside, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if aside.exists() and not out.exists():  # stopped between the two
            os.replace(aside, out)
        for rest in (beside, aside):
            shutil.rmtree(rest, ignore_errors=True)


def kept(folder: Path, own: str | None = None) -> tuple[Shared, Schema]:
    """The model in a folder, and how it reads a table; ``own`` names its method if that is none of koinon's.

    Raises:
        UserError: it is not whole, or its method is neither koinon's nor named.
    """
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        schema = Schema.rebuild(description["schema"])
        tasks = [Task(**task) for task in description["tasks"]]
        its = description["method"]
        if own is None and its["method"] not in names():
            raise UserError(f"its method {its['method']!r} is none of koinon's: give its file with --own")
        method = rebuild(its | {"method": own or its["method"]})
        assert isinstance(method, Share)
        encoder = TableEncoder(schema, description["embedding"])
        model = method.share(encoder, tasks, encoder.width)
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no model kept by `koinon share`") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # whatever a damaged file makes fail, in whichever library
        raise UserError(f"{folder}: damaged, or not a model kept by `koinon share` ({error})") from None
    return model.eval(), schema


def _refuse_taken(out: Path, overwrite: bool) -> None:
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out}: exists already; give another --out, or --overwrite to replace the model in it")
    if out.exists() and any(out.iterdir()) and not (out / "model.json").exists():
        raise UserError(f"{out}: holds something else than a model; give another --out")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{out}: cannot be written ({parent} is a file)")


def _reading(world: World) -> dict[str, list[str]]:
    return {
        "categories": [category.name for category in world.schema.categories],
        "numbers": [number.name for number in world.schema.numbers],
    }
