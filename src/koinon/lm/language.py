"""A language model with its tokenizer: what it says to a prompt, how likely it finds an answer, what goes on inside."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from koinon.core import UserError
from koinon.lm.anatomy import Anatomy, anatomy, frozen
from koinon.lm.fingerprints import fingerprint
from koinon.lm.folders import places
from koinon.lm.places import at, said_at
from koinon.lm.reading import reading_of
from koinon.nn.params import stream

BATCH = 4096
"""Tokens in one pass, padding included, unless a single text is longer."""


@dataclass(frozen=True)
class Said:
    """What a model makes of one answer to one prompt."""

    logprobs: tuple[float, ...]
    """Of the answer's tokens, those before each given; natural logarithms."""
    tokens: tuple[int, ...]
    """The answer's."""
    best: tuple[int, ...]
    """At each of their places, the token the model finds likeliest."""

    @property
    def logprob(self) -> float:
        """Of the whole answer."""
        return sum(self.logprobs)

    @property
    def hits(self) -> float:
        """Share of the answer's tokens that are the likeliest, those before them given."""
        return sum(a == b for a, b in zip(self.tokens, self.best)) / len(self.tokens)

    @property
    def exact(self) -> bool:
        """Whether greedy decoding says this answer, token by token."""
        return self.tokens == self.best


@dataclass(frozen=True)
class Encoded:
    """Texts as tokens, filled up on the right."""

    ids: Int64[Tensor, "text time"]
    mask: Bool[Tensor, "text time"]
    """What is no filling."""
    answer: Bool[Tensor, "text time"]
    """The tokens that hold a character behind the prompt."""

    @property
    def prompt(self) -> Bool[Tensor, "text time"]:
        """The tokens before the answer."""
        return self.mask & ~self.answer

    def rows(self, chosen: slice | Int64[Tensor, " chosen"]) -> "Encoded":
        """Some of the texts, without filling that none of them needs."""
        mask = self.mask[chosen]
        time = int(mask.sum(1).max())
        return Encoded(self.ids[chosen, :time], mask[:, :time], self.answer[chosen, :time])

    @property
    def needed(self) -> "Encoded":
        """What must be read to know what is said of the answers: not the last column, if it holds no prompt's token."""
        if self.ids.shape[1] < 2 or bool(self.prompt[:, -1].any()):
            return self
        return Encoded(self.ids[:, :-1], self.mask[:, :-1], self.answer[:, :-1])


Router = Callable[[Sequence[str]], "list[tuple[LM, str]]"]
"""From prompts to the model that answers each, and what that one is asked instead."""


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model of Hugging Face's interface, and its tokenizer. Neither is ever changed.

    Raises:
        UserError: a tokenizer that does not tell which characters a token stands for.
    """

    model: Any
    """The ``PreTrainedModel``."""
    tokenizer: Any
    """A fast tokenizer."""
    router: Router | None = None
    """Who answers a prompt, and what it is asked; the model itself as it stands if there is none."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError(
                f"{type(self.tokenizer).__name__}: a fast tokenizer is needed, which tells its tokens' places"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept of it for speed."""
        return {name: getattr(self, name) for name in ("model", "tokenizer", "router")}

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "LM":
        """A user's own model: its values are shared, its modules are not; dropout is off, and no gradient is kept."""
        return cls(frozen(model), tokenizer)

    @classmethod
    def load(cls, where: str | Path, dtype: str = "auto", device: str | None = None) -> "LM":
        """A model in a folder, or of the hub if it is in its cache or can be fetched.

        Raises:
            UserError: nothing readable there, a model that is no language model, or transformers is missing.
        """
        from koinon.lm.folders import read

        model, tokenizer = read(where, dtype, device)
        found = cls(frozen(model), tokenizer)
        if not found._looks_back_only():
            raise UserError(f"{where}: this model fills in what is hidden; a causal one, which continues, is needed")
        return found

    @torch.no_grad()
    def _looks_back_only(self) -> bool:
        # Other ends of several texts, each read at several places: one place may happen to look at itself alone.
        words = self.model.get_input_embeddings().num_embeddings
        half = int(min(16, self.limit)) // 2
        texts, ends = torch.randint(words, (2, 8, 2 * half), generator=stream(0, "looks back")).to(self.device)
        others = torch.cat((texts[:, :half], ends[:, half:]), 1)
        one, other = (self.model(input_ids=ids, use_cache=False).logits[:, :half] for ids in (texts, others))
        rounding = min(1000 * torch.finfo(one.dtype).eps, 0.01)
        return bool((one - other).abs().amax() <= rounding * (one.amax() - one.amin()))

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where its parts are."""
        return anatomy(self.model)

    @property
    def limit(self) -> float:
        """How many tokens a text may have; infinite where the model does not say."""
        return places(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where its embedding is, and so where tokens go."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def fingerprint(self) -> str:
        """Of all that it computes with, and of its tokenizer; see `koinon.lm.fingerprints`."""
        return fingerprint(self.model, self.tokenizer)

    def with_model(self, model: nn.Module) -> "LM":
        """The same tokenizer and router with another model."""
        return replace(self, model=model)

    # Tokens.

    def encode(
        self, prompts: Sequence[str], answers: Sequence[str] | None = None, after: str = "", closed: bool = False
    ) -> Encoded:
        """Prompts with what follows them, tokenized as one text each; which token is whose goes by its characters.

        Args:
            prompts: texts.
            answers: one for each; a space is put between the two unless one is there.
            after: goes on behind every answer, and is no part of it.
            closed: keep the token that the tokenizer puts behind a text, if it does.

        Raises:
            UserError: an empty text, an answer without a token of its own, or more tokens than the model has places.
        """
        answers = (
            [""] * len(prompts) if answers is None else [joint(p, a) for p, a in zip(prompts, answers, strict=True)]
        )
        texts = [prompt + answer + after for prompt, answer in zip(prompts, answers, strict=True)]
        coded = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=True)
        ids, offsets = coded["input_ids"], coded["offset_mapping"]
        for place, its in enumerate(ids):
            while not closed and its and offsets[place][len(its) - 1] == (0, 0) and its[-1] in self._closing:
                its.pop()  # what closes a text would be read as part of it
        time = max(map(len, ids), default=0)
        rows = torch.full((len(ids), time), self._filling), torch.zeros(2, len(ids), time, dtype=torch.bool)
        for place, (its, text) in enumerate(zip(ids, texts)):
            if not its or len(its) > self.limit:
                what = "no token" if not its else f"{len(its)} tokens, and the model reads {self.limit} at most"
                raise UserError(f"text {_short(text)}: it has {what}")
            rows[0][place, : len(its)] = torch.tensor(its)
            rows[1][0, place, : len(its)] = True
            starts, ends = torch.tensor(offsets[place][: len(its)]).T
            stop = len(prompts[place]) + len(answers[place]) if after else len(text)
            rows[1][1, place, : len(its)] = (ends > len(prompts[place])) & (starts < stop)
            if answers[place] and not rows[1][1, place].any():
                raise UserError(
                    f"answer {_short(answers[place])}: the tokenizer gives it no token behind {_short(text)}"
                )
        return Encoded(*(its.to(self.device) for its in (rows[0], *rows[1])))

    @cached_property
    def _closing(self) -> frozenset[int]:
        return frozenset({self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None})

    @property
    def _filling(self) -> int:
        pad = self.tokenizer.pad_token_id
        return next(its for its in (pad, self.tokenizer.eos_token_id, 0) if its is not None)

    def last_of(self, fact_prompt: str, place: tuple[int, int]) -> int:
        """The number of the last token that holds a character of ``prompt[place]``, the text being tokenized alone."""
        coded = self.tokenizer([fact_prompt], return_offsets_mapping=True)
        found = [n for n, (start, end) in enumerate(coded["offset_mapping"][0]) if start < place[1] and end > place[0]]
        if not found:
            raise UserError(f"{_short(fact_prompt[slice(*place)])}: no token of {_short(fact_prompt)} holds it")
        return found[-1]

    # What it says.

    def logits(self, encoded: Encoded) -> Float[Tensor, "text time token"]:
        """The plain forward pass; what is prompt and what is answer is told to modules that decide by it."""
        with self._reading.asked(encoded.prompt):
            return self.model(input_ids=encoded.ids, attention_mask=encoded.mask.long(), use_cache=False).logits

    @cached_property
    def _reading(self) -> Any:
        return reading_of(self.model)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Said]:
        """How likely each answer is behind its prompt, and what the model would say in its place.

        The result does not depend on which texts share a batch, but for rounding.
        """
        return self._routed(prompts, answers, LM._score)

    def _score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Said]:
        found: dict[int, Said] = {}
        for numbers, part in self._by_length(self.encode(prompts, answers)):
            row, column = part.answer[:, 1:].nonzero(as_tuple=True)  # places just before the answers' tokens
            sure = self._said_at(part.needed, row, column).float().log_softmax(-1)
            due = part.ids[row, column + 1].to(sure.device)
            said = sure.gather(1, due[:, None])[:, 0].tolist(), due.tolist(), sure.argmax(-1).tolist()
            ends = row.bincount(minlength=len(numbers)).cumsum(0).tolist()
            for number, start, end in zip(numbers.tolist(), (0, *ends), ends):
                found[number] = Said(*(tuple(its[start:end]) for its in said))
        return [found[number] for number in range(len(found))]

    def _said_at(self, read: Encoded, rows: Tensor, columns: Tensor) -> Float[Tensor, "place token"]:
        try:
            anatomy = self.anatomy
        except UserError:  # such as layers with several experts: all of it, then
            return at(self.logits(read), rows, columns)
        return said_at(anatomy, rows, columns, partial(self.logits, read))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], tokens: int = 20, sample: bool = False, seed: int = 0, whole: bool = False
    ) -> list[str]:
        """What the model goes on with, up to so many tokens or its own end.

        Args:
            prompts: texts.
            tokens: at most.
            sample: draw from its distribution instead of taking the likeliest; the global random numbers stay unmoved.
            seed: of the draws.
            whole: keep special tokens.
        """
        return self._routed(
            prompts, [""] * len(prompts), lambda lm, its, _: lm._generate(its, tokens, sample, seed, whole)
        )

    def _generate(self, prompts: Sequence[str], tokens: int, sample: bool, seed: int, whole: bool) -> list[str]:
        found = []
        for part in self._batches(self.encode(prompts)):
            time = part.ids.shape[1]
            shift = [time - int(count) for count in part.mask.sum(1)]
            ids, mask = (torch.stack([row.roll(s) for row, s in zip(its, shift)]) for its in (part.ids, part.mask))
            with torch.random.fork_rng(), reading_of(self.model).asked(mask):
                torch.manual_seed(seed)
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    max_new_tokens=tokens,
                    do_sample=sample,
                    temperature=None if not sample else 1.0,
                    top_p=None,
                    top_k=0 if sample else None,
                    pad_token_id=self._filling,
                )
            found += self.tokenizer.batch_decode(out[:, time:], skip_special_tokens=not whole)
        return found

    def _routed(self, prompts: Sequence[str], answers: Sequence[str], call: Callable[..., list]) -> list:
        """Each prompt asked of whoever answers it, those of one model together; in the given order."""
        if isinstance(prompts, str):
            raise UserError("give a list of prompts, not one text")
        if self.router is None:
            return call(self, prompts, answers) if prompts else []
        routes = self.router(prompts)
        found: list = [None] * len(prompts)
        for lm in dict.fromkeys(lm for lm, _ in routes):
            mine = [place for place, (its, _) in enumerate(routes) if its is lm]
            said = lm._routed([routes[place][1] for place in mine], [answers[place] for place in mine], call)
            for place, its in zip(mine, said, strict=True):
                found[place] = its
        return found

    def _batches(self, encoded: Encoded) -> Iterator[Encoded]:
        rows = max(1, BATCH // encoded.ids.shape[1])
        for start in range(0, len(encoded.ids), rows):
            yield encoded.rows(slice(start, start + rows))

    def _by_length(self, encoded: Encoded) -> Iterator[tuple[Int64[Tensor, " chosen"], Encoded]]:
        """Batches of texts of about one length, so that little of them is filling; with the texts' numbers."""
        lengths = encoded.mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        while len(order):
            numbers, order = order.tensor_split([max(1, BATCH // int(lengths[order[0]]))])
            yield numbers, encoded.rows(numbers)

    # What goes on inside.

    @torch.no_grad()
    def seen(
        self, modules: Mapping[str, nn.Module], encoded: Encoded, side: str = "out"
    ) -> dict[str, Float[Tensor, "text time width"]]:
        """What goes into modules, or comes out of them, in one plain forward pass.

        Args:
            modules: name to module of this model.
            encoded: texts.
            side: "in" or "out".
        """
        with watched(modules, side, len(encoded.ids)) as found:
            self.logits(encoded)
        return found


def by_text(vectors: Tensor, texts: int) -> Float[Tensor, "text time width"]:
    """Vectors inside a pass, text by text; some models, such as OPT, put all texts in one row around their FFN."""
    return vectors.unflatten(0, (texts, -1)) if vectors.ndim == 2 else vectors


@contextmanager
def watched(modules: Mapping[str, nn.Module], side: str = "out", texts: int = 1) -> Iterator[dict[str, Tensor]]:
    """Keeps what went into modules, or came out, in the last pass; what is computed is not touched.

    Args:
        modules: name to module.
        side: "in" or "out".
        texts: how many there are in a pass.
    """
    found: dict[str, Tensor] = {}

    def into(name: str) -> Callable:
        def before(module: nn.Module, given: tuple, named: dict) -> None:
            found[name] = by_text(given[0] if given else named["hidden_states"], texts)

        def after(module: nn.Module, given: tuple, result: Any) -> None:
            found[name] = by_text(first(result), texts)

        return before if side == "in" else after

    handles = [
        module.register_forward_pre_hook(into(name), with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(into(name))
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rewritten(module: nn.Module, change: Callable[[Tensor], Tensor], texts: int = 1) -> Iterator[None]:
    """What comes out of a module is changed within: ``change`` takes the vectors and gives those to go on with.

    Args:
        module: gives vectors, alone or first in a tuple.
        change: of [text, time, width].
        texts: how many there are in a pass.
    """

    def shaped(vectors: Tensor) -> Tensor:
        return change(by_text(vectors, texts)).reshape(vectors.shape)

    def after(module: nn.Module, given: tuple, result: Any) -> Any:
        return (shaped(result[0]), *result[1:]) if isinstance(result, tuple) else shaped(result)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def first(result: Any) -> Tensor:
    """The vectors in what a module gives, which may be a tuple."""
    return result[0] if isinstance(result, tuple) else result


def joint(prompt: str, answer: str) -> str:
    """The answer as it goes on from the prompt: behind a space, unless one of the two brings its own."""
    return answer if not answer or not prompt or answer[0].isspace() or prompt[-1].isspace() else f" {answer}"


def _short(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 3] + "...")
