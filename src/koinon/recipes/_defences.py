"""Defences for one model that may carry a backdoor, with a few clean rows and their classes: AWM and SAU.

Both are written for the weights that tasks share, under heads that stay as they are: each task has rows, perturbations
and a loss of its own, and the mean of the losses is descended. With one task they are what their papers have.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from koinon.merge._coefficients import batches, descend
from koinon.merge._live import Predict, State

Clean = Mapping[str, Mapping[str, Tensor]]
"""Task to ``rows`` and ``classes``, known to be right."""
Say = Callable[[Tensor], Tensor]
"""From rows to their logits."""


class Defence(ABC):
    """Something that makes weights harmless."""

    @abstractmethod
    def defend(self, predict: Predict, state: State, clean: Clean, seed: int) -> dict[str, Tensor]:
        """Other weights in the place of a state's; the state is not changed.

        Args:
            predict: what the model says with some weights, for a task.
            state: the weights.
            clean: what the defence may learn from.
            seed: of the order of the batches.
        """


@dataclass(frozen=True)
class Masking(Defence):
    """Adversarial weight masking (Chai and Chen, NeurIPS 2022): weights that a worst perturbation needs are faded out.

    In each round a perturbation is sought that changes the most predictions, then a mask on the weights under which
    clean rows are right, with and without it. Weights are masked one by one, in matrices only, as the release masks
    those of convolutions only. Defaults are the release's, https://github.com/jinghuichen/AWM.
    """

    rounds: int = 20
    """How often both are sought."""
    steps: int = 15
    """Of each of the two in a round; the release makes 5 passes over 500 rows."""
    batch: int = 128
    """Rows of each task in a step."""
    natural: float = 0.9
    """alpha: weight of the loss without the perturbation; the loss with it has the rest."""
    sparsity: float = 1e-8
    """gamma: weight of the mask's sum."""
    norm: float = 83.0
    """tau: what a perturbation's magnitudes sum up to at most. The release has 1000, for 12 times as many numbers."""
    adv_rate: float = 10.0
    """Learning rate of gradient ascent for a perturbation, which starts at 0 in each round."""
    rate: float = 1e-2
    """Learning rate of Adam for the mask, which starts at 1 and is clipped to 0 and 1."""
    decay: float = 0.9
    """What the mask's rate is multiplied by after a round."""

    @torch.enable_grad()
    def defend(self, predict: Predict, state: State, clean: Clean, seed: int) -> dict[str, Tensor]:
        masks = self.masks(predict, state, clean, seed)
        return {name: its.detach().clone() for name, its in masked(state, masks).items()}

    def masks(self, predict: Predict, state: State, clean: Clean, seed: int) -> dict[str, Tensor]:
        """A mask for each matrix, from 0 to 1."""
        masks = {name: torch.ones_like(its).requires_grad_() for name, its in state.items() if its.ndim > 1}
        optimizer = torch.optim.Adam(masks.values(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        drawn = batches(clean, self.batch, seed, "masking")
        for _ in range(self.rounds):
            now = {name: its.detach() for name, its in masked(state, masks).items()}
            noise = self.attack(predict, now, drawn, clean)
            for _ in range(self.steps):
                descend(optimizer, self.loss(predict, masked(state, masks), next(drawn), noise) + self.size(masks))
                with torch.no_grad():
                    for its in masks.values():
                        its.clamp_(0, 1)
            schedule.step()
        return masks

    def attack(self, predict: Predict, state: State, drawn: Iterator[Clean], clean: Clean) -> dict[str, Tensor]:
        """For each task one perturbation of all rows, that takes most of them from what the model says without it."""
        noise = {task: torch.zeros_like(its["rows"][0]).requires_grad_() for task, its in clean.items()}
        optimizer = torch.optim.SGD(noise.values(), lr=self.adv_rate)
        for _ in range(self.steps):
            descend(optimizer, -harm(predict, state, next(drawn), noise))
        return {task: (its * (self.norm / its.abs().sum()).clamp(max=1)).detach() for task, its in noise.items()}

    def loss(self, predict: Predict, state: State, batch: Clean, noise: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """alpha CE(z(x), y) + (1 - alpha) CE(z(clip(x + Delta, 0, 1)), y)."""
        losses = []
        for task, its in batch.items():
            pair = (its["rows"], (its["rows"] + noise[task]).clamp(0, 1))
            plain, moved = (F.cross_entropy(predict(state, task, rows), its["classes"]) for rows in pair)
            losses.append(self.natural * plain + (1 - self.natural) * moved)
        return torch.stack(losses).mean()

    def size(self, masks: State) -> Float[Tensor, ""]:
        """gamma |m|."""
        return self.sparsity * torch.stack([its.abs().sum() for its in masks.values()]).sum()


def masked(state: State, masks: State) -> dict[str, Tensor]:
    """The weights, times their masks where they have one."""
    return {name: its * masks[name] if name in masks else its for name, its in state.items()}


def harm(predict: Predict, state: State, batch: Clean, noise: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The sum over tasks of CE(z(x + Delta), argmax z(x))."""
    total = torch.zeros(())
    for task, its in batch.items():
        with torch.no_grad():
            says = predict(state, task, its["rows"]).argmax(1)
        total = total + F.cross_entropy(predict(state, task, its["rows"] + noise[task]), says)
    return total


@dataclass(frozen=True)
class Unlearning(Defence):
    """Shared adversarial unlearning (Wei et al., NeurIPS 2023): examples that fool the model before and after alike.

    For each row a perturbation is sought that fools the model that learns and the model as it was to one same class;
    the former then learns to be right on clean rows, and not to say what the latter says of perturbed ones. Defaults
    are the release's, ``defense/sau.py`` in https://github.com/SCLBD/BackdoorBench, but for steps, rate and batch.
    """

    steps: int = 100
    """Batches to learn from. The release makes 100 passes over its rows, about 1,000 steps."""
    batch: int = 64
    """Rows of each task in a step; the release has 256."""
    rate: float = 1e-3
    """Learning rate of Adam, which falls to 0 as a cosine. The release has 0.0001, for ten times as many steps."""
    unlearn: float = 1.0
    """lambda of what is unlearned, beside the loss on clean rows; at 0 this is fine-tuning."""
    bound: float = 0.2
    """What each number of a row is changed by at most."""
    adv_steps: int = 5
    """Steps of the search for a perturbation, which starts at the bound."""
    adv_size: float = 0.2
    """By how much each number changes in a step of the search."""
    adv_weight: float = 0.01
    """beta_1: weight in the search of the loss on the true class."""
    shared_weight: float = 1.0
    """beta_2: weight in the search of the divergence of both models."""

    @torch.enable_grad()
    def defend(self, predict: Predict, state: State, clean: Clean, seed: int) -> dict[str, Tensor]:
        now = {name: its.detach().clone().requires_grad_() for name, its in state.items()}
        optimizer = torch.optim.Adam(now.values(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps, 1))
        drawn = batches(clean, self.batch, seed, "unlearning")
        for _ in range(self.steps):
            losses = []
            for task, its in next(drawn).items():
                says, said = (lambda rows, w=w, t=task: predict(w, t, rows) for w in (now, state))
                losses.append(self.loss(says, said, its["rows"], its["classes"]))
            descend(optimizer, torch.stack(losses).mean())
            schedule.step()
        return {name: its.detach() for name, its in now.items()}

    def loss(
        self, says: Say, said: Say, rows: Float[Tensor, "rows ..."], classes: Int64[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        """CE(z(x), y) - lambda mean of log(1 - p(x + epsilon)[what the model as it was is fooled to])."""
        loss = F.cross_entropy(says(rows), classes)
        if self.unlearn == 0:
            return loss
        moved = rows + self.attack(says, said, rows, classes)
        with torch.no_grad():
            wrong = said(moved).argmax(1)
            fooled = (wrong != classes) & (wrong != said(rows).argmax(1))
        p = says(moved).softmax(1).gather(1, wrong[:, None])[fooled]
        return loss - self.unlearn * (1 + 1e-6 - p).log().sum() / len(rows)

    def attack(
        self, says: Say, said: Say, rows: Float[Tensor, "rows ..."], classes: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows ..."]:
        """A perturbation for each row, that fools both models alike; what does so already is searched no further."""
        with torch.no_grad():
            clean = [model(rows).argmax(1) for model in (says, said)]
        noise = torch.full_like(rows, self.bound)
        for _ in range(self.adv_steps):
            noise.requires_grad_()
            logits = [model(rows + noise) for model in (says, said)]
            found = [its.argmax(1) for its in logits]
            fooled = [its != before for its, before in zip(found, clean, strict=True)]
            shared = fooled[0] & fooled[1] & (found[0] == found[1])
            missed = F.cross_entropy(torch.cat(logits), classes.repeat(2), reduction="none")
            apart = divergence(*logits)
            loss = self.shared_weight * apart[~shared].sum() - self.adv_weight * missed[~torch.cat(fooled)].sum() / 2
            (slope,) = torch.autograd.grad(loss / len(rows), noise)
            noise = (noise.detach() - self.adv_size * slope.sign()).clamp(-self.bound, self.bound)
            if shared.all():
                break
        return noise


def divergence(one: Float[Tensor, "rows classes"], other: Float[Tensor, "rows classes"]) -> Float[Tensor, " rows"]:
    """Jensen and Shannon's, of the predictions of two models, in nats."""
    p, q = (its.softmax(1).clamp(min=1e-8) for its in (one, other))
    middle = ((p + q) / 2).log()
    return (p * (p.log() - middle) + q * (q.log() - middle)).sum(1) / 2
