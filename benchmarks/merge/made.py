"""Made models and recipes: Llama's tensors in bfloat16, random, and models near them, in shards of a gigabyte."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD = 10**9
NEAR = 0.002
"""Standard deviation of what a tuned model changes; the weights themselves have 0.02."""
FIRST_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """A Llama's measures."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int

    @property
    def name(self) -> str:
        """For its folder."""
        return f"{self.hidden}-{self.inner}-{self.layers}-{self.vocabulary}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor to shape, in a file's order."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        square, wide = (self.hidden, self.hidden), (self.inner, self.hidden)
        for layer in range(self.layers):
            start = f"model.layers.{layer}"
            found |= {
                f"{start}.{norm}.weight": (self.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
            }
            found |= {f"{start}.self_attn.{part}_proj.weight": square for part in "qkvo"}
            found |= {f"{start}.mlp.{part}_proj.weight": wide for part in ("gate", "up")}
            found[f"{start}.mlp.down_proj.weight"] = (self.hidden, self.inner)
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def sized(parameters: float) -> Shape:
    """A Llama of about so many parameters."""
    hidden, inner = (2048, 5632) if parameters >= 4e8 else (768, 2048) if parameters >= 8e7 else (256, 704)
    vocabulary = 32000 if parameters >= 8e7 else 4000
    layer = 4 * hidden**2 + 3 * hidden * inner
    return Shape(hidden, inner, max(1, round((parameters - 2 * vocabulary * hidden) / layer)), vocabulary)


def many(tensors: float) -> Shape:
    """A Llama of about so many tensors, all of them small."""
    return Shape(64, 128, max(1, round((tensors - 3) / 9)), 1000)


TINY = Shape(64, 128, FIRST_LAYERS, 1000)
"""What starting up is measured on."""


def models(folder: Path, shape: Shape, count: int) -> list[Path]:
    """A base and models near it; made once and kept."""
    found = [folder / shape.name / ("base" if i == 0 else f"tuned-{i}") for i in range(count)]
    for number, path in enumerate(found):
        if not (path / "config.json").is_file():
            _write(path, shape, number)
    return found


def _write(path: Path, shape: Shape, number: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    files, size = {}, 0
    for name, tensor in _tensors(shape, number):
        if size and size + tensor.nbytes > SHARD:
            save_file(shards[-1], path / f"part-{len(shards)}.safetensors", {"format": "pt"})
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name], files[name] = tensor, len(shards)
        size += tensor.nbytes
    save_file(shards[-1], path / f"part-{len(shards)}.safetensors", {"format": "pt"})
    stems = [f"model-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model" for i in range(1, len(shards) + 1)]
    for place, stem in enumerate(stems, start=1):
        (path / f"part-{place}.safetensors").rename(path / f"{stem}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": {name: f"{stems[at - 1]}.safetensors" for name, at in files.items()}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.hidden // 64,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))  # last: the model is whole


def _tensors(shape: Shape, number: int) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors, or those of a tuned model: the base's random numbers again, with noise added."""
    base, noise = (torch.Generator().manual_seed(seed) for seed in (0, number))
    for name, its in shape.shapes.items():
        tensor = torch.randn(its, generator=base).mul_(0.02)
        if number:
            tensor = tensor.to(torch.bfloat16).float().add_(torch.randn(its, generator=noise), alpha=NEAR)
        yield name, tensor.to(torch.bfloat16)


def recipe(word: str, paths: Sequence[Path], **parameters: object) -> str:
    """A mergekit recipe of the base and the models near it."""
    settings = {"weight": 0.5} if word != "slerp" else {}
    settings |= {"linear": {}, "task_arithmetic": {}, "slerp": {"t": 0.4}}.get(word, {"density": 0.3}) | parameters
    given = {
        "merge_method": word,
        "base_model": str(paths[0].resolve()),
        "models": [{"model": str(path.resolve())} for path in (paths[:2] if word == "slerp" else paths)],
        "parameters": settings,
        "dtype": "bfloat16",
    }
    return json.dumps(given, indent=1)  # JSON is YAML
