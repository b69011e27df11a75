"""What must be true of every way of editing, tried on a tiny model with random weights."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from koinon.bench.checks import Fixture, Outcome
from koinon.core import Method, UserError
from koinon.data.facts import Case, Fact, Probe
from koinon.edit._contract import Edit
from koinon.edit._edited import Edited, Material
from koinon.edit.finetune import Finetune
from koinon.lm.language import LM
from koinon.lm.small import decoder, tokenizer_of, train

KNOWN = {
    "Lyon": "France",
    "Oslo": "Norway",
    "Kyoto": "Japan",
    "Lima": "Peru",
    "Bonn": "Germany",
    "Turin": "Italy",
    "Porto": "Spain",
    "Cusco": "Peru",
    "Nice": "France",
    "Milan": "Italy",
}
"""What the tiny model is trained to say. All but the first two stand for what an edit must leave alone."""
ASK, REPHRASED = "{} is a city in", "People of {} live in"
FACTS = (Fact("Lyon", "Japan", ASK, "country", was="France"), Fact("Oslo", "Peru", ASK, "country", was="Norway"))
OTHERS = tuple(Fact(city, country, ASK, "country") for city, country in list(KNOWN.items())[2:])
TEXTS = tuple(f"{ask.replace('{}', city)} {country}." for city, country in KNOWN.items() for ask in (ASK, REPHRASED))


@dataclass
class Small:
    """Inputs of a tiny edit."""

    lm: LM
    material: Material
    prompts: tuple[str, ...]


@functools.cache
def _trained() -> LM:
    tokenizer = tokenizer_of(TEXTS, 300)
    model = decoder(tokenizer, width=32, layers=3, heads=2, wide=64, context=96, seed=0)
    train(model, tokenizer, TEXTS, epochs=80, rows=2, lr=1e-2)
    model.config.max_position_embeddings = 256  # places are turned, not learnt: there is room for examples in a prompt
    return LM.of(model, tokenizer)


def small() -> Small:
    """A Llama of three layers that knows ten cities; of eight of them there are facts with probes, and texts of all."""
    cases = tuple(
        Case(
            its,
            (
                Probe(REPHRASED.replace("{}", its.subject), its.object, "generality", "rephrase"),
                Probe(OTHERS[place - 1].question, OTHERS[place - 1].object, "locality", "same relation"),
            ),
        )
        for place, its in enumerate(OTHERS)
    )
    unrelated = tuple(REPHRASED.replace("{}", its.subject) for its in OTHERS)
    prompts = (FACTS[0].question, "People of Lyon live in", FACTS[1].question, "Bonn is a city in", "Milan is")
    return Small(copy.deepcopy(_trained()), Material(TEXTS, cases, unrelated), prompts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that a sample is small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def edited(method: Method, given: Small, facts: tuple[Fact, ...] = FACTS) -> Edited:
    """The facts taught by the method."""
    assert isinstance(method, Edit)
    with quiet():
        return method.edit(given.lm, facts, given.material)


def says(lm: LM, prompts: tuple[str, ...]) -> Tensor:
    """How likely the model finds a few answers behind each prompt."""
    answers = ("Japan", "Peru", "Italy in")
    asked = [(prompt, answer) for prompt in prompts for answer in answers]
    return torch.tensor([its.logprob for its in lm.score(*map(list, zip(*asked)))])


def apply(method: Method, given: Small) -> Outcome:
    """What the edited model says."""
    return {"logprobs": says(edited(method, given).lm, given.prompts)}


def _no_fact_changes_nothing(method: Method) -> None:
    given = small()
    assert torch.equal(says(edited(method, given, ()).lm, given.prompts), says(given.lm, given.prompts))


def _undo_is_exact(method: Method) -> None:
    given = small()
    its = edited(method, given)
    back = its.undo()
    assert not back.steps
    for name, value in given.lm.model.named_parameters():
        assert torch.equal(back.lm.model.get_parameter(name), value), f"{name} is not what it was"
    assert torch.equal(says(back.lm, given.prompts), says(given.lm, given.prompts)), "undone, it says something else"


def _undoing_the_last_step_is_exact(method: Method) -> None:
    given = small()
    assert isinstance(method, Edit)
    with quiet():
        editor = method.on(given.lm, given.material)
        one = editor.edit(FACTS[:1])
        both = editor.edit(FACTS[1:], one)
    try:
        back = both.undo(1)
    except UserError:
        return  # it keeps the last state only, and says so
    assert torch.equal(says(back.lm, given.prompts), says(one.lm, given.prompts)), (
        "not what it was before the last step"
    )


def _is_kept_in_tensors(method: Method) -> None:
    given = small()
    its = edited(method, given)
    assert its.patch is not None
    again = type(its.patch).restore(its.patch.tensors(), its.patch.notes)
    expected, found = (says(patch.attach(given.lm), given.prompts) for patch in (its.patch, again))
    assert torch.equal(found, expected), "read back from its tensors it says something else"


def _makes_the_answer_likelier(method: Method) -> None:
    given = small()
    for fact in FACTS:
        lm, asked = edited(method, given, (fact,)).lm, ([fact.question], [fact.object])
        gain = lm.score(*asked)[0].logprob - given.lm.score(*asked)[0].logprob
        assert gain > 0, f"the log-probability of {fact.object!r} changed by {gain:.3f} though it was taught"


def _batches_do_not_matter(method: Method) -> None:
    given = small()
    lm = edited(method, given).lm
    alone = torch.cat([says(lm, (prompt,)) for prompt in given.prompts])
    torch.testing.assert_close(
        says(lm, given.prompts), alone, rtol=1e-4, atol=1e-4, msg="an answer depends on its batch"
    )


def _contradictions_are_refused(method: Method) -> None:
    given = small()
    wrong = (FACTS[0], Fact("Lyon", "Italy", "{} is a city in"))
    try:
        edited(method, given, wrong)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    assert "Lyon" in said, f"two objects for one question: no UserError that names it, but {said!r}"


FIXTURE = Fixture(
    contract=Edit,
    arguments=small,
    apply=apply,
    baseline=lambda: Finetune(layer=1, steps=0),
    properties={
        "no_fact_changes_nothing": _no_fact_changes_nothing,
        "undo_is_exact": _undo_is_exact,
        "undoing_the_last_step_is_exact": _undoing_the_last_step_is_exact,
        "is_kept_in_tensors": _is_kept_in_tensors,
        "makes_the_answer_likelier": _makes_the_answer_likelier,
        "batches_do_not_matter": _batches_do_not_matter,
        "contradictions_are_refused": _contradictions_are_refused,
    },
)
