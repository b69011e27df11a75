"""PLE (Tang et al. 2020, equations 1-8): per level, each task mixes the shared experts and its own by a softmax gate.

The shared gate mixes all experts of the level. Shared experts and gate read the shared state of the level below, a
task's experts and gate read that task's state.
"""

from oracles.plain import flat, mixed, mlp, parameters, tower


def outputs(method, model, inputs):
    """What the network must give for a batch in training, task by task."""
    p, last = parameters(model), "swish" if method.swish else "relu"
    common = model.encoder(inputs)
    state = [common for _ in model.tasks]
    for level in range(method.levels):
        at = f"trunk.{level}"
        shared = [mlp(p, f"{at}.shared", i, common, last) for i in range(method.shared)]
        specific = [
            [mlp(p, f"{at}.specific", t * method.specific + i, state[t], last) for i in range(method.specific)]
            for t in range(len(model.tasks))
        ]
        above = [mixed(p, f"{at}.task_gates", t, state[t], shared + specific[t]) for t in range(len(model.tasks))]
        if level < method.levels - 1:
            common = mixed(p, f"{at}.shared_gate", 0, common, shared + flat(specific))
        state = above
    return {task.name: tower(p, t, state[t]) for t, task in enumerate(model.tasks)}
