"""Second moments of what goes into a projection, from texts, with a cache keyed by what they come from."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.lm.anatomy import Projection
from koinon.lm.language import LM

STARTS = ("The", "A", "In", "It", "There", "When", "One", "This")
"""What a model that is given no texts begins its own with."""


def own_texts(lm: LM, count: int = 64, tokens: int = 48, seed: int = 0) -> list[str]:
    """What the model says by itself, drawn from its distribution: a sample of what it takes for text."""
    prompts = [STARTS[number % len(STARTS)] for number in range(count)]
    said = lm.generate(prompts, tokens, sample=True, seed=seed)
    return [prompt + text for prompt, text in zip(prompts, said)]


@torch.no_grad()
def second_moment(
    lm: LM, projection: Projection, texts: Sequence[str], cache: Path | None = None
) -> tuple[Float[Tensor, "into into"], int]:
    """E[k k^T] over the tokens of texts, in float64, where k is what goes into the projection; and how many tokens.

    Args:
        lm: the model.
        projection: one of its own.
        texts: each is cut where the model's places end.
        cache: a folder that keeps what was computed, by the model, the place and the texts.
    """
    file = None
    if cache is not None:
        file = cache / f"moment-{_key(lm, projection.name, texts)}.safetensors"
        if file.exists():
            return _kept(file)
    into = projection.weight.shape[1]
    total, count = torch.zeros(into, into, dtype=torch.float64), 0
    for part in lm._batches(lm.encode([_cut(lm, text) for text in texts])):
        seen = lm.seen({"keys": projection.module}, part, "in")["keys"]
        keys = seen[part.mask.to(seen.device)].to(torch.float64).cpu()
        total += keys.T @ keys
        count += len(keys)
    found = total / max(count, 1)
    if file is not None:
        _keep(file, found, count)
    return found, count


def shrunk(moment: Float[Tensor, "into into"], count: int) -> tuple[Float[Tensor, "into into"], float]:
    """The moment drawn towards its diagonal as far as its sample is small, so that it can be inverted.

    The share of the diagonal is into / (into + count): a half where there are as many tokens as dimensions. A dimension
    that was never used gets a thousandth of the mean.
    """
    share = len(moment) / (len(moment) + count)
    diagonal = moment.diagonal().clamp(min=1e-3 * float(moment.diagonal().mean()))
    return (1 - share) * moment + share * torch.diag(diagonal), share


def _cut(lm: LM, text: str) -> str:
    limit = lm.limit
    if len(text) < limit:  # no tokenizer makes more tokens than characters, but for the few it puts around them
        return text
    ends = [end for _, end in lm.tokenizer([text], return_offsets_mapping=True)["offset_mapping"][0]]
    return text if len(ends) <= limit else text[: ends[int(limit) - 2]]


def _key(lm: LM, name: str, texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(f"{lm.fingerprint} {name}".encode(), digest_size=16)
    for text in texts:
        digest.update(f"\n{len(text)} {text}".encode())
    return digest.hexdigest()


def _kept(file: Path) -> tuple[Tensor, int]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.get_tensor("moment"), int(opened.metadata()["count"])


def _keep(file: Path, moment: Tensor, count: int) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")
    save_file({"moment": moment}, beside, {"count": str(count)})
    os.replace(beside, file)
