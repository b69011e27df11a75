"""A small decoder: predicts each next symbol of a sequence from those before it, with causal self-attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from koinon.core import UserError
from koinon.nn.params import stream, xavier


class Decoder(nn.Module):
    """A transformer with normalisation before each part (Radford et al., 2019), learned places and a head of its own.

    Its head comes last, so that its input is a vector for each symbol read. All weights but the norms' are matrices.
    There is no dropout: a run draws nothing.

    Args:
        symbols: how many there are; 256 for bytes.
        width: of the vectors between the parts; a multiple of ``heads``.
        layers: how many blocks.
        heads: of the attention.
        context: the longest sequence.
        seed: of the weights; each is drawn from a stream of its own name.

    Raises:
        UserError: a width that the heads do not divide.
    """

    def __init__(
        self, symbols: int = 256, width: int = 96, layers: int = 3, heads: int = 3, context: int = 96, seed: int = 0
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"width {width}: give a multiple of the {heads} heads")
        self.context = context
        self.embedding = nn.utils.skip_init(nn.Embedding, symbols, width)
        self.places = nn.utils.skip_init(nn.Embedding, context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.utils.skip_init(nn.Linear, width, symbols)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.ndim == 2:
                    value.copy_(xavier(len(value), value.shape[1], stream(seed, name)))
                elif name.endswith("bias"):
                    value.zero_()

    def forward(self, symbols: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time symbols"]:
        """Logits of the symbol after each one, from it and those before it.

        Raises:
            UserError: a sequence longer than the context.
        """
        return self.head(self.features(symbols))

    def features(self, symbols: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """What the head sees."""
        time = symbols.shape[1]
        if time > self.context:
            raise UserError(f"a sequence of {time} symbols: this decoder reads {self.context} at most")
        x = self.embedding(symbols) + self.places(torch.arange(time, device=symbols.device)[None])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """Causal self-attention, then two layers for each place, both added to what comes in.

    Args:
        width: of the vectors.
        heads: of the attention, each of ``width / heads`` numbers.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.queries, self.keys, self.values, self.out = (nn.utils.skip_init(nn.Linear, width, width) for _ in range(4))
        self.between = nn.LayerNorm(width)
        self.wide = nn.utils.skip_init(nn.Linear, width, 4 * width)
        self.narrow = nn.utils.skip_init(nn.Linear, 4 * width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The same places; none sees a later one."""
        h = self.before(x)
        q, k, v = (self._split(its(h)) for its in (self.queries, self.keys, self.values))  # batch head time share
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.between(x))))

    def _split(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch head time share"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
