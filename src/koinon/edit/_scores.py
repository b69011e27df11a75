"""All scores of an edited model in one place, as plain data: what a report shows and a folder keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from koinon.data.facts import Case, Fact
from koinon.data.probes import drop_overlap
from koinon.edit._folders import number
from koinon.edit._measures import WAYS, Measured, fluency, intervals, means, perplexity
from koinon.lm.language import LM

TOKENS, TEXTS = 100, 32
"""How long, and how many, the texts are that fluency is measured on."""


@dataclass(frozen=True)
class Scored:
    """What edits did to the probes of several cases, and to how the model writes."""

    found: Sequence[Measured]
    base: LM
    fluency: tuple[float, float]
    """Before and after."""
    perplexity: tuple[float, float]
    """Of what was written, by the model without edits."""

    def plain(self) -> dict[str, Any]:
        """By aspect: the exact score before, and what each way of looking at answers gives now, with its interval."""
        before = means([its.unedited for its in self.found])
        given: dict[str, Any] = {aspect: {"before": number(its)} for aspect, its in before.items()}
        for how in WAYS:
            for aspect, its in intervals(self.found, how).items():
                given[aspect][how] = [number(its.mean), number(its.low), number(its.high)]
        if "locality" in given:
            given["locality"]["known"] = number(self.known())
        for name in ("fluency", "perplexity"):
            given[name] = dict(zip(("before", "now"), map(number, getattr(self, name)), strict=True))
        return given

    @property
    def local(self) -> int:
        """How many probes there are of what must stay."""
        return sum(one.probe.aspect == "locality" for its in self.found for one in its.answered)

    def changed(self) -> list[dict[str, str]]:
        """The probes of locality that the model answers otherwise than before."""
        return [
            {"prompt": one.probe.prompt, "kind": one.probe.kind, "before": self.text(one.before.best),
             "now": self.text(one.after.best), "fact": its.case.fact.question}
            for its in self.found
            for one in its.answered
            if one.probe.aspect == "locality" and one.changed
        ]  # fmt: skip

    def known(self) -> float:
        """The share of locality's answers that the model gave without the edits; the others show only if they stay."""
        local = [one for its in self.found for one in its.answered if one.probe.aspect == "locality"]
        return sum(one.before.exact for one in local) / len(local)

    def facts(self) -> list[dict[str, Any]]:
        """One row a fact: what the model took for the answer before and now, and how its probes came out."""
        rows = []
        for its in self.found:
            own = its.answered[0]
            rows.append(
                {
                    "prompt": its.case.fact.question,
                    "object": its.case.fact.object,
                    "before": self.text(own.before.best),
                    "now": self.text(own.after.best),
                    "log-probability": [number(own.before.logprob), number(own.after.logprob)],
                    **{aspect: number(score) for aspect, score in means([its]).items()},
                }
            )
        return rows

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens spell."""
        return self.base.tokenizer.decode(list(tokens)).strip()


def scored(base: LM, lm: LM, found: Sequence[Measured]) -> Scored:
    """With what both models write when they go on from the cases' questions, drawn from their distributions."""
    prompts = [its.case.fact.question for its in found[:TEXTS]]
    said = [its.generate(prompts, room(base, prompts), sample=True) for its in (base, lm)]
    return Scored(
        found,
        base,
        (fluency(said[0]), fluency(said[1])),
        (perplexity(base, prompts, said[0]), perplexity(base, prompts, said[1])),
    )


def room(lm: LM, prompts: Sequence[str]) -> int:
    """How many tokens can be written behind the longest prompt, and read again as one text; at least one."""
    longest = lm.encode(prompts).ids.shape[1] if prompts else 0
    return max(1, int(min(TOKENS, (lm.limit - longest) // 2)))


def shown(score: Sequence[float | None]) -> str:
    """A score with its interval, as a person reads it."""
    mean, low, high = score
    return f"{mean:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def of_steps(
    steps: Sequence[Sequence[Fact]], earlier: Sequence[tuple[Case, ...]], cases: Sequence[Case]
) -> list[tuple[Case, ...]]:
    """The cases of all steps: those of the earlier ones are known, and the others taught these."""
    by = {case.fact.question: case for case in cases}
    return [*earlier, *(tuple(by[fact.question] for fact in step) for step in steps[len(earlier) :])]


def standing(steps: Sequence[Sequence[Case]]) -> list[Case]:
    """What is judged after the last step: of a question the last answer, and no probe of what a step teaches."""
    last = {case.fact.question: case for step in steps for case in step}
    return drop_overlap(list(last.values()))[0]
