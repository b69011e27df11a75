"""Every way of editing on models of several makes: OPT puts all texts in one row around its FFN, GPT-NeoX fuses."""

import pytest
import torch
from test_edit_writing import made

from koinon.core import load, names
from koinon.edit._checks import ASK, FACTS, quiet, small
from koinon.edit._hypernetwork import factors
from koinon.edit._memories import Above
from koinon.edit.grace import Grace
from koinon.edit.wise import Wise
from koinon.lm.language import LM

METHODS = [its for its in names() if its.startswith("edit.")]
MAKES = ("llama", "gpt2", "neox", "opt", "opt-narrow", "opt-350m")
ASKED = [fact.question for fact in FACTS], [fact.object for fact in FACTS]
OTHERS = ["People of Kyoto live in", "Milan is", ASK.replace("{}", "Bonn")]


def quickly(name: str):
    method = load(name)
    return method(**method.quick)


@pytest.fixture(params=MAKES)
def lm(request) -> LM:
    return made(request.param)


@pytest.mark.parametrize("name", METHODS)
def test_it_teaches_generates_and_undoes(name, lm):
    """What is generated, with kept keys and values, is the same alone and in a batch."""
    method = quickly(name)
    with quiet():
        edited = method.edit(lm, FACTS, small().material)
    before, after = (sum(its.logprob for its in one.score(*ASKED)) for one in (lm, edited.lm))
    assert after != before
    prompts = [*ASKED[0], *OTHERS]
    said = edited.lm.generate(prompts, 4, whole=True)
    assert said == [edited.lm.generate([its], 4, whole=True)[0] for its in prompts]
    back = edited.undo().lm
    assert all(torch.equal(back.model.get_parameter(key), value) for key, value in lm.model.named_parameters())
    assert [its.logprobs for its in back.score(*ASKED)] == [its.logprobs for its in lm.score(*ASKED)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", ["llama", "opt"])
def test_it_teaches_in_bfloat16(name, make):
    lm = made(make)
    lm = LM.of(lm.model.to(torch.bfloat16), lm.tokenizer)
    with quiet():
        edited = quickly(name).edit(lm, FACTS, small().material)
    assert edited.undo(0).lm.model.dtype == torch.bfloat16
    before, after = (sum(its.logprob for its in one.score(*ASKED)) for one in (lm, edited.lm))
    assert after != before


MEMORIES = (
    Grace(layer=1, steps=40, rate=0.3, radius=0.01),
    Wise(layer=1, steps=25, rate=0.5, share=1.0, count=1, over="last", ratio=0.5),
)


@pytest.mark.parametrize("method", MEMORIES, ids=lambda its: type(its).__name__)
def test_memories_keep_texts_apart(method, lm):
    """The rows of a batch are what each is alone, whichever of them a memory answers."""
    with quiet():
        edited = method.edit(lm, FACTS[:1], small().material)
    assert edited.lm.score(*ASKED)[0].logprob > lm.score(*ASKED)[0].logprob + 0.1
    prompts, answers = [*ASKED[0], *OTHERS], ["Japan"] * 5
    for its, prompt in zip(edited.lm.score(prompts, answers), prompts):
        (alone,) = edited.lm.score([prompt], answers[:1])
        assert its.logprobs == pytest.approx(alone.logprobs, abs=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_shortened_pass_says_what_a_whole_one_does(lm, layer):
    encoded = lm.encode(*ASKED)
    above = Above(lm, layer, encoded)
    assert above.short
    assert above.into.shape[:2] == above.out.shape[:2] == above.read.ids.shape
    assert torch.equal(above.logits(lambda out: out), lm.logits(above.read))
    falls = lm.anatomy.block(layer).falls.module
    handle = falls.register_forward_hook(lambda module, given, out: 2 * out)
    assert torch.equal(above.logits(lambda out: 2 * out), lm.logits(above.read))
    handle.remove()


def test_factors_make_up_each_gradient(lm):
    """Text by text: sum delta u^T is the gradient of that text's own loss."""
    block = lm.anatomy.block(1)
    places = [*block.rises, block.falls]
    together = factors(lm, places, lm.encode(*ASKED))
    for row in range(2):
        encoded = lm.encode(ASKED[0][row : row + 1], ASKED[1][row : row + 1])
        weights = [its.module.weight.requires_grad_() for its in places]
        said = lm.logits(encoded)[0].float().log_softmax(-1)
        at = encoded.answer[0].nonzero()[:, 0]
        slopes = torch.autograd.grad(-said[at - 1, encoded.ids[0, at]].mean(), weights)
        for its, slope in zip(places, slopes):
            its.module.weight.requires_grad_(False)
            into, delta = (pair[row] for pair in together[its.parameter])
            torch.testing.assert_close(delta.T @ into, slope.T if its.turned else slope, rtol=1e-3, atol=1e-4)


def test_a_word_is_what_its_logit_grows_with(lm):
    """Of what comes out of the last normalisation, or of the last block where there is none."""
    site = lm.anatomy.norm if lm.anatomy.norm is not None else lm.anatomy.blocks[-1].module
    kept = []

    def keep(module, given, out):
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    handle = site.register_forward_hook(keep)
    said = lm.logits(lm.encode(["Lyon is"]))[0, -1, 7]
    handle.remove()
    (slope,) = torch.autograd.grad(said, kept)
    torch.testing.assert_close(lm.anatomy.word(7), slope[0, -1])
