"""Shared bottom: y_k = h_k(f(x)), with one f for all tasks."""

from oracles.plain import mlp, parameters, tower


def outputs(method, model, inputs):
    """What the network must give for a batch in training, task by task."""
    p = parameters(model)
    common = mlp(p, "trunk.bottom", 0, model.encoder(inputs), "swish" if method.swish else "relu")
    return {task.name: tower(p, t, common) for t, task in enumerate(model.tasks)}
