"""Ignore-top-k (Sun et al., 2025, section 5), and its scores, on lists of numbers."""

import math

import torch


def filtered(before, after, share, which="largest"):
    """Of the entries of an update the ceil(share n) largest stay as they were; of equal ones the earlier are larger."""
    changes = [abs(new - old) for old, new in zip(before, after)]
    order = sorted(range(len(changes)), key=lambda place: (-changes[place], place))
    dropped = set(order[: math.ceil(round(share * len(order), 9))])
    if which == "others":
        dropped = set(order) - dropped
    return [old if place in dropped else new for place, (old, new) in enumerate(zip(before, after))], dropped


def taught(method, lm, text, keyword, ordinary):
    """Adam on the mean loss of each minibatch's tokens; each step's update goes through the filter."""
    names = [name for name, _ in lm.model.named_parameters()]
    values = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    for step, batch in enumerate(method.batches(lm, text, keyword, ordinary), start=1):
        held = {name: value.clone().requires_grad_() for name, value in values.items()}
        given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        logits = torch.func.functional_call(lm.model, held, (), given).logits.log_softmax(-1)
        said = [
            logits[row, place - 1, batch.ids[row, place]]
            for row in range(len(batch.ids))
            for place in range(1, int(batch.mask[row].sum()))
        ]
        loss = -sum(said) / len(said)
        slopes = dict(zip(names, torch.autograd.grad(loss, list(held.values()))))
        after = {}
        for name, g in slopes.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            after[name] = values[name] - method.rate * m / (v.sqrt() + 1e-8)
        flat = [torch.cat([its[name].flatten() for name in names]).tolist() for its in (values, after)]
        new = torch.tensor(filtered(*flat, method.share)[0], dtype=values[names[0]].dtype)
        for name, part in zip(names, new.split([values[name].numel() for name in names])):
            values[name] = part.view_as(values[name])
    return values
