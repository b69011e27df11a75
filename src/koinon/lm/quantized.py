"""Language models out of GGUF files: few bits a weight become float32, so that they are trained and edited like any."""

import struct
from pathlib import Path
from typing import Any

import torch

from koinon.core import UserError
from koinon.lm.folders import quiet

FILE = "model.gguf"
DAMAGED = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, struct.error)
"""What the reader raises at a file that is not as it should be."""


def read_gguf(content: bytes, folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer that a GGUF file holds.

    Args:
        content: of the file.
        folder: where it is put while it is read; removed afterwards.

    Raises:
        UserError: the reader is missing, or the file is none that it knows.
    """
    try:
        import gguf  # noqa: F401
        import transformers
    except ModuleNotFoundError:
        raise UserError("GGUF files are read with transformers and gguf: pip install 'koinon[lm]'") from None
    file = folder / FILE
    try:
        file.write_bytes(content)
        with torch.random.fork_rng(devices=[]), quiet():
            held = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
            model = _plain(held)
    except DAMAGED as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the GGUF file cannot be read ({said})") from None
    finally:
        file.unlink(missing_ok=True)
    return model, tokenizer


def _plain(held: Any) -> Any:
    """The same weights in a model that no longer remembers how they were stored, and so can be saved."""
    settings = {key: value for key, value in held.config.to_dict().items() if key != "quantization_config"}
    model = type(held)(type(held.config).from_dict(settings))
    model.load_state_dict(held.state_dict())
    model.generation_config = held.generation_config
    return model.float().eval()
