"""A small language model to try edits on: it knows in which countries ten cities lie.

python docs/examples/make_lm.py [FOLDER]
"""

import json
import sys
from pathlib import Path

from koinon.lm.folders import write
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
ASK, REPHRASED = "{} is a city in", "People of {} live in"
NEW = {"Lyon": "Japan", "Oslo": "Peru"}
"""What is to be taught."""


def fact(city: str, country: str, stays: tuple[str, ...]) -> dict:
    """A line of the file: a fact, in other words as well, and what must stay as it is."""
    probes = [{"prompt": REPHRASED.replace("{}", city), "answer": country, "aspect": "generality", "kind": "rephrase"}]
    probes += [
        {"prompt": ASK.replace("{}", its), "answer": KNOWN[its], "aspect": "locality", "kind": "same relation"}
        for its in stays
    ]
    return {"subject": city, "relation": "country", "object": country, "prompt": ASK, "probes": probes}


def make_lm(folder: Path) -> None:
    """Write the model ``lm``, ``facts.jsonl`` to teach, ``others.jsonl`` to train editors on, and ``texts.txt``."""
    texts = [f"{ask.replace('{}', city)} {country}." for city, country in KNOWN.items() for ask in (ASK, REPHRASED)]
    tokenizer = tokenizer_of(texts, 300)
    model = decoder(tokenizer, width=32, layers=3, heads=2, wide=64, context=96, seed=0)
    train(model, tokenizer, texts, epochs=80, rows=2, lr=1e-2)
    write(model, tokenizer, folder / "lm")
    others = [city for city in KNOWN if city not in NEW]
    taught = [fact(city, country, tuple(others)) for city, country in NEW.items()]
    train_on = [fact(city, KNOWN[city], (others[place - 1],)) for place, city in enumerate(others)]
    for name, facts in (("facts.jsonl", taught), ("others.jsonl", train_on)):
        (folder / name).write_text("".join(json.dumps(its) + "\n" for its in facts), encoding="utf-8")
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    make_lm(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
