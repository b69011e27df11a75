"""What can be wrong with models to be merged is one line that says what and where; and nothing is left or touched."""

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import made
import pytest
import torch
from safetensors.torch import load_file, save_file

from koinon.data.tensorfiles import TensorWriter

EXPERTS = ("x", "y")


class Wrong(NamedTuple):
    """A command that must fail: its words, what it says, and how the folder is made wrong beforehand."""

    words: tuple
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None


def merge(*more: object, method: str = "ties", base: str | None = "base", experts=EXPERTS, out: str = "out") -> tuple:
    given = ("--experts", *experts) if experts else ()
    return ("merge", method, *given, *(("--base", base) if base else ()), "--out", out, *more)


def state(seed: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (9, 4), "layer.weight": (4, 4), "layer.bias": (4,)}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()} | {"ids": torch.arange(3)}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of a base and two models, in which the test runs."""
    for seed, name in enumerate(("base", *EXPERTS)):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"torch_dtype": "float32"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Ways to make a model wrong.


def changed(model: str = "y", **tensors: torch.Tensor | None) -> Callable[[Path], object]:
    """Tensors replaced, added, or (None) left out; a dot in a name is given as __."""

    def prepare(folder: Path) -> None:
        file = folder / model / "model.safetensors"
        held = load_file(file) | {name.replace("__", "."): its for name, its in tensors.items()}
        save_file({name: its for name, its in held.items() if its is not None}, file)

    return prepare


def with_bytes(edit: Callable[[bytes], bytes], model: str = "y") -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        file = folder / model / "model.safetensors"
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(edit(content))

    return prepare


def with_index(weight_map: object, *files: str, model: str = "y") -> Callable[[Path], object]:
    """An index, and the model's one file under these names."""

    def prepare(folder: Path) -> None:
        content = (folder / model / "model.safetensors").read_bytes()
        (folder / model / "model.safetensors").unlink()
        for file in files:
            (folder / model / file).write_bytes(content)
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / model / "model.safetensors.index.json").write_text(text)

    return prepare


def pickled(content: object, name: str = "pytorch_model.bin", **how: object) -> Callable[[Path], object]:
    """The model's weights as a pickle of something."""

    def prepare(folder: Path) -> None:
        (folder / "y" / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "y" / name).write_bytes(content)
        else:
            torch.save(content, folder / "y" / name, **how)

    return prepare


class Malicious:
    """Makes a folder when it is unpickled by a careless reader."""

    def __reduce__(self):
        return os.mkdir, ("was here",)


FACTORS = {"layer.lora_A.weight": torch.ones(2, 4), "layer.lora_B.weight": torch.ones(4, 2)}


def adapter(tensors=None, **settings: object) -> Callable[[Path], object]:
    """A PEFT adapter in the model's place."""

    def prepare(folder: Path) -> None:
        shutil.rmtree(folder / "y")
        (folder / "y").mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings
        (folder / "y" / "adapter_config.json").write_text(json.dumps(config))
        held = FACTORS if tensors is None else tensors
        save_file(
            {f"base_model.model.{name}": its for name, its in held.items()}, folder / "y" / "adapter_model.safetensors"
        )

    return prepare


def both(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [step(folder) for step in steps]


def file(name: str, content: str = "x") -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return prepare


PICKLES = {
    "pickled": Wrong(merge(), ("y", "pickled weights (pytorch_model.bin)", "--trust-pickle"), pickled(state(1))),
    "pickled base": Wrong(
        merge(base="b.pt"), ("b.pt", "pickled weights"), lambda folder: torch.save(state(0), folder / "b.pt")
    ),
    "pickled and in an index": Wrong(
        merge(),
        ("pickled weights",),
        both(
            pickled(state(1), "pytorch_model-1.bin"),
            file("y/pytorch_model.bin.index.json", '{"weight_map": {"ids": "pytorch_model-1.bin"}}'),
        ),
    ),
    "pickled with code": Wrong(
        merge("--trust-pickle"), ("pytorch_model.bin", "cannot be read as pickled"), pickled({"a": Malicious()})
    ),
    "pickled with code, of old": Wrong(
        merge("--trust-pickle"),
        ("pytorch_model.bin", "cannot be read as pickled"),
        pickled({"a": Malicious()}, _use_new_zipfile_serialization=False),
    ),
    "pickled by Python": Wrong(
        merge("--trust-pickle"), ("cannot be read as pickled",), pickled(pickle.dumps(Malicious()))
    ),
    "a damaged pickle": Wrong(merge("--trust-pickle"), ("cannot be read as pickled",), pickled(b"PK\x03\x04" * 50)),
    "an empty pickle": Wrong(merge("--trust-pickle"), ("cannot be read as pickled",), pickled(b"")),
    "a pickle of something else": Wrong(
        merge("--trust-pickle"), ("something else than named tensors",), pickled({"model": state(1), "epoch": 3})
    ),
    "a pickle of a list": Wrong(merge("--trust-pickle"), ("something else than named tensors",), pickled([1, 2])),
    "a pickle of sparse tensors": Wrong(
        merge("--trust-pickle"),
        ("something else than named tensors",),
        pickled({name: its.to_sparse() for name, its in state(1).items()}),
    ),
    "a pickle of complex numbers": Wrong(
        merge("--trust-pickle"),
        ("something else than named tensors",),
        pickled(state(1) | {"c": torch.ones(1, dtype=torch.complex64)}),
    ),
}
SHORT = torch.ones(4, 4).to(torch.float8_e4m3fn)
EIGHT = {"layer__weight": SHORT, "layer__weight_scale_inv": torch.ones(1)}
FITS = {
    "another shape": Wrong(
        merge(), ("'y'", "layer.weight is 5 x 4 against 4 x 4"), changed(layer__weight=torch.ones(5, 4))
    ),
    "another vocabulary": Wrong(
        merge(), ("'y'", "embed.weight is 10 x 4 against 9 x 4"), changed(embed__weight=torch.ones(10, 4))
    ),
    "several shapes": Wrong(
        merge(), ("and 1 more",), changed(embed__weight=torch.ones(10, 4), layer__bias=torch.ones(3))
    ),
    "a scalar for a vector": Wrong(merge(), ("layer.bias",), changed(layer__bias=torch.tensor(1.0))),
    "a tensor lacks": Wrong(merge(), ("'y'", "no tensor layer.bias", "--missing"), changed(layer__bias=None)),
    "a tensor too many": Wrong(merge(), ("'y'", "a tensor layer.more"), changed(layer__more=torch.ones(2))),
    "the base lacks a tensor": Wrong(merge(), ("'x'", "a tensor layer.bias"), changed("base", layer__bias=None)),
    "another architecture": Wrong(
        merge(),
        ("'y'", "has no tensor", "(and 3 more)"),
        lambda folder: save_file({"w": torch.ones(2)}, folder / "y" / "model.safetensors"),
    ),
    "another architecture, of one's own": Wrong(
        merge(base=None, method="average"), ("'y'", "layer.weight"), changed(layer__weight=torch.ones(5, 4))
    ),
    "in 8 bits with scales": Wrong(
        merge(method="average", base=None),
        ("x", "layer.weight_scale_inv is the scale of a quantized layer.weight", "bfloat16"),
        both(*(changed(its, **EIGHT) for its in EXPERTS)),
    ),
    "only one of them in 8 bits": Wrong(
        merge("--only", "layer.weight"), ("y", "layer.weight_scale_inv"), changed(**EIGHT)
    ),
    "scales of a layer": Wrong(
        merge("--only", "*.scale"),
        ("base", "layer.scale is the scale of a quantized layer.weight"),
        both(*(changed(its, layer__weight=SHORT, layer__scale=torch.ones(1)) for its in ("base", *EXPERTS))),
    ),
    "quantized": Wrong(merge(), ("'y'", "ids", "quantized?"), changed(ids=torch.arange(3) + 1)),
    "integers for numbers": Wrong(
        merge(), ("'y'", "layer.bias holds torch.int8"), changed(layer__bias=torch.ones(4, dtype=torch.int8))
    ),
    "no numbers": Wrong(
        merge(),
        ("no floating-point tensors",),
        both(*(changed(its, embed__weight=None, layer__weight=None, layer__bias=None) for its in ("base", *EXPERTS))),
    ),
    "NaN": Wrong(
        merge(),
        ("'y'", "NaN in layer.bias", "--allow-nonfinite"),
        changed(layer__bias=torch.tensor([1, 2, torch.nan, 4])),
    ),
    "infinity": Wrong(
        merge(), ("'y'", "infinity in layer.bias"), changed(layer__bias=torch.tensor([1, -torch.inf, 0, 4]))
    ),
    "two infinities": Wrong(
        merge(method="average", base=None),
        ("'y'", "infinity in layer.bias"),
        changed(layer__bias=torch.tensor([torch.inf, -torch.inf, 0, 4])),
    ),
    "NaN in the base": Wrong(
        merge(), ("the base", "NaN in embed.weight"), changed("base", embed__weight=torch.full((9, 4), torch.nan))
    ),
    "NaN in what is copied": Wrong(
        merge("--only", "layer.*"),
        ("NaN in embed.weight",),
        changed("base", embed__weight=torch.full((9, 4), torch.nan)),
    ),
    "more than a type holds": Wrong(
        merge("--dtype", "float16", method="average"),
        ("layer.bias", "float16", "--dtype"),
        changed(layer__bias=torch.full((4,), 1e30)),
    ),
    "more than any type holds": Wrong(merge("--scale", "1e38"), ("float32", "settings")),
    "a dry run with a setting that cannot be": Wrong(merge("--dry-run", "--density", "-0.2"), ("density -0.2",)),
    "data for a method that reads none": Wrong(merge("--data", "texts.txt"), ("--data", "Ties", "look at data")),
    "own tensors for a method that has none": Wrong(merge("--own", "embed.*"), ("--own", "Ties")),
    "an output in an input": Wrong(merge(out="x/merged"), ("x/merged: is x or within it, which is read",)),
    "an output in new folders": Wrong(
        merge(out="new/er/out"), ("NaN",), changed(layer__bias=torch.tensor([1, 2, torch.nan, 4]))
    ),
    "NaN in half": Wrong(
        merge(), ("NaN in layer.bias",), changed(layer__bias=torch.full((4,), torch.nan, dtype=torch.float16))
    ),
    "a name that a terminal obeys": Wrong(
        merge(), ("a tensor \N{REPLACEMENT CHARACTER}[31mred",), changed(**{"\x1b[31mred": torch.ones(1, 2)})
    ),
}  # fmt: skip
NAMES = dict.fromkeys(state(0), "a.safetensors")
FILES = {
    "truncated": Wrong(merge(), ("y/model.safetensors", "truncated?"), with_bytes(lambda its: its[:-3])),
    "cut in the header": Wrong(merge(), ("y/model.safetensors", "damaged"), with_bytes(lambda its: its[:50])),
    "empty": Wrong(merge(), ("y/model.safetensors", "damaged"), with_bytes(lambda its: b"")),
    "wrong header length": Wrong(
        merge(), ("its header would be",), with_bytes(lambda its: struct.pack("<Q", 2**63) + its[8:])
    ),
    "short header length": Wrong(
        merge(), ("damaged",), with_bytes(lambda its: struct.pack("<Q", struct.unpack("<Q", its[:8])[0] - 1) + its[8:])
    ),
    "garbage": Wrong(merge(), ("y/model.safetensors", "damaged"), with_bytes(lambda its: os.urandom(len(its)))),
    "damaged base": Wrong(merge(), ("base/model.safetensors",), with_bytes(lambda its: its[:-3], "base")),
    "a pointer instead of the file": Wrong(
        merge(), ("damaged",), with_bytes(lambda its: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ),
    "no file but a pipe": Wrong(
        merge(), ("cannot be read",), both(with_bytes(lambda its: its), lambda folder: _pipe(folder / "y"))
    ),
    "a shard that is not there": Wrong(merge(), ("y", "a.safetensors is missing"), with_index(NAMES)),
    "a shard above": Wrong(
        merge(), ("'../x/model.safetensors'", "not a file beside"), with_index({"ids": "../x/model.safetensors"})
    ),
    "a shard far away": Wrong(
        merge(), ("'/etc/hostname'", "not a file beside"), with_index({"ids": "/etc/hostname"})
    ),
    "a shard below": Wrong(merge(), ("'b/a.safetensors'",), with_index({"ids": "b/a.safetensors"})),
    "a shard that is a folder": Wrong(merge(), ("'..'",), with_index({"ids": ".."})),
    "a shard without a name": Wrong(merge(), ("''",), with_index({"ids": ""})),
    "a shard of another system": Wrong(merge(), ("not a file beside",), with_index({"ids": "..\\x"})),
    "a shard with a zero": Wrong(merge(), ("not a file beside",), with_index({"ids": "a\0"})),
    "a shard that is a number": Wrong(merge(), ("no weight_map",), with_index({"ids": 3})),
    "an index without files": Wrong(merge(), ("no weight_map",), with_index({})),
    "an index that is a list": Wrong(merge(), ("no JSON object",), with_index("[]")),
    "an index that is no JSON": Wrong(merge(), ("index.json", "cannot be read as JSON"), with_index("{")),
    "an index nested too deeply": Wrong(merge(), ("cannot be read as JSON",), with_index("[" * 200_000)),
    "an index of tensors that are nowhere": Wrong(
        merge(),
        ("none of its files holds other", "model.safetensors.index.json"),
        with_index(NAMES | {"other": "a.safetensors"}, "a.safetensors"),
    ),
    "a tensor in two shards": Wrong(
        merge(),
        ("two of its files hold the same tensor",),
        with_index(NAMES | {"ids": "b.safetensors"}, "a.safetensors", "b.safetensors"),
    ),
    "files without an index": Wrong(
        merge(),
        ("2 safetensors files and no index",),
        both(with_index(NAMES, "a.safetensors", "b.safetensors"), lambda folder: _unlink_index(folder)),
    ),
    "no such model": Wrong(merge(experts=("x", "absent")), ("absent", "no such file or folder")),
    "no such base": Wrong(merge(base="absent"), ("absent", "no such file or folder")),
    "a folder without weights": Wrong(
        merge(experts=("x", "empty")), ("empty", "holds no weights"), lambda folder: (folder / "empty").mkdir()
    ),
    "a file that is no model": Wrong(
        merge(experts=("x", "x/config.json")), ("x/config.json", "not a safetensors file")
    ),
    "a name that is too long": Wrong(merge(experts=("x", "n" * 300)), ("cannot be read",)),
    "configuration that is no JSON": Wrong(
        merge(), ("base/config.json", "cannot be read as JSON"), file("base/config.json")
    ),
}  # fmt: skip


def _pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _unlink_index(folder: Path) -> None:
    (folder / "y" / "model.safetensors.index.json").unlink()


ADAPTERS = {
    "without a base": Wrong(merge(base=None, method="average"), ("y: an adapter", "as the base"), adapter()),
    "an adapter as the base": Wrong(merge(base="y", experts=("x",)), ("y: an adapter",), adapter()),
    "another kind": Wrong(merge(), ("y", "kind IA3"), adapter(peft_type="IA3")),
    "no kind": Wrong(merge(), ("y", "kind NONE"), adapter(peft_type=None)),
    "DoRA": Wrong(merge(), ("y", "kind DoRA"), adapter(use_dora=True)),
    "PiSSA": Wrong(merge(), ("'pissa_niter_16'", "changes the base"), adapter(init_lora_weights="pissa_niter_16")),
    "copied layers": Wrong(merge(), ("layer_replication",), adapter(layer_replication=[[0, 4], [2, 5]])),
    "no weights": Wrong(
        merge(),
        ("no adapter_model.safetensors",),
        both(adapter(), lambda folder: (folder / "y" / "adapter_model.safetensors").unlink()),
    ),
    "damaged": Wrong(
        merge(), ("adapter_model.safetensors: damaged",), both(adapter(), file("y/adapter_model.safetensors"))
    ),
    "no settings": Wrong(
        merge(), ("adapter_config.json: cannot be read as JSON",), both(adapter(), file("y/adapter_config.json"))
    ),
    "of another model": Wrong(
        merge(),
        ("adapts other.weight, which the base does not have",),
        adapter({name.replace("layer", "other"): its for name, its in FACTORS.items()}),
    ),
    "of another size": Wrong(
        merge(),
        ("its factors of layer.weight make 5 x 4, the base has 4 x 4",),
        adapter(FACTORS | {"layer.lora_B.weight": torch.ones(5, 2)}),
    ),
    "factors that do not meet": Wrong(
        merge(), ("its factors of layer.weight",), adapter(FACTORS | {"layer.lora_B.weight": torch.ones(4, 3)})
    ),
    "half of a pair": Wrong(
        merge(), ("layer.lora_A is no pair",), adapter({"layer.lora_A.weight": torch.ones(2, 4)})
    ),
    "the other half": Wrong(
        merge(), ("layer.lora_B is no pair",), adapter({"layer.lora_B.weight": torch.ones(4, 2)})
    ),
    "more than a pair": Wrong(
        merge(), ("layer.lora_B.bias is no pair",), adapter(FACTORS | {"layer.lora_B.bias": torch.ones(4)})
    ),
    "a factor without dimensions": Wrong(
        merge(),
        ("the factors of layer are no matrices",),
        adapter(FACTORS | {"layer.lora_A.weight": torch.tensor(1.0)}),
    ),
    "of a tensor without dimensions": Wrong(
        merge(), ("its factors of layer.weight",),
        both(adapter(), *(changed(model, layer__weight=torch.tensor(1.0)) for model in ("base", "x"))),
    ),
    "a rank that is not the factors'": Wrong(merge(), ("factors of rank 2", "says 8"), adapter(r=8)),
    "a rank that is text": Wrong(merge(), ("no valid r for layer",), adapter(r="two")),
    "no alpha": Wrong(merge(), ("no valid lora_alpha for layer",), adapter(lora_alpha=None)),
    "an alpha that is NaN": Wrong(merge(), ("no valid lora_alpha",), adapter(lora_alpha=float("nan"))),
    "a huge alpha": Wrong(merge(), ("no valid lora_alpha",), adapter(lora_alpha=10**400)),
    "patterns that are a list": Wrong(merge(), ("rank_pattern is no mapping",), adapter(rank_pattern=[1])),
    "a pattern that is damaged": Wrong(merge(), ("the pattern '['", "is damaged"), adapter(alpha_pattern={"[": 1})),
    "a pattern that takes for ever": Wrong(
        merge(), ("too involved",), adapter(alpha_pattern={"(a*)*b": 1})
    ),
    "a replaced tensor of another size": Wrong(
        merge(), ("replaces embed.weight",), adapter(FACTORS | {"embed.weight": torch.ones(12, 4)})
    ),
    "NaN in it": Wrong(
        merge(),
        ("'y'", "NaN in layer.weight"),
        adapter(FACTORS | {"layer.lora_B.weight": torch.full((4, 2), torch.nan)}),
    ),
}  # fmt: skip
SETTINGS = {
    "negative density": Wrong(merge("--density", "-0.1"), ("density -0.1", "0 to 1")),
    "density above 1": Wrong(merge("--density", "1.5"), ("density 1.5", "0 to 1")),
    "density that is no number": Wrong(merge("--density", "nan"), ("density nan", "finite")),
    "density in words": Wrong(merge("--density", "half"), ("--density", "half")),
    "density of DARE": Wrong(merge("--density", "-0.1", method="dare"), ("density -0.1",)),
    "density of breadcrumbs": Wrong(merge("--density", "-1", method="breadcrumbs"), ("-1",)),
    "more than all": Wrong(
        merge("--density", "0.9", "--outliers", "0.2", method="breadcrumbs"), ("density 0.9 and outliers 0.2",)
    ),
    "an infinite scale": Wrong(merge("--scale", "inf"), ("scale inf", "finite")),
    "too many weights": Wrong(merge("--weights", 1, 2, 3), ("weights: 3 values for 2 models",)),
    "too many densities": Wrong(merge("--density", 0.1, 0.2, 0.3), ("density: 3 values for 2 models",)),
    "weights of nothing": Wrong(merge("--weights", 1, -1, method="average"), ("weights (1.0, -1.0) sum to 0",)),
    "slerp of three": Wrong(
        merge(method="slerp", experts=("x", "y", "base"), base=None), ("slerp is for two models, here are 3",)
    ),
    "slerp of one": Wrong(merge(method="slerp", experts=("x",), base=None), ("x: one model only",)),
    "one model only": Wrong(merge(method="average", experts=("x",)), ("x: one model only",)),
    "no model": Wrong(("merge", "ties", "--base", "base", "--out", "out", "--experts"), ("no model", "--experts")),
    "no option for models": Wrong(merge(experts=()), ("missing --experts",)),
    "a model twice": Wrong(merge(experts=("x", "y", "./x")), ("x: given twice",)),
    "no base": Wrong(merge(base=None), ("differences to a base", "--base")),
    "unknown method": Wrong(merge(method="tise"), ("'tise'", "did you mean 'ties'")),
    "unknown option": Wrong(merge("--densty", 0.5), ("--densty", "--density")),
    "an option of another method": Wrong(merge("--outliers", 0.5), ("--outliers",)),
    "unknown type": Wrong(merge("--dtype", "int8"), ("--dtype", "int8", "float32")),
    "unknown rounding": Wrong(merge("--rounding", "twice"), ("--rounding", "every-step")),
    "no tensor of that name": Wrong(merge("--only", "layers.*"), ("'layers.*'", "embed.weight")),
    "negative workers": Wrong(merge("--workers", -1), ("--workers",)),
    "files of nothing": Wrong(merge("--shard-gb", 0), ("--shard-gb",)),
    "files of no number": Wrong(merge("--shard-gb", "nan"), ("--shard-gb",)),
    "files without end": Wrong(merge("--shard-gb", "inf"), ("--shard-gb",)),
    "dry run without a base": Wrong(merge("--dry-run", base=None), ("differences to a base", "--base")),
}
OUT = {
    "exists": Wrong(merge(), ("out: exists already; give a new name",), file("out/kept.txt")),
    "is a file": Wrong(merge(), ("out: exists already",), file("out")),
    "is an input": Wrong(merge(out="x"), ("x: is x or within it, which is read",)),
    "is the base": Wrong(merge(out="base"), ("base: is base or within it",)),
    "is an input by another way": Wrong(merge(out="y/../x"), ("y/../x: is x or within it",)),
    "is in a file": Wrong(merge(out="a.txt/deep/out"), ("a.txt", "is a file"), file("a.txt")),
    "is a link to an input": Wrong(
        merge(), ("out: is x or within it",), lambda folder: (folder / "out").symlink_to(folder / "x")
    ),
    "has too long a name": Wrong(merge(out="n" * 300), ("cannot be written", "too long")),
    "has a name too long to be hidden": Wrong(merge(out="n" * 250), ("cannot be written", "too long")),
    "exists and it is a dry run": Wrong(merge("--dry-run"), ("out: exists already",), file("out/kept.txt")),
    "is here": Wrong(merge(out="."), ("exists already",)),
}
EVERY = {
    f"{group}: {name}": wrong
    for group, held in {"pickle": PICKLES, "fit": FITS, "file": FILES, "adapter": ADAPTERS, "setting": SETTINGS,
                        "out": OUT}.items()
    for name, wrong in held.items()
}  # fmt: skip


@pytest.mark.parametrize("wrong", EVERY.values(), ids=EVERY)
def test_what_is_wrong_is_one_line_and_nothing_is_left(capsys, here, wrong):
    wrong.prepare(here)
    before = made.held(here)
    made.assert_one_line(made.say(capsys, *wrong.words), *wrong.says)
    assert made.held(here) == before


# A disk that is full, and folders that cannot be written to.


def failing(number: int, after: int = 0):
    """A call that fails as the system would, after some that do not matter."""
    calls = [0]

    def fail(*_args, **_named):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        return len(_args[1]) if len(_args) > 1 else None

    return fail


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=os.strerror)
def test_a_disk_that_fails_is_told(capsys, here, monkeypatch, function, number):
    before = made.held(here)
    monkeypatch.setattr(os, function, failing(number))
    made.assert_one_line(made.say(capsys, *merge()), "cannot be written", os.strerror(number))
    assert made.held(here) == before


def test_a_disk_that_fails_in_the_middle_is_told(capsys, here, monkeypatch):
    """While tensors are written, while files are carried over, and while the journal is kept."""
    before = made.held(here)
    write, many = os.pwrite, []

    def some(handle, data, at):
        many.append(at)
        if len(many) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", some)
        made.assert_one_line(made.say(capsys, *merge()), "cannot be written", "No space left")
    assert len(many) > 3
    assert made.held(here) == before
    for place in ("shutil.copyfile", "koinon.merge._files._Unfinished.keep", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(place, failing(errno.ENOSPC))
            made.assert_one_line(made.say(capsys, *merge()), "cannot be written", "No space left")
        assert made.held(here) == before, place


def test_writes_that_take_a_part_are_gone_on_with(capsys, here, monkeypatch):
    made.say(capsys, *merge(out="whole"))
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: write(handle, data[:5] if len(data) < 200 else data, at))
    assert made.say(capsys, *merge()).code == 0
    assert (here / "out" / "model.safetensors").read_bytes() == (here / "whole" / "model.safetensors").read_bytes()


def test_too_little_room_is_told_before_the_work(capsys, here, monkeypatch):
    before = made.held(here)
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    monkeypatch.setattr(TensorWriter, "write", failing(errno.EIO))  # is not come to
    made.assert_one_line(made.say(capsys, *merge()), "are to be written, the disk has 0.0 MB left")
    assert made.held(here) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM], ids=os.strerror)
def test_a_folder_that_may_not_be_written_to_is_told(capsys, here, monkeypatch, number):
    before = made.held(here)
    monkeypatch.setattr(os, "mkdir", failing(number))
    made.assert_one_line(made.say(capsys, *merge()), "out: cannot be written", os.strerror(number))
    assert made.held(here) == before


def test_a_model_that_may_not_be_read_is_told(capsys, here, monkeypatch):
    before = made.held(here)
    opened = Path.open

    def refuse(self, *args, **named):
        if self.parent.name == "y":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        said = made.say(capsys, *merge())
    made.assert_one_line(said, "y/model.safetensors", "Permission denied")
    assert made.held(here) == before


# What is odd and works.


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "model.safetensors")


def test_what_is_not_finite_is_merged_if_asked_for(capsys, here):
    changed(layer__bias=torch.tensor([1, torch.nan, torch.inf, 4]))(here)
    assert made.say(capsys, *merge("--allow-nonfinite", method="average")).code == 0
    found = numbers(here)["layer.bias"]
    assert found.isfinite().tolist() == [True, False, False, True]


def test_scales_that_stay_as_they_are_are_copied(capsys, here):
    for model in ("base", *EXPERTS):
        changed(model, **EIGHT)(here)
    assert made.say(capsys, *merge("--only", "embed.*")).code == 0
    assert numbers(here)["layer.weight"].dtype == torch.float8_e4m3fn


def test_large_numbers_are_no_infinity(capsys, here):
    """Whose sum overflows."""
    changed(layer__bias=torch.full((4,), 3e38))(here)
    assert made.say(capsys, *merge(method="average")).code == 0
    assert numbers(here)["layer.bias"].isfinite().all()


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
def test_pickles_are_read_if_trusted(capsys, here, new):
    wanted = load_file(here / "y" / "model.safetensors")
    assert made.say(capsys, *merge(out="wanted")).code == 0
    pickled(wanted, _use_new_zipfile_serialization=new)(here)
    file("y/training_args.bin")(here)
    file("y/optimizer.pt")(here)
    assert made.say(capsys, *merge("--trust-pickle")).code == 0
    wanted = load_file(here / "wanted" / "model.safetensors")
    assert all(torch.equal(its, wanted[name]) for name, its in numbers(here).items())


def test_one_model_on_a_base_is_something(capsys, here):
    assert made.say(capsys, *merge("--scale", -1, method="task_arithmetic", experts=("x",))).code == 0
    base, tuned = (load_file(here / name / "model.safetensors")["layer.bias"] for name in ("base", "x"))
    torch.testing.assert_close(numbers(here)["layer.bias"], 2 * base - tuned)


def test_an_index_of_another_name_gives_way(capsys, here):
    """A second copy of the weights under other names, as some publish beside the usual one."""
    names = json.dumps({"weight_map": {"other": "consolidated.safetensors"}})
    for model in ("base", *EXPERTS):
        save_file({"other": torch.ones(2)}, here / model / "consolidated.safetensors")
        file(f"{model}/consolidated.safetensors.index.json", names)(here)
    assert made.say(capsys, *merge()).code == 0
    assert numbers(here).keys() == state(0).keys()
    shutil.rmtree(here / "out")
    with_index(dict.fromkeys(state(0), "a.safetensors"), "a.safetensors")(here)
    assert made.say(capsys, *merge()).code == 0


def test_models_of_one_name_are_told_apart(capsys, here):
    for name in ("a", "b"):
        (here / name).mkdir()
        shutil.copytree(here / ("x" if name == "a" else "y"), here / name / "model")
    assert made.say(capsys, *merge(experts=("a/model", "b/model"))).code == 0
    assert list(json.loads((here / "out" / "koinon.json").read_text())["models"]) == ["a/model", "b/model"]
