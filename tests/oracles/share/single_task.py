"""Single task: y_k = h_k(f_k(x)), with an encoder, an f_k and a tower for each task."""

from oracles.plain import mlp, parameters, tower
from torch.func import functional_call


def outputs(method, model, inputs):
    """What the network must give for a batch in training, task by task."""
    p = parameters(model)
    answers = {}
    for t, task in enumerate(model.tasks):
        encoder, at = model.encoder.encoders[t], f"encoder.encoders.{t}"
        own = functional_call(encoder, {name: p[f"{at}.{name}"] for name in encoder.state_dict()}, inputs)
        answers[task.name] = tower(p, t, mlp(p, "trunk", t, own, "swish" if method.swish else "relu"))
    return answers
