"""SERAC (Mitchell et al., 2022, section 3): a prompt's place, the routing rule, and the classifier's loss."""

import math

import torch


def place(vectors, query, value):
    """Where a prompt is: for each head the softmax-weighted mean of its tokens' vectors, times the head's matrix."""
    found = []
    for q, w in zip(query, value, strict=True):
        powers = [math.exp(float(q @ v)) for v in vectors]
        mean = sum(power / sum(powers) * v for power, v in zip(powers, vectors))
        found.append(w @ mean)
    return torch.cat(found)


def route(prompt, edits, places, threshold):
    """beta = max_i exp(-||e(x) - e(z_i)||^2); the number of the edit that answers, or None for the base."""
    alike = [math.exp(-float(((places(prompt) - places(edit)) ** 2).sum())) for edit in edits]
    best = max(range(len(edits)), key=alike.__getitem__)
    return best if alike[best] > threshold else None


def loss(same, different):
    """Balanced cross-entropy of p = exp(-d): half the mean of -log p, and half the mean of -log(1 - p)."""
    one = sum(-math.log(math.exp(-d)) for d in same) / len(same)
    other = sum(-math.log(1 - math.exp(-d)) for d in different) / len(different)
    return (one + other) / 2
