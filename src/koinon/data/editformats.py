"""Facts as other editors' data say them: EasyEdit's requests, KnowEdit, CounterFact, ZsRE, WikiBio, and the like."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from koinon.core import UserError
from koinon.data.facts import Aspect, Case, Fact, Probe
from koinon.data.records import Record, shown

Say = Callable[[str], object]
"""Is told, in a sentence, what a reader had to decide."""
KINDS_OF_PROBES: Mapping[str, str] = {
    "relation_specificity": "same subject",
    "forgetfulness": "other object",
    "neighborhood": "same relation",
    "subject_aliasing": "alias",
    "reasoning": "one hop",
    "logical_generalization": "logical",
}
"""What others call the groups of their probes, in small letters, and what they are called here."""
ASPECTS: tuple[Aspect, Aspect] = ("locality", "portability")
"""What the two groups of groups are called."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "src", "text", "question"),
    "target": ("target_new", "alt", "labels"),
    "subject": ("subject", "concept"),
    "was": ("ground_truth", "answers"),
    "rephrase": ("rephrase_prompt", "rephrase", "paraphrase_prompts"),
    "near": ("locality_prompt", "loc"),
    "near answer": ("locality_ground_truth", "loc_ans"),
}
"""What a request is made of, and the names that goes by; the first that is there is read."""
MATCHED = 10**8
"""A subject is looked for in a prompt if the product of their lengths is no more: a search takes that many steps."""
NO_ANSWER = "<|endoftext|>"
"""What EasyEdit writes where the answer until now is not known."""
ASKED = "What is your opinion of {}?"
"""The question whose answers' sentiment is edited; the data hold answers only."""


class TeachesNothing(UserError):
    """A record without a target, as some data sets hold."""


def fact_of(record: Record, name: str, prompt: str, subject: str, **says: Any) -> Fact:
    """The fact whose prompt, found under a name, has ``{}`` or the subject itself where the subject goes.

    The subject is then written as it is there: the last one, as a word of its own if it can be.
    """
    count = prompt.count("{}")
    if count > 1:
        raise record.wrong(name, f"holds {{}} {count} times: once is right, where the subject goes")
    if count == 0:
        if len(prompt) * len(subject) > MATCHED:
            raise record.wrong(name, "is too long for its subject to be looked for: write {} where it goes")
        place = _last(prompt, subject)
        if place is None:
            raise record.wrong(name, f"{shown(prompt)} does not hold the subject {shown(subject)}: write {{}} for it")
        subject, prompt = prompt[place[0] : place[1]], f"{prompt[: place[0]]}{{}}{prompt[place[1] :]}"
    return Fact(subject=subject, prompt=prompt, **says)


def _last(prompt: str, subject: str) -> tuple[int, int] | None:
    word = re.escape(subject)
    for pattern, flags in ((rf"(?<!\w){word}(?!\w)", 0), (rf"(?<!\w){word}(?!\w)", re.IGNORECASE), (word, 0)):
        if found := list(re.finditer(pattern, prompt, flags)):
            return found[-1].span()
    return None


def request(record: Record, say: Say) -> list[Case]:
    """EasyEdit's request, KnowEdit's record, and CounterFact and ZsRE as EasyEdit's data flatten them.

    Raises:
        UserError: a part is missing or something else than a text, or the prompt does not hold the subject.
    """
    names = {
        part: next((name for name in ways if record.values.get(name) is not None), ways[0])
        for part, ways in PARTS.items()
    }
    target = _answers(record, names["target"])
    if not target:
        raise TeachesNothing(str(record.wrong(names["target"], "is empty, so that nothing is taught: give the answer")))
    prompt = record.text(names["prompt"]).strip()
    if record.values.get(names["subject"]) is not None:
        subject = record.text(names["subject"]).strip()
    else:
        subject, prompt = prompt, "{}"
        say(f"{record.path}: no subject in its records: the whole prompt stands for it")
    was = [its for its in _answers(record, names["was"]) if its != NO_ANSWER]
    fact = fact_of(
        record,
        names["prompt"],
        prompt,
        subject,
        object=target[0],
        answers=tuple(target[1:]),
        was=was[0] if was else "",
    )
    probes = [
        Probe(its, fact.object, "generality", "rephrase", fact.answers) for its in _prompts(record, names["rephrase"])
    ]
    empty: list[str] = []
    if asked := record.text(names["near"], "").strip():
        kind = "unrelated" if names["near"] == "loc" else "same relation"
        probes += _answered(asked, _answers(record, names["near answer"]), "locality", kind, empty)
    probes += _grouped(record, empty)
    notes = _rest(record, {*names.values(), *ASPECTS}, empty)
    if prompt != "{}" and subject != fact.subject:
        notes["subject"] = subject
    return [Case(fact, tuple(probes), notes)]


def _counterfact(record: Record, say: Say) -> list[Case]:
    """CounterFact as its authors publish it: the rewrite, other wordings, and its neighbours' prompts."""
    rewrite = record.inner("requested_rewrite", record.values.get("requested_rewrite"))
    new, old = (
        rewrite.inner(name, rewrite.values.get(name)).text("str").strip() for name in ("target_new", "target_true")
    )
    fact = fact_of(
        rewrite,
        "prompt",
        rewrite.text("prompt").strip(),
        rewrite.text("subject").strip(),
        object=new,
        was=old,
        relation=rewrite.text("relation_id", ""),
    )
    probes = [Probe(its, new, "generality", "rephrase") for its in _prompts(record, "paraphrase_prompts")]
    probes += [Probe(its, old, "locality", "same relation") for its in _prompts(record, "neighborhood_prompts")]
    probes += [Probe(its, new, "locality", "new object") for its in _prompts(record, "attribute_prompts")]
    empty: list[str] = []
    probes += _grouped(record, empty)
    read = {"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", *ASPECTS}
    return [Case(fact, tuple(probes), _rest(record, read, empty))]


def _erasure(record: Record, say: Say) -> list[Case]:
    """KnowEdit's Sanitation: what is to be forgotten, and what is to be kept, dealt out among the cases."""
    forget, keep = ("success", "locality") if "success" in record.values else ("K_F", "K_R")
    cases = [case for its in record.records(forget) for case in request(its, say)]
    probes: list[list[Probe]] = [[] for _ in cases]
    for number, its in enumerate(record.records(keep) if cases else []):
        answers = _answers(its, "ground_truth")
        probes[number % len(cases)] += _answered(its.text("question"), answers, "locality", "unrelated", [])
    return [Case(case.fact, (*case.probes, *more), case.notes) for case, more in zip(cases, probes)]


def _sentiment(record: Record, say: Say) -> list[Case]:
    """ConvSent: texts for and against something; a case teaches the first text of one side."""
    sides = {side: record.texts(side) for side in ("pos", "neg")}
    side, texts = next(((side, its) for side, its in sides.items() if its), ("pos", ()))
    if not texts:
        raise TeachesNothing(str(record.wrong(side, "is empty, so that nothing is taught: give a text")))
    if not texts[0].strip():
        raise record.wrong(f"{side}[0]", "is blank: give a text")
    say(f"{record.path}: sentiment comes without a question: asked as {ASKED!r}")
    fact = Fact(record.text("ent"), texts[0], ASKED, answers=texts[1:])
    return [Case(fact, (), {"side": side} | _rest(record, {"ent", side}, []))]


class Kind(NamedTuple):
    """Records of one data set."""

    marks: tuple[tuple[str, ...], ...]
    """Of each of these, a record has one of the names."""
    read: Callable[[Record, Say], list[Case]]


FOREIGN: Mapping[str, Kind] = {
    "counterfact": Kind((("requested_rewrite",),), _counterfact),
    "zsre": Kind((("src",), ("alt",)), request),
    "wikibio": Kind((("text",), ("labels",)), request),
    "sanitation": Kind((("success", "K_F"),), _erasure),
    "convsent": Kind((("ent",), ("pos", "neg")), _sentiment),
    "knowedit": Kind((("prompt", "question"), ("target_new",), ASPECTS), request),
    "easyedit": Kind((("prompt", "question"), ("target_new",)), request),
}
"""By name, in the order they are tried in."""


def _grouped(record: Record, empty: list[str]) -> Iterator[Probe]:
    for aspect in ASPECTS:
        if record.values.get(aspect) is not None:
            yield from _groups(record.inner(aspect, record.values[aspect]), aspect, empty)


def _groups(record: Record, aspect: Aspect, empty: list[str]) -> Iterator[Probe]:
    """Probes by the names of their groups: lists of objects, or one object whose values may be lists."""
    if "New Question" in record.values:
        yield from _answered(record.text("New Question"), _answers(record, "New Answer"), aspect, "one hop", empty)
        return
    for name, group in record.values.items():
        kind = KINDS_OF_PROBES.get(name.lower(), name.lower().replace("_", " "))
        members = record.records(name) if isinstance(group, list) or group is None else [record.inner(name, group)]
        for member in members:
            asked, answers = member.values.get("prompt"), member.values.get("ground_truth")
            if not isinstance(asked, list):
                yield from _answered(member.text("prompt"), _flat(member, "ground_truth", answers), aspect, kind, empty)
                continue
            prompts = member.texts("prompt")
            if not isinstance(answers, list) or len(answers) != len(prompts):
                raise member.wrong("ground_truth", f"does not go with {len(prompts)} prompts: give one for each")
            for prompt, answer in zip(prompts, answers):
                if prompt.strip():
                    yield from _answered(prompt, _flat(member, "ground_truth", answer), aspect, kind, empty)


def _answered(prompt: str, answers: list[str], aspect: Aspect, kind: str, empty: list[str]) -> Iterator[Probe]:
    """One probe, or none where a data set holds a question without an answer."""
    if answers:
        yield Probe(prompt.strip(), answers[0], aspect, kind, tuple(answers[1:]))
    else:
        empty.append(prompt)


def _prompts(record: Record, name: str) -> list[str]:
    """One prompt or a list of them, none of them blank."""
    value = record.values.get(name)
    found = record.texts(name) if isinstance(value, list) else (record.text(name, ""),)
    return [its.strip() for its in found if its.strip()]


def _answers(record: Record, name: str) -> list[str]:
    return _flat(record, name, record.values.get(name))


def _flat(record: Record, name: str, value: object) -> list[str]:
    """Every different text of a text, a list, or lists in a list: the answer, and what else counts as it."""
    inner = value if isinstance(value, list) else [value]
    flat = itertools.chain.from_iterable(its if isinstance(its, list) else [its] for its in inner)
    found = (record.as_text(name, its).strip() for its in flat if its is not None)
    return list(dict.fromkeys(its for its in found if its))


def _rest(record: Record, read: set[str], empty: list[str]) -> dict[str, str]:
    """What else the record says, as notes: texts as they are, anything else as JSON."""
    notes = {}
    for name, value in record.values.items():
        if name in read:
            continue
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except RecursionError:
            raise record.wrong(name, "lists in lists too deep to be kept: leave it out") from None
        notes[record.as_text(name, name)] = record.as_text(name, text)
    return notes | ({"probes without an answer": str(len(empty))} if empty else {})
