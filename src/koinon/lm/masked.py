"""A masked language model with its tokenizer: how likely it finds an answer where a text is hidden."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from koinon.core import UserError
from koinon.lm.anatomy import frozen
from koinon.lm.language import LM, Said


@dataclass(frozen=True, eq=False)
class MaskedLM:
    """A model of Hugging Face's interface that fills in what is hidden, such as BERT. It is never changed.

    Raises:
        UserError: a tokenizer without a token that hides, or one that does not tell its tokens' characters.
    """

    lm: LM
    """Model and tokenizer; parts, tokens and what goes on inside are as of any other, but for what it says."""

    def __post_init__(self) -> None:
        if self.lm.tokenizer.mask_token_id is None:
            raise UserError(f"{type(self.lm.tokenizer).__name__}: it has no token that hides others")

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "MaskedLM":
        """A user's own model; its values are shared, its modules are not."""
        return cls(LM(frozen(model), tokenizer))

    @classmethod
    def load(cls, where: str | Path, dtype: str = "auto", device: str | None = None) -> "MaskedLM":
        """A model in a folder, or of the hub; see `LM.load`."""
        from koinon.lm.folders import read

        model, tokenizer = read(where, dtype, device, masked=True)
        return cls.of(model, tokenizer)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], answers: Sequence[str], after: str = ".") -> list[Said]:
        """How likely each answer is between its prompt and what follows, token by token.

        Of an answer's tokens, each is scored with itself and those behind it hidden and those before it given: the
        model fills in from left to right, as one that continues does, and the sum is the answer's log-probability.

        Args:
            prompts: texts up to the answer.
            answers: one for each.
            after: the rest of the text.
        """
        encoded = self.lm.encode(prompts, answers, after, closed=True)
        longest = int(encoded.answer.sum(1).max())
        hidden = self.lm.tokenizer.mask_token_id
        order = encoded.answer.long().cumsum(1)  # of the answer's tokens, from 1
        sure = torch.zeros(len(prompts), longest)
        best = torch.zeros(len(prompts), longest, dtype=torch.long)
        for number in range(1, longest + 1):
            rows = (order[:, -1] >= number).nonzero()[:, 0]
            covered = encoded.answer[rows] & (order[rows] >= number)
            logits = self._logits(encoded.ids[rows].masked_fill(covered, hidden), encoded.mask[rows])
            place = (order[rows] == number).long().argmax(1)  # the first token of that number
            its = logits[torch.arange(len(rows)), place].float().log_softmax(-1).cpu()
            due = encoded.ids[rows, place].cpu()
            sure[rows.cpu(), number - 1] = its.gather(1, due[:, None])[:, 0]
            best[rows.cpu(), number - 1] = its.argmax(1)
        counts = encoded.answer.sum(1).tolist()
        tokens = [row[its].tolist() for row, its in zip(encoded.ids, encoded.answer)]
        return [
            Said(tuple(its[:count].tolist()), tuple(said), tuple(told[:count].tolist()))
            for its, said, told, count in zip(sure, tokens, best, counts)
        ]

    def _logits(self, ids: Tensor, mask: Bool[Tensor, "text time"]) -> Tensor:
        return self.lm.model(input_ids=ids, attention_mask=mask.long()).logits
