"""What training for edits descends: how unlikely answers are, and how far a model's words move."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from koinon.lm.language import LM, Encoded


def logits_with(lm: LM, values: Mapping[str, Tensor], encoded: Encoded) -> Float[Tensor, "text time token"]:
    """What the model would say with other values of some parameters; gradients flow into them."""
    named = {"input_ids": encoded.ids, "attention_mask": encoded.mask.long(), "use_cache": False}
    return torch.func.functional_call(lm.model, dict(values), (), named).logits.float()


def unlikely(logits: Float[Tensor, "text time token"], encoded: Encoded) -> Tensor:
    """The negative log-probability of a token of an answer: the mean over its tokens, then over the texts."""
    asked = encoded.answer[:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), encoded.ids[:, 1:], reduction="none")
    return ((each * asked).sum(1) / asked.sum(1)).mean()


def moved(
    before: Float[Tensor, "text time token"], after: Float[Tensor, "text time token"], encoded: Encoded
) -> Tensor:
    """KL(before || after) of the next token, the mean over all tokens."""
    before, after = before[encoded.mask].float().log_softmax(-1), after[encoded.mask].float().log_softmax(-1)
    return F.kl_div(after, before, log_target=True, reduction="batchmean")
