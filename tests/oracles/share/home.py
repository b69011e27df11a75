"""HoME (Wang et al. 2024, section 3): normalised experts, a hierarchy mask on two levels, feature gates, self gates.

Level 1: z_c mixes E_shared and E_c, z_shared mixes all; each z_c adds its self gate over E_c. Level 2: task t of
category c mixes the shared experts on z_shared, the category's and its own on z_c, gated by [z_c, z_shared]; it adds
its self gate over its own experts. Every expert reads x * FG(x), FG(x) = sum_l w_l(x) 2 sigmoid(x B_l A_l).
"""

import torch
from oracles.plain import flat, mixed, mlp, parameters, sigmoid, tower


def outputs(method, model, inputs):
    """What the network must give for a batch in training, task by task."""
    p, v = parameters(model), model.encoder(inputs)
    kinds = list(dict.fromkeys(task.group for task in model.tasks))
    mine = [kinds.index(task.group) for task in model.tasks]
    z_shared, z, at = v, [v for _ in kinds], "trunk.0"
    if method.meta:
        e_shared = experts(method, p, at, 0, method.meta_feature_gates, [v], method.shared)[0]
        e = experts(method, p, at, 1, method.meta_feature_gates, z, method.per_group, before=1)
        z_shared = mixed(p, f"{at}.shared_gate", 0, v, e_shared + flat(e))
        for c in range(len(kinds)):
            z[c] = mixed(p, f"{at}.group_gates", c, v, e_shared + (e[c] if method.hierarchy else flat(e)))
            z[c] = z[c] + own(method, p, f"{at}.self_gates", c, v, e[c])
        at = "trunk.1"
    e_shared = experts(method, p, at, 0, method.task_feature_gates, [z_shared], method.shared)[0]
    e = experts(method, p, at, 1, method.task_feature_gates, z, method.per_group, before=1)
    z_task = [z[c] for c in mine]
    e_own = experts(method, p, at, 2, method.task_feature_gates, z_task, method.specific, before=1 + len(kinds))
    answers = {}
    for t, task in enumerate(model.tasks):
        x = torch.cat([z_task[t], z_shared], 1) if method.meta else v
        seen = e_shared + (e[mine[t]] if method.hierarchy else flat(e)) + e_own[t]
        y = mixed(p, f"{at}.gates", t, x, seen) + own(method, p, f"{at}.self_gates", t, x, e_own[t])
        answers[task.name] = tower(p, t, y)
    return answers


def experts(method, p, at, bank, feature_gates, reads, each, before=0):
    """The outputs of ``each`` experts for every owner, which reads its own input through its own feature gate."""
    last, found = "swish" if method.swish else "relu", []
    for o, x in enumerate(reads):
        x = feature_gated(p, f"{at}.experts.feature_gates", before + o, feature_gates, x)
        found.append([mlp(p, f"{at}.experts.banks.{bank}", o * each + i, x, last) for i in range(each)])
    return found


def feature_gated(p, at, owner, count, x):
    """x * FG(x); x itself without feature gates."""
    if count == 0:
        return x
    shares = torch.exp(mlp(p, f"{at}.mix", owner, x, "linear"))
    shares = shares / shares.sum(1, keepdim=True)
    total = 0
    for number in range(count):
        low_rank = x @ p[f"{at}.down.weights.0"][owner * count + number].T
        total = total + shares[:, [number]] * 2 * sigmoid(low_rank @ p[f"{at}.up.weights.0"][owner * count + number].T)
    return x * total


def own(method, p, at, reader, x, experts):
    """The self gate's part: a sigmoid for one expert, a softmax for several, nothing without."""
    if not (method.self_gate and experts):
        return 0
    return mixed(p, at, reader, x, experts, "sigmoid" if len(experts) == 1 else "softmax")
