"""Tensors that are mostly zeros as what is not zero: of a matrix a masked edit changes a share of the entries."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By a number's bytes, what has as many: that of zero are no bits, those of minus zero are one."""

LEAST = 256
"""Entries below which a second name costs more than zeros do."""


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """What to write, and the shapes of those that were packed: where they would take at most half of their bytes.

    A packed tensor is one bit an entry (``NAME:places``, [entries / 8]) and the entries that are not zero
    (``NAME:values``), in order.
    """
    written: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, its in tensors.items():
        size, flat = its.element_size(), its.reshape(-1)
        if its.is_floating_point() and size in WORDS:
            there = flat.view(WORDS[size]) != 0
            if len(flat) >= LEAST and len(flat) / 8 + int(there.sum()) * size <= len(flat) * size / 2:
                written[f"{name}:places"] = torch.from_numpy(np.packbits(there.numpy()))
                written[f"{name}:values"] = flat[there]
                shapes[name] = list(its.shape)
                continue
        written[name] = its
    return written, shapes


def unpacked(written: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The tensors that `packed` was given, to the bit.

    Raises:
        AssertionError, KeyError, TypeError: bits, values and shape do not belong together; nothing large is made then.
    """
    tensors = dict(written)
    for name, shape in shapes.items():
        places, values = (tensors.pop(f"{name}:{part}") for part in ("places", "values"))
        count = prod(shape)
        assert min(shape, default=1) >= 0, f"{name}: a negative size"
        assert places.dtype == torch.uint8, f"{name}: places that are no bits"
        assert len(places) == -(-count // 8), f"{name}: bits of {len(places)} bytes for {count} entries"
        there = torch.from_numpy(np.unpackbits(places.numpy(), count=count)).bool()
        assert values.shape == (int(there.sum()),), f"{name}: {values.numel()} values for {int(there.sum())} places"
        assert name not in tensors, f"{name}: twice"
        tensors[name] = values.new_zeros(count).masked_scatter(there, values).view(shape)
    return tensors
