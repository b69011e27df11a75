"""Real conversations in several languages, as bytes: a text to train a base on, and one task a language to tune it for.

They are ChatterBot's corpus: short exchanges about daily life, jokes, facts and computers, written by its contributors.
A world is a function of the conversations and the seed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from koinon.core import UserError
from koinon.data import sources

Conversation = tuple[str, ...]
"""Its lines."""
SHARES: Mapping[str, float] = {"train": 0.6, "valid": 0.1, "adapt": 0.1, "test": 0.2}
"""To train on; to choose on; for methods that adapt; to report on. Each part with its share of the conversations."""
CROWD = 8
"""Conversations that are linked by lines they share, and are more than this, are all trained on."""
TASKS: Mapping[str, float] = {"english": 1.0, "italian": 0.2, "spanish": 0.2, "dutch": 0.2}
"""The four languages in Latin script with the most text, and the share of their training parts the base has seen."""
OTHERS = ("portuguese", "indonesian", "turkish", "german", "french")
"""Languages that only the base is trained on. Swedish is left out: most of it is English."""


@dataclass(frozen=True)
class TextTask:
    """Text of one kind."""

    name: str
    parts: Mapping[str, bytes]
    """By the names in `SHARES`: no line is in two parts of any tasks."""

    @property
    def fingerprints(self) -> list[str]:
        """Of each part's content."""
        return [fingerprint(text) for text in self.parts.values()]


@dataclass(frozen=True)
class TextWorld:
    """What a base is trained on, and the tasks it is tuned for."""

    general: bytes
    """No line of it is in a part to choose, adapt or report on."""
    tasks: Mapping[str, TextTask]


def texts(seed: int = 0) -> TextWorld:
    """Four languages as tasks, and five more in the base's text; about 215 kB and 40 kB.

    Raises:
        UserError: nothing to fetch the corpus from, or pyyaml is missing.
    """
    return world_of({name: spoken(name) for name in TASKS}, [spoken(name) for name in OTHERS], TASKS, seed)


def spoken(language: str) -> list[Conversation]:
    """All conversations of one of the corpus's languages."""
    return [its for content in sources.read_folder("chats", language).values() for its in conversations(content)]


def conversations(content: bytes) -> list[Conversation]:
    """Those of one of the corpus's files: YAML with a list of lists of lines under ``conversations``."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError("the conversations are YAML files: pip install 'koinon[merge]'") from None
    return [tuple(str(line).strip() for line in its) for its in yaml.safe_load(content)["conversations"]]


def made(tasks: int = 3, count: int = 150, seed: int = 0) -> TextWorld:
    """A stand-in of the same shape: languages with words of their own, in conversations of words drawn at random."""
    rng = np.random.default_rng([seed, 1])
    spoken = {f"language {number}": _drawn(count, rng) for number in range(tasks)}
    seen = dict.fromkeys(spoken, 0.2) | {"language 0": 1.0}
    return world_of(spoken, [_drawn(count // 3, rng)], seen, seed)


def _drawn(count: int, rng: np.random.Generator) -> list[Conversation]:
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyzàèéñöü"), 9, replace=False)
    words = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(40)]
    found = [[" ".join(rng.choice(words, rng.integers(4, 8))) for _ in range(rng.integers(2, 4))] for _ in range(count)]
    return [tuple(its) for its in found]


def world_of(
    tasks: Mapping[str, Sequence[Conversation]],
    others: Iterable[Sequence[Conversation]],
    seen: Mapping[str, float],
    seed: int = 0,
) -> TextWorld:
    """Cut each task's conversations into parts, and join what the base is trained on.

    Conversations that share a line, in any letter case and directly or through others, come into the same part, also
    across tasks. One that is there twice counts once.

    Args:
        tasks: name to conversations.
        others: further ones for the base; those that share a line with a part not trained on are left out.
        seen: task to the share of its training part that the base is trained on as well.
        seed: of the cut and of the order.
    """
    every = [(name, its) for name, spoken in tasks.items() for its in dict.fromkeys(spoken)]
    linked = groups([its for _, its in every])
    sizes, rng = np.bincount(linked), np.random.default_rng(seed)
    place = np.searchsorted(np.cumsum(list(SHARES.values()))[:-1], rng.random(len(sizes)), side="right")
    place[sizes > CROWD] = 0
    cut: dict[str, dict[str, list[Conversation]]] = {name: {part: [] for part in SHARES} for name in tasks}
    for number in rng.permutation(len(every)):
        name, conversation = every[number]
        cut[name][tuple(SHARES)[place[linked[number]]]].append(conversation)
    train, *held = SHARES
    closed = {_key(line) for parts in cut.values() for part in held for its in parts[part] for line in its}
    general = [its for name, parts in cut.items() for its in parts[train][: round(seen[name] * len(parts[train]))]]
    for spoken in others:
        general += [its for its in dict.fromkeys(spoken) if not closed & {_key(line) for line in its}]
    found = {name: TextTask(name, {part: joined(its) for part, its in parts.items()}) for name, parts in cut.items()}
    return TextWorld(joined([general[number] for number in rng.permutation(len(general))]), found)


def groups(spoken: Sequence[Conversation]) -> list[int]:
    """A number for each conversation, the same for two that share a line, directly or through others."""
    parent = list(range(len(spoken)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[str, int] = {}
    for number, lines in enumerate(spoken):
        for line in lines:
            parent[root(number)] = root(first.setdefault(_key(line), number))
    names = {its: place for place, its in enumerate(dict.fromkeys(map(root, range(len(spoken)))))}
    return [names[root(number)] for number in range(len(spoken))]


def _key(line: str) -> str:
    return line.casefold()


def joined(spoken: Iterable[Conversation]) -> bytes:
    """A text in UTF-8: a line each, and an empty one behind every conversation."""
    return "".join("\n".join(its) + "\n\n" for its in spoken).encode()


def windows(text: bytes, length: int, step: int) -> UInt8[np.ndarray, "rows length"]:
    """Pieces of a text, as bytes from 0 to 255, that begin ``step`` apart; what does not fill the last one is left out.

    Raises:
        UserError: a text shorter than one window.
    """
    if len(text) < length:
        raise UserError(f"a text of {len(text)} bytes: {length} are needed for one window")
    return np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), length)[::step].copy()


def fingerprint(text: bytes) -> str:
    """Of a text."""
    return hashlib.blake2b(text, digest_size=8).hexdigest()
