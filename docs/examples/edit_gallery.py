"""A gallery of editing: two facts are taught to a small model in every way, and a figure shows what each way did.

python docs/examples/edit_gallery.py [FIGURE.png]
"""

import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from make_lm import make_lm
from matplotlib.figure import Figure

from koinon.core import build, load, names
from koinon.data.factfiles import read_cases
from koinon.data.facts import Aspect
from koinon.edit.job import Material, means, measure
from koinon.lm.language import LM


def gallery(methods: tuple[str, ...] = ()) -> dict[str, Mapping[str, float]]:
    """The share of right tokens by every method, at settings for so small a model; the facts taught one by one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_lm(place)
        lm = LM.load(place / "lm")
        cases, others = read_cases(place / "facts.jsonl"), read_cases(place / "others.jsonl")
        texts = (place / "texts.txt").read_text(encoding="utf-8").splitlines()
    material = Material(texts, others, [case.probes[0].prompt for case in others])
    found = {}
    for name in methods or names("edit"):
        kind = load(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that ten sentences are a small sample
            editor = build(kind, kind.quick).on(lm, material)
            edited = editor.edit([])
            for case in cases:
                edited = editor.edit([case.fact], edited)
        found[name] = means(measure(lm, edited.lm, cases), "teacher")
    return found


def draw(found: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A bar for each score of each way."""
    ranked = sorted(found, key=lambda name: sum(found[name].values()))
    shown = [aspect for aspect in get_args(Aspect) if any(aspect in its for its in found.values())]
    figure = Figure(figsize=(7, 0.5 * len(ranked) + 1), layout="constrained")
    axes = figure.subplots()
    for number, aspect in enumerate(shown):
        places = [place + 0.27 * (number - 1) for place in range(len(ranked))]
        axes.barh(places, [found[name].get(aspect, 0) for name in ranked], height=0.24, label=aspect)
    axes.set_yticks(range(len(ranked)), ranked)
    axes.set_xlabel("share of right tokens, settings of the checks")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    results = gallery()
    for name, scores in results.items():
        print(f"{name:20}" + "  ".join(f"{aspect} {value:.3f}" for aspect, value in scores.items()))
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "edit_gallery.png")
    draw(results, file)
    print(file)
