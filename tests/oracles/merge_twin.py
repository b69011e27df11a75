"""Twin-Merging (Lu et al. 2024, section 3.3 and algorithm 1), one tensor and one row at a time.

Nothing of koinon is called: states are dictionaries of tensors, and low rank comes from eigenvectors.
"""

import torch

EPSILON = 1e-5
"""What batch normalisation adds to a variance."""


def shared(base, experts, scale):
    """theta* = theta_0 + lambda sum_t (theta_t - theta_0)."""
    return {name: value + scale * sum(expert[name] - value for expert in experts) for name, value in base.items()}


def low_rank(tensor, share):
    """The projection of the rows onto the eigenvectors of A^T A with the largest eigenvalues; a vector is kept whole.

    A tensor is taken as the matrix [first dimension, all others]; if it has more than two, ones in front do not count.
    """
    sizes = list(tensor.shape)
    while len(tensor.shape) > 2 and sizes[0] == 1:
        sizes = sizes[1:]
    if len(sizes) < 2:
        return tensor
    matrix = tensor.reshape(sizes[0], -1).double()
    rank = int(share * min(matrix.shape))
    if rank == 0:
        return torch.zeros_like(tensor)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)  # in rising order
    kept = vectors[:, -rank:]
    return (matrix @ kept @ kept.T).reshape(tensor.shape).to(tensor.dtype)


def twins(star, experts, share):
    """v_t = compress(theta_t - theta*); vectors are kept whole, unless nothing is kept."""
    found = []
    for expert in experts:
        vectors = {name: expert[name] - value for name, value in star.items()}
        if share == 0:
            found.append({name: torch.zeros_like(value) for name, value in vectors.items()})
        else:
            found.append({n: low_rank(v, share) if v.ndim > 1 and share < 1 else v for n, v in vectors.items()})
    return found


def merged(star, vectors, weights):
    """theta(x) = theta* + sum_t w_t v_t."""
    return {
        name: value + sum(float(w) * v[name] for w, v in zip(weights, vectors, strict=True))
        for name, value in star.items()
    }


def leaky(z):
    return torch.where(z > 0, z, 0.01 * z)


def routed(router, x):
    """softmax(R(x)), by the router's tensors, with the running statistics of batch normalisation."""
    p = router.state_dict()
    for layer in range(2):
        z = x @ p[f"hidden.{layer}.weight"].T
        z = (z - p[f"norms.{layer}.running_mean"]) / torch.sqrt(p[f"norms.{layer}.running_var"] + EPSILON)
        x = leaky(p[f"norms.{layer}.weight"] * z + p[f"norms.{layer}.bias"])
    scores = torch.exp(x @ p["last.weight"].T + p["last.bias"])
    return scores / scores.sum(1, keepdim=True)
