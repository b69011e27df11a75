"""LoRA against its equation, and what a change of low rank is."""

from dataclasses import replace

import pytest
import torch
from oracles import edit_lora as oracle

from koinon.core import UserError
from koinon.edit._checks import FACTS, edited, says, small
from koinon.edit.lora import Lora
from koinon.lm.anatomy import linears
from koinon.nn.params import stream

QUICK = Lora(steps=4, rank=2)


@pytest.fixture(scope="module")
def given():
    return small()


def changes(method, given, facts=FACTS[:1]):
    (step,) = edited(method, given, facts).patch.steps
    return step


def test_learning_equals_the_equation(given):
    """Adam on A and B, written out; the change is (alpha / r) B A."""
    names = [its.name for its in linears(given.lm.model, QUICK.where)]
    first = {
        name: (torch.rand(2, 32, generator=stream(0, "lora", name)) * 2 - 1) / 32**0.5 for name in names
    }  # the tiny model is 32 wide
    encoded = given.lm.encode([FACTS[0].question], [FACTS[0].object])
    a, b = oracle.learnt(
        given.lm.model, names, encoded.ids[0], int(encoded.prompt.sum()), first, QUICK.alpha, QUICK.steps, QUICK.rate
    )
    found = changes(QUICK, given)
    assert set(found) == {f"{name}.weight" for name in names}
    for name in names:
        its = found[f"{name}.weight"]
        torch.testing.assert_close(its.left @ its.right.T, QUICK.alpha / 2 * b[name] @ a[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_change_has_the_rank_at_most(given, rank):
    for name, its in changes(replace(QUICK, rank=rank), given).items():
        assert its.left.shape[1] == rank
        assert 1 <= int(torch.linalg.matrix_rank(its.left.double() @ its.right.double().T)) <= rank, name


def test_only_the_chosen_matrices_change(given):
    lm = edited(replace(QUICK, where=("model.layers.1.mlp.down_proj",)), given).lm
    moved = [
        name
        for name, value in given.lm.model.named_parameters()
        if not torch.equal(value, lm.model.get_parameter(name))
    ]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]


def test_without_a_step_the_model_is_the_base_to_the_bit(given):
    lm = edited(replace(QUICK, steps=0), given).lm
    assert torch.equal(says(lm, given.prompts), says(given.lm, given.prompts))
    for its in changes(replace(QUICK, steps=0), given).values():
        assert not its.left.any()
        assert its.right.any()


def test_the_result_is_the_users_own_class_with_a_second_step_on_the_first(given):
    editor = QUICK.on(given.lm)
    one = editor.edit(FACTS[:1])
    both = editor.edit(FACTS[1:], one)
    assert type(both.lm.model) is type(given.lm.model)
    assert len(both.patch.steps) == 2
    assert both.patch.steps[0] is one.patch.steps[0]
    for name, value in both.undo(1).lm.model.named_parameters():
        assert torch.equal(value, one.lm.model.get_parameter(name)), name


def test_a_model_that_stores_its_weights_the_other_way_round():
    """GPT-2: the change is of the weight as it multiplies a column."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from koinon.lm.language import LM

    plain = small().lm
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(plain.tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
        )
    lm = LM.of(model, plain.tokenizer)
    result = Lora(steps=3, rank=2, where=("c_attn",)).edit(lm, FACTS[:1])
    assert result.patch.turned == {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"}
    its = result.patch.steps[0]["transformer.h.0.attn.c_attn.weight"]
    assert its.left.shape == (48, 2)
    asked = [FACTS[0].question], [FACTS[0].object]
    assert result.lm.score(*asked)[0].logprob > lm.score(*asked)[0].logprob


def test_a_pattern_that_fits_nothing_names_what_there_is(given):
    with pytest.raises(UserError, match=r"no matrix of the model fits; there are .*q_proj.*up_proj"):
        edited(replace(QUICK, where=("attention",)), given)


def test_a_step_that_leads_nowhere_is_refused(given):
    with pytest.raises(UserError, match="diverged"):
        edited(replace(QUICK, rate=1e30, where=("*",)), given)


def test_no_rank_is_refused(given):
    with pytest.raises(UserError, match="rank 0: give a number from 1"):
        edited(replace(QUICK, rank=0), given)
