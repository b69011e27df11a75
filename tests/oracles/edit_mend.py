"""MEND (Mitchell et al., 2022, section 3), one token and one matrix at a time; nothing of koinon is called."""

import torch


def gradient(model, name, ids, prompt):
    """The whole gradient of a matrix, by autograd on the matrix itself: the mean over the answer's tokens."""
    weight = model.get_parameter(name)
    weight.requires_grad_()
    says = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    loss = -sum(says[at - 1, ids[at]] for at in range(prompt, len(ids))) / (len(ids) - prompt)
    (found,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    return found


def transformed(u, delta, net, matrix):
    """Equations 3a and 3b: z = norm([u; delta]); h = z + relu(s1 (U1 V1 z + b) + o1); g = h + relu(s2 U2 V2 h + o2)."""
    z = (torch.cat([u, delta]) - net["mean"]) / (net["deviation"] + 1e-7)
    h = z + torch.relu(
        net["scale"][0, matrix] * (net["wide.0"] @ (net["narrow.0"] @ z) + net["bias"]) + net["shift"][0, matrix]
    )
    g = h + torch.relu(net["scale"][1, matrix] * (net["wide.1"] @ (net["narrow.1"] @ h)) + net["shift"][1, matrix])
    return g[: len(u)], g[len(u) :]


def edited(weight, us, deltas, net, matrix, alpha):
    """W - alpha sum_i delta~_i u~_i^T."""
    total = torch.zeros_like(weight)
    for u, delta in zip(us, deltas, strict=True):
        new_u, new_delta = transformed(u, delta, net, matrix)
        total += torch.outer(new_delta, new_u)
    return weight - alpha * total


def divergence(before, after):
    """KL(before || after), the mean over tokens, of logits [token, word]."""
    found = 0.0
    for one, other in zip(before, after, strict=True):
        p, q = torch.softmax(one, -1), torch.softmax(other, -1)
        found += float((p * (p / q).log()).sum())
    return found / len(before)
