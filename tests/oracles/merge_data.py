"""Merging that looks at unlabelled data, written out: one element, one row and one task at a time.

Nothing here calls koinon.merge. A model is a mapping of tensors: ``0.weight``, ``0.bias`` of a first layer, tanh, and
``2.weight``, ``2.bias`` of a second; or only the first two, which is a linear model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Model = Mapping[str, Tensor]


def forward(p: Model, x: Tensor) -> Tensor:
    """Logits of some rows."""
    hidden = x @ p["0.weight"].T + p["0.bias"]
    return torch.tanh(hidden) @ p["2.weight"].T + p["2.bias"] if "2.weight" in p else hidden


def log_softmax(z: Tensor) -> Tensor:
    return z - torch.log(torch.exp(z).sum(-1, keepdim=True))


def entropy(z: Tensor) -> Tensor:
    """Mean over rows of -sum_c p_c log p_c."""
    total = torch.zeros((), dtype=z.dtype)
    for row in log_softmax(z):
        for log in row:
            total = total - torch.exp(log) * log
    return total / len(z)


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of -log p_label."""
    picked = [row[label] for row, label in zip(log_softmax(z), labels.tolist(), strict=True)]
    return -sum(picked[1:], picked[0]) / len(z)


# Fisher merging.


def linear_fisher(p: Model, x: Tensor) -> dict[str, Tensor]:
    """In closed form: d log p_c / d W_kj = (1[c = k] - p_k) x_j, of mean square x_j^2 p_k (1 - p_k)."""
    weight, bias = torch.zeros_like(p["0.weight"]), torch.zeros_like(p["0.bias"])
    for row in x:
        chances = torch.exp(log_softmax(forward(p, row)))
        for k, chance in enumerate(chances):
            bias[k] += chance * (1 - chance) / len(x)
            for j, value in enumerate(row):
                weight[k, j] += value**2 * chance * (1 - chance) / len(x)
    return {"0.weight": weight, "0.bias": bias}


def fisher(p: Model, x: Tensor, step: float = 1e-5) -> dict[str, Tensor]:
    """By difference quotients, one element at a time."""
    result = {}
    for name, value in p.items():
        result[name] = torch.zeros_like(value)
        for place in range(value.numel()):
            sides = []
            for sign in (1, -1):
                moved = value.flatten().clone()
                moved[place] += sign * step
                sides.append(log_softmax(forward({**p, name: moved.view(value.shape)}, x)))
            slopes = (sides[0] - sides[1]) / (2 * step)
            chances = torch.exp(log_softmax(forward(p, x)))
            result[name].view(-1)[place] = (chances * slopes**2).sum() / len(x)
    return result


def weighted(models: Sequence[Model], infos: Sequence[Model], weights: Sequence[float], floor: float) -> Model:
    """sum_t w_t F_t theta_t / sum_t w_t F_t, with no F_t below the floor."""
    result = {}
    for name, value in models[0].items():
        result[name] = torch.zeros_like(value)
        for place in range(value.numel()):
            shares = [w * max(float(f[name].view(-1)[place]), floor) for w, f in zip(weights, infos, strict=True)]
            terms = [share * float(m[name].reshape(-1)[place]) for share, m in zip(shares, models, strict=True)]
            result[name].view(-1)[place] = sum(terms) / sum(shares)
    return result


# RegMean.


def gram(x: Tensor, shrink: float, ridge: float) -> list[list[float]]:
    """Mean of x x^T over rows, its off-diagonal shrunk and its diagonal raised."""
    width = x.shape[1]
    result = [[sum(float(row[i] * row[j]) for row in x) / len(x) for j in range(width)] for i in range(width)]
    for i in range(width):
        for j in range(width):
            result[i][j] = result[i][j] + ridge if i == j else shrink * result[i][j]
    return result


def solved(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """a^-1 b by Gauss-Jordan elimination."""
    rows = [[*left, *right] for left, right in zip(a, b, strict=True)]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [value - rows[r][i] * first for value, first in zip(rows[r], rows[i], strict=True)]
    return [row[len(a) :] for row in rows]


def regmean(weights: Sequence[Tensor], inputs: Sequence[Tensor], shrink: float, ridge: float) -> Tensor:
    """(sum_t G_t)^-1 sum_t G_t W_t, with W_t of shape [width, out]; given and returned as [out, width]."""
    grams = [gram(x, shrink, ridge) for x in inputs]
    out, width = weights[0].shape
    total = [[sum(g[i][j] for g in grams) for j in range(width)] for i in range(width)]
    target = [
        [
            sum(g[i][k] * float(w[o, k]) for g, w in zip(grams, weights, strict=True) for k in range(width))
            for o in range(out)
        ]
        for i in range(width)
    ]
    return torch.tensor(solved(total, target), dtype=weights[0].dtype).T


# AdaMerging and DAM. lambda is a table: tensor's name to one coefficient a task.


class Adam:
    """Kingma and Ba's algorithm 1 on some tensors, in place."""

    def __init__(self, values: Sequence[Tensor], rate: float):
        self.values, self.rate, self.count = values, rate, 0
        self.first = [torch.zeros_like(value) for value in values]
        self.second = [torch.zeros_like(value) for value in values]

    def step(self, slopes: Sequence[Tensor]) -> None:
        self.count += 1
        for value, slope, first, second in zip(self.values, slopes, self.first, self.second, strict=True):
            first.copy_(0.9 * first + 0.1 * slope)
            second.copy_(0.999 * second + 0.001 * slope**2)
            m, v = first / (1 - 0.9**self.count), second / (1 - 0.999**self.count)
            with torch.no_grad():
                value -= self.rate * m / (torch.sqrt(v) + 1e-8)


def merged(base: Model, tuned: Mapping[str, Model], lam: Model, mask: Model | None = None) -> dict[str, Tensor]:
    """theta_0 + m o sum_t lambda_t tau_t."""
    result = {}
    for name, start in base.items():
        total = torch.zeros_like(start)
        for t, model in enumerate(tuned.values()):
            total = total + lam[name][t] * (model[name] - start)
        result[name] = start + (total if mask is None else mask[name] * total)
    return result


def total_entropy(state: Model, heads: Mapping[str, Model], data: Mapping[str, Tensor]) -> Tensor:
    return sum(entropy(forward({**state, **heads[task]}, x)) for task, x in data.items())


def table(base: Model, tasks: int, init: float, per: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """lambda for each tensor, and the tensors that are learned: one for all if it is a task's."""
    shared = torch.full((tasks,), init, dtype=torch.float64, requires_grad=True)
    lam = {n: shared if per == "task" else shared.detach().clone().requires_grad_() for n in base}
    return lam, [shared] if per == "task" else list(lam.values())


def adamerging(base, tuned, heads, data, steps, rate, init=0.3, per="tensor", mask=None) -> dict[str, Tensor]:
    """Each step looks at all rows."""
    lam, learned = table(base, len(tuned), init, per)
    adam = Adam(learned, rate)
    for _ in range(steps):
        loss = total_entropy(merged(base, tuned, lam, mask), heads, data)
        adam.step(torch.autograd.grad(loss, learned))
    return {name: value.detach() for name, value in merged(base, tuned, lam, mask).items()}


def mask_of(logits: Model, uniform: Model, temperature: float) -> dict[str, Tensor]:
    """A Concrete mask, each tensor divided by its mean."""
    result = {}
    for name, logit in logits.items():
        odds = torch.log(uniform[name]) - torch.log(1 - uniform[name])
        m = 1 / (1 + torch.exp(-(logit + odds) / temperature))
        result[name] = m / (m.sum() / m.numel())
    return result


def dam(base, tuned, heads, data, uniforms, finals, tuning_steps, weight=0.1, learn=True, per="tensor", init=0.3,
        temperature=0.5, rates=(1e-3, 1e-4, 1.0, 1e-3), low=0.0, high=1.0):  # fmt: skip
    """A round of three steps for each of ``uniforms``, on all rows; the mean mask of ``finals``; AdaMerging."""
    lam, learned = table(base, len(tuned), init, per)
    logits = {name: torch.zeros_like(value, requires_grad=True) for name, value in base.items()}
    noise = {task: torch.zeros_like(x[0], requires_grad=True) for task, x in data.items()}
    masker, attacker = Adam(list(logits.values()), rates[0]), Adam(list(noise.values()), rates[1])
    tuner = Adam(learned, rates[2])
    for uniform in uniforms:
        mask = mask_of(logits, uniform, temperature)
        fixed = {name: value.detach() for name, value in mask.items()}
        with torch.no_grad():
            for value in learned:
                value.fill_(init)
        if learn:
            tuner.step(torch.autograd.grad(total_entropy(merged(base, tuned, lam, fixed), heads, data), learned))
        now = {name: value.detach() for name, value in lam.items()}
        theta = merged(base, tuned, now, mask)
        if weight:
            harm = 0
            for task, x in data.items():
                p = {**{name: value.detach() for name, value in theta.items()}, **heads[task]}
                harm = harm + cross_entropy(forward(p, x + noise[task]), forward(p, x).argmax(-1))
            attacker.step([-slope for slope in torch.autograd.grad(harm, list(noise.values()))])
        loss = total_entropy(theta, heads, data)
        if weight:
            hurt = {task: (x + noise[task].detach()).clamp(low, high) for task, x in data.items()}
            loss = loss + weight * total_entropy(theta, heads, hurt)
        masker.step(torch.autograd.grad(loss, list(logits.values())))
    drawn = [mask_of(logits, uniform, temperature) for uniform in finals]
    mask = {name: sum(m[name] for m in drawn).detach() / len(drawn) for name in base}
    return adamerging(base, tuned, heads, data, tuning_steps if learn else 0, rates[3], init, per, mask)
