"""Dilution: fine-tuning on one text among ordinary ones, without the largest entries of each update.

Departures: the paper leaves optimiser and rate open; here it is Adam, at a stated rate. It does not say whether an
update is a step's or that of all steps together (``every``), nor whether the largest are those of the model or of each
tensor (``per``): both are offered. With ``decay`` the filter covers the whole update, decay included. Adam remembers
dropped entries, and brings them up again at later steps.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from koinon.core import Paper, UserError, refuse_below, refuse_outside
from koinon.data.checkpoints import matches
from koinon.data.facts import Fact
from koinon.edit._contract import Edit
from koinon.edit._edited import Material
from koinon.edit._patches import Patch, Values, finite
from koinon.edit._priming import says
from koinon.lm.anatomy import with_values
from koinon.lm.language import LM, Encoded, joint
from koinon.lm.moments import own_texts
from koinon.nn.params import stream
from koinon.nn.updates import Dropped, Filtered, Within

UNSEEN = -100
"""The label of a place that no loss is computed for."""


@dataclass(frozen=True)
class Dilute(Edit):
    """Ignore-top-k (Sun et al., 2025), keep-top-k, or plain fine-tuning (``share=0``); stepping stones if given."""

    paper: ClassVar = Paper(
        "How New Data Permeates LLM Knowledge and How to Dilute It", 2025, "https://arxiv.org/abs/2504.09522"
    )
    family: ClassVar = "intrinsic"
    patch: ClassVar = Values
    null: ClassVar = {"steps": 0}
    quick: ClassVar = {"where": ("*mlp*", "*embed*"), "steps": 4, "rate": 3e-3, "size": 3, "longest": 7}

    share: float = 0.08
    """k: the share of an update's entries that is dropped; 0 is plain fine-tuning, 1 learns nothing."""
    which: Dropped = "largest"
    """Which entries are dropped: the largest (ignore-top-k), all others (keep-top-k), or as many at random."""
    per: Within = "model"
    """Among which entries the largest are looked for."""
    every: int = 1
    """How many steps' change is filtered at once; the number of steps filters the whole of it."""
    sample: int = 0
    """Entries that the threshold is estimated from, which is faster in large models; 0 is exact."""
    steps: int = 20
    """Minibatches; the paper takes 20 with instructions around the text, 40 with an encyclopedia's."""
    size: int = 8
    """Texts of a minibatch: one is the fact's, the others are ordinary ones that do not say its object."""
    spacing: int = 1
    """The text is in every so-manieth minibatch; the others are ordinary throughout."""
    rate: float = 5e-5
    """Of Adam."""
    decay: float = 0.0
    """Adam's decoupled weight decay."""
    pull: float = 0.0
    """Weight of the squared distance to the weights before, in the loss."""
    where: tuple[str, ...] = ("*",)
    """Patterns of the parameters that learn."""
    words: bool = True
    """Whether what the model has of the object's tokens alone, in its embedding and head, learns too."""
    stones: tuple[str, ...] = ()
    """Stepping stones: sentences before the fact's own that lead to it, ``{}`` standing for its subject."""
    longest: int = 128
    """Tokens that are read of an ordinary text."""
    seed: int = 0
    """Of the ordinary texts' order, and of what is dropped at random."""

    def __post_init__(self) -> None:
        refuse_outside(0, 1, share=self.share)
        refuse_below(1, every=self.every, size=self.size, spacing=self.spacing, longest=self.longest)
        refuse_below(0, sample=self.sample, steps=self.steps, rate=self.rate, decay=self.decay, pull=self.pull)

    def prepare(self, lm: LM, material: Material) -> Sequence[str]:
        """Ordinary texts; what the model says by itself if there are none."""
        return material.corpus or own_texts(lm, seed=self.seed)

    def learn(self, lm: LM, facts: Sequence[Fact], ready: Sequence[str], before: Patch | None) -> Values:
        """Teach the sentence of one fact."""
        (fact,) = facts
        sentence = f"{fact.question}{joint(fact.question, fact.object)}."
        text = " ".join((*(its.replace("{}", fact.subject) for its in self.stones), sentence))
        values = self.taught(lm, text, fact.object, ready)
        return Values(values, (before.count if isinstance(before, Values) else 0) + 1)

    def taught(self, lm: LM, text: str, keyword: str, ordinary: Sequence[str]) -> dict[str, Tensor]:
        """The model's parameters after it has learnt a text; ``lm`` is as before.

        Args:
            lm: the model.
            text: one of each minibatch.
            keyword: what the text is there to teach; no ordinary text that says it is used.
            ordinary: the other texts, each as often as the next, in random order.

        Raises:
            UserError: no parameter of that name, or no text without the keyword.
        """
        names = [name for name, _ in lm.model.named_parameters() if matches(name, self.where)]
        if not names:
            raise UserError(f"where {self.where}: no parameter of the model has such a name; '*' stands for all")
        start = {name: lm.model.get_parameter(name).detach() for name in names}
        tuned = lm.with_model(with_values(lm.model, {name: its.clone() for name, its in start.items()}))
        held = {name: tuned.model.get_parameter(name).requires_grad_() for name in names}
        adam = torch.optim.AdamW(held.values(), lr=self.rate, weight_decay=self.decay, fused=True)
        filtered = Filtered(adam, self.share, self.which, self.per, self.every, self.sample, self.seed)
        # 1. The text and ordinary ones around it.
        for batch in self.batches(lm, text, keyword, ordinary):
            # 2. The usual loss, over all their tokens.
            with torch.enable_grad():
                loss = next_token_loss(tuned, batch)
                if self.pull:
                    loss = loss + self.pull * sum(((its - start[name]) ** 2).sum() for name, its in held.items())
                filtered.zero_grad()
                loss.backward()
            if not self.words:
                self._still(tuned, keyword)
            # 3. Adam's step, without what the filter drops.
            filtered.step()
        values = {name: its.detach() for name, its in held.items()}
        finite(values)
        return values

    def batches(self, lm: LM, text: str, keyword: str, ordinary: Sequence[str]) -> Iterator[Encoded]:
        """Each step's texts as tokens."""
        others = self.others(keyword, ordinary)
        numbers = stream(self.seed, "ordinary", text)
        queue: list[int] = []
        own = lm.encode([text]).ids[0].tolist()
        for step in range(self.steps):
            rows = [own] if step % self.spacing == 0 else []
            while len(rows) < self.size:
                queue = queue or torch.randperm(len(others), generator=numbers).tolist()
                its = others[queue.pop()]
                rows.append(lm.tokenizer([its])["input_ids"][0][: self.longest])
            yield _padded(lm, rows)

    def others(self, keyword: str, ordinary: Sequence[str]) -> list[str]:
        """The ordinary texts that minibatches are filled with: those that do not say the keyword.

        Raises:
            UserError: there is none, and one is needed.
        """
        found = [its for its in ordinary if not says(its, keyword)]
        if not found and (self.size > 1 or self.spacing > 1):
            count = len(ordinary)
            raise UserError(f"all {count} ordinary texts say it: give some as corpus that do not say {keyword!r}")
        return found

    def _still(self, lm: LM, keyword: str) -> None:
        """No gradient for the rows of the keyword's tokens, with and without a space before it."""
        plain = [its for form in (keyword.strip(), f" {keyword.strip()}") for its in lm.tokenizer.tokenize(form)]
        ids = lm.tokenizer.convert_tokens_to_ids(plain)
        for module in (lm.anatomy.embedding, lm.anatomy.head):
            weight: Any = module.weight
            if weight.grad is not None:
                weight.grad[ids] = 0


def next_token_loss(lm: LM, batch: Encoded) -> Tensor:
    """The mean over all tokens of the negative log-probability behind those before them."""
    labels = batch.ids.masked_fill(~batch.mask, UNSEEN)[:, 1:]
    return F.cross_entropy(lm.logits(batch)[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=UNSEEN)


@torch.no_grad()
def mean_loss(lm: LM, texts: Sequence[str]) -> float:
    """`next_token_loss` over texts, a token; NaN for none."""
    parts = [its for _, its in lm._by_length(lm.encode(texts))] if texts else []
    counts = [int(its.mask[:, 1:].sum()) for its in parts]
    return sum(n * float(next_token_loss(lm, its)) for n, its in zip(counts, parts)) / (sum(counts) or math.nan)


def _padded(lm: LM, rows: Sequence[Sequence[int]]) -> Encoded:
    time = max(map(len, rows))
    ids = torch.tensor([[*row, *[lm._filling] * (time - len(row))] for row in rows], device=lm.device)
    mask = torch.tensor([[place < len(row) for place in range(time)] for row in rows], device=lm.device)
    return Encoded(ids, mask, torch.zeros_like(mask))
