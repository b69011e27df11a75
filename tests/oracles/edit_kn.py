"""Knowledge neurons (Dai et al., 2022), one point of the integral and one layer at a time."""

import torch


def with_neurons(model, way, ids, neurons):
    """The next token's probabilities if an FFN's neurons are these at the last token; and what they are otherwise."""
    seen = {}

    def before(_, given):
        flat = given[0].reshape(-1, given[0].shape[-1])
        seen["neurons"] = flat[-1].detach().clone()
        if neurons is None:
            return None
        return (torch.cat([flat[:-1], neurons[None]]).reshape(given[0].shape),)

    handle = way.register_forward_pre_hook(before)
    try:
        probabilities = model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)
    finally:
        handle.remove()
    return probabilities, seen["neurons"]


def attributed(model, way, ids, token, steps):
    """a / m sum_k dP(token | k / m a) / da."""
    _, neurons = with_neurons(model, way, ids, None)
    total = torch.zeros_like(neurons)
    for step in range(1, steps + 1):
        point = (step / steps * neurons).requires_grad_()
        probabilities, _ = with_neurons(model, way, ids, point)
        total += torch.autograd.grad(probabilities[token], point)[0]
    return neurons * total / steps
