"""The adapter over Hugging Face's language models: parts by structure, scores by characters, and nothing changed."""

import copy
import json
from contextlib import ExitStack

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.lm import reading, tracing
from koinon.lm.anatomy import anatomy, frozen, linears, sharing, with_values
from koinon.lm.folders import write
from koinon.lm.language import LM, joint, rewritten, watched
from koinon.lm.masked import MaskedLM
from koinon.lm.moments import second_moment, shrunk
from koinon.lm.small import decoder, encoder, tokenizer_of
from koinon.lm.tracing import best_layer, trace

TEXTS = ["Lyon is a city in France.", "Oslo is a city in Norway.", "Kyoto lies in Japan, they say."]
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4}
NEW = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = NEW | {"intermediate_size": 64}
GROUPED = GATED | {"num_key_value_heads": 2}
WHERE = {
    "llama": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "qwen2": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "qwen3": (GROUPED | {"head_dim": 16}, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "gemma": (GROUPED | {"head_dim": 32}, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "gemma2": (GROUPED | {"head_dim": 16}, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "mistral": (GROUPED, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "phi3": (GATED | {"pad_token_id": 0}, ["mlp.gate_up_proj"], "mlp.down_proj", "self_attn.o_proj"),
    "gpt2": (OLD, ["mlp.c_fc"], "mlp.c_proj", "attn.c_proj"),
    "gptj": (OLD | {"rotary_dim": 4}, ["mlp.fc_in"], "mlp.fc_out", "attn.out_proj"),
    "gpt_neox": (NEW | {"intermediate_size": 128}, ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", "attention.dense"),
    "opt": (NEW | {"ffn_dim": 64, "word_embed_proj_dim": 32}, ["fc1"], "fc2", "self_attn.out_proj"),
    "bloom": (
        {"hidden_size": 32, "n_layer": 3, "n_head": 4},
        ["mlp.dense_h_to_4h"],
        "mlp.dense_4h_to_h",
        "self_attention.dense",
    ),
    "falcon": (NEW, ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", "self_attention.dense"),
}
"""A kind of model: its sizes; what goes up in an FFN, what comes back, and what comes back from attention."""


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(TEXTS, 300)


def tiny(kind: str, tokenizer, sizes: dict | None = None):
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(special | (sizes or WHERE[kind][0])))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim == 2:
                    value.normal_(0, 0.2)
    return model


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "opt"])
def lm(request, tokenizer):
    return LM.of(tiny(request.param, tokenizer), tokenizer)


# Anatomy.


@pytest.mark.parametrize("kind", WHERE)
def test_parts_are_found_by_structure(kind, tokenizer):
    _, rises, falls, attends = WHERE[kind]
    model = tiny(kind, tokenizer)
    found = anatomy(model)
    assert len(found.blocks) == 3
    assert found.width == 32
    block = found.blocks[1]
    assert [its.name.removeprefix(f"{block.name}.") for its in block.rises] == rises
    assert block.falls.name == f"{block.name}.{falls}"
    assert block.attends.name == f"{block.name}.{attends}"
    assert block.falls.weight.shape[0] == 32
    assert block.falls.turned == (kind == "gpt2")
    assert found.norm is not None
    assert found.head is model.get_output_embeddings()


TWICE = {
    "phi3": GATED | {"num_key_value_heads": 2, "pad_token_id": 0},
    "falcon": NEW | {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""Queries, keys and values in one that is just twice as wide as what comes back, as gate and value are."""


@pytest.mark.parametrize("kind", TWICE)
def test_attention_twice_as_wide_is_no_ffn(kind, tokenizer):
    _, rises, falls, attends = WHERE[kind]
    block = anatomy(tiny(kind, tokenizer, TWICE[kind])).block(1)
    found = [its.name.removeprefix(f"{block.name}.") for its in (*block.rises, block.falls, block.attends)]
    assert found == [*rises, falls, attends]


def test_adapters_are_seen_through_but_in_the_ffn(tokenizer):
    def adapted(*names: str):
        return peft.get_peft_model(tiny("llama", tokenizer), peft.LoraConfig(r=4, target_modules=list(names)))

    block = anatomy(adapted("q_proj", "o_proj")).block(1)
    assert block.falls.name.endswith("1.mlp.down_proj")
    assert block.attends.module is block.module.self_attn.o_proj
    for name in ("up_proj", "down_proj"):
        with pytest.raises(UserError, match=rf"layers\.0\.mlp\.{name}: an adapter is around it; merge it into"):
            anatomy(adapted(name))
    assert len(anatomy(adapted("down_proj").merge_and_unload()).blocks) == 3


def test_an_encoder_has_parts_too(tokenizer):
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=300, **GATED))
    block = anatomy(model).block(-1)
    assert block.falls.name == "bert.encoder.layer.2.output.dense"
    assert block.attends.name == "bert.encoder.layer.2.attention.output.dense"
    assert [its.name for its in block.rises] == ["bert.encoder.layer.2.intermediate.dense"]


def test_experts_are_refused(tokenizer):
    model = tiny("mixtral", tokenizer, GROUPED | {"num_local_experts": 4})
    with pytest.raises(UserError, match="experts"):
        anatomy(model)


def test_a_layer_that_is_not_there_is_named(lm):
    with pytest.raises(UserError, match="layer 7: this model has 3, from 0 to 2"):
        lm.anatomy.block(7)


def test_projections_by_pattern(tokenizer):
    model = tiny("llama", tokenizer)
    assert [its.name for its in linears(model, ("q_proj",))] == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert len(linears(model, ("*.mlp.*",))) == 9


# Copies.


def test_a_sharing_copy_holds_the_same_values_and_other_modules(tokenizer):
    model = tiny("llama", tokenizer)
    copied = sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert not {id(its) for its in model.modules()} & {id(its) for its in copied.modules()}
    copied.model.layers[0].mlp.down_proj = torch.nn.Linear(1, 1)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 64)


def test_a_tied_parameter_changes_wherever_it_is_used(tokenizer):
    model = tiny("gpt2", tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = torch.zeros_like(model.get_input_embeddings().weight)
    changed = with_values(model, {"transformer.wte.weight": new})
    assert changed.get_output_embeddings().weight is changed.get_input_embeddings().weight
    assert not changed.get_output_embeddings().weight.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_shares_memory_and_takes_no_gradient(tokenizer):
    model = tiny("llama", tokenizer).train()
    cold = frozen(model)
    assert not cold.training
    assert model.training
    assert all(
        a.data_ptr() == b.data_ptr() and not b.requires_grad for a, b in zip(model.parameters(), cold.parameters())
    )
    assert all(its.requires_grad for its in model.parameters())


# Tokens and scores.


def test_answers_are_found_by_their_characters(lm):
    prompts, answers = ["Lyon is a city in", "Oslo lies in ", ""], ["France", "Norway", "Kyoto"]
    encoded = lm.encode(prompts, answers)
    for row, prompt, answer in zip(range(3), prompts, answers):
        ids = encoded.ids[row]
        assert lm.tokenizer.decode(ids[encoded.answer[row]]).strip() == answer
        assert lm.tokenizer.decode(ids[encoded.prompt[row]], skip_special_tokens=True).strip() == prompt.strip()
        assert not (encoded.answer[row] & ~encoded.mask[row]).any()


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer):
    merged = tokenizer_of(["inFrance " * 50], 400)
    lm = LM.of(tiny("llama", merged), merged)
    assert "inFrance" in merged.tokenize("inFrance")
    encoded = lm.encode(["in\t"[:2]], ["\u200bFrance"[1:]])
    assert merged.decode(encoded.ids[0][encoded.answer[0]]) == " France"
    whole = lm.encode([""], ["inFrance"])
    assert whole.answer[0].sum() == 1


def test_scores_are_sums_of_log_probabilities(lm):
    """Restated: the answer's tokens, each from the plain logits at the place before it."""
    ids = lm.tokenizer("Lyon is a city in France")["input_ids"]
    start = len(lm.tokenizer("Lyon is a city in")["input_ids"])
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))
    (said,) = lm.score(["Lyon is a city in"], ["France"])
    assert said.logprob == pytest.approx(expected, abs=1e-4)
    assert said.tokens == tuple(ids[start:])
    assert said.best == tuple(int(logits[place - 1].argmax()) for place in range(start, len(ids)))


def test_an_answer_does_not_depend_on_its_batch(lm):
    prompts, answers = ["Lyon is a city in", "Kyoto, as they all say, lies in", "Oslo"], ["France", "Japan", "is"]
    together = lm.score(prompts, answers)
    for its, prompt, answer in zip(together, prompts, answers):
        (alone,) = lm.score([prompt], [answer])
        assert its.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert its.best == alone.best


def test_only_what_is_asked_is_computed_and_texts_of_one_length_go_together(lm, monkeypatch):
    """Restated text by text; batches hold little filling, and whoever watches the last block or the head sees all."""
    prompts = [f"{'so ' * (number % 5)}Lyon is a city in" for number in range(12)]
    answers = ["France" if number % 3 else "Japan, Italy and Norway" for number in range(12)]
    sizes = []
    plain = lm.logits
    monkeypatch.setattr("koinon.lm.language.BATCH", 60)
    monkeypatch.setattr(LM, "logits", lambda self, part: sizes.append(tuple(part.ids.shape)) or plain(part))
    found = lm.score(prompts, answers)
    assert len(sizes) > 1
    assert sizes == sorted(sizes, key=lambda size: -size[1])
    assert all(rows * time <= 60 for rows, time in sizes)
    encoded = lm.encode(prompts, answers)
    assert sum(rows * (time + 1) for rows, time in sizes) < 0.9 * encoded.ids.numel()
    for its, ids, mask, asked in zip(found, encoded.ids, encoded.mask, encoded.answer):
        sure = lm.model(input_ids=ids[mask][None]).logits[0].log_softmax(-1)
        places = asked.nonzero()[:, 0]
        assert its.tokens == tuple(ids[places].tolist())
        assert its.best == tuple(sure[places - 1].argmax(-1).tolist())
        assert its.logprobs == pytest.approx(sure[places - 1, ids[places]].tolist(), abs=1e-4)
        assert its.logprob == pytest.approx(sum(its.logprobs))
    head, width = lm.anatomy.head, encoded.ids.shape[1]
    own, seen = head.forward, []
    monkeypatch.setattr(head, "forward", lambda given: (seen.append(given.shape[:-1].numel()), own(given))[1])
    lm.score(prompts[:2], answers[:2])
    assert seen == [sum(len(its.tokens) for its in found[:2])]
    handle = head.register_forward_hook(lambda *_: None)
    lm.score(prompts[:2], answers[:2])
    handle.remove()
    assert seen[1] > width


@pytest.mark.parametrize("kind", [*WHERE, "mixtral", "mamba"])
def test_answers_are_scored_on_every_kind_of_model(kind, tokenizer):
    """Also where the parts of a layer are not known: layers with several experts, or without attention."""
    sizes = {"mixtral": GROUPED | {"num_local_experts": 2}, "mamba": {"hidden_size": 32, "num_hidden_layers": 2}}
    lm = LM.of(tiny(kind, tokenizer, sizes.get(kind)), tokenizer)
    prompts, answers = ["Lyon is a city in", "Kyoto, as they all say, lies in"], ["France and Japan", "Japan"]
    for its, prompt, answer in zip(lm.score(prompts, answers), prompts, answers):
        encoded = lm.encode([prompt], [answer])
        sure = lm.model(input_ids=encoded.ids, use_cache=False).logits[0].log_softmax(-1)
        places = encoded.answer[0].nonzero()[:, 0]
        assert its.logprobs == pytest.approx(sure[places - 1, encoded.ids[0, places]].tolist(), abs=1e-3)


def test_greedy_text_is_what_teacher_forcing_calls_exact(lm):
    prompts = ["Lyon is a city in", "Kyoto, as they all say, lies in"]
    together = lm.generate(prompts, 5)
    assert together == [lm.generate([prompt], 5)[0] for prompt in prompts]
    ids = lm.tokenizer(prompts[0])["input_ids"]
    for _ in range(5):
        ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert lm.generate(prompts[:1], 5, whole=True)[0].startswith(lm.tokenizer.decode(ids[-5:])[:3])


def test_samples_follow_their_seed_and_leave_the_global_numbers(lm):
    before = torch.random.get_rng_state()
    one, again, other = (lm.generate(["Lyon"], 12, sample=True, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_observing_changes_no_bit(lm):
    encoded = lm.encode(TEXTS)
    plain = lm.logits(encoded)
    modules = {name: its for name, its in lm.model.named_modules() if name}
    with watched({block.name: block.module for block in lm.anatomy.blocks}):
        assert torch.equal(lm.logits(encoded), plain)
    lm.seen({"ffn": lm.anatomy.block(1).falls.module}, encoded, "in")
    assert torch.equal(lm.logits(encoded), plain)
    assert not any(its._forward_hooks or its._forward_pre_hooks for its in modules.values())


def test_what_a_module_gives_can_be_changed(lm):
    encoded = lm.encode(TEXTS)
    plain = lm.logits(encoded)
    site = lm.anatomy.block(1).falls.module
    with rewritten(site, lambda its: its):
        assert torch.equal(lm.logits(encoded), plain)
    with rewritten(site, lambda its: its + 1):
        assert not torch.allclose(lm.logits(encoded), plain)
    assert torch.equal(lm.logits(encoded), plain)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lm: lm.encode([""]), "no token"),
        (lambda lm: lm.score("Lyon", "France"), "list of prompts"),
        (lambda lm: lm.last_of("Lyon is", (7, 7)), "no token of"),
    ],
)
def test_texts_that_cannot_be_read_are_named(lm, call, said):
    with pytest.raises(UserError, match=said):
        call(lm)


def test_a_text_longer_than_the_model_is_refused(tokenizer):
    lm = LM.of(decoder(tokenizer, width=16, layers=1, heads=2, wide=16, context=8), tokenizer)
    with pytest.raises(UserError, match="reads 8 at most"):
        lm.score(["Lyon is a city, as everybody who has ever been there says, in"], ["France"])


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 8}),
        ("gpt2", OLD | {"n_positions": 8}),
        ("opt", WHERE["opt"][0] | {"max_position_embeddings": 8}),
    ],
)
def test_the_limit_is_read_whatever_a_model_calls_it(kind, sizes, tokenizer):
    lm = LM.of(tiny(kind, tokenizer, sizes), tokenizer)
    assert lm.limit == 8
    assert len(lm.score(["Lyon"], ["is"])) == 1
    with pytest.raises(UserError, match="reads 8 at most"):
        lm.score(["Lyon is a city, as everybody who has ever been there says, in"], ["France"])


def test_a_router_says_who_answers(lm):
    other = LM.of(copy.deepcopy(lm.model), lm.tokenizer)
    torch.nn.init.zeros_(other.model.get_output_embeddings().weight)

    def route(prompts):
        return [(other if "Oslo" in its else lm, its.replace("Kyoto", "Lyon")) for its in prompts]

    both = LM(lm.model, lm.tokenizer, route)
    prompts, answers = ["Lyon is in", "Oslo is in", "Kyoto is in"], ["France", "Norway", "France"]
    found = both.score(prompts, answers)
    (plain,) = lm.score(prompts[:1], answers[:1])
    assert found[0].logprob == found[2].logprob == pytest.approx(plain.logprob, abs=1e-5)
    (oslo,) = other.score(prompts[1:2], answers[1:2])
    assert found[1].logprob == pytest.approx(oslo.logprob, abs=1e-5)


def test_the_answer_goes_on_behind_one_space():
    assert joint("in", "France") == " France"
    assert joint("in ", "France") == joint("in\n", "France") == joint("", "France") == "France"
    assert joint("in", " France") == " France"


# Models that fill in.


def test_a_masked_model_is_scored_from_left_to_right(tokenizer):
    """Restated: for each token of the answer, it and those behind it are hidden, and its own place is read."""
    model = encoder(tokenizer, width=32, layers=2, heads=2, wide=64, context=64)
    masked = MaskedLM.of(model, tokenizer)
    prompts, answers = ["Lyon is a city in", "Kyoto, they all say, lies in"], ["France", "Japan now"]
    found = masked.score(prompts, answers)
    for prompt, answer, its in zip(prompts, answers, found):
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt} {answer}.")["input_ids"]
        end = len(ids) - len(tokenizer.tokenize("."))
        total = 0.0
        for place in range(len(before), end):
            seen = [tokenizer.mask_token_id if place <= at < end else token for at, token in enumerate(ids)]
            total += float(masked.lm.model(input_ids=torch.tensor([seen])).logits[0, place].log_softmax(-1)[ids[place]])
        assert its.tokens == tuple(ids[len(before) : end])
        assert its.logprob == pytest.approx(total, abs=1e-4)
    assert masked.score(prompts[:1], answers[:1])[0].logprob == pytest.approx(found[0].logprob, abs=1e-4)
    assert anatomy(masked.lm.model).blocks


def test_a_masked_model_needs_a_token_that_hides(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(UserError, match="no token that hides"):
        MaskedLM.of(encoder(tokenizer, width=16, layers=1, heads=2, wide=16, context=64), bare)


# Reading.


def test_reading_tells_the_prompt_and_holds_it_while_decoding(lm):
    model = sharing(lm.model)
    watcher = reading.attach(model)
    assert reading.attach(model) is watcher is reading.reading_of(model)
    assert not list(watcher.parameters())
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append((watcher.first, watcher.prompt)))
    watching = lm.with_model(model)
    encoded = watching.encode(["Lyon is in"], ["France"])
    watching.logits(encoded)
    assert seen[-1][0]
    assert torch.equal(seen[-1][1], encoded.prompt)
    seen.clear()
    watching.generate(["Lyon is", "Kyoto lies, they say, in"], 4, whole=True)
    assert [first for first, _ in seen] == [True] + [False] * (len(seen) - 1)
    assert len(seen) == 4
    assert seen[0][1].sum(1).tolist() == watching.encode(["Lyon is", "Kyoto lies, they say, in"]).mask.sum(1).tolist()
    seen.clear()
    ids, mask = encoded.ids[:, :4].expand(2, -1), torch.tensor([[0, 1, 1, 1], [1] * 4])
    for _ in range(2):  # without a cache the prompt stays what it was, and is forgotten then
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=False)
    assert [its.shape[1] for _, its in seen] == [4, 5, 6] * 2
    assert all(torch.equal(its[:, :4], mask.bool()) and not its[:, 4:].any() for _, its in seen)
    copied = copy.deepcopy(model)
    assert copied.generate.model is copied
    assert reading.reading_of(copied) is not watcher
    copied(input_ids=encoded.ids)
    assert reading.reading_of(copied).prompt.all()


# Moments.


def test_the_second_moment_is_a_mean_of_outer_products(lm, tmp_path):
    falls = lm.anatomy.block(1).falls
    found, count = second_moment(lm, falls, TEXTS, tmp_path)
    keys = []
    for text in TEXTS:
        with watched({"keys": falls.module}, "in") as seen:
            lm.model(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
        keys += list(seen["keys"].detach().double().flatten(0, -2))
    assert count == len(keys)
    torch.testing.assert_close(found, sum(torch.outer(key, key) for key in keys) / len(keys), rtol=1e-4, atol=1e-6)
    (_,) = tmp_path.iterdir()
    again, _ = second_moment(lm, falls, TEXTS, tmp_path)
    assert torch.equal(found, again)
    second_moment(lm, falls, TEXTS[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_small_sample_is_shrunk_so_that_it_can_be_inverted():
    keys = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = keys.T @ keys / 3
    found, share = shrunk(moment, 3)
    assert share == 8 / 11
    torch.testing.assert_close(found.diagonal(), moment.diagonal())
    torch.testing.assert_close(found[0, 1], moment[0, 1] * 3 / 11)
    assert torch.linalg.eigvalsh(found).min() > 0
    assert shrunk(torch.zeros(2, 2, dtype=torch.float64) + torch.tensor([[1.0, 0], [0, 0]]), 10)[0][1, 1] > 0


# Tracing.


def test_without_noise_there_is_no_effect(lm):
    found = trace(lm, Fact("Lyon", "France", "{} is a city in"), noise=0.0, samples=2)
    assert found.clean == pytest.approx(found.broken, abs=1e-6)
    assert found.effect.abs().max() < 1e-6


def test_mending_the_last_state_gives_the_clean_probability(lm):
    found = trace(lm, Fact("Lyon", "France", "{} is a city in"), samples=3, noise=5.0)
    assert found.effect[-1, -1] == pytest.approx(found.clean - found.broken, abs=1e-5)
    assert found.tokens[found.subject[0] : found.subject[1]] != ()
    assert "".join(found.tokens[found.subject[0] : found.subject[1]]).strip() == "Lyon"
    before = found.effect[0, : found.subject[0]]
    assert not len(before) or before.abs().max() < 1e-6  # what noise did not reach need not be mended


@pytest.mark.parametrize("what", ["state", "ffn", "attention"])
def test_mending_every_state_gives_the_clean_probability(lm, what):
    """Of states, the last layer's are enough; what parts add, and the noise itself, is mended by states alone."""
    fact = Fact("Lyon", "France", "{} is a city in")
    found = trace(lm, fact, what, samples=3, noise=5.0)
    ids = lm.encode([fact.question]).ids
    sites = [tracing._site(block, what) for block in lm.anatomy.blocks]
    with watched({str(number): its for number, its in enumerate(sites)}) as seen, torch.no_grad():
        answer = int(lm.model(input_ids=ids).logits[0, -1].argmax())
    kept = {number: seen[str(number)].reshape(1, ids.shape[1], -1) for number in range(len(sites))}
    noise = torch.randn(3, ids.shape[1], 32, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(rewritten(lm.anatomy.embedding, lambda vectors: vectors + noise[..., : vectors.shape[-1]]))
        broken = tracing._probability(lm, ids.expand(3, -1), answer)
        for token in range(ids.shape[1]):
            stack.enter_context(tracing._mended(sites, kept, range(len(sites)), token, 3))
        mended = tracing._probability(lm, ids.expand(3, -1), answer)
    assert abs(broken - found.clean) > 1e-3
    assert (mended == pytest.approx(found.clean, abs=1e-6)) == (what == "state")


def test_the_layer_is_the_one_that_knows(tokenizer):
    """In two architectures: if only one layer's FFN says anything, tracing finds it."""
    for kind in ("llama", "gpt2"):
        model = tiny(kind, tokenizer)
        with torch.no_grad():
            for number, block in enumerate(anatomy(model).blocks):
                block.falls.weight.mul_(10 if number == 1 else 0)
        assert (
            best_layer(LM.of(model, tokenizer), [Fact("Lyon", "x", "We all love {}"), Fact("Kyoto", "x", "Go to {}")])
            == 1
        )


def test_tracing_says_that_it_found_nothing(tokenizer):
    model = tiny("llama", tokenizer)
    with torch.no_grad():
        for block in anatomy(model).blocks:
            block.falls.weight.zero_()
    with pytest.warns(UserWarning, match="no layer brings back .*: give --layer"):
        best_layer(LM.of(model, tokenizer), [Fact("Lyon", "x", "We all love {}")])


# Folders.


def test_a_folder_is_read_as_it_was_written(lm, tmp_path):
    write(lm.model, lm.tokenizer, tmp_path / "model")
    again = LM.load(tmp_path / "model")
    assert again.fingerprint == lm.fingerprint
    said, was = (its.score(["Lyon is in"], ["France"])[0] for its in (again, lm))
    assert (said.tokens, said.best) == (was.tokens, was.best)
    assert said.logprob == pytest.approx(was.logprob, abs=1e-5)
    with pytest.raises(UserError, match="there already"):
        write(lm.model, lm.tokenizer, tmp_path / "model")
    assert [its.name for its in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["llama", "gemma", "gptj", "falcon", "mixtral"])
def test_a_copy_has_the_same_fingerprint(kind, tokenizer, tmp_path):
    """Also with its input and output tied, read again in another place, and after it was used."""
    sizes = (WHERE[kind][0] if kind in WHERE else GROUPED) | {"tie_word_embeddings": True}
    model = tiny(kind, tokenizer, sizes)
    lm = LM.of(model, tokenizer)
    assert LM(sharing(model), copy.deepcopy(tokenizer)).fingerprint == lm.fingerprint
    write(model, tokenizer, tmp_path / "one")
    again = LM.load(tmp_path / "one")
    again.tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    again.model.config.use_cache = False
    again.model.config.pad_token_id = 3
    write(again.model, again.tokenizer, tmp_path / "two")
    assert lm.fingerprint == again.fingerprint == LM.load(tmp_path / "two").fingerprint


def test_a_half_precise_copy_has_the_same_fingerprint(tokenizer, tmp_path):
    """Its angles are half as precise in memory, and computed anew where it is read."""
    model = tiny("llama", tokenizer).to(torch.bfloat16)
    write(model, tokenizer, tmp_path / "lm")
    assert LM.load(tmp_path / "lm").fingerprint == LM.of(model, tokenizer).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_equal_values_that_are_computed_with_otherwise_are_another_model(changed, tokenizer, tmp_path):
    model = tiny("llama", tokenizer)
    write(model, tokenizer, tmp_path / "lm")
    file = tmp_path / "lm" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    lm, other = LM.of(model, tokenizer), LM.load(tmp_path / "lm")
    assert all(torch.equal(its, other.model.get_parameter(name)) for name, its in model.named_parameters())
    assert other.score(TEXTS, ["Yes"] * 3) != lm.score(TEXTS, ["Yes"] * 3)
    assert other.fingerprint != lm.fingerprint
    first, second = (second_moment(its, its.anatomy.block(1).falls, TEXTS, tmp_path / "cache") for its in (lm, other))
    assert not torch.equal(first[0], second[0])


def test_another_kind_buffer_or_tokenizer_is_another_model(tokenizer):
    found = {LM.of(tiny(kind, tokenizer, GROUPED), tokenizer).fingerprint for kind in ("llama", "mistral")}
    model = tiny("llama", tokenizer, GROUPED)
    assert LM.of(model, tokenizer).fingerprint in found
    found.add(LM.of(model, tokenizer_of(TEXTS[::-1], 280)).fingerprint)
    model.model.rotary_emb.inv_freq.mul_(2)
    found.add(LM.of(model, tokenizer).fingerprint)
    model.register_buffer("scale", torch.tensor(2.0))
    found.add(LM.of(model, tokenizer).fingerprint)
    model.scale.add_(1e-6)
    found.add(LM.of(model, tokenizer).fingerprint)
    assert len(found) == 6


def test_folders_that_are_no_models_are_named(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        LM.load(tmp_path / "empty")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only pickled weights"):
        LM.load(pickled)
    masked = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **GATED))
    write(masked, tokenizer, tmp_path / "masked")
    with pytest.raises(UserError, match="fills in what is hidden"):
        LM.load(tmp_path / "masked")
    assert MaskedLM.load(tmp_path / "masked").score(["Lyon is in"], ["France"])[0].logprob < 0
    with pytest.raises(UserError, match="dtype"):
        LM.load(tmp_path / "masked", dtype="float31")


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0], ids="spread {}".format)
def test_which_models_look_back_only_is_seen_whatever_their_values(tmp_path, tokenizer, spread):
    """Also where attention is so sharp that a place looks at itself alone, and so even that the others hardly count."""
    for seed in range(8):
        torch.manual_seed(seed)
        for kind, kinds in (("bert", AutoModelForMaskedLM), ("llama", AutoModelForCausalLM)):
            config = AutoConfig.for_model(
                kind, vocab_size=len(tokenizer), initializer_range=spread, max_position_embeddings=12, **GATED
            )
            write(kinds.from_config(config), tokenizer, tmp_path / f"{kind}-{seed}")
        LM.load(tmp_path / f"llama-{seed}")
        with pytest.raises(UserError, match="fills in what is hidden"):
            LM.load(tmp_path / f"bert-{seed}")


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="fast tokenizer"):
        LM(torch.nn.Linear(1, 1), object())
