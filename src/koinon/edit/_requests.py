"""Facts as they can be taught: which are refused before anything is changed, and how prompts are placed."""

import re
from collections.abc import Sequence

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.lm.language import LM, joint

SHORT = ("prof", "gen", "capt", "col", "hon", "rev", "sen", "gov", "pres", "lieut", "sgt", "assn", "dept", "univ")
"""Words cut short, behind which a stop ends no sentence; nor does it where the last three letters hold a capital."""
LAST = ("inc", "ltd", "co", "corp", "jr", "sr", "esq", "bros", "llc", "plc")
"""Words cut short that end a name with their stop."""
STOP = re.compile(
    r"(?P<word>\w*[^\W_]{3})[.!?][\"')\]]*\s+(?P<next>[^\W_][\w'’-]*)(?:\s+\S|(?P<stop>[.!?][\"')\]]*\s*$))"
)
"""A stop behind a word or a number of three digits, with two more words behind it, or one and the last stop."""
STOP_WITHOUT_BLANK = re.compile(r"[。｡।॥۔]\W*\w")
"""Of Chinese, Japanese, Hindi and Urdu: no abbreviation has it."""


def teachable(lm: LM, facts: Sequence[Fact]) -> list[Fact]:
    """The facts, each once.

    Raises:
        UserError: two objects for one question, an object of several sentences, one that is already at its prompt's
            end, or one whose first token begins in the prompt.
    """
    found: dict[str, Fact] = {}
    for fact in facts:
        its = found.setdefault(fact.question, fact)
        if its.object != fact.object:
            raise UserError(f"{fact.question!r} is taught twice, as {its.object!r} and as {fact.object!r}: keep one")
        if _sentences(fact.object):
            raise UserError(
                f"{fact.question!r}: the object {_short(fact.object)} is several sentences; give the answer alone"
            )
        if fact.question.rstrip().endswith(fact.object):
            raise UserError(f"{fact.question!r}: the prompt says the object {fact.object!r} already; end it before")
    if found:
        lm.encode(list(found), [fact.object for fact in found.values()])  # answers without a token are refused
        _refuse_shared(lm, list(found.values()))
    return list(found.values())


def _sentences(text: str) -> bool:
    """Whether there is more than one: several lines, or a stop that ends neither an abbreviation nor the text."""
    if "\n" in text.strip() or STOP_WITHOUT_BLANK.search(text):
        return True
    return any(
        end["word"].lower() not in (*SHORT, *LAST)
        and not any(letter.isupper() for letter in end["word"][-3:])
        and not (end["stop"] and end["next"].lower() in LAST)
        for end in STOP.finditer(text)
    )


def _refuse_shared(lm: LM, facts: Sequence[Fact]) -> None:
    """Raise UserError where a token holds the end of a prompt and the start of its object."""
    for fact in facts:
        end = len(fact.question)
        whole = _coded(lm, fact.question + joint(fact.question, fact.object))
        alone = [its for its, (a, b) in _coded(lm, fact.question) if b]
        before = [its for its, (start, stop) in whole if stop and start < end]
        blank = fact.question[-1].isspace()  # which some tokenizers leave out of a token's place
        if any(start < end < stop for _, (start, stop) in whole) or (blank and alone != before):
            raise UserError(
                f"{fact.question!r}: its end and the start of the object {_short(fact.object)} become one token; "
                f"end the prompt {'without a blank' if blank else 'at a whole word'}"
            )


def _coded(lm: LM, text: str) -> list[tuple[int, tuple[int, int]]]:
    """Tokens, and which characters they stand for."""
    its = lm.tokenizer([text], return_offsets_mapping=True)
    return list(zip(its["input_ids"][0], its["offset_mapping"][0]))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
