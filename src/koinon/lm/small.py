"""Small language models of transformers' own classes, trained here in seconds to minutes, the same every time.

A decoder continues a text, its twin fills in what is hidden; both are saved, loaded and used like any other model.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from koinon.core import UserError
from koinon.nn.params import stream
from koinon.nn.train import Cost, evaluating
from koinon.terminal import Told, untold

try:
    import tokenizers
    import transformers
except ModuleNotFoundError:
    raise UserError("language models need transformers: pip install 'koinon[lm]'") from None

END, PAD, MASK = SPECIAL = ("<end>", "<pad>", "<mask>")
"""Stands before and behind every text; fills rows up; stands for what is hidden."""
SCALE = 0.5
"""Standard deviation of the weights drawn, times the square root of the model's width."""
TAIL = 4
"""The longest end of a text that is hidden at once."""
TAILS = 0.8
"""The share of the texts whose end is hidden, where facts have their object; of the others, it is single symbols."""
UNSEEN = -100
"""The label of a place that no loss is computed for."""


def tokenizer_of(texts: Iterable[str], size: int = 3_000) -> "transformers.PreTrainedTokenizerFast":
    """A byte-level BPE vocabulary learnt from the texts: any text comes back as it was.

    Args:
        texts: what to learn from.
        size: symbols in all, at least 259: 256 bytes and three special ones, which then are all there is.

    Raises:
        UserError: a smaller size.
    """
    least = 256 + len(SPECIAL)
    if size < least:
        raise UserError(f"a vocabulary of {size} symbols: {least} are needed for the bytes and {', '.join(SPECIAL)}")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, SPECIAL.index(END))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )


def decoder(
    tokenizer: "transformers.PreTrainedTokenizerFast",
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    wide: int = 512,
    context: int = 64,
    seed: int = 0,
) -> "transformers.LlamaForCausalLM":
    """A Llama whose output layer is its embedding; each weight is drawn from a stream of its own name.

    Args:
        tokenizer: of the symbols.
        width: of the vectors between the layers; an even multiple of ``heads``.
        layers: how many.
        heads: of the attention.
        wide: width inside the gated layers.
        context: the longest text, in symbols, that it is made for.
        seed: of the weights.
    """
    _check(width, heads)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=wide,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **_symbols(tokenizer),
    )
    return _drawn(transformers.LlamaForCausalLM, config, seed)


def encoder(
    tokenizer: "transformers.PreTrainedTokenizerFast",
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    wide: int = 512,
    context: int = 64,
    seed: int = 0,
) -> "transformers.BertForMaskedLM":
    """The decoder's twin, which sees the text on both sides of what is hidden: a BERT without dropout.

    Args:
        tokenizer: of the symbols.
        width: of the vectors between the layers; an even multiple of ``heads``.
        layers: how many.
        heads: of the attention.
        wide: width inside the layers.
        context: the longest text, in symbols.
        seed: of the weights.
    """
    _check(width, heads)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=wide,
        max_position_embeddings=context,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_symbols(tokenizer),
    )
    return _drawn(transformers.BertForMaskedLM, config, seed)


def _check(width: int, heads: int) -> None:
    if width % (2 * heads):
        raise UserError(f"width {width}: give a multiple of twice the {heads} heads")


def _symbols(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _drawn(kind: Any, config: Any, seed: int) -> Any:
    """A model with weights of its own streams; transformers draws as well, and from the global one."""
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.normal_(0, SCALE / math.sqrt(config.hidden_size), generator=stream(seed, name))
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


# Training.

Texts = Sequence[str] | Callable[[int], Sequence[str]]
"""The same in every epoch, or what an epoch is trained on, by its number from 0."""


def train(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerFast",
    texts: Texts,
    epochs: int = 20,
    rows: int = 32,
    lr: float = 2e-3,
    decay: float = 0.05,
    warm: float = 0.03,
    hidden: float = 0.0,
    seed: int = 0,
    told: Told = untold,
) -> Cost:
    """Train with AdamW on texts packed into rows of the model's context; on one thread, the same to the bit.

    A model that fills in gets a row for each text, since it learns where in a text its symbols are.

    Args:
        model: changed in place, and given back in evaluation mode.
        tokenizer: of its symbols.
        texts: each shorter than the context; in a new random order each epoch.
        epochs: times every text is seen.
        rows: of a step.
        lr: the highest step size; a cosine leads from it to nearly 0.
        decay: AdamW's weight decay, of matrices.
        warm: share of the steps in which the step size grows from 0.
        hidden: for a model that fills in: the share of the symbols it does not see. 0 trains to continue.
        seed: of the order, and of what is hidden.
        told: hears how many steps are done.

    Returns:
        what it cost; ``samples`` counts symbols that are not padding.

    Raises:
        UserError: a text that does not fit the context.
    """
    get = texts if callable(texts) else lambda epoch: texts

    def drawn(epoch: int) -> Int64[Tensor, "rows time"]:
        order = stream(seed, "order", epoch)
        return packed(tokenizer, get(epoch), model.config.max_position_embeddings, order, alone=hidden > 0)

    held = drawn(0)
    each = -(-len(held) // rows)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    start, samples, step = time.perf_counter(), 0, 0
    model.train()
    with one_thread():
        for epoch in range(epochs):
            held = drawn(epoch) if epoch else held
            hide = stream(seed, "hidden", epoch)
            for part in held.tensor_split(each):
                done = step / (each * epochs)
                for group in optimizer.param_groups:
                    group["lr"] = (
                        lr * min(1.0, (done + 1e-9) / warm) * (0.01 + 0.99 * math.cos(math.pi / 2 * done) ** 2)
                    )
                optimizer.zero_grad()
                _loss(model, tokenizer, part, hidden, hide).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                samples += int((part != tokenizer.pad_token_id).sum())
                step += 1
                told(step, each * epochs)
    model.eval()
    return Cost(epochs, samples, step, time.perf_counter() - start)


def _loss(model: nn.Module, tokenizer: Any, part: Int64[Tensor, "rows time"], hidden: float, hide: Any) -> Tensor:
    padding = part == tokenizer.pad_token_id
    if not hidden:
        # Padding comes last, where no symbol sees it.
        return model(input_ids=part, labels=part.masked_fill(padding, UNSEEN), use_cache=False).loss
    covered = _covered(part, tokenizer, hidden, hide)
    seen = part.masked_fill(covered, tokenizer.mask_token_id)
    labels = part.masked_fill(~covered, UNSEEN)
    return model(input_ids=seen, attention_mask=(~padding).long(), labels=labels).loss


def _covered(
    part: Int64[Tensor, "rows time"], tokenizer: Any, hidden: float, hide: torch.Generator
) -> Bool[Tensor, "rows time"]:
    """Of `TAILS` of the texts the last symbols before the full stop, up to `TAIL`; of the others single ones."""
    texts, length, single = (torch.rand(size, generator=hide) for size in (len(part), len(part), part.shape))
    symbols = (part != tokenizer.pad_token_id).sum(1)
    stop = (symbols - 2)[:, None]
    first = stop - (length[:, None] * TAIL).ceil()
    places = torch.arange(part.shape[1])
    covered = torch.where(texts[:, None] < TAILS, (places >= first) & (places < stop), single < hidden)
    return covered & (part >= len(SPECIAL))


def packed(
    tokenizer: "transformers.PreTrainedTokenizerFast",
    texts: Sequence[str],
    context: int,
    order: torch.Generator,
    alone: bool = False,
) -> Int64[Tensor, "rows time"]:
    """Whole texts in random order, each behind the symbol of an end, the last of a row before one; padding fills up.

    Args:
        tokenizer: of the symbols.
        texts: to pack.
        context: the longest row.
        order: draws the order.
        alone: each text has a row of its own.

    Raises:
        UserError: a text that does not fit, or none.
    """
    if not texts:
        raise UserError("no text to train on")
    symbols: list[list[int]] = tokenizer(list(texts))["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = [[]]
    for place in torch.randperm(len(symbols), generator=order).tolist():
        its = symbols[place]
        if len(its) >= context:
            raise UserError(f"a text of {len(its)} symbols, {texts[place][:40]!r}...: fewer than {context} fit")
        if rows[-1] and (alone or len(rows[-1]) + len(its) >= context):
            rows.append([])
        rows[-1] += its
    longest = max(map(len, rows))
    return torch.tensor([[*row, end, *[pad] * (longest - len(row))] for row in rows])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums are the same however many cores there are; as many threads as before are given back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Asking.


@torch.no_grad()
def recall(
    model: nn.Module,
    tokenizer: "transformers.PreTrainedTokenizerFast",
    prompts: Sequence[str],
    answers: Sequence[str],
    after: str = "",
    rows: int = 256,
) -> list[bool]:
    """Whether the likeliest next symbols, one after the other, spell the answer.

    Args:
        model: one that continues a text.
        tokenizer: of its symbols.
        prompts: what it continues; a space goes between prompt and answer.
        answers: one for each prompt.
        after: what has to follow the answer, such as ``"."``, so that Guinea is not taken for Guinea-Bissau.
        rows: asked at once.
    """
    found: list[bool] = []
    with evaluating(model):
        for start in range(0, len(prompts), rows):
            ids, asked, _ = _asked(tokenizer, prompts[start : start + rows], answers[start : start + rows], after)
            # If every symbol of the answer is the likeliest behind those before it, then it is what greed would write.
            told = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
            found += ((told == ids[:, 1:]) | ~asked[:, 1:]).all(1).tolist()
    return found


@torch.no_grad()
def filled(
    model: nn.Module,
    tokenizer: "transformers.PreTrainedTokenizerFast",
    prompts: Sequence[str],
    answers: Sequence[str],
    after: str = "",
    rows: int = 256,
) -> list[bool]:
    """`recall` for a model that fills in: whether the likeliest symbols for the answer's places spell it.

    All of them are hidden, and filled from the first to the last. How many there are, and what is ``after``, is told.
    """
    found: list[bool] = []
    with evaluating(model):
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            ids, asked, attention = _asked(tokenizer, prompts[part], answers[part], "", after + tokenizer.eos_token)
            seen = ids.masked_fill(asked, tokenizer.mask_token_id)
            for _ in range(int(asked.sum(1).max())):
                first = (seen == tokenizer.mask_token_id).cumsum(1).cumsum(1) == 1
                seen = torch.where(first, model(input_ids=seen, attention_mask=attention).logits.argmax(-1), seen)
            found += (seen == ids).all(1).tolist()
    return found


def _asked(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], after: str, told: str = ""
) -> tuple[Int64[Tensor, "rows time"], Bool[Tensor, "rows time"], Int64[Tensor, "rows time"]]:
    """The symbols of whole texts, which of them are the answer and what is ``after`` it, and which are no padding."""
    wholes = [f"{prompt} {answer}{after}" for prompt, answer in zip(prompts, answers, strict=True)]
    heads, bodies = (tokenizer(list(texts))["input_ids"] for texts in (prompts, wholes))
    symbols = tokenizer([whole + told for whole in wholes])["input_ids"] if told else bodies
    longest = max(map(len, symbols))
    # What fills up comes last, where a model that continues does not look.
    ids = torch.tensor([[*its, *[tokenizer.pad_token_id or 0] * (longest - len(its))] for its in symbols])
    places = torch.arange(longest)
    starts, ends = (
        torch.tensor([_shared(one, other) for one, other in zip(part, symbols)]) for part in (heads, bodies)
    )
    lengths = torch.tensor([len(its) for its in symbols])
    asked = (places >= starts[:, None]) & (places < ends[:, None])
    return ids, asked, (places < lengths[:, None]).long()


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many symbols two rows have in common from their start."""
    pairs = enumerate(zip(first, second))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
