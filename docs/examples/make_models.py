"""Make a folder of small models to merge: a base in the shape of a Llama, three tuned from it, and a LoRA adapter.

python docs/examples/make_models.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, WORDS = 64, 172, 2, 500
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{at}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{at}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,)}


def make_models(folder: Path) -> None:
    """Write ``base``, ``french``, ``law``, ``code`` and the adapter ``style`` into the folder."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes().items()}
    for model in ("base", "french", "law", "code"):
        step = 0.0 if model == "base" else 0.005
        tuned = {name: value + step * torch.randn(value.shape, generator=draw) for name, value in base.items()}
        (folder / model).mkdir(parents=True, exist_ok=True)
        kept = {name: value.bfloat16() for name, value in tuned.items()}
        save_file(kept, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{module}.lora_A.weight": torch.randn(4, HIDDEN, generator=draw),
        f"{module}.lora_B.weight": torch.randn(HIDDEN, 4, generator=draw) * 0.01,
    }
    (folder / "style").mkdir(exist_ok=True)
    save_file(factors, folder / "style" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "style" / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    make_models(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
