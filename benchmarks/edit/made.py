"""The models and facts that both sides get: copies of koinon's own, in folders that EasyEdit can read."""

import random
from collections.abc import Sequence
from pathlib import Path

from koinon.data import factlab
from koinon.lm import shelf


def models(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Folders of the small model and of SmolLM2-135M; "llama" in a name is how EasyEdit knows what to do.

    Their heads are copies of their embeddings: EasyEdit's MEMIT finds no head that is tied. The small model's end token
    is its padding: EasyEdit pads with the end token, and its GRACE would miscount prompts that begin with the same one.
    """
    found = {}
    for name, short in (("world", "world"), ("smollm2", "smol")):
        if short not in wanted:
            continue
        found[short] = folder / f"llama-{short}"
        if not found[short].exists():
            _untied(Path(shelf.path(name)), found[short])
    return found


def _untied(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.pad_token
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def facts(count: int) -> list[dict[str, str]]:
    """Facts that are not so: cities in other countries, and other capitals."""
    world, drawn = factlab.world(), random.Random(0)
    chosen = [
        drawn.sample(list(world.related(relation)), number)
        for relation, number in (("country", count - count * 2 // 5), ("capital", count * 2 // 5))
    ]
    changed = [world.counterfactual(fact) for its in chosen for fact in its]
    drawn.shuffle(changed)
    return [{"prompt": its.prompt, "subject": its.subject, "object": its.object} for its in changed]


def corpus(count: int) -> list[str]:
    """Sentences that the small model is trained on."""
    found = factlab.world().statements()
    random.Random(0).shuffle(found)
    return found[:count]
