"""What a layer should say for the model to answer as taught: a vector at the subject's last token, found by descent."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.lm.language import LM, joint, rewritten, watched
from koinon.lm.places import said_at
from koinon.lm.reading import CACHES

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""What the model's own sentences before a prompt begin with (Meng et al., 2022)."""


@torch.no_grad()
def contexts(lm: LM, count: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Beginnings to put before a prompt, the empty one first: what the model says by itself, of each length in tokens.

    Args:
        lm: the model.
        count: how many of each length.
        lengths: in tokens.
        seed: of the draws.
    """
    found = [""]
    for length in lengths:
        prompts = [OPENINGS[number % len(OPENINGS)] for number in range(count)]
        said = lm.generate(prompts, length, sample=True, seed=seed)
        found += [" ".join(f"{prompt}{text}".split()) + ". " for prompt, text in zip(prompts, said)]
    return found


@dataclass(frozen=True)
class Rows:
    """Texts about one subject, placed so that its last token is in the same column of each; filled up on both sides."""

    ids: Int64[Tensor, "row time"]
    mask: Bool[Tensor, "row time"]
    answer: Bool[Tensor, "row time"]
    """The tokens of the answer."""
    at: int
    """The column of the subject's last token."""

    def until(self, end: int) -> "Rows":
        """Without the columns from one on: nothing that comes after what is asked has a part in it."""
        return Rows(self.ids[:, :end], self.mask[:, :end], self.answer[:, :end], self.at)


def rows(lm: LM, fact: Fact, before: Sequence[str], closing: str | None = None) -> Rows:
    """The fact's question with its object behind each beginning; and, as the last row, ``closing`` in place of both.

    Args:
        lm: the model.
        fact: what is taught.
        before: beginnings of the prompt.
        closing: a prompt with ``{}`` for the subject, such as "{} is a", that nothing is asked of.
    """
    texts = [(its + fact.question, joint(fact.question, fact.object), len(its) + fact.place[0]) for its in before]
    if closing is not None:
        texts.append((closing.replace("{}", fact.subject), "", closing.index("{}")))
    found = []
    for prompt, answer, start in texts:
        encoded = lm.encode([prompt], [answer] if answer else None)
        its = encoded.ids[0], encoded.answer[0], lm.last_of(prompt + answer, (start, start + len(fact.subject)))
        if answer and bool(its[1][its[2]]):
            raise UserError(f"{prompt + answer!r}: subject and object share a token; put a word between them")
        found.append(its)
    at = max(place for _, _, place in found)
    time = at + max(len(ids) - place for ids, _, place in found)
    shape = (len(found), time)
    ids, mask, answers = (torch.full(shape, fill, device=lm.device) for fill in (lm._filling, False, False))
    for row, (tokens, asked, place) in enumerate(found):
        where = slice(at - place, at - place + len(tokens))
        ids[row, where], mask[row, where], answers[row, where] = tokens, True, asked
    return Rows(ids, mask, answers, at)


class Suffix:
    """The rows from the subject's last token on: what is before it is read once and kept as keys and values."""

    def __init__(self, lm: LM, texts: Rows, site: nn.Module):
        self.lm, self.texts, self.site = lm, texts, site
        self._places = (texts.mask.long().cumsum(1) - 1).clamp(min=0)
        known = inspect.signature(lm.model.forward).parameters
        self._takes_places = "position_ids" in known
        self._cached_as = next((name for name in CACHES if name in known), CACHES[0])
        self._kept: Any = None
        if texts.at:
            with torch.no_grad():
                nowhere = torch.zeros(1, dtype=torch.long, device=texts.ids.device)
                said_at(lm.anatomy, nowhere, nowhere, lambda: self._read(slice(0, texts.at)), site)

    def logits(self, rows: Int64[Tensor, " place"], columns: Int64[Tensor, " place"]) -> Float[Tensor, "place token"]:
        """What the model says at some places, their columns counted from the subject's last token."""
        whole = slice(self.texts.at, None)
        kept = self._kept is not None
        return said_at(self.lm.anatomy, rows, columns, lambda: self._call(whole, self._cache(), kept).logits, self.site)

    def _read(self, places: slice) -> Tensor:
        """Keep the keys and values of the first tokens."""
        found = self._call(places, None, True)
        self._kept = found[self._cached_as]
        return found.logits

    def _cache(self) -> Any:
        """A copy that can grow: its layers take new tensors and leave the old ones as they are."""
        cache = copy.copy(self._kept)
        if cache is not None:
            cache.layers = [copy.copy(layer) for layer in cache.layers]
        return cache

    def _call(self, places: slice, cache: Any, use_cache: bool) -> Any:
        end = places.stop or self.texts.mask.shape[1]
        named: dict[str, Any] = {"position_ids": self._places[:, places]} if self._takes_places else {}
        if cache is not None:
            named[self._cached_as] = cache
        return self.lm.model(
            input_ids=self.texts.ids[:, places],
            attention_mask=self.texts.mask[:, :end].long(),
            use_cache=use_cache,
            **named,
        )


@contextmanager
def repeating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What modules give in their first pass within, they give again in each one after it, without computing it."""
    own = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = _once(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    found: list[Any] = []

    def again(*given: Any, **named: Any) -> Any:
        if not found:
            found.append(forward(*given, **named))
        return found[0]

    return again


@dataclass(frozen=True)
class Descent:
    """How an aim is looked for."""

    steps: int
    rate: float
    """Of Adam."""
    kl: float
    """Weight of D_KL(what it says of the subject alone || what it said before)."""
    decay: float
    """Weight of ||delta|| / ||v0||^2."""
    bound: float
    """||delta|| is at most so many times ||v0||."""
    enough: float
    """The loss at which it stops."""


def aim(lm: LM, fact: Fact, site: nn.Module, before: Sequence[str], how: Descent) -> Float[Tensor, " width"]:
    """What a module should give at the subject's last token: what it gives in the bare prompt, changed by Adam.

    Minimised is the mean over the beginnings of the answer's mean negative log-probability, and two small terms, see
    `Descent`; ROME's equation 4, and MEMIT's equation 16.

    Args:
        lm: the model.
        fact: what is taught.
        site: gives vectors of the model's width.
        before: beginnings of the prompt, the empty one first.
        how: of the descent.
    """
    texts = rows(lm, fact, before, closing="{} is a")
    row, column = texts.answer[:, texts.at + 1 :].nonzero().T  # places just before the answer's tokens
    wanted = texts.ids[row, texts.at + 1 + column, None]
    suffix = Suffix(lm, texts.until(texts.at + 1 + int(column.max())), site)
    last = torch.tensor([len(texts.ids) - 1]).to(row), torch.tensor([0]).to(row)
    places = torch.cat([row, last[0]]), torch.cat([column, last[1]])
    with repeating(_below(lm, site)):
        with torch.no_grad(), watched({"site": site}, texts=len(texts.ids)) as seen:
            plain = suffix.logits(*last)[0].float().log_softmax(-1)
        start = seen["site"][0, 0].float()
        delta = torch.zeros_like(start, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=how.rate)
        bound = how.bound * float(start.norm())

        def change(vectors: Tensor) -> Tensor:
            return torch.cat([vectors[:, :1] + delta.to(vectors.dtype), vectors[:, 1:]], 1)

        for _ in range(how.steps - 1):  # the last step would only look at the loss
            with torch.enable_grad():
                with rewritten(site, change, len(texts.ids)):
                    says = suffix.logits(*places).float().log_softmax(-1)
                now = says[-1]
                kl = (now.exp() * (now - plain)).sum()
                small = how.kl * kl + how.decay * delta.norm() / start.norm() ** 2
                loss = _means(-says[:-1].gather(1, wanted).squeeze(1), row).mean() + small
            if float(loss.detach()) < how.enough:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            with torch.no_grad():
                delta *= min(1.0, bound / max(float(delta.norm()), 1e-12))
    return start + delta.detach()


def _below(lm: LM, site: nn.Module) -> list[nn.Module]:
    """The blocks before the one that a module is in, and itself: what they give does not depend on its change."""
    blocks = [block.module for block in lm.anatomy.blocks]
    number = next((number for number, its in enumerate(blocks) if any(one is site for one in its.modules())), 0)
    return [*blocks[:number], site]


def _means(values: Float[Tensor, " n"], row: Int64[Tensor, " n"]) -> Float[Tensor, " row"]:
    """The mean over each row's places."""
    counts = row.bincount()
    return values.new_zeros(len(counts)).index_add(0, row, values) / counts


def keys(lm: LM, facts: Sequence[Fact], site: nn.Module, before: Sequence[str]) -> Float[Tensor, "fact before into"]:
    """What goes into a module at each subject's last token, behind each beginning of its prompt."""
    return at_subjects(lm, facts, before, into=site, out=site)[0]


def values(lm: LM, facts: Sequence[Fact], site: nn.Module) -> Float[Tensor, "fact width"]:
    """What comes out of a module at each subject's last token of the bare prompt."""
    return at_subjects(lm, facts, [""], into=site, out=site)[1][:, 0]


class _Enough(Exception):
    """What was wanted has been seen: the rest of the pass need not be."""


def _enough(*_: Any) -> None:
    raise _Enough


@torch.no_grad()
def at_subjects(
    lm: LM, facts: Sequence[Fact], before: Sequence[str], into: nn.Module, out: nn.Module
) -> tuple[Float[Tensor, "fact before into"], Float[Tensor, "fact before out"]]:
    """What goes into one module and comes out of another at each subject's last token; the pass ends there.

    Args:
        lm: the model.
        facts: whose prompts are read.
        before: beginnings of the prompts.
        into: of the model; not after ``out``.
        out: of the model.
    """
    prompts = [its + fact.question for fact in facts for its in before]
    starts = [len(its) + fact.place[0] for fact in facts for its in before]
    lengths = [len(fact.subject) for fact in facts for _ in before]
    places = [lm.last_of(*its) for its in zip(prompts, ((a, a + n) for a, n in zip(starts, lengths)))]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    done = 0
    for part in lm._batches(lm.encode(prompts)):
        size = part.ids.shape
        with watched({"its": into}, "in", size[0]) as goes, watched({"its": out}, texts=size[0]) as comes:
            stop = out.register_forward_hook(_enough)
            try:
                lm.logits(part)
            except _Enough:
                pass
            finally:
                stop.remove()
        for kept, seen in zip(found, (goes["its"], comes["its"])):
            its = torch.tensor(places[done : done + size[0]], device=seen.device)
            kept.append(seen[torch.arange(size[0], device=seen.device), its])
        done += size[0]
    went, came = (torch.cat(its).float().unflatten(0, (len(facts), len(before))) for its in found)
    return went, came
