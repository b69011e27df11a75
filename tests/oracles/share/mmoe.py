"""MMoE (Ma et al. 2018, equations 5-7): y_k = h_k(sum_i g_k(x)_i f_i(x)), g_k(x) = softmax(W_k x)."""

from oracles.plain import mixed, mlp, parameters, tower


def outputs(method, model, inputs):
    """What the network must give for a batch in training, task by task."""
    p = parameters(model)
    x = model.encoder(inputs)
    experts = [mlp(p, "trunk.experts", i, x, "swish" if method.swish else "relu") for i in range(method.experts)]
    return {task.name: tower(p, t, mixed(p, "trunk.gates", t, x, experts)) for t, task in enumerate(model.tasks)}
