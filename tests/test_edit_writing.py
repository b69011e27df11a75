"""ROME, MEMIT, EMMET, AlphaEdit and fine-tuning against their equations, and what makes each of them what it is."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers
from oracles import edit_writing as oracle

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.edit._aims import Descent, aim, at_subjects, keys, repeating, values
from koinon.edit._checks import TEXTS, quiet
from koinon.edit._contract import Editor
from koinon.edit._edited import Material
from koinon.edit._memories import Above
from koinon.edit._spread import Beginnings, window
from koinon.edit._statistics import factored, sampled
from koinon.edit.alphaedit import AlphaEdit
from koinon.edit.alphaedit import Ready as Free
from koinon.edit.finetune import Finetune
from koinon.edit.memit import Memit
from koinon.edit.memit import Ready as Held
from koinon.edit.rome import Ready, Rome
from koinon.lm.language import LM
from koinon.lm.places import said_at
from koinon.lm.small import tokenizer_of
from koinon.nn.params import stream

FACTS = (
    Fact("Lyon", "Japan", "The town of {} is a city in", "country"),
    Fact("Oslo", "Peru", "People of {} live in", "country"),
)
BEFORE = ["", "The Oslo was in. ", "People of Peru. ", "You. ", "I said Bonn is. "]
SIZES = {"mean": [5], "release": [1, 2, 2]}
"""Groups of beginnings whose means are averaged: all together, or the bare one and two of each of two lengths."""
DESCENT = {"steps": 5, "rate": 0.1, "kl": 0.0625, "decay": 0.01, "bound": 4.0, "enough": 0.05}


@functools.cache
def tokenizer():
    return tokenizer_of(TEXTS, 300)


def made(name: str) -> LM:
    """A tiny model with random weights, of one of several architectures."""
    size = {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    size |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 96}
    grouped = {"num_key_value_heads": 2, "intermediate_size": 48}
    kind, config = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**size, **grouped)),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**size)),
        "neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**size, intermediate_size=64)),
        "opt": (transformers.OPTForCausalLM, transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32)),
        "opt-350m": (  # narrow words, and normalisation behind each part of a block
            transformers.OPTForCausalLM,
            transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
        ),
        "opt-narrow": (transformers.OPTForCausalLM, transformers.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=16)),
        "gemma2": (
            transformers.Gemma2ForCausalLM,
            transformers.Gemma2Config(**size, **grouped, head_dim=8, sliding_window=8),
        ),
    }[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
    with torch.no_grad():
        for name_, value in model.named_parameters():
            if value.ndim == 2:  # larger than models begin with, so that what is said hangs on every layer
                value.normal_(0, 0.2, generator=stream(0, name_))
    return LM.of(model, tokenizer())


def plain(fact: Fact) -> tuple[str, str, str, int]:
    """A fact as the oracle takes it."""
    return fact.subject, fact.question, fact.object, fact.place[1]


def moment(lm: LM, layer: int, seed: int = 0) -> torch.Tensor:
    """A made C of a layer."""
    into = lm.anatomy.block(layer).falls.weight.shape[1]
    keys_ = torch.randn(3 * into, into, generator=stream(seed, "moment", layer), dtype=torch.float64)
    return keys_.T @ keys_ / len(keys_)


def weights(lm: LM, layers: list[int]) -> list[torch.Tensor]:
    """[out, in]."""
    return [lm.anatomy.block(layer).falls.weight.detach() for layer in layers]


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal, in parts of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# What a layer should give.


@pytest.mark.parametrize("part", ["ffn", "block"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "gemma2"])
def test_aim_is_that_of_whole_texts_without_a_cache(name, part):
    """Rows are filled up on both sides, begin with kept keys and values, and skip the layers below."""
    lm = made(name)
    block = lm.anatomy.block(1)
    site = block.falls.module if part == "ffn" else block.module
    found = aim(lm, FACTS[0], site, BEFORE, Descent(**DESCENT))
    expected = oracle.descended(lm.model, lm.tokenizer, site, plain(FACTS[0]), BEFORE, **DESCENT)
    start = values(lm, FACTS[:1], site)[0]
    assert float((expected - start).norm()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"bound": 0.01}, {"enough": 1e9}, {"steps": 1}, {"kl": 30.0}, {"decay": 50.0}])
def test_each_term_of_the_descent_counts_as_in_the_equation(change):
    lm = made("llama")
    site = lm.anatomy.block(1).falls.module
    how = DESCENT | change
    found = aim(lm, FACTS[0], site, BEFORE[:2], Descent(**how))
    expected = oracle.descended(lm.model, lm.tokenizer, site, plain(FACTS[0]), BEFORE[:2], **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, aim(lm, FACTS[0], site, BEFORE[:2], Descent(**DESCENT)), atol=1e-4)


def test_layers_below_are_computed_once():
    lm = made("llama")
    calls = []
    lm.anatomy.block(0).attends.module.register_forward_hook(lambda *_: calls.append("below"))
    lm.anatomy.block(2).attends.module.register_forward_hook(lambda *_: calls.append("above"))
    aim(lm, FACTS[0], lm.anatomy.block(1).module, BEFORE, Descent(**DESCENT))
    assert calls.count("below") == 2  # the beginnings, and the rest
    assert calls.count("above") == 2 + DESCENT["steps"] - 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "gemma2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_a_change_does_to_answers_is_computed_where_it_is_read(name, layer):
    """The change reaches every token; below it nothing is computed again, and above it little that nobody reads."""
    lm = made(name)
    texts = lm.encode([its + FACTS[0].question for its in BEFORE], [FACTS[0].object] * len(BEFORE))
    above = Above(lm, layer, texts)

    def change(out):
        return 2 * out + 0.1

    handle = lm.anatomy.block(layer).falls.module.register_forward_hook(lambda module, given, out: change(out))
    with torch.no_grad():
        whole = lm.logits(texts)
    handle.remove()
    row, column = texts.answer[:, 1:].nonzero().T
    sizes = []
    for its in (above.lm.anatomy.head, above.lm.anatomy.blocks[-1].rises[0].module):  # a hook would be given all
        its.forward = lambda given, own=its.forward: (sizes.append(given.shape[:-1].numel()), own(given))[1]
    read = said_at(above.lm.anatomy, row, column, lambda: above.logits(change), but=above.falls)
    computed = list(sizes)
    torch.testing.assert_close(read, whole[row, column], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, lm.logits(texts), atol=1e-2)
    if name != "opt" and layer < 2:
        assert computed == [len(row)] * 2
    each = -whole[:, :-1].log_softmax(-1).gather(2, texts.ids[:, 1:, None])[:, :, 0]
    loss = torch.stack([its[asked].mean() for its, asked in zip(each, texts.answer[:, 1:])]).mean()
    torch.testing.assert_close(above.harm(change), loss, rtol=1e-4, atol=1e-5)


def test_repeating_gives_back_what_it_took():
    inner, outer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    vars(outer)["forward"] = own = inner.forward
    one, other = torch.ones(1, 2), torch.zeros(1, 2)
    with repeating([inner, outer]):
        assert torch.equal(inner(one), inner(other))
    assert not torch.equal(inner(one), inner(other))
    assert "forward" not in vars(inner)
    assert vars(outer)["forward"] is own


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_keys_and_values_are_those_of_whole_texts(name):
    lm = made(name)
    falls, last = lm.anatomy.block(0).falls.module, lm.anatomy.block(1).module
    calls = []
    lm.anatomy.block(2).module.register_forward_hook(lambda *_: calls.append(1))
    into, out = at_subjects(lm, FACTS, BEFORE, falls, last)
    assert not calls, "the pass goes on though all has been seen"
    for row, fact in enumerate(FACTS):
        for column, text in enumerate(BEFORE):
            given = text + fact.question, len(text) + fact.place[1]
            went = oracle.seen_at_subject(lm.model, lm.tokenizer, falls, *given)["in"]
            torch.testing.assert_close(into[row, column], went, rtol=1e-4, atol=1e-5)
            came = oracle.seen_at_subject(lm.model, lm.tokenizer, last, *given)["out"]
            torch.testing.assert_close(out[row, column], came, rtol=1e-4, atol=1e-5)


# ROME.


def rome(lm: LM, method: Rome, c: torch.Tensor | None, before: list[str] = BEFORE):
    """One fact, with a made C."""
    factor = None if c is None else factored(c)
    return Editor(method, lm, Ready(1, before, factor)).edit(FACTS[:1])


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rome_is_its_equation(name, whiten):
    lm = made(name)
    falls = lm.anatomy.block(1).falls
    c = moment(lm, 1) if whiten else None
    found = rome(lm, Rome(layer=1, **DESCENT), c).lm
    value = oracle.descended(lm.model, lm.tokenizer, falls.module, plain(FACTS[0]), BEFORE, **DESCENT)
    key = keys(lm, FACTS[:1], falls.module, BEFORE)[0].mean(0)
    bias = getattr(falls.module, "bias", None)
    bias = 0.0 if bias is None else bias.double()
    identity = torch.eye(len(key), dtype=torch.float64)
    weight = falls.weight.double()
    expected = oracle.rome(weight, key.double(), value.double(), identity if c is None else c, bias)
    (new,) = weights(found, [1])
    near(new - falls.weight, (expected - weight).float())
    # What it is for: the key has the value now, by a change of rank 1.
    near(new.double() @ key.double() + bias, value.double())
    sizes = torch.linalg.svdvals((new - falls.weight).double())
    assert float(sizes[1]) < 1e-5 * float(sizes[0])


def test_rome_as_released_divides_by_the_bare_prompts_key():
    lm = made("llama")
    falls = lm.anatomy.block(1).falls
    c = moment(lm, 1)
    found = rome(lm, Rome(layer=1, keys="release", **DESCENT), c).lm
    value = oracle.descended(lm.model, lm.tokenizer, falls.module, plain(FACTS[0]), BEFORE, **DESCENT)
    seen = keys(lm, FACTS[:1], falls.module, BEFORE)[0].double()
    delta = value.double() - falls.weight.double() @ seen[0]
    expected = oracle.released_rome(falls.weight.double(), seen.mean(0), seen[0], delta, c)
    near(weights(found, [1])[0] - falls.weight, (expected - falls.weight.double()).float())


def test_rome_writes_along_the_whitened_key():
    lm = made("llama")
    c = moment(lm, 1)
    edited = rome(lm, Rome(layer=1, **DESCENT), c)
    (change,) = edited.patch.steps[0].values()
    key = keys(lm, FACTS[:1], lm.anatomy.block(1).falls.module, BEFORE)[0].mean(0)
    cosine = torch.cosine_similarity(change.right[:, 0].double(), torch.linalg.inv(c) @ key.double(), dim=0)
    assert float(cosine.abs()) > 1 - 1e-6
    assert change.left.shape[1] == 1


# MEMIT and EMMET.


def held(lm: LM, layers: list[int], how: str = "mean", before: list[str] = BEFORE, c=None) -> Held:
    moments = [moment(lm, layer) if c is None else c for layer in layers]
    return Held(layers, Beginnings(before, 2, how), [factored(its) for its in moments])


@pytest.mark.parametrize(("name", "how"), [("llama", "mean"), ("llama", "release"), ("gpt2", "mean")])
def test_memit_is_its_algorithm(name, how):
    lm = made(name)
    layers = [0, 1]
    found = Editor(Memit(weight=0.3, **DESCENT), lm, held(lm, layers, how)).edit(FACTS)
    blocks = [lm.anatomy.block(layer) for layer in layers]
    expected = oracle.spread(
        lm.model,
        lm.tokenizer,
        [block.name for block in blocks],
        [block.falls.name for block in blocks],
        [plain(fact) for fact in FACTS],
        BEFORE,
        SIZES[how],
        lambda number, rest, seen: oracle.memit(rest, seen, moment(lm, layers[number]), 0.3),
        DESCENT,
    )
    for new, its, old in zip(weights(found.lm, layers), expected, weights(lm, layers), strict=True):
        near(new - old, its - old)
    assert all(change.left.shape[1] == len(FACTS) for change in found.patch.steps[0].values())
    assert len(found.patch.steps[0]) == 2


def test_memit_leaves_layers_outside_its_window_alone():
    lm = made("llama")
    found = Editor(Memit(**DESCENT), lm, held(lm, [1])).edit(FACTS).lm
    for layer in (0, 2):
        assert torch.equal(*weights(found, [layer]), *weights(lm, [layer]))
    assert window(1, 1) == [1]
    assert window(5, 3) == [3, 4, 5]
    assert window(1, 5) == [0, 1]
    with pytest.raises(UserError, match="spread 0"):
        window(1, 0)


@pytest.mark.parametrize("whiten", [True, False])
def test_memit_of_one_fact_in_one_layer_without_lambda_is_rome(whiten):
    """The bare prompt alone, and neither of the terms that know how long v is: v and z then move by the same delta."""
    lm = made("llama")
    how = DESCENT | {"decay": 0.0, "bound": 1e9}
    c = moment(lm, 1) if whiten else torch.eye(48, dtype=torch.float64)
    memit = Editor(Memit(weight=0.0, **how), lm, held(lm, [1], before=[""], c=c)).edit(FACTS[:1]).lm
    other = rome(lm, Rome(layer=1, **how), c if whiten else None, before=[""]).lm
    old = weights(lm, [1])[0]
    near(weights(memit, [1])[0] - old, weights(other, [1])[0] - old)


def solved(lm: LM, method: Memit, facts=FACTS):
    """Change, keys and residual of one layer."""
    edited = Editor(method, lm, held(lm, [1])).edit(facts)
    (change,) = edited.patch.steps[0].values()
    seen = keys(lm, facts, lm.anatomy.block(1).falls.module, BEFORE).mean(1).T.double()
    return change.left.double() @ change.right.double().T, seen, change.left.double()


def test_emmet_meets_every_constraint():
    """``weight=0``: each key brings out exactly what was missing, and the change is EMMET's."""
    lm = made("llama")
    delta, seen, rest = solved(lm, Memit(weight=0.0, **DESCENT))
    near(delta @ seen, rest)
    near(delta, oracle.emmet(rest, seen, moment(lm, 1)))


def test_emmet_as_released_is_memit():
    lm = made("llama")
    delta, seen, rest = solved(lm, Memit(weight=1000.0, **DESCENT))
    near(delta, oracle.emmet(rest, seen, moment(lm, 1), scale=10_000.0, ridge=0.1))
    assert float((delta @ seen - rest).norm()) > 0.1 * float(rest.norm())  # not exactly met


def test_more_weight_changes_less():
    lm = made("llama")
    sizes = [float(solved(lm, Memit(weight=its, **DESCENT))[0].norm()) for its in (0.0, 1.0, 1e2, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-3 * sizes[0]


def test_two_facts_with_one_key_cannot_both_be_met():
    lm = made("llama")
    same = (FACTS[0], Fact("Lyon", "Peru", "The town of {} lies near", "near"))
    with pytest.raises(UserError, match="fact 2 of 2 has the same key"):
        solved(lm, Memit(weight=0.0, **DESCENT), same)
    solved(lm, Memit(weight=1.0, **DESCENT), same)


# AlphaEdit.

LESS = DESCENT | {"steps": 3}


def basis(lm: LM, layer: int, free: int = 20) -> torch.Tensor:
    """[into, free], orthonormal."""
    into = lm.anatomy.block(layer).falls.weight.shape[1]
    return torch.linalg.qr(torch.randn(into, free, generator=stream(0, "free", layer), dtype=torch.float64)).Q


def free(lm: LM, layers: list[int]) -> Free:
    return Free(layers, Beginnings(BEFORE, 2, "mean"), [basis(lm, layer) for layer in layers])


def test_alphaedit_is_its_equation_with_the_keys_of_earlier_edits():
    lm = made("llama")
    layers = [0, 1]
    editor = Editor(AlphaEdit(ridge=0.2, **LESS), lm, free(lm, layers))
    first = editor.edit(FACTS[:1])
    both = editor.edit(FACTS[1:], first)
    blocks = [lm.anatomy.block(layer) for layer in layers]

    def update(number, rest, seen):
        falls = first.lm.anatomy.block(layers[number]).falls.module
        earlier = keys(first.lm, FACTS[:1], falls, BEFORE).mean(1).T.double()
        return oracle.alphaedit(rest, seen, earlier, basis(lm, layers[number]) @ basis(lm, layers[number]).T, 0.2)

    expected = oracle.spread(
        first.lm.model,
        lm.tokenizer,
        [block.name for block in blocks],
        [block.falls.name for block in blocks],
        [plain(FACTS[1])],
        BEFORE,
        SIZES["mean"],
        update,
        LESS,
    )
    for new, its, old in zip(weights(both.lm, layers), expected, weights(first.lm, layers), strict=True):
        near(new - old, its - old)


def test_alphaedit_leaves_the_keys_of_ordinary_text_alone():
    """A corpus whose keys leave directions unused: what they bring out stays as it was; MEMIT changes it."""
    lm = made("llama")
    falls = lm.anatomy.block(1).falls
    few = Material(("Bonn is a city in Germany.",))
    with quiet():
        edited = AlphaEdit(layer=1, spread=1, threshold=1e-10, ridge=0.1, count=0, **LESS).edit(lm, FACTS[:1], few)
    encoded = lm.encode(few.corpus)
    seen = lm.seen({"keys": falls.module}, encoded, "in")["keys"][0]
    delta = weights(edited.lm, [1])[0] - falls.weight
    (change,) = edited.patch.weights.steps[0].values()
    assert float((seen @ change.right).abs().max()) < 1e-4 * float(change.right.norm())
    own = keys(lm, FACTS[:1], falls.module, [""])[0, 0]
    assert float((delta @ own).norm()) > 100 * float((delta @ seen.T).norm(dim=0).max())


def test_alphaedit_keeps_what_it_wrote_before():
    """With hardly a ridge, a later edit leaves what an earlier one's key brings out; if that is forgotten it moves."""
    lm = made("llama")
    editor = Editor(AlphaEdit(ridge=1e-4, **LESS), lm, free(lm, [1]))
    first = editor.edit(FACTS[:1])
    forgotten = {name: torch.zeros_like(its) for name, its in first.patch.keys[0].items()}
    forgetful = replace(first, patch=replace(first.patch, keys=(forgotten,)))
    key = first.patch.keys[0][lm.anatomy.block(1).falls.parameter]
    moved = [
        float(((weights(editor.edit(FACTS[1:], its).lm, [1])[0] - weights(first.lm, [1])[0]) @ key).norm())
        for its in (first, forgetful)
    ]
    assert moved[0] < 0.01 * moved[1]


def test_alphaedit_forgets_the_keys_of_what_is_undone():
    lm = made("llama")
    editor = Editor(AlphaEdit(**LESS), lm, free(lm, [1]))
    first = editor.edit(FACTS[:1])
    both = editor.edit(FACTS[1:], first)
    assert [len(its.patch.keys) for its in (first, both, both.undo(1))] == [1, 2, 1]
    again = type(both.patch).restore(both.patch.tensors(), both.patch.notes)
    assert len(again.keys) == 2
    for mine, theirs in zip(again.keys, both.patch.keys, strict=True):
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(*weights(again.attach(lm), [1]), *weights(both.lm, [1]))


def test_alphaedits_relative_threshold_is_in_units_of_the_mean_eigenvalue():
    lm = made("llama")
    falls = lm.anatomy.block(1).falls
    with quiet():
        moment, _ = sampled(lm, falls, Material(TEXTS), 0)
        shares = torch.linalg.eigvalsh(moment) / moment.trace() * len(moment)
        for threshold in (0.3, 1.0):
            found = AlphaEdit(threshold=threshold, relative=True).free(lm, falls, Material(TEXTS))
            assert 0 < found.shape[1] == int((shares < threshold).sum()) < len(moment)
            absolute = AlphaEdit(threshold=threshold * float(moment.trace()) / len(moment))
            near(found @ found.T, (other := absolute.free(lm, falls, Material(TEXTS))) @ other.T)


def test_alphaedit_without_a_free_direction_says_so():
    with pytest.raises(UserError, match=r"threshold 0: no direction of .* is below it"), quiet():
        AlphaEdit(layer=1, threshold=0.0, count=0).on(made("llama"), Material(TEXTS))


# Fine-tuning.


@pytest.mark.parametrize("loss", ["answer", "prompt end"])
def test_tuning_losses_are_those_of_the_two_settings(loss):
    lm = made("llama")
    with torch.no_grad():
        found = Finetune(loss=loss).harm(lm, FACTS)
        expected = oracle.tuning_loss(lm.model, lm.tokenizer, [plain(fact) for fact in FACTS], loss == "prompt end")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bound", [1e-3, 0.0])
def test_tuned_weights_stay_in_their_box(name, bound):
    """Adam's steps are 5e-4 and lead out of the box within three; without one, farther."""
    lm = made(name)
    found = Editor(Finetune(bound=bound, steps=8, enough=0.0), lm, 1).edit(FACTS).lm
    moved = (weights(found, [1])[0] - weights(lm, [1])[0]).abs().max()
    assert (float(moved) <= bound * 1.001 and float(moved) > 0.9 * bound) if bound else float(moved) > 1.5e-3
    for layer in (0, 2):
        assert torch.equal(*weights(found, [layer]), *weights(lm, [layer]))


def test_tuning_is_adam_on_its_loss():
    """Three steps of torch's own Adam on the oracle's loss."""
    lm = made("llama")
    found = Editor(Finetune(bound=0.0, steps=3, rate=1e-3, enough=0.0), lm, 1).edit(FACTS).lm
    model = copy.deepcopy(lm.model)
    weight = model.get_parameter(lm.anatomy.block(1).falls.parameter).requires_grad_()
    adam = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(3):
        adam.zero_grad()
        oracle.tuning_loss(model, lm.tokenizer, [plain(fact) for fact in FACTS], False).backward()
        adam.step()
    near(weights(found, [1])[0], weight.detach(), 1e-5)


def test_tuning_stops_where_the_loss_is_small():
    lm = made("llama")
    found = Editor(Finetune(enough=1e9), lm, 1).edit(FACTS).lm
    assert torch.equal(*weights(found, [1]), *weights(lm, [1]))
