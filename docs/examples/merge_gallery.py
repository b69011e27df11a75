"""A gallery of merging: two experts on scikit-learn's digits become one, in every way, and a figure shows how well.

python docs/examples/merge_gallery.py [FIGURE.png]
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import build, load, names
from koinon.merge._contract import Pool

SEEN = ("right", "down")
"""The two tasks: digits two pixels off to the right, and two pixels down."""


def worlds() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each task pictures and labels to learn from, then pictures and labels to try on."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32) / 16  # row 8 8
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pictures, labels = pictures[order], labels[order]
    views = {"plain": pictures, "right": pictures.roll(2, 2), "down": pictures.roll(2, 1)}
    return {
        name: (view[:1200].flatten(1), labels[:1200], view[1200:].flatten(1), labels[1200:])
        for name, view in views.items()
    }


def fitted(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """A copy of the model that has learned to tell the labels of the pictures."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def gallery(steps: int = 250) -> dict[str, dict[str, float]]:
    """Accuracy on each task, of the experts and of every way of merging them at its defaults, some with fewer steps."""
    data = worlds()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    base = fitted(start, *data["plain"][:2], steps)
    tuned = {task: fitted(base, *data[task][:2], steps) for task in SEEN}
    pool = Pool(base, tuned, data={task: data[task][0] for task in SEEN})

    def accuracy(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {task: float((model(data[task][2]).argmax(1) == data[task][3]).float().mean()) for task in SEEN}

    found = {"base": accuracy(base)} | {f"expert: {task}": accuracy(model) for task, model in tuned.items()}
    for name in names("merge"):
        kind = load(name)
        longer = {setting: 10 * value for setting, value in kind.quick.items() if isinstance(value, int)}
        method = build(kind, longer)  # the checks take a tenth of these steps
        found[name] = accuracy(method.merge(pool))
    return found


def draw(found: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A bar for each task of each way, the best way on top."""
    ranked = sorted(found, key=lambda name: sum(found[name].values()))
    figure = Figure(figsize=(7, 0.38 * len(ranked) + 1), layout="constrained")
    axes = figure.subplots()
    for shift, task in enumerate(SEEN):
        places = [place + 0.4 * shift - 0.2 for place in range(len(ranked))]
        axes.barh(places, [found[name][task] for name in ranked], height=0.36, label=task)
    axes.set_yticks(range(len(ranked)), ranked)
    axes.set_xlabel("accuracy on pictures nobody has seen")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    results = gallery()
    for name, accuracies in results.items():
        print(f"{name:24}" + "  ".join(f"{task} {value:.3f}" for task, value in accuracies.items()))
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "merge_gallery.png")
    draw(results, file)
    print(file)
