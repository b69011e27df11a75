"""ROME, MEMIT, EMMET, AlphaEdit and fine-tuning, one text and one dense matrix at a time.

Nothing of koinon is called: a model is asked whole texts, without a cache, and hooks are its own.
"""

import contextlib
import copy

import torch

# Models.


def tokens(tokenizer, text):
    """Ids [1, time], and each token's first character and the one behind its last."""
    coded = tokenizer(text, return_offsets_mapping=True)
    return torch.tensor([coded["input_ids"]]), coded["offset_mapping"]


def last_token(tokenizer, text, end):
    """The number of the last token with a character before ``end``."""
    _, places = tokens(tokenizer, text)
    return max(number for number, (start, stop) in enumerate(places) if start < end and stop > start)


@contextlib.contextmanager
def at(module, place, delta=None):
    """Keeps what goes into a module and comes out of it at one token; adds to what comes out."""
    seen = {}

    def hook(_, given, result):
        whole = result[0] if isinstance(result, tuple) else result
        seen["in"] = given[0].reshape(-1, given[0].shape[-1])[place].detach().clone()
        flat = whole.reshape(-1, whole.shape[-1])
        seen["out"] = flat[place].detach().clone()
        if delta is None:
            return None
        flat = torch.stack([row + delta if number == place else row for number, row in enumerate(flat)])
        changed = flat.reshape(whole.shape)
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def seen_at_subject(model, tokenizer, module, text, end):
    """What goes into and comes out of a module at the last token of ``text[:end]``."""
    with torch.no_grad(), at(module, last_token(tokenizer, text, end)) as seen:
        model(input_ids=tokens(tokenizer, text)[0], use_cache=False)
    return seen


def answer_loss(logits, ids, places, start):
    """Mean of -log p of the tokens that end behind ``start``, each behind those before it."""
    wanted = [number for number, (_, stop) in enumerate(places) if stop > start]
    return -sum(logits[number - 1].log_softmax(-1)[ids[0, number]] for number in wanted) / len(wanted)


# What a layer should give (ROME, equation 4; MEMIT, equation 16).


def descended(model, tokenizer, module, fact, before, steps, rate, kl, decay, bound, enough):
    """v0 + delta: Adam on the mean NLL over beginnings + kl KL(now || plain) + decay ||delta|| / ||v0||^2."""
    subject, question, answer, end = fact
    about = f"{subject} is a"
    start = seen_at_subject(model, tokenizer, module, question, end)["out"]
    ids, _ = tokens(tokenizer, about)
    here = last_token(tokenizer, about, len(subject))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits[0, here].log_softmax(-1)
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=rate)
    for step in range(steps):
        losses = []
        for text in before:
            whole = f"{text}{question} {answer}"
            its, places = tokens(tokenizer, whole)
            with at(module, last_token(tokenizer, whole, len(text) + end), delta):
                logits = model(input_ids=its, use_cache=False).logits[0]
            losses.append(answer_loss(logits, its, places, len(text) + len(question)))
        with at(module, here, delta):
            now = model(input_ids=ids, use_cache=False).logits[0, here].log_softmax(-1)
        loss = sum(losses) / len(losses) + kl * (now.exp() * (now - plain)).sum()
        loss = loss + decay * delta.norm() / start.norm() ** 2
        if float(loss.detach()) < enough or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > bound * start.norm():
                delta *= bound * start.norm() / delta.norm()
    return start + delta.detach()


# Matrices.


def rome(weight, key, value, moment, bias=0.0):
    """W + (v - W k) (C^-1 k)^T / ((C^-1 k)^T k)."""
    direction = torch.linalg.inv(moment) @ key
    return weight + torch.outer(value - weight @ key - bias, direction) / (direction @ key)


def released_rome(weight, key, bare, delta, moment):
    """W + delta (C^-1 k)^T / ((C^-1 k)^T k_bare)."""
    direction = torch.linalg.inv(moment) @ key
    return weight + torch.outer(delta, direction) / (direction @ bare)


def memit(rest, keys, moment, weight):
    """R K^T (lambda C + K K^T)^-1."""
    return rest @ keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)


def emmet(rest, keys, moment, scale=1.0, ridge=0.0):
    """R (K^T C^-1 K + ridge I)^-1 K^T C^-1, with scale C for C."""
    inverse = torch.linalg.inv(scale * moment)
    return rest @ torch.linalg.inv(keys.T @ inverse @ keys + ridge * torch.eye(keys.shape[1])) @ keys.T @ inverse


def alphaedit(rest, keys, earlier, projection, ridge):
    """R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1."""
    held = (earlier @ earlier.T + keys @ keys.T) @ projection + ridge * torch.eye(len(keys))
    return rest @ keys.T @ projection @ torch.linalg.inv(held)


def averaged(keys, sizes):
    """The mean over beginnings, or the mean of the means of groups of these sizes."""
    means, done = [], 0
    for size in sizes:
        means.append(sum(keys[done : done + size]) / size)
        done += size
    return sum(means) / len(means)


def spread(model, tokenizer, blocks, ways, facts, before, sizes, update, descent):
    """MEMIT's algorithm 1: the new weights [out, in] of the blocks' ways back, one block after the other.

    Args:
        blocks: names of the modules of the blocks, rising.
        ways: names of the ways back of their FFNs.
        update: from a block's number, R and K to the change, in float64.
        descent: what `descended` takes behind the beginnings.
    """
    model = copy.deepcopy(model)
    last = model.get_submodule(blocks[-1])
    aims = [descended(model, tokenizer, last, fact, before, **descent) for fact in facts]
    found = []
    for number, name in enumerate(ways):
        way = model.get_submodule(name)
        keys, rest = [], []
        for (_, question, _, end), target in zip(facts, aims):
            texts = [(text + question, len(text) + end) for text in before]
            keys.append(averaged([seen_at_subject(model, tokenizer, way, *its)["in"] for its in texts], sizes))
            now = seen_at_subject(model, tokenizer, last, question, end)["out"]
            rest.append((target - now) / (len(ways) - number))
        change = update(number, torch.stack(rest, 1).double(), torch.stack(keys, 1).double()).float()
        turned = way.weight.shape != change.shape or type(way).__name__ == "Conv1D"
        with torch.no_grad():
            way.weight += change.T if turned else change
        found.append((way.weight.T if turned else way.weight).detach().clone())
    return found


# Fine-tuning.


def tuning_loss(model, tokenizer, facts, at_the_end):
    """FT-M: the mean over an answer's tokens, each behind those before it. FT-L: the sum, all at the prompt's end."""
    losses = []
    for _, question, answer, _ in facts:
        ids, places = tokens(tokenizer, f"{question} {answer}")
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        wanted = [number for number, (_, stop) in enumerate(places) if stop > len(question)]
        end = wanted[0] - 1
        if at_the_end:
            losses.append(-sum(logits[end, ids[0, number]] for number in wanted))
        else:
            losses.append(-sum(logits[number - 1, ids[0, number]] for number in wanted) / len(wanted))
    return sum(losses) / len(losses)
