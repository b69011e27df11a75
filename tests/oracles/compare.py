"""Networks to compare with their equations, and the comparison."""

import importlib

import torch
from torch import nn

from koinon.nn.params import stream
from koinon.nn.tasks import Task

TASKS = (
    Task("like", group="positive"),
    Task("hate", group="negative"),
    Task("love", group="positive"),
    Task("stars", kind="regression", group="negative"),
    Task("share", group="passive"),
)
TWO_GROUPS = TASKS[:4]
WIDTH, ROWS = 6, 23
ROW_FACTORS = torch.arange(1, ROWS + 1) / ROWS
TINY = {"expert": (5,), "tower": (4,)}


def encoder() -> nn.Module:
    """A small network, equal each time."""
    made = nn.Sequential(nn.utils.skip_init(nn.Linear, 7, WIDTH), nn.Tanh())
    numbers = stream(0, "encoder")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    return made


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, 7, generator=stream(seed, "inputs"), dtype=torch.float64)


def built(method, tasks=TASKS, seed: int = 0, randomised: bool = True):
    """The method's network in double precision; every parameter is drawn anew, those that start at 0 or 1 as well."""
    model = method.share(encoder(), tasks, WIDTH, seed).double()
    if randomised:
        numbers = stream(seed, "oracle")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.7 + 0.1)
    return model


def assert_equals_equations(method, oracle: str) -> None:
    """Outputs of a training batch, and the gradient of every parameter, are those of the equations written out.

    Gradients count because a detached path leaves the outputs as they are.

    Args:
        method: with its settings.
        oracle: name of the file of equations, ``capability.method``.
    """
    outputs = importlib.import_module(f"oracles.{oracle}").outputs
    for seed, tasks in enumerate((TASKS, TWO_GROUPS, TASKS[::-1], TASKS[:1])):
        model = built(method, tasks, seed)
        found, written = (way(inputs(seed)) for way in (model, lambda x, m=model: outputs(method, m, x)))
        assert list(found) == list(written) == [task.name for task in tasks]
        parameters = dict(model.named_parameters())
        slopes = []
        for answers in (found, written):
            # Another factor for each row and task, so that no two gradients cancel.
            mass = sum((k * ROW_FACTORS * output).sum() for k, output in enumerate(answers.values(), start=1))
            slopes.append(torch.autograd.grad(mass, list(parameters.values()), materialize_grads=True))
        for name in written:
            assert found[name].std() > 0, f"{name} is constant, which would compare nothing"
            torch.testing.assert_close(found[name], written[name], rtol=1e-5, atol=1e-5, msg=f"output {name}")
        for name, one, other in zip(parameters, *slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"gradient of {name}")
