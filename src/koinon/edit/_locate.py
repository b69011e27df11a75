"""Where answers come from, averaged over facts: the effect of each layer at each role that a token has in a prompt."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from koinon.core import UserError
from koinon.data.facts import Fact
from koinon.data.outputs import refuse_places
from koinon.edit._edited import Material
from koinon.edit._folders import number
from koinon.edit._given import Given, Opened, warned
from koinon.edit._layers import TRACED, chosen
from koinon.lm.language import LM
from koinon.lm.tracing import Trace, What, trace
from koinon.terminal import Told, untold

ROLES = ("first of the subject", "within the subject", "last of the subject", "first behind it", "further", "last")
"""What a token can be in a prompt (Meng et al., 2022, figure 1)."""
KINDS = (".png", ".svg", ".pdf")
"""Of figures."""


@dataclass(frozen=True)
class Locate:
    """See where in a model answers come from: causal tracing, averaged over facts, as a figure."""

    opened: Opened
    given: Given
    out: Path
    """Figure, .png, .svg or .pdf; replaced if it is there."""
    noise: float = 3.0
    """On the subject's embedding, in standard deviations of all embeddings."""
    samples: int = 8
    """How often noise is drawn."""
    window: int = 1
    """How many layers' FFNs or attentions are mended together."""
    seed: int = 0
    """Of the noise."""

    def run(self, told: Told = untold) -> dict[str, Any]:
        """Trace, draw, and tell which layer `auto` takes."""
        if self.out.suffix not in KINDS or self.samples < 1 or self.window < 1:
            raise UserError(f"{self.out}: give a figure's name ({', '.join(KINDS)}), and numbers from 1")
        refuse_places([], [self.out], [self.opened.model, *self.given.files])
        cases = self.given.cases()
        with warned():
            found = located(self.opened.lm(), [case.fact for case in cases],
                            self.noise, self.samples, self.window, self.seed, told)  # fmt: skip
        draw(found, self.out)
        return {"out": str(self.out), **found.plain()}


@dataclass(frozen=True)
class Located:
    """Mean effects."""

    effect: Mapping[What, Float[Tensor, "role layer"]]
    """By what is mended; NaN for a role that no token has."""
    facts: int
    clean: float
    """The answers' probability, a mean."""
    broken: float
    """With noise on the subjects."""
    layer: int
    """What layer="auto" takes for these facts."""

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "facts": self.facts,
            "layer that auto takes": self.layer,
            "traced for it": min(self.facts, TRACED),
            "probability": {"clean": number(self.clean), "with noise": number(self.broken)},
            "effect": {
                what: {role: [number(its) for its in row] for role, row in zip(ROLES, table.tolist(), strict=True)}
                for what, table in self.effect.items()
            },
        }


def located(lm: LM, facts: Sequence[Fact], noise: float, samples: int, window: int, seed: int, told: Told) -> Located:
    """Trace every fact, mending the state, the FFN and the attention in turn."""
    layer = chosen(lm, "auto", Material(traced=facts))
    effect: dict[What, Tensor] = {}
    traces: list[Trace] = []
    for place, what in enumerate(get_args(What)):
        traces = []
        for count, fact in enumerate(facts):
            told(place * len(facts) + count, len(get_args(What)) * len(facts))
            width = 1 if place == 0 else window  # states are mended one at a time
            traces.append(trace(lm, fact, what, noise, samples, width, seed))
        effect[what] = by_role(traces)
    clean, broken = (sum(getattr(its, name) for its in traces) / len(traces) for name in ("clean", "broken"))
    return Located(effect, len(facts), clean, broken, layer)


def by_role(traces: Sequence[Trace]) -> Float[Tensor, "role layer"]:
    """The mean effect of each role: over the tokens of a prompt that have it, then over the prompts where one has."""
    rows = []
    for its in traces:
        roles = torch.tensor([_role(place, its) for place in range(len(its.tokens))])
        means = [its.effect[:, roles == role].mean(1) for role in range(len(ROLES))]  # NaN of none
        rows.append(torch.stack(means))
    return torch.stack(rows).nanmean(0)


def _role(place: int, its: Trace) -> int:
    """Of a token, a place in `ROLES`; -1 before the subject. A role further left goes first where two fit."""
    start, end = its.subject
    if place < start:
        return -1
    if place < end:
        return 2 if place == end - 1 else 0 if place == start else 1
    return 5 if place == len(its.tokens) - 1 else 3 if place == end else 4


def draw(found: Located, file: Path) -> None:
    """A map for each thing that is mended, layers from left to right.

    Raises:
        UserError: the file cannot be written.
    """
    from koinon.bench import figures

    titles = {"state": "vector between layers", "ffn": "FFN", "attention": "attention"}
    with figures.styled():
        figure = figures.Figure(figsize=(figures.WIDTH, 3.2), layout="constrained")
        panels = figure.subplots(1, len(found.effect), sharey=True)
        for axes, (what, table) in zip(panels, found.effect.items(), strict=True):
            image = axes.imshow(table.numpy(), aspect="auto", cmap="Purples", vmin=0)
            axes.set_title(f"effect of the {titles[what]}", fontsize=10, color=figures.INK)
            axes.set_xlabel("layer")
            axes.set_yticks(range(len(ROLES)), ROLES)
            axes.grid(visible=False)
            figure.colorbar(image, ax=axes, shrink=0.8)
        panels[0].set_ylabel("token")
        figure.suptitle(
            f"mean over {found.facts} facts; probability {found.clean:.2f}, with noise {found.broken:.2f}; "
            f"layer auto: {found.layer}", fontsize=10,
        )  # fmt: skip
        beside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
        try:
            figure.savefig(beside, dpi=150)
            os.replace(beside, file)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror})") from None
        finally:
            beside.unlink(missing_ok=True)
