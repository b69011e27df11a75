"""WISE (Wang et al. 2024): equations 2 to 6 and the merging of shards, one token and one entry at a time.

Nothing of koinon is called.
"""

import torch


def excitement(activations, delta, over="mean", balanced=False):
    """Delta_act of one prompt: ||A(x) (W_v' - W_v)|| of each of its tokens (equation 2); balanced, by ||A(x)||."""
    norms = [sum(float(delta[i] @ a) ** 2 for i in range(len(delta))) ** 0.5 for a in activations]
    if balanced:
        norms = [norm / sum(float(x) ** 2 for x in a) ** 0.5 for norm, a in zip(norms, activations, strict=True)]
    if over == "last":
        return norms[-1]
    return max(norms) if over == "max" else sum(norms) / len(norms)


def routing_loss(inside, outside, alpha, beta, gamma):
    """L_a by the excitement of the edit's prompts and of irrelevant ones (equation 6)."""
    total = sum(max(0.0, out - alpha) for out in outside) / len(outside)
    total += sum(max(0.0, beta - its) for its in inside) / len(inside)
    pairs = [max(0.0, gamma - (its - out)) for its in inside for out in outside]
    return total + sum(pairs) / len(pairs)


def ties(vectors, weights, density):
    """Trim to the largest, elect a sign, average what has it; for each entry."""
    count = int(density * vectors[0].numel())
    trimmed = []
    for vector in vectors:
        kept = sorted(range(vector.numel()), key=lambda place: -abs(float(vector.flatten()[place])))[:count]
        trimmed.append([float(x) if place in kept else 0.0 for place, x in enumerate(vector.flatten())])
    found = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(w * x for w, x in zip(weights, entries, strict=True)) >= 0 else -1
        agree = [(w, x) for w, x in zip(weights, entries, strict=True) if x * sign > 0]
        found.append(sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return torch.tensor(found).view_as(vectors[0])


def edited(model, weight, texts, outside, site, mask, rate, decay, bound, steps, margins, unit):
    """W_v' after gradient descent on the edit loss and L_a, by whole passes with the matrix itself in the model.

    Args:
        model: a Hugging Face model.
        weight: its parameter W_v, [out, into]; what it holds is put back.
        texts: (ids, length of the prompt), of the fact behind each beginning.
        outside: ids of irrelevant prompts.
        site: the module that holds the parameter.
        mask: 1 for entries that may move.
        rate: of the descent.
        decay: of W_v'.
        bound: of each entry's way.
        steps: of the descent.
        margins: alpha, beta and gamma.
        unit: what excitement is counted in.
    """
    start = weight.detach().clone()
    alpha, beta, gamma = margins
    seen = []
    handle = site.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].detach()))
    for _ in range(steps):
        seen.clear()
        weight.requires_grad_()
        loss = 0.0
        for ids, prompt in texts:
            says = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            loss = loss - sum(says[at - 1, ids[at]] for at in range(prompt, len(ids))) / (len(ids) - prompt) / len(
                texts
            )
        for ids in outside:
            model(input_ids=ids[None])
        acts = [(a @ (weight - start).T).norm(dim=1) / unit for a in seen]
        inside = [a[:prompt].mean() for a, (_, prompt) in zip(acts, texts)]
        out = [a.mean() for a in acts[len(texts) :]]
        loss = loss + sum(torch.relu(beta - i) for i in inside) / len(inside)
        loss = loss + sum(torch.relu(o - alpha) for o in out) / len(out)
        loss = loss + sum(torch.relu(gamma - (i - o)) for i in inside for o in out) / len(inside) / len(out)
        (slope,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= rate * mask * (slope + decay * weight)
            weight.copy_(torch.minimum(torch.maximum(weight, start - bound), start + bound))
    handle.remove()
    found = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(start)
    weight.requires_grad_(False)
    return found
