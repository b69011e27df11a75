"""GRACE against its algorithm written out, and what makes it the system it is."""

import copy
import itertools

import pytest
import torch
import transformers
from oracles import edit_grace as oracle

from koinon.data.facts import Fact
from koinon.edit._checks import ASK, FACTS, KNOWN, small
from koinon.edit._codebook import Code, Codebook, Codes, Entry, book
from koinon.edit._memories import Above, ends, late, put
from koinon.edit.grace import Grace
from koinon.lm.language import LM
from koinon.nn.params import stream

QUICK = Grace(layer=1, steps=20, rate=0.2, radius=0.5)
THIRD = Fact("Turin", "Peru", ASK, "country", was="Italy")
FAR = ("Bonn is a city in", "People of Kyoto live in", "Milan is a city in")
"""Prompts that no key of the facts is near to."""


@pytest.fixture(scope="module")
def given():
    return small()


@pytest.fixture(scope="module")
def edited(given):
    return QUICK.edit(given.lm, FACTS)


def plain(lm: LM, prompts, **named):
    """Logits of the model called as anyone would, and what is no padding."""
    encoded = lm.encode(list(prompts))
    with torch.no_grad():
        return lm.model(input_ids=encoded.ids, attention_mask=encoded.mask.long(), **named).logits, encoded.mask


# Its equations.


@pytest.mark.parametrize("seed", range(6))
def test_the_codebook_equals_the_algorithm(seed):
    keys = 1.2 * torch.randn(14, 2, generator=stream(seed, "keys"))
    labels = [str(its) for its in torch.randint(3, (14,), generator=stream(seed, "labels")).tolist()]
    codes = [Code(key, torch.full((1,), float(number)), label) for number, (key, label) in enumerate(zip(keys, labels))]
    found = [(entry.key.tolist(), int(entry.value), round(entry.radius, 5)) for entry in book(codes, 1.0)]
    wanted = oracle.book(keys.tolist(), labels, 1.0)
    assert found == [(keys[old].tolist(), value, round(radius, 5)) for old, value, radius in wanted]
    assert 1 < len(found) < 14


def test_the_value_equals_adam_written_out(given):
    fact = FACTS[0]
    (code,) = QUICK.edit(given.lm, [fact]).patch.codes
    encoded = given.lm.encode([fact.question], [fact.object])
    start = torch.rand(32, generator=stream(0, "value", fact.question))
    falls = given.lm.anatomy.block(1).falls.module
    prompt = int(encoded.prompt.sum())
    wanted = oracle.value(given.lm.model, falls, encoded.ids[0], prompt, start, QUICK.steps, QUICK.rate)
    torch.testing.assert_close(code.value, wanted, rtol=1e-3, atol=1e-3)
    key = given.lm.seen({"it": falls}, given.lm.encode([fact.question]), "in")["it"][0, -1]
    torch.testing.assert_close(code.key, key)


def test_it_starts_from_the_layer_if_asked(given):
    """Without a step the value is what the layer gives anyway."""
    (code,) = Grace(layer=1, steps=0, start="layer").edit(given.lm, FACTS[:1]).patch.codes
    falls = given.lm.anatomy.block(1).falls.module
    out = given.lm.seen({"it": falls}, given.lm.encode([FACTS[0].question]))["it"][0, -1]
    torch.testing.assert_close(code.value, out)


# Radii.


def codes(*given: tuple[float, str]) -> list[Code]:
    return [Code(torch.tensor([place, 1.0]), torch.tensor([float(n)]), label) for n, (place, label) in enumerate(given)]


def radii(*given: tuple[float, str]) -> list[float]:
    return [pytest.approx(entry.radius, abs=2e-5) for entry in book(codes(*given), 1.0)]


def test_keys_far_apart_keep_their_radius():
    assert radii((0.0, "a"), (2.5, "b")) == [1.0, 1.0]


def test_different_answers_split_the_way_between_them():
    assert radii((0.0, "a"), (1.2, "b")) == [0.6, 0.6]
    first, second = book(codes((0.0, "a"), (1.2, "b")), 1.0)
    assert first.radius + second.radius < 1.2  # a question in the middle is in one of them only


def test_the_same_answer_widens_the_old_key_and_adds_none():
    (entry,) = book(codes((0.0, "a"), (1.7, "a")), 1.0)
    assert (entry.radius, float(entry.value)) == (pytest.approx(1.7), 1.0)
    (entry,) = book(codes((0.0, "a"), (0.3, "a")), 1.0)
    assert entry.radius == 1.0  # it never shrinks


def test_the_same_question_with_another_answer_has_the_new_one_only():
    (entry,) = book(codes((0.0, "a"), (0.0, "b")), 1.0)
    assert (entry.label, float(entry.value), entry.radius) == ("b", 1.0, 1.0)


def test_a_radius_does_not_grow_in_a_split():
    assert radii((0.0, "a"), (0.4, "b"), (-1.0, "b")) == [0.2, 0.2, 0.5]
    assert radii((0.0, "a"), (1.9, "a"), (-2.5, "b")) == [1.25, 1.0]


def test_the_nearest_key_answers_and_only_as_far_as_it_reaches(given):
    """A question nearer to a key that does not reach it is not another key's, however far that one reaches."""
    name, width = given.lm.anatomy.block(1).falls.name, 64
    falls = given.lm.anatomy.block(1).falls.module
    key = given.lm.seen({"it": falls}, given.lm.encode([FAR[0]]), "in")["it"][0, -1]
    away = torch.zeros(width)
    away[0] = 1.0
    near, far = (Code(key + its * away, torch.full((32,), its), str(its)) for its in (0.5, 9.0))
    module = Codes([Entry(near.key, near.value, 0.4, "a"), Entry(far.key, far.value, 10.0, "b")])
    lm = put(given.lm, name, module)
    assert torch.equal(plain(lm, FAR)[0], plain(given.lm, FAR)[0])
    with torch.no_grad():
        module.radii[0] = 0.6
    out = lm.seen({"it": lm.anatomy.block(1).falls.module}, lm.encode([FAR[0]]))["it"][0, -1]
    assert torch.equal(out, near.value)


# What it does to a model.


def test_the_model_says_what_it_was_taught(edited):
    assert [its.exact for its in edited.lm.score([f.question for f in FACTS], [f.object for f in FACTS])] == [
        True,
        True,
    ]
    said = edited.lm.generate([fact.question for fact in FACTS], 8)
    assert all(text.strip().startswith(fact.object) for text, fact in zip(said, FACTS))


def test_outside_all_radii_it_is_the_model_to_the_bit(given, edited):
    for prompts in (FAR, FAR[:1]):
        assert torch.equal(plain(edited.lm, prompts)[0], plain(given.lm, prompts)[0])
    assert edited.lm.score(FAR, ["Italy"] * 3) == given.lm.score(FAR, ["Italy"] * 3)
    nowhere = Codebook(edited.patch.name, -1.0, edited.patch.codes).attach(given.lm)
    prompts = [fact.question for fact in FACTS]
    assert torch.equal(plain(nowhere, prompts)[0], plain(given.lm, prompts)[0])


def test_in_a_batch_with_others_and_padding_every_row_is_as_alone(given, edited):
    prompts = [FACTS[0].question, *FAR, FACTS[1].question]
    together, mask = plain(edited.lm, prompts)
    before, _ = plain(given.lm, prompts)
    assert len({int(its) for its in mask.sum(1)}) > 1  # some rows are padded
    for row in (1, 2, 3):
        assert torch.equal(together[row], before[row])
    for row, prompt in enumerate(prompts):
        alone, _ = plain(edited.lm, [prompt])
        torch.testing.assert_close(together[row, mask[row]], alone[0], rtol=1e-4, atol=1e-4)
    for row in (0, 4):
        assert not torch.allclose(together[row], before[row], atol=1e-2)


def test_only_the_last_token_of_the_prompt_is_given_the_value(given, edited):
    fact = FACTS[0]
    encoded = edited.lm.encode([fact.question], [fact.object])
    last = int(encoded.prompt.sum()) - 1
    before, after = (
        lm.seen({"it": lm.anatomy.block(1).falls.module}, encoded)["it"][0] for lm in (given.lm, edited.lm)
    )
    assert torch.equal(after[last], edited.patch.codes[0].value)
    others = [place for place in range(len(before)) if place != last]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_of_a_prompt_is_found_behind_padding_on_either_side(side):
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]] if side == "left" else [[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert ends(mask).tolist() == ([3, 3] if side == "left" else [2, 0])


def test_what_is_generated_is_what_teacher_forcing_says(given, edited):
    """Through `LM.generate`, and through the model's own ``generate`` with a cache and padding on the left."""
    prompts = [FACTS[0].question, *FAR, FACTS[1].question, "People of Lyon live in"]
    for lm in (given.lm, edited.lm):
        said = lm.generate(prompts, 6)
        assert all(its.exact for its in lm.score(prompts, said))
    tokens = [given.lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, tokens))
    ids = torch.tensor([[given.lm._filling] * (longest - len(its)) + its for its in tokens])
    mask = torch.tensor([[0] * (longest - len(its)) + [1] * len(its) for its in tokens])
    for named in ({}, {"use_cache": False}):
        out = edited.lm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **named)
        assert edited.lm.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True) == said


def test_without_a_cache_the_prompt_is_held_as_well(given, edited):
    """Where the model itself says that it has none; in one text and several, in copies, and in a beam search."""
    model = copy.deepcopy(edited.lm.model)
    model.config.use_cache = model.generation_config.use_cache = False
    lm = edited.lm.with_model(model)
    prompts = [FACTS[0].question, FAR[0], FACTS[1].question]
    assert lm.generate(prompts, 6) == edited.lm.generate(prompts, 6)
    for prompt, fact in zip(prompts[::2], FACTS, strict=True):
        assert lm.generate([prompt], 6)[0].startswith(f" {fact.object}")
        ids = torch.tensor([given.lm.tokenizer(prompt)["input_ids"]])
        beams = [
            its.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3)
            for its in (lm, edited.lm)
        ]
        assert torch.equal(*beams)
        assert lm.tokenizer.decode(beams[0][0, ids.shape[1] :]).startswith(f" {fact.object}")
    one, other = (its.score(prompts, ["Peru"] * 3) for its in (lm, edited.lm))
    assert one == other  # no prompt is held on to


def test_the_models_values_are_shared_and_unchanged(given, edited):
    there = dict(edited.lm.model.named_parameters())
    for name, value in given.lm.model.named_parameters():
        assert there.pop(name) is value
    assert sum(its.numel() for its in there.values()) == 2 * (64 + 32 + 1)  # keys, values and radii
    assert edited.lm.anatomy.block(1).falls.name == given.lm.anatomy.block(1).falls.name


@pytest.mark.parametrize("gone", [*itertools.combinations(range(3), 1), *itertools.combinations(range(3), 2)])
def test_any_steps_taken_away_leave_what_would_have_been_without_them(given, gone):
    """Also where two keys had split their radii: they get them back."""
    method = Grace(layer=1, steps=5, rate=0.2, radius=4.0)
    facts = [*FACTS, THIRD]
    left = method.edit(given.lm, facts).without(gone)
    wanted = method.edit(given.lm, [fact for number, fact in enumerate(facts) if number not in gone])
    assert left.patch.notes == wanted.patch.notes
    assert all(torch.equal(left.patch.tensors()[name], its) for name, its in wanted.patch.tensors().items())
    prompts = [fact.question for fact in facts]
    assert torch.equal(plain(left.lm, prompts)[0], plain(wanted.lm, prompts)[0])
    assert [e.radius for e in left.patch.entries] == [e.radius for e in wanted.patch.entries]


def test_taught_again_a_question_has_its_new_answer(given):
    editor = QUICK.on(given.lm)
    edited = editor.edit([Fact("Lyon", "Peru", ASK)], editor.edit(FACTS[:1]))
    assert edited.lm.generate([FACTS[0].question, FAR[0]], 6)[0].strip().startswith("Peru")
    assert edited.undo(1).lm.generate([FACTS[0].question, FAR[0]], 6)[0].strip().startswith("Japan")


def test_what_is_learnt_does_not_depend_on_what_was_before(given):
    one = QUICK.edit(given.lm, [FACTS[1]]).patch.codes[0]
    other = QUICK.edit(given.lm, FACTS).patch.codes[1]
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.key, other.key)


def test_an_edited_model_can_be_edited_again_by_anything(given, edited):
    again = Grace(layer=0, steps=20, rate=0.2, radius=0.5).edit(edited.lm, [THIRD])
    facts = [*FACTS, THIRD]
    assert all(its.exact for its in again.lm.score([f.question for f in facts], [f.object for f in facts]))
    assert torch.equal(plain(again.lm, FAR)[0], plain(given.lm, FAR)[0])
    assert sum(isinstance(its, Codes) for its in again.lm.model.modules()) == 2


# Models of other shapes.


def gpt2(tokenizer) -> LM:
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LM.of(transformers.GPT2LMHeadModel(config), tokenizer)


def test_it_works_where_matrices_are_stored_the_other_way_round(given):
    lm = gpt2(given.lm.tokenizer)
    edited = Grace(layer=1, steps=60, rate=0.5, radius=0.01).edit(lm, FACTS)
    asked = [f.question for f in FACTS], [f.object for f in FACTS]
    for before, after in zip(lm.score(*asked), edited.lm.score(*asked)):  # weights drawn at random echo what they read
        assert (before.best[0] == before.tokens[0], after.best[0] == after.tokens[0]) == (False, True)
    assert torch.equal(plain(edited.lm, FAR)[0], plain(lm, FAR)[0])


def test_it_works_in_bfloat16(given):
    lm = given.lm.with_model(small().lm.model.to(torch.bfloat16))
    edited = QUICK.edit(lm, FACTS)
    assert all(its.exact for its in edited.lm.score([f.question for f in FACTS], [f.object for f in FACTS]))
    assert torch.equal(plain(edited.lm, FAR)[0], plain(lm, FAR)[0])


# The blocks below are read once.


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_shortened_pass_says_what_a_whole_one_does(given, layer):
    for lm in (given.lm, gpt2(given.lm.tokenizer)):
        encoded = lm.encode([f.question for f in FACTS], [f.object for f in FACTS])
        above = Above(lm, layer, encoded)
        assert above.short
        assert torch.equal(above.logits(lambda out: out), lm.logits(above.read))
        doubled = above.logits(lambda out: 2 * out)
        handle = lm.anatomy.block(layer).falls.module.register_forward_hook(lambda module, given, out: 2 * out)
        assert torch.equal(doubled, lm.logits(above.read))
        handle.remove()


def test_a_model_with_memories_is_read_in_whole_passes(given):
    """A memory decides by the tokens of a pass, which are not known where only its end is computed."""
    lm = QUICK.edit(given.lm, FACTS).lm
    encoded = lm.encode([f.question for f in FACTS], [f.object for f in FACTS])
    above = Above(lm, 0, encoded)
    assert above._tail is None
    assert Above(given.lm, 0, encoded)._tail is not None
    assert torch.equal(above.logits(lambda out: out), lm.logits(above.read))
    assert not torch.equal(lm.logits(encoded), given.lm.logits(encoded))


def test_the_blocks_below_are_not_run_again(given):
    above = Above(given.lm, 2, given.lm.encode([FACTS[0].question]))
    runs = []
    for block in above.lm.anatomy.blocks[:2]:
        block.falls.module.register_forward_hook(lambda *its: runs.append(1))
    above.logits(lambda out: out)
    assert runs == []


def test_where_blocks_do_more_than_pass_vectors_on_every_pass_is_whole(given):
    lm = small().lm
    seen = []
    lm.anatomy.blocks[0].module.register_forward_hook(lambda module, given, out: seen.append(out))

    def added(module, given, out):
        out.logits = out.logits + seen.pop().mean()

    lm.model.register_forward_hook(added)
    encoded = lm.encode([FACTS[0].question])
    with torch.no_grad():
        above = Above(lm, 2, encoded)
        assert not above.short
        assert torch.equal(above.logits(lambda out: out), lm.logits(encoded))


def test_auto_is_a_late_layer_and_not_the_last(given):
    assert [late(given.lm, its) for its in ("auto", 0, -1)] == [1, 0, 2]
    assert set(KNOWN) >= {fact.subject for fact in FACTS}
