"""Which layer is edited: the one a person names, or the one that causal tracing finds."""

from typing import Literal

from koinon.core import UserError
from koinon.edit._edited import Material
from koinon.lm.language import LM
from koinon.lm.tracing import best_layer

Layer = int | Literal["auto"]
TRACED = 4
"""How many facts are traced."""


def chosen(lm: LM, layer: Layer, material: Material) -> int:
    """The number of a block, from 0.

    Raises:
        UserError: no such layer, or nothing to trace.
    """
    if layer == "auto":
        facts = list(material.traced or [case.fact for case in material.cases])[:TRACED]
        if not facts:
            raise UserError("layer auto: tracing needs facts; give some as material, or the number of a layer")
        return best_layer(lm, facts)
    lm.anatomy.block(int(layer))
    return int(layer) % len(lm.anatomy.blocks)
