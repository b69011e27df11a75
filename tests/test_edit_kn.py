"""Knowledge neurons against their equations, and what makes them what they are."""

import pytest
import torch
from oracles import edit_kn as oracle
from test_edit_writing import made

from koinon.data.facts import Case, Fact, Probe
from koinon.edit._contract import Editor
from koinon.edit._edited import Material
from koinon.edit.kn import KnowledgeNeurons, attributions

FACT = Fact("Lyon", "Japan", "The town of {} is a city in", "country", was="France")
OTHER = "People of {} live in"


def token(lm, answer: str) -> int:
    coded = lm.encode([FACT.question], [answer])
    return int(coded.ids[coded.answer][0])


def edited(lm, method: KnowledgeNeurons, fact: Fact = FACT, wordings: tuple[str, ...] = ()):
    return Editor(method, lm, {"country": list(wordings)}).edit([fact])


def weights(lm) -> list[torch.Tensor]:
    """Of each layer's way back, [out, in]."""
    return [block.falls.weight.detach() for block in lm.anatomy.blocks]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_attributions_are_integrated_gradients(name):
    lm = made(name)
    ids, wanted = lm.encode([FACT.question]).ids, token(lm, "France")
    found = attributions(lm, FACT.question, wanted, 5)
    assert len(found) == 3
    for block, its in zip(lm.anatomy.blocks, found, strict=True):
        expected = oracle.attributed(lm.model, block.falls.module, ids, wanted, 5)
        torch.testing.assert_close(its, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_attributions_of_a_layer_add_up_to_what_its_neurons_change():
    """P with the neurons as they are less P with all of them at 0: the sum, but for the size of the steps."""
    lm = made("llama")
    ids, wanted = lm.encode([FACT.question]).ids, token(lm, "France")
    found = attributions(lm, FACT.question, wanted, 300)
    for block, its in zip(lm.anatomy.blocks, found, strict=True):
        with torch.no_grad():
            whole, neurons = oracle.with_neurons(lm.model, block.falls.module, ids, None)
            none, _ = oracle.with_neurons(lm.model, block.falls.module, ids, torch.zeros_like(neurons))
        difference = float(whole[wanted] - none[wanted])
        assert abs(float(its.sum()) - difference) < 0.02 * abs(difference) + 1e-6


def test_chosen_neurons_go_from_the_old_word_to_the_new_one():
    """v_i + |v_i| sign(a_i) (lambda_2 t' / |t'| - lambda_1 t / |t|) of neurons above the threshold; no other moves."""
    lm = made("llama")
    ids = lm.encode([FACT.question]).ids
    method = KnowledgeNeurons(steps=3, threshold=0.1, away=0.5, towards=2.0)
    found = attributions(lm, FACT.question, token(lm, "France"), 3)
    largest = max(float(its.max()) for its in found)
    rows = lm.anatomy.head.weight.detach()
    old, new = (rows[token(lm, its)] / rows[token(lm, its)].norm() for its in ("France", "Japan"))
    signs: list[float] = []
    for block, before, after, its in zip(
        lm.anatomy.blocks, weights(lm), weights(edited(lm, method).lm), found, strict=True
    ):
        _, neurons = oracle.with_neurons(lm.model, block.falls.module, ids, None)
        expected = before.clone()
        for place, value in enumerate(its):
            if value > 0.1 * largest:
                step = before[:, place].norm() * neurons[place].sign()
                expected[:, place] += step * (2.0 * new - 0.5 * old)
                signs.append(float(neurons[place].sign()))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert set(signs) == {-1.0, 1.0}
    assert len(signs) < 60


def test_neurons_must_be_in_more_than_a_share_of_the_wordings():
    lm = made("llama")
    each = []
    for prompt in (FACT.question, OTHER.replace("{}", "Lyon")):
        found = attributions(lm, prompt, token(lm, "France"), 3)
        largest = max(float(its.max()) for its in found)
        each.append({(layer, int(n)) for layer, its in enumerate(found) for n in (its > 0.2 * largest).nonzero()[:, 0]})
    assert each[0] != each[1]

    def moved(share: float) -> set[tuple[int, int]]:
        after = edited(lm, KnowledgeNeurons(steps=3, share=share), wordings=(OTHER,)).lm
        pairs = enumerate(zip(weights(lm), weights(after), strict=True))
        return {(layer, int(n)) for layer, (a, b) in pairs for n in (a != b).any(0).nonzero()[:, 0]}

    assert moved(0.4) == each[0] | each[1]
    assert moved(0.5) == each[0] & each[1]


def test_without_a_shared_neuron_nothing_changes_and_it_is_said():
    lm = made("llama")
    with pytest.warns(UserWarning, match="no neuron is in 100% of its wordings"):
        found = edited(lm, KnowledgeNeurons(steps=1, share=1.0))
    assert all(torch.equal(*its) for its in zip(weights(lm), weights(found.lm), strict=True))
    assert len(found.steps) == 1


def test_without_an_old_answer_the_likeliest_is_taken():
    lm = made("llama")
    with torch.no_grad():
        says = int(lm.logits(lm.encode([FACT.question]))[0, -1].argmax())
    fact = Fact(FACT.subject, FACT.object, FACT.prompt, FACT.relation)
    (change, *_) = edited(lm, KnowledgeNeurons(steps=3, towards=0.0), fact).patch.steps[0].values()
    row = lm.anatomy.head.weight.detach()[says]
    torch.testing.assert_close(change.left[:, 0], -row / row.norm())


def test_wordings_are_those_of_the_same_relation():
    case = Case(
        Fact("Bonn", "Germany", FACT.prompt, "country"),
        (
            Probe("People of Bonn live in", "Germany", "generality", "rephrase"),
            Probe("It is in", "Germany", "generality", "rephrase"),  # does not name the subject
            Probe("Bonn and Oslo are in", "Germany", "locality", "same relation"),
        ),
    )
    found = KnowledgeNeurons().prepare(made("llama"), Material(cases=(case,)))
    assert found == {"country": [FACT.prompt, OTHER]}
