"""GRACE (Hartvigsen et al. 2023, algorithm 1), one key at a time; nothing of koinon is called."""

import math

import torch


def book(keys, labels, epsilon):
    """For each key that is kept: (number of the step it came from, number of the step whose value it has, radius)."""
    found = []
    for new, (key, label) in enumerate(zip(keys, labels, strict=True)):
        distances = [math.dist(keys[old], key) for old, _, _ in found]
        nearest = min(range(len(found)), key=distances.__getitem__, default=None)
        if nearest is None or distances[nearest] > epsilon + found[nearest][2]:
            found.append((new, new, epsilon))
            continue
        old, value, radius = found[nearest]
        if labels[value] == label:
            found[nearest] = (old, new, max(radius, distances[nearest]))
        else:
            half = distances[nearest] / 2
            found[nearest] = (old, value, min(radius, half - 1e-5))
            found.append((new, new, min(epsilon, half)))
    return found


def value(model, site, ids, prompt, start, steps, rate):
    """Adam (beta 0.9 and 0.999, epsilon 1e-8) on what ``site`` gives at the prompt's last token.

    Args:
        model: a Hugging Face model.
        site: a module of it.
        ids: of the prompt and its answer.
        prompt: how many of the ids are the prompt.
        start: the first value.
        steps: of Adam.
        rate: of Adam.
    """
    v, m, s = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        v = v.detach().requires_grad_()

        def replaced(module, given, out, v=v):
            out = out.clone()
            out[0, prompt - 1] = v
            return out

        handle = site.register_forward_hook(replaced)
        says = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        handle.remove()
        loss = -sum(says[place - 1, ids[place]] for place in range(prompt, len(ids))) / (len(ids) - prompt)
        (g,) = torch.autograd.grad(loss, v)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        v = v.detach() - rate * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
    return v
