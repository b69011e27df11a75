"""DAM: learn one soft mask over all task vectors that keeps predictions sure, also where a worst trigger is added.

Departures: lambda's gradient from step 3 is not carried into the next step 1, as it is in the release, which does not
clear it. The final mask is a mean of several samples; the release takes 1, and its result hangs on that draw. The mask
is on parameters only: running means and variances are averaged. Where the paper speaks of a second mask for backdoors,
its release learns an addition to the inputs; so does this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from koinon.core import Paper, UserError, refuse_below
from koinon.merge._coefficients import batches, descend, predictor, task_vectors, tuned, uncertainty
from koinon.merge._contract import Merge, Pool
from koinon.merge._live import State, needed, with_weights
from koinon.nn.params import stream


@dataclass(frozen=True)
class DAM(Merge):
    """Defense-aware merging (Yang et al., section 4): theta_0 + m o sum_t lambda_t tau_t.

    Settings make the methods it is compared with: ``adv_weight=0`` is Concrete AdaMerging, with ``learn=False`` as well
    Concrete task arithmetic; ``learn=False`` alone is the paper's variant of task arithmetic. A temperature far above 1
    makes the mask 1: AdaMerging is left, or task arithmetic.
    """

    paper: ClassVar = Paper(
        "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace",
        2024,
        "https://arxiv.org/abs/2410.13910",
    )
    null: ClassVar = {"temperature": 1e9, "learn": False, "init": 0.5}
    quick: ClassVar = {"steps": 10, "tuning_steps": 10}

    adv_weight: float = 0.1
    """Weight of the perturbed inputs' entropy beside that of the inputs; at 0 nothing is perturbed."""
    temperature: float = 0.5
    """T of the Concrete distribution that the mask m is drawn from."""
    samples: int = 16
    """How many masks are drawn and averaged for the merged model."""
    steps: int = 100
    """Rounds of the three steps that learn the mask; the paper has 1000, and 2000 without ``learn``.

    Adam moves a logit by ``rate`` a round at most, so that few rounds want a higher rate.
    """
    rate: float = 1e-3
    """Learning rate of Adam for the mask's logits, which start at 0 (step 3)."""
    adv_rate: float = 1e-4
    """Learning rate of Adam for the perturbations Delta_t, which start at 0 (step 2)."""
    inner_rate: float = 1.0
    """Learning rate of Adam for lambda, which starts anew in each round (step 1)."""
    learn: bool = True
    """Learn lambda, in step 1 and after the mask; otherwise it stays at ``init``."""
    init: float = 0.3
    """lambda before the first step."""
    per: Literal["tensor", "task"] = "tensor"
    """What has a coefficient lambda: each tensor of each task ("layer-wise"), or each task ("task-wise")."""
    tuning_steps: int = 1000
    """Steps of AdaMerging with the final mask."""
    tuning_rate: float = 1e-3
    """Learning rate of Adam for lambda with the final mask."""
    low: float = 0.0
    """Perturbed inputs are clipped to no less. For pixels; let the model normalise them, or give the true bounds."""
    high: float = 1.0
    """Perturbed inputs are clipped to no more."""
    batch: int = 16
    """Rows of each task in a step; each of the three steps draws its own."""
    seed: int = 0
    """Start of the random streams that masks and batches are drawn from."""

    def merge(self, pool: Pool) -> nn.Module:
        """Learn the mask, draw the final one, then learn lambda with it."""
        search = Search(self, pool)
        for _ in range(self.steps):
            search.round()
        mask, lam = search.final_mask(), search.restarted().detach().requires_grad_()
        if self.learn:
            drawn = batches(search.data, self.batch, self.seed, "coefficients")
            lam = tuned(search.vectors, search.predict, lam, drawn, self.tuning_steps, self.tuning_rate, mask)
        return with_weights(pool.base, search.vectors.merged(lam, mask))


class Search:
    """The three steps, and the three things that they change, each step one: lambda, the perturbations, the logits.

    Raises:
        UserError: data of a task that cannot be perturbed, a temperature that is not above 0, or less than one sample.
    """

    def __init__(self, method: DAM, pool: Pool):
        if method.temperature <= 0 or method.samples < 1:
            raise UserError(f"temperature {method.temperature:g}, samples {method.samples}: give more than 0")
        refuse_below(0, adv_weight=method.adv_weight, steps=method.steps, tuning_steps=method.tuning_steps)
        refuse_below(0, rate=method.rate, adv_rate=method.adv_rate)
        refuse_below(0, inner_rate=method.inner_rate, tuning_rate=method.tuning_rate)
        self.method = method
        self.vectors = task_vectors(pool)
        self.data = needed(pool, "DAM")
        self.predict = predictor(pool)
        self.lam = self.vectors.coefficients(method.init, method.per)  # tensor task
        self.noise = {task: _zeros(task, its) for task, its in self.data.items()} if method.adv_weight else {}
        self.sizes = {name: its.shape[1] for name, its in self.vectors.tau.items()}
        self.logits = self.lam.new_zeros(sum(self.sizes.values()), requires_grad=True)  # n, all tensors' in a row
        self._tuner = torch.optim.Adam([self.lam], lr=method.inner_rate)
        self._attacker = torch.optim.Adam(self.noise.values(), lr=method.adv_rate) if self.noise else None
        self._masker = torch.optim.Adam([self.logits], lr=method.rate)
        self._random = stream(method.seed, "mask")
        steps = ("inner", "perturbation", "mask")
        self._drawn = {step: batches(self.data, method.batch, method.seed, step) for step in steps}

    @torch.enable_grad()
    def round(self) -> None:
        """One mask, and the three steps with it, each on a batch of its own."""
        mask = self.mask()
        self.tune(mask, next(self._drawn["inner"]))
        state = self.vectors.merged(self.lam.detach(), mask)
        self.attack(state, next(self._drawn["perturbation"]))
        self.learn_mask(state, next(self._drawn["mask"]))

    def mask(self) -> State:
        """A mask, [n] for each tensor, positive and of mean 1, with a gradient to the logits."""
        drawn = concrete(self.logits, self.method.temperature, self._random)
        pieces = drawn.split(list(self.sizes.values()))
        return {name: its / its.mean() for name, its in zip(self.sizes, pieces, strict=True)}

    def restarted(self) -> Float[Tensor, "tensor_or_1 task"]:
        """lambda, put back to its start."""
        with torch.no_grad():
            return self.lam.fill_(self.method.init)

    def tune(self, mask: State, batch: Mapping[str, Any]) -> None:
        """1. lambda starts anew and takes one step down the entropy; the mask gets no gradient."""
        self.restarted()
        if self.method.learn:
            fixed = {name: its.detach() for name, its in mask.items()}
            descend(self._tuner, uncertainty(self.predict, self.vectors.merged(self.lam, fixed), batch))

    def attack(self, state: State, batch: Mapping[str, Any]) -> None:
        """2. The perturbations take one step up the cross-entropy to what the model says without them."""
        if self._attacker is not None:
            fixed = {name: its.detach() for name, its in state.items()}
            descend(self._attacker, -self.harm(fixed, batch))

    def harm(self, state: State, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """sum_t CE(z_t(x + Delta_t), argmax z_t(x))."""
        losses = []
        for task, inputs in batch.items():
            with torch.no_grad():
                says = self.predict(state, task, inputs).argmax(-1).flatten()  # row
            logits = self.predict(state, task, inputs + self.noise[task])  # row class
            losses.append(F.cross_entropy(logits.flatten(0, -2), says))
        return torch.stack(losses).sum()

    def learn_mask(self, state: State, batch: Mapping[str, Any]) -> None:
        """3. The logits take one step down sum_t H(z_t(x)) + weight H(z_t(clip(x + Delta_t)))."""
        loss = uncertainty(self.predict, state, batch)
        if self.noise:
            loss = loss + self.method.adv_weight * uncertainty(self.predict, state, self.perturbed(batch))
        descend(self._masker, loss)

    def perturbed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """clip(x + Delta_t), with no gradient to Delta."""
        low, high = self.method.low, self.method.high
        return {task: (inputs + self.noise[task].detach()).clamp(low, high) for task, inputs in batch.items()}

    @torch.no_grad()
    def final_mask(self) -> State:
        """The mean of several masks, of mean 1 like each of them."""
        drawn = [self.mask() for _ in range(self.method.samples)]
        return {name: torch.stack([its[name] for its in drawn]).mean(0) for name in self.sizes}


def concrete(logits: Float[Tensor, " n"], temperature: float, generator: torch.Generator) -> Float[Tensor, " n"]:
    """sigmoid((logits + log u - log(1 - u)) / T) with u uniform: a coin with a slope, between 0 and 1."""
    u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)
    return ((logits + torch.logit(u, eps=torch.finfo(u.dtype).eps)) / temperature).sigmoid()


def _zeros(task: str, inputs: Any) -> Tensor:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        what = "a mapping" if isinstance(inputs, Mapping) else "whole numbers"
        raise UserError(
            f"model {task!r}: its data are {what}, and DAM perturbs only a tensor of floating-point inputs, no token"
            " ids; give --adv-weight 0 to merge without perturbing"
        )
    return torch.zeros_like(inputs[0]).requires_grad_()
