"""LoRA (Hu et al., 2022, equation 3) on one text: W0 x + (alpha / r) B A x, both learnt by Adam."""

import torch


def learnt(model, names, ids, prompt, first, alpha, steps, rate):
    """A and B of each matrix after so many steps.

    Args:
        model: a Hugging Face model.
        names: of modules that are ``nn.Linear``.
        ids: of the prompt and its answer.
        prompt: how many of them are the prompt.
        first: name to A [rank, in] at the start.
        alpha: scale, to be divided by the rank.
        steps: of Adam.
        rate: of Adam.
    """
    a = {name: its.clone() for name, its in first.items()}
    b = {name: torch.zeros(model.get_submodule(name).weight.shape[0], len(its)) for name, its in first.items()}
    moments = {
        (kind, name): [torch.zeros_like(held[name])] * 2 for kind, held in (("a", a), ("b", b)) for name in names
    }
    for step in range(1, steps + 1):
        for held in (a, b):
            for name in names:
                held[name] = held[name].detach().requires_grad_()
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, given, out, name=name: out + alpha / len(a[name]) * (given[0] @ a[name].T @ b[name].T)
            )
            for name in names
        ]
        says = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        (-sum(says[at - 1, ids[at]] for at in range(prompt, len(ids))) / (len(ids) - prompt)).backward()
        for kind, held in (("a", a), ("b", b)):
            for name in names:
                g, (m, v) = held[name].grad, moments[kind, name]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                moments[kind, name] = [m, v]
                move = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                held[name] = held[name].detach() - rate * move
    return a, b
