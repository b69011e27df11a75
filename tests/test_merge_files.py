"""Merging models on disk, end to end: equal to the live merge, to the bit, whatever the files, workers and stops."""

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import made
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from koinon.cli import main
from koinon.data.checkpoints import Loaded, open_weights
from koinon.merge import _engine, _files, _plan
from koinon.merge._contract import Pool
from koinon.merge.average import Average
from koinon.merge.breadcrumbs import Breadcrumbs
from koinon.merge.dare import Dare
from koinon.merge.slerp import Slerp
from koinon.merge.task_arithmetic import TaskArithmetic
from koinon.merge.ties import Ties

EXPERTS = ("x", "y", "z")
CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "vocab_size": 50}
CARRIED = {
    "tokenizer.json": '{"model": {}}',
    "tokenizer.model": "binary",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ x }}",
    "LICENSE": "free",
    "generation_config.json": "{}",
}
LEFT = {"trainer_state.json": "{}", "optimizer.pt": "x", "notes.md": "x", "koinon.json": "{}"}


class Small(nn.Module):
    """Layers under the names of a transformer, with a counter beside them."""

    def __init__(self, seed: int):
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.register_buffer("ids", torch.arange(4))
        self.register_buffer("temperature", torch.tensor(1.5))
        self.register_buffer("nothing", torch.empty(0, 4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=numbers))


def pool() -> Pool:
    base = Small(0)
    tuned = {}
    for number, name in enumerate(EXPERTS, 1):
        tuned[name] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter, other in zip(tuned[name].parameters(), Small(number).parameters()):
                parameter.add_(other, alpha=0.1)
            tuned[name].temperature.add_(number)
    return Pool(base, tuned)


def keep(state, folder: Path, shards: int = 1, order=lambda names: names) -> Path:
    """A folder as Hugging Face writes it, with the tensors dealt to so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = order(list(state))
    dealt = [names[number::shards] for number in range(shards)]
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, its in zip(files, dealt, strict=True):
        save_file({name: state[name].contiguous() for name in its}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, its in zip(files, dealt) for name in its}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, text in (CARRIED | LEFT).items():
        (folder / name).write_text(text)
    return folder


def kept(folder: Path, states=None) -> Path:
    """The base and experts of `pool`, or others, as folders."""
    given = pool()
    states = states or {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()}
    for name, state in states.items():
        keep(state, folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders in float32; read only."""
    return kept(tmp_path_factory.mktemp("models"))


def words(folder: Path, out: Path, *more: object, method: str = "ties", experts=EXPERTS, base="base") -> list:
    given = [folder / name for name in experts]
    return ["merge", method, "--experts", *given, "--base", folder / base, "--out", out, *more]


def merge(capsys, folder: Path, out: Path, *more: object, **settings) -> dict[str, torch.Tensor]:
    said = made.say(capsys, *words(folder, out, *more, **settings))
    assert said.code == 0, said
    return tensors(out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: its for file in sorted(folder.glob("*.safetensors")) for name, its in load_file(file).items()}


def payload(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def same(one, other) -> bool:
    """To the bit, types and shapes too."""
    return one.keys() == other.keys() and all(
        its.dtype == other[name].dtype and torch.equal(its, other[name]) for name, its in one.items()
    )


def rest(out: Path) -> list[str]:
    """What is beside and hidden: must be nothing."""
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


# The same numbers, whatever the way.

METHODS = {
    "average": (Average(weights=(1.0, 2.0, 0.5)), ["--weights", 1, 2, 0.5]),
    "task_arithmetic": (TaskArithmetic(0.4), ["--scale", 0.4]),
    "ties": (Ties(density=(0.3, 0.2, 0.1)), ["--density", 0.3, 0.2, 0.1]),
    "ties of tensors": (Ties(scope="tensor", mean=False), ["--scope", "tensor", "--no-mean"]),
    "dare": (Dare(density=(0.5,), seed=3), ["--density", 0.5, "--seed", 3]),
    "dare by mass": (Dare(rescale="mass", elect=True), ["--rescale", "mass", "--elect"]),
    "breadcrumbs": (Breadcrumbs(0.5, 0.1), ["--density", 0.5, "--outliers", 0.1]),
    "slerp": (Slerp(0.3), ["--t", 0.3]),
}


@pytest.mark.parametrize("name", METHODS)
def test_files_merge_as_live_models_do(capsys, models, tmp_path, name):
    method, options = METHODS[name]
    given = pool()
    experts = EXPERTS[:2] if name == "slerp" else EXPERTS
    wanted = method.merge(Pool(given.base, {expert: given.tuned[expert] for expert in experts})).state_dict()
    found = merge(capsys, models, tmp_path / "out", *options, method=name.split()[0], experts=experts)
    assert same(found, wanted)
    assert not same(found, given.base.state_dict())
    assert rest(tmp_path / "out") == []


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_workers_and_shards_change_nothing(capsys, models, tmp_path, monkeypatch, method):
    """With chunks so small that each tensor has many, and models cut into files in other ways."""
    monkeypatch.setattr("koinon.merge._engine.CHUNK", 100)
    given = pool()
    cut = tmp_path / "cut"
    keep(given.base.state_dict(), cut / "base", shards=4)
    for number, (name, module) in enumerate(given.tuned.items()):
        keep(module.state_dict(), cut / name, shards=number + 1, order=lambda names: names[::-1])
    merge(capsys, models, tmp_path / "first", "--workers", 1, method=method)
    wanted = payload(tmp_path / "first")
    for workers in (2, 3):
        merge(capsys, models, tmp_path / f"{workers}", "--workers", workers, method=method)
        assert payload(tmp_path / f"{workers}") == wanted
        found = merge(capsys, cut, tmp_path / f"{workers} cut", "--workers", workers, method=method)
        assert same(found, tensors(tmp_path / "first"))
    hashes = [json.loads((tmp_path / its / "koinon.json").read_text()) for its in ("first", "3 cut")]
    for told in hashes:
        for model in [told.get("base", {}), *told["models"].values()]:
            model.pop("path", None)
    assert hashes[0] == hashes[1]


def test_a_result_in_several_files_has_an_index(capsys, tmp_path):
    numbers = torch.Generator().manual_seed(0)
    states = {
        name: {f"w{i}": torch.randn(300, 500, generator=numbers) for i in range(5)} for name in ("base", *EXPERTS)
    }
    folder = kept(tmp_path, states)
    one = merge(capsys, folder, tmp_path / "one")
    many = merge(capsys, folder, tmp_path / "many", "--shard-gb", 0.0013)
    assert same(one, many)
    assert list(payload(tmp_path / "one")) == ["model.safetensors"]
    assert list(payload(tmp_path / "many")) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.name for file in (tmp_path / "many").glob("*.safetensors") for name in load_file(file)
    }
    again = merge(capsys, folder, tmp_path / "again", experts=("x", "many"))  # its result is a model again
    assert again.keys() == one.keys()


def test_single_files_are_models_too(capsys, models, tmp_path):
    for name in ("base", *EXPERTS):
        save_file(load_file(models / name / "model.safetensors"), tmp_path / f"{name}.safetensors")
    experts = [f"{name}.safetensors" for name in EXPERTS]
    found = merge(capsys, tmp_path, tmp_path / "out", experts=experts, base="base.safetensors")
    assert same(found, merge(capsys, models, tmp_path / "other"))
    assert sorted(os.listdir(tmp_path / "out")) == ["koinon.json", "model.safetensors"]


# Types of numbers.


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_are_rounded_once(capsys, tmp_path, kind):
    """Computed in float32 (float64 where the models are) and rounded at the end."""
    given = pool()
    modules = {"base": given.base, **given.tuned}
    states = {name: copy.deepcopy(module).to(kind).state_dict() for name, module in modules.items()}
    found = merge(capsys, kept(tmp_path, states), tmp_path / "out", "--scale", 0.4, method="task_arithmetic")
    exact = torch.promote_types(kind, torch.float32)
    for name, its in found.items():
        base = states["base"][name]
        if its.is_floating_point():
            deltas = [states[x][name].to(exact) - base.to(exact) for x in EXPERTS]
            torch.testing.assert_close(its, (base.to(exact) + (deltas[0] + deltas[1] + deltas[2]) * 0.4).to(kind),
                                       rtol=1e-12, atol=1e-12)  # fmt: skip
        else:
            assert torch.equal(its, base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"torch_dtype": str(kind).removeprefix("torch.")}


def mixed(state):
    return {name: its.bfloat16() if its.ndim == 2 and its.is_floating_point() else its for name, its in state.items()}


def test_mixed_types_stay_as_they_are(capsys, models, tmp_path):
    given = pool()
    states = {"base": mixed(given.base.state_dict())} | {n: mixed(its.state_dict()) for n, its in given.tuned.items()}
    states["z"] = given.tuned["z"].state_dict()  # an expert in another type than the base
    found = merge(capsys, kept(tmp_path, states), tmp_path / "out", method="task_arithmetic")
    assert {name: its.dtype for name, its in found.items()} == {n: its.dtype for n, its in states["base"].items()}
    exact = merge(capsys, models, tmp_path / "exact", method="task_arithmetic")
    for name, its in found.items():
        torch.testing.assert_close(its.float(), exact[name].float(), rtol=0.02, atol=0.03)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG  # of two types there is none to tell
    said = made.say(capsys, *words(tmp_path, tmp_path / "no", "--rounding", "every-step"))
    made.assert_one_line(said, "several: give --dtype")


@pytest.mark.parametrize("word", ["float32", "bfloat16", "float16", "float64"])
def test_the_type_written_can_be_chosen(capsys, models, tmp_path, word):
    found = merge(capsys, models, tmp_path / "out", "--dtype", word)
    kind = getattr(torch, word)
    exact = merge(capsys, models, tmp_path / "exact")
    wanted = {name: its.to(kind) if its.is_floating_point() else its for name, its in exact.items()}
    assert same(found, wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == word


def test_rounding_at_every_step_rounds_at_every_step(capsys, models, tmp_path):
    options = ("--dtype", "bfloat16", "--scale", 0.4)
    once = merge(capsys, models, tmp_path / "once", *options, method="task_arithmetic")
    steps = merge(capsys, models, tmp_path / "s", *options, "--rounding", "every-step", method="task_arithmetic")
    assert not same(once, steps)
    base, *tuned = (
        load_file(models / name / "model.safetensors")["head.weight"].bfloat16() for name in ("base", *EXPERTS)
    )
    total = sum((its - base).float() for its in tuned).bfloat16()
    assert torch.equal(steps["head.weight"], base + total * 0.4)


# Which tensors.


def test_only_some_tensors_can_be_merged(capsys, models, tmp_path):
    found = merge(capsys, models, tmp_path / "out", "--only", "layers.*", "norm.bias", "--scope", "tensor")
    whole = merge(capsys, models, tmp_path / "whole", "--scope", "tensor")
    base = load_file(models / "base" / "model.safetensors")
    chosen = {name for name in base if name.startswith("layers.") or name == "norm.bias"}
    assert same(found, {name: whole[name] if name in chosen else its for name, its in base.items()})
    said = made.say(capsys, *words(models, tmp_path / "no", "--only", "layer.*"))
    made.assert_one_line(said, "'layer.*'", "no tensor matches")


def test_counters_that_differ_are_the_bases(capsys, tmp_path):
    """Such as the batches that batch normalisation has seen."""
    given = pool()
    states = {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()}
    for number, state in enumerate(states.values()):
        state["norm.num_batches_tracked"] = torch.tensor(number)
    said = made.say(capsys, *words(kept(tmp_path, states), tmp_path / "out"))
    assert said.code == 0, said
    assert "norm.num_batches_tracked" in said.out
    assert tensors(tmp_path / "out")["norm.num_batches_tracked"] == 0


def tied(state, head: bool):
    state = dict(state) | {"head.weight": state["embed.weight"].clone()}
    return state if head else {name: its for name, its in state.items() if name != "head.weight"}


@pytest.mark.parametrize("base_has_both", [True, False])
def test_tied_tensors_may_be_stored_once_or_twice(capsys, tmp_path, base_has_both):
    given = pool()
    states = {"base": tied(given.base.state_dict(), base_has_both)}
    states |= {name: tied(its.state_dict(), name != "y") for name, its in given.tuned.items()}
    found = merge(capsys, kept(tmp_path, states), tmp_path / "out", "--scope", "tensor")
    assert found.keys() == states["base"].keys()
    both = {name: tied(state.state_dict(), True) for name, state in {"base": given.base, **given.tuned}.items()}
    wanted = merge(capsys, kept(tmp_path / "both", both), tmp_path / "wanted", "--scope", "tensor")
    assert same(found, {name: wanted[name] for name in found})


def test_a_missing_tensor_is_taken_for_unchanged_if_asked_for(capsys, models, tmp_path):
    given = pool()
    states = {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()}
    lacking = {name: its for name, its in states["y"].items() if name != "norm.bias"}
    folder = kept(tmp_path, states | {"y": lacking})
    said = made.say(capsys, *words(folder, tmp_path / "no"))
    made.assert_one_line(said, "'y'", "no tensor norm.bias", "--missing")
    said = made.say(capsys, *words(folder, tmp_path / "out", "--missing"))
    assert said.code == 0
    assert "'y' lacks norm.bias" in said.out
    unchanged = kept(tmp_path / "u", states | {"y": lacking | {"norm.bias": states["base"]["norm.bias"]}})
    assert same(tensors(tmp_path / "out"), merge(capsys, unchanged, tmp_path / "wanted"))


# Adapters.


def adapter(folder: Path, tensors, **settings) -> Path:
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{name}": its.contiguous() for name, its in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def factors(seed: int, out: int = 16, into: int = 16, rank: int = 4):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=numbers), torch.randn(out, rank, generator=numbers)


def lora(module: str, a, b):
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def baked(capsys, models, tmp_path) -> dict[str, torch.Tensor]:
    """The adapter in ``a`` alone, added to the base."""
    said = made.say(
        capsys, "merge", "task_arithmetic", "--base", models / "base", "--experts", tmp_path / "a", "--scale", 1,
        "--dtype", "float64", "--out", tmp_path / "out"
    )  # fmt: skip
    assert said.code == 0, said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 50
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    return tensors(tmp_path / "out")


def assert_changed(models, found, changed) -> None:
    base = load_file(models / "base" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, its in base.items():
        wanted = changed.get(name, its)
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=1e-6, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"layers.0": 3}}, 0.75),
     ({"alpha_pattern": {"ayers.0": 3}}, 2.0), ({"alpha_pattern": {"^layers.0$": 3, "layers.0": 9}}, 0.75),
     ({"alpha_pattern": {r"layers\.\d+": 4.0}}, 1.0), ({"r": 2, "rank_pattern": {"layers.0": 4}}, 2.0),
     ({"r": 2, "rank_pattern": {"0": 4}, "use_rslora": True}, 4.0), ({"lora_alpha": -8}, -2.0)],
    ids=str,
)  # fmt: skip
def test_an_adapter_is_its_base_and_its_factors(capsys, models, tmp_path, settings, scale):
    a, b = factors(0)
    adapter(tmp_path / "a", lora("layers.0", a, b), **settings)
    weight = load_file(models / "base" / "model.safetensors")["layers.0.weight"]
    assert_changed(models, baked(capsys, models, tmp_path), {"layers.0.weight": weight + scale * (b @ a)})


def test_an_adapter_of_another_layout(capsys, models, tmp_path):
    """Weights stored [in, out]; embeddings, whose factors have other names; modules and biases saved whole."""
    base = load_file(models / "base" / "model.safetensors")
    a, b = factors(0, out=50)
    c, d = factors(1, out=16, into=50)
    held = lora("head", b.T, a.T) | {"embed.lora_embedding_A": c, "embed.lora_embedding_B": d}
    held |= {"norm.weight": torch.full((16,), 2.0), "layers.1.base_layer.bias": torch.full((16,), 3.0)}
    adapter(tmp_path / "a", held, fan_in_fan_out=True)
    changed = {
        "head.weight": base["head.weight"] + 2 * (a.T @ b.T).T,
        "embed.weight": base["embed.weight"] + 2 * (d @ c).T,
        "norm.weight": torch.full((16,), 2.0),
        "layers.1.bias": torch.full((16,), 3.0),
    }
    assert_changed(models, baked(capsys, models, tmp_path), changed)


def test_an_adapter_is_not_rounded_in_between(capsys, models, tmp_path):
    """On a bfloat16 base, whose steps are coarser than what the adapter adds; beside a model that is whole."""
    base = {n: its.bfloat16() if its.is_floating_point() else its
            for n, its in load_file(models / "base" / "model.safetensors").items()}  # fmt: skip
    keep(base, tmp_path / "base")
    keep(base, tmp_path / "whole")
    a, b = factors(0)
    adapter(tmp_path / "a", lora("layers.0", a * 1e-2, b * 1e-2))
    options = ("--scale", 100, "--dtype", "float32")
    found = merge(capsys, tmp_path, tmp_path / "out", *options, method="task_arithmetic", experts=("a", "whole"))
    weight = base["layers.0.weight"].float()
    added = 2 * (b * 1e-2) @ (a * 1e-2)
    torch.testing.assert_close(found["layers.0.weight"], weight + 100 * added, rtol=1e-3, atol=2e-4)
    assert not torch.equal((weight + added).bfloat16().float(), weight + added)
    kept_type = merge(capsys, tmp_path, tmp_path / "kept", method="task_arithmetic", experts=("a", "whole"))
    assert kept_type["layers.0.weight"].dtype == torch.bfloat16
    told = json.loads((tmp_path / "out" / "koinon.json").read_text())["models"]
    assert len(told["a"]["adapter sha256"]) == 64


def test_adapters_merge_as_the_models_they_make(capsys, models, tmp_path, monkeypatch):
    """Chunk by chunk, where a chunk begins and ends in the middle of a row."""
    monkeypatch.setattr("koinon.merge._engine.CHUNK", 37)
    base = load_file(models / "base" / "model.safetensors")
    for number, name in enumerate(("p", "q")):
        a, b = factors(number)
        adapter(tmp_path / name, lora("layers.0", a, b) | lora("layers.2", b.T, a.T))
        added = {"layers.0.weight": 2 * (b @ a), "layers.2.weight": 2 * (a.T @ b.T)}
        keep({n: its + added.get(n, 0) for n, its in base.items()}, tmp_path / f"{name} whole")
    keep(base, tmp_path / "base")
    found = merge(capsys, tmp_path, tmp_path / "out", experts=("p", "q"), method="task_arithmetic")
    wanted = merge(capsys, tmp_path, tmp_path / "wanted", experts=("p whole", "q whole"), method="task_arithmetic")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# What is told and carried over.


def test_what_is_told_of_a_merge(capsys, models, tmp_path):
    merge(capsys, models, tmp_path / "out", "--density", 0.5)
    told = json.loads((tmp_path / "out" / "koinon.json").read_text())
    assert eval(told["methods"][0], {"Ties": Ties}) == Ties(density=(0.5,))
    assert list(told["models"]) == list(EXPERTS)
    assert (told["merged"], told["copied"]) == (12, 1)
    assert told["rounding"] == "once"
    digests = [told["base"]["tensors sha256"], *(its["tensors sha256"] for its in told["models"].values())]
    assert len(set(digests)) == 4
    assert all(len(digest) == 64 for digest in digests)
    assert told["models"]["x"]["path"] == str(models / "x")


def test_the_hash_of_a_model_is_of_every_number_it_has(capsys, models, tmp_path):
    def digests(folder, out):
        merge(capsys, folder, tmp_path / out)
        told = json.loads((tmp_path / out / "koinon.json").read_text())
        return [its["tensors sha256"] for its in (told["base"], *told["models"].values())]

    given = pool()
    states = {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()}
    before = digests(models, "out")
    for number, (name, tensor) in enumerate([("base", "norm.bias"), ("y", "head.weight"), ("z", "temperature")]):
        changed = {key: its.clone() for key, its in states[name].items()}
        changed[tensor].view(-1)[-1] += 1e-3
        after = digests(kept(tmp_path / str(number), states | {name: changed}), f"out {number}")
        assert [one == other for one, other in zip(before, after)] == [key != name for key in states]


def test_configuration_tokenizer_and_licence_are_carried_over(capsys, models, tmp_path):
    merge(capsys, models, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", "koinon.json", "config.json", *CARRIED}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in CARRIED.items())
    assert json.loads((tmp_path / "out" / "koinon.json").read_text())["format"] == 1  # not the input's
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


def test_a_dry_run_tells_and_writes_nothing(capsys, models, tmp_path):
    said = made.say(capsys, *words(models, tmp_path / "out", "--dry-run", "--json"))
    assert said.code == 0
    told = json.loads(said.out)
    size = sum(its.numel() * its.element_size() for its in load_file(models / "base" / "model.safetensors").values())
    assert told["bytes"] == {"read": 3 * 4 * (size - 32) + 32, "written": size}
    assert told["tensors"] == {"merged": 12, "copied": 1}
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_not_touched_and_an_empty_folder_is_taken(capsys, models, tmp_path):
    before = made.held(models)
    (tmp_path / "out").mkdir()
    merge(capsys, models, tmp_path / "out")
    merge(capsys, models, tmp_path / "deep" / "er" / "out")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "deep" / "er" / "out"))
    assert made.held(models) == before


def test_a_folder_reached_by_a_link_or_from_inside_is_taken(capsys, models, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "broken").symlink_to(tmp_path / "later")
    (tmp_path / "here").mkdir()
    for out in ("link", "broken"):
        merge(capsys, models, tmp_path / out)
    monkeypatch.chdir(tmp_path / "here")
    assert made.say(capsys, *words(models, Path("."))).code == 0
    found = [payload(tmp_path / name) for name in ("real", "later", "here")]
    assert found[0]
    assert found[0] == found[1] == found[2]
    assert rest(tmp_path / "link") == []


# Stops. Models of some tens of megabytes, so that a stop comes in the middle.


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    numbers = torch.Generator().manual_seed(0)
    base = {f"layers.{number}.weight": torch.randn(512, 512, generator=numbers) for number in range(40)}
    for name in ("base", *EXPERTS):
        keep({key: its.roll(len(name) + ord(name[0])) for key, its in base.items()}, folder / name)
    return folder


SLOW = ("--scope", "tensor", "--density", 0.3, "--workers", 1, "--shard-gb", 0.01)


def stopped(capsys, large: Path, out: Path, how: int) -> tuple[int, str]:
    """Start a merge in a process, see that it holds the folder, and stop it by a signal when some tensors are whole."""
    process = made.start(made.command(*words(large, out, *SLOW)))
    hidden = out.parent / f".{out.name}.merging"
    try:
        assert made.waited(lambda: process.poll() is not None or len(done(hidden / "journal.jsonl")) >= 3)
        os.killpg(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # no thread is writing any more
        assert not out.exists(), "it was through before it could be stopped"
        before = made.held(hidden)
        made.assert_one_line(made.say(capsys, *words(large, out)), str(out), "another process is merging into it")
        assert made.held(hidden) == before
        assert not out.exists()
        os.killpg(process.pid, how)
        os.killpg(process.pid, signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert not out.exists()
    return process.returncode, err


def done(journal: Path) -> list[str]:
    """The tensors a journal knows to be whole."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [next(iter(json.loads(line))) for line in lines if line.endswith("}}")]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The tensors that a run here writes to."""
    found: list[str] = []
    write = _files.TensorWriter.write

    def counting(self, name, start, values):
        found.append(name)
        write(self, name, start, values)

    monkeypatch.setattr(_files.TensorWriter, "write", counting)
    return found


@pytest.fixture(scope="module")
def through(large, tmp_path_factory) -> Path:
    """The result of a run that was not stopped."""
    out = tmp_path_factory.mktemp("through") / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        main([str(word) for word in words(large, out, *SLOW)])
    return out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
def test_a_merge_that_is_stopped_goes_on(capsys, large, through, tmp_path, counted, how):
    code, err = stopped(capsys, large, tmp_path / "out", how)
    if how == signal.SIGINT:
        assert code == 130, err
        assert err == "koinon: stopped; what was finished is kept\n"
    else:
        assert code == -signal.SIGKILL
    hidden = tmp_path / ".out.merging"
    whole = done(hidden / "journal.jsonl")
    assert 3 <= len(whole) < 40
    with (hidden / "journal.jsonl").open("a") as journal:
        journal.write('{"layers.39.weight": {"x": "12')  # as if it had been cut while it wrote a line
    merge(capsys, large, tmp_path / "out", *SLOW)
    assert set(counted) == {f"layers.{number}.weight" for number in range(40)} - set(whole)
    assert payload(tmp_path / "out") == payload(through)
    told = [json.loads((its / "koinon.json").read_text()) for its in (tmp_path / "out", through)]
    assert told[0] == told[1]
    assert rest(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(through))


def stop_early(monkeypatch, capsys, arguments, after: int = 3) -> None:
    """A run in this process that is stopped, as by Ctrl-C, when so many tensors are whole."""
    kept_before = _files._Unfinished.keep
    whole: list[str] = []

    def keeping(self, name, digests):
        kept_before(self, name, digests)
        whole.append(name)
        if len(whole) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_files._Unfinished, "keep", keeping)
        assert made.say(capsys, *arguments).code == 130


@pytest.mark.parametrize(
    "change", ["nothing", "a setting", "an input", "another model", "the order", "damage", "a power cut"]
)
def test_a_merge_goes_on_only_if_it_is_the_same(capsys, models, tmp_path, monkeypatch, counted, change):
    kept(tmp_path)
    changed = {key: its * 2 if its.is_floating_point() else its for key, its in pool().tuned["x"].state_dict().items()}
    keep(changed, tmp_path / "w")
    for name in ("x", "w"):  # two models that differ in nothing but what they are: same sizes, same times
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1, 1))
    options = ["--workers", 1, "--scope", "tensor"]
    stop_early(monkeypatch, capsys, words(tmp_path, tmp_path / "out", *options))
    hidden = tmp_path / ".out.merging"
    whole = done(hidden / "journal.jsonl")
    assert 3 <= len(whole) < 13
    experts = EXPERTS
    match change:
        case "a setting":
            options += ["--density", 0.5]
        case "a power cut":
            monkeypatch.setattr(_files, "_started", lambda: "another start of the system")
        case "an input":
            keep(changed, tmp_path / "y")
        case "another model":
            experts = ("w", "y", "z")
        case "the order":
            experts = ("y", "x", "z")
        case "damage":
            (hidden / "plan.json").write_bytes(b"\xff\xfe")
    counted.clear()
    found = merge(capsys, tmp_path, tmp_path / "out", *options, experts=experts)
    every = {name for name, its in found.items() if its.numel()}
    assert set(counted) == every - (set(whole) if change == "nothing" else set())
    assert same(found, merge(capsys, tmp_path, tmp_path / "fresh", *options, experts=experts))
    assert rest(tmp_path / "out") == []


# Memory.

MEASURE = """
import sys, threading
from pathlib import Path
from koinon.cli import main
import koinon.merge.job, koinon.merge.ties, rich.progress, torch

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

before = most = anonymous()
stop = threading.Event()
def watch():
    global most
    while not stop.wait(0.002):
        most = max(most, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
main(sys.argv[1:])
stop.set()
watcher.join()
print(most - before, file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Models of one tensor of 126 MB: what is allocated, as it runs, stays below one of them and what is said."""
    numbers = torch.Generator().manual_seed(0)
    base = torch.randn(1 << 20, generator=numbers).repeat(30)
    for name in ("base", "x", "y"):
        keep({"w": base.roll(ord(name[0]))}, tmp_path / name)
    arguments = words(tmp_path, tmp_path / "out", "--workers", 1, experts=("x", "y"))
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.splitlines()[-1]) < 88, f"{done.stderr} MB"
    assert len(tensors(tmp_path / "out")["w"]) == len(base)


def test_what_is_copied_is_copied_to_the_bit(capsys, tmp_path):
    """Whole numbers have more digits than the type that is computed in."""
    given = pool()
    large = torch.tensor([2**24 + 1, 2**40 + 3, -(2**62) - 1, 7])
    for its in (given.base, *given.tuned.values()):
        its.ids = large.clone()
    kept(tmp_path, {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()})
    for method in ("ties", "average"):
        assert torch.equal(merge(capsys, tmp_path, tmp_path / method, method=method)["ids"], large)


def test_a_failed_merge_takes_its_new_folders_away(capsys, tmp_path):
    given = pool()
    given.tuned["y"].norm.bias.data[0] = torch.nan
    kept(tmp_path, {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()})
    before = made.held(tmp_path)
    made.assert_one_line(made.say(capsys, *words(tmp_path, tmp_path / "new" / "er" / "out")), "norm.bias")
    assert not (tmp_path / "new").exists()
    assert made.held(tmp_path) == before


def test_tied_tensors_stay_tied_though_elements_are_dropped_at_random(capsys, tmp_path):
    given = pool()
    states = {"base": tied(given.base.state_dict(), True)}
    states |= {name: tied(its.state_dict(), False) for name, its in given.tuned.items()}
    kept(tmp_path, states)
    found = merge(capsys, tmp_path, tmp_path / "out", "--density", 0.3, method="dare")
    assert torch.equal(found["head.weight"], found["embed.weight"])
    assert not torch.equal(found["head.weight"], states["base"]["head.weight"])


def test_a_bias_is_not_taken_for_tied_because_both_are_untrained(capsys, tmp_path):
    given = pool()
    states = {"base": given.base.state_dict()} | {n: its.state_dict() for n, its in given.tuned.items()}
    for name in ("layers.0.bias", "layers.1.bias"):
        states["base"][name] = torch.zeros(16)
    del states["y"]["layers.0.bias"]
    kept(tmp_path, states)
    made.assert_one_line(made.say(capsys, *words(tmp_path, tmp_path / "out")), "'y'", "no tensor layers.0.bias")


def test_other_names_are_told_without_comparing_each_with_each(tmp_path):
    """Each tensor is read a fixed number of times, however many there are."""

    class Counted(Loaded):
        read_times = 0

        def read(self, name, start, stop):
            self.read_times += 1
            return super().read(name, start, stop)

    numbers = torch.Generator().manual_seed(0)
    count = 200
    weights = Counted({f"layer.{i}": torch.randn(2, 2, generator=numbers) for i in range(count)})
    twins = _plan._Twins(weights)
    assert [twins.of(name) for name in weights.specs] == [[]] * count
    assert weights.read_times <= 2 * count


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (Average(), 1),
        (TaskArithmetic(), 1),
        (Ties(), 3),
        (Ties(density=(1.0,)), 1),
        (Ties(scope="tensor"), 3),
        (Dare(), 1),
        (Dare(rescale="mass"), 2),
        (Breadcrumbs(), 3),
    ],
    ids=repr,
)
def test_a_tensor_is_read_as_often_as_is_told(monkeypatch, method, passes):
    monkeypatch.setattr(_engine, "CHUNK", 64)
    read: dict[str, int] = {}

    class Counted(Loaded):
        def read(self, name, start, stop):
            read[name] = read.get(name, 0) + stop - start
            return super().read(name, start, stop)

    numbers = torch.Generator().manual_seed(0)
    models = {name: Counted({"w": torch.randn(200, generator=numbers)}) for name in EXPERTS}
    sources = _engine.Sources(Loaded({"w": torch.zeros(200)}), models)
    found = {repr(method): _engine.measure_all(method, sources, ["w"])} if method.measures_whole else None
    _engine.blend_all(
        lambda name: method, sources, ["w"], models["x"].specs, lambda *_: None, workers=1, measured=found
    )
    assert read == {"w": 3 * 200 * passes}
    assert method.passes == passes


def test_the_manifest_tells_what_an_adapter_is_applied_to(capsys, tmp_path):
    """Also where the method itself does not look at the base."""
    given = pool()
    kept(tmp_path, {"base": given.base.state_dict(), "x": given.tuned["x"].state_dict()})
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    start = "base_model.model.layers.0.lora_"
    factors = {f"{start}A.weight": torch.ones(2, 16), f"{start}B.weight": torch.ones(16, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    manifests = []
    for alpha in (4, 8):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": alpha}))
        out = tmp_path / f"out{alpha}"
        merge(capsys, tmp_path, out, method="average", experts=("x", "adapter"))
        manifests.append(json.loads((out / "koinon.json").read_text()))
    one, other = (its["models"]["adapter"] for its in manifests)
    assert one["adapter sha256"] == other["adapter sha256"]
    assert one["its config sha256"] != other["its config sha256"]
    assert manifests[0]["base"]["tensors sha256"] == _files.digest_of(open_weights(tmp_path / "base"))
