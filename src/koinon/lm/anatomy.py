"""The parts of a transformer, found by their shapes and places, whatever they are called."""

import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from koinon.core import UserError


@dataclass(frozen=True)
class Projection:
    """A matrix product inside a model: ``nn.Linear``, or GPT-2's, which stores its weight the other way round."""

    name: str
    """Of the module."""
    module: nn.Module
    """What is called."""

    @property
    def parameter(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight"

    @property
    def turned(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as it multiplies a column; a view of the parameter."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.turned else weight


@dataclass(frozen=True)
class Block:
    """One layer of a transformer."""

    name: str
    """Of its module."""
    module: nn.Module
    """What takes and gives the vectors between layers, [batch, time, width]."""
    rises: tuple[Projection, ...]
    """Of the FFN, from the width: one, a gate and another, or both in one."""
    falls: Projection
    """Of the FFN, back to the width; its input is the FFN's activations, the keys of Geva et al. (2021)."""
    attends: Projection
    """Of the attention, back to the width."""
    norms: tuple[nn.Module, ...]
    """Normalisations, in the order of the module."""


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in a transformer with one stack of layers."""

    width: int
    """Of the vectors between layers."""
    embedding: nn.Module
    """Tokens to vectors."""
    blocks: tuple[Block, ...]
    """From the first to the last."""
    norm: nn.Module | None
    """The last normalisation before the head, outside all blocks."""
    head: nn.Module
    """Vectors to logits; its weight may be the embedding's."""
    narrows: nn.Module | None = None
    """What takes the blocks' vectors to the head's width, behind the normalisation, if that is another (OPT-350M's)."""

    def block(self, number: int) -> Block:
        """A block by its number, from 0; a negative one counts from the end."""
        if not -len(self.blocks) <= number < len(self.blocks):
            raise UserError(f"layer {number}: this model has {len(self.blocks)}, from 0 to {len(self.blocks) - 1}")
        return self.blocks[number]

    def word(self, token: int) -> Float[Tensor, " width"]:
        """The head's row of a token, as it reads what comes out of the blocks."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        row = weight.detach()[token].float()
        return row if self.narrows is None else row @ self.narrows.weight.float()  # type: ignore[operator]

    def at(self, depth: float) -> int:
        """The number of the block at a share of the depth, from 0 to 1."""
        return min(int(depth * len(self.blocks)), len(self.blocks) - 1)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a Hugging Face decoder or encoder.

    Raises:
        UserError: no stack of layers with an FFN of two projections, such as a mixture of experts.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if embedding is None or head is None:
        raise UserError(f"{type(model).__name__}: no language model, it has no embedding or no head")
    name, stack = _stack(model)
    width = _width(stack, embedding.weight.shape[1])
    blocks = tuple(_block(f"{name}.{number}", module, width) for number, module in enumerate(stack))
    inside = {id(module) for block in stack for module in block.modules()}
    norms = [its for its in model.modules() if id(its) not in inside and _is_norm(its, width)]
    narrow = (head.weight.shape[1], width)
    between = [its for its in model.modules() if id(its) not in inside and its is not head and _shape(its) == narrow]
    narrows = between[-1] if between and narrow[0] != width else None
    return Anatomy(width, embedding, blocks, norms[-1] if norms else None, head, narrows)


def linears(model: nn.Module, patterns: tuple[str, ...]) -> list[Projection]:
    """All projections whose module's name, or its last part, fits one of the patterns (as of ``fnmatch``)."""
    found = [Projection(name, module) for name, module in model.named_modules() if _shape(module)]
    ends = [(its, (its.name, its.name.rpartition(".")[2])) for its in found]
    return [its for its, names in ends if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)]


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of equal modules with the most parameters; of those within each other, the outer one."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(its) for its in module}) == 1:
            found.append((sum(value.numel() for value in module.parameters()), name, module))
    if not found:
        raise UserError(f"{type(model).__name__}: it has no list of equal layers")
    _, name, module = max(found, key=lambda its: its[0])  # of equal ones the first, which is the outer one
    return name, module


def _width(stack: nn.ModuleList, embedded: int) -> int:
    """The embedding's width, unless the layers have another (as ALBERT's and OPT-350M's)."""
    sizes = [size for _, module in stack[0].named_modules() if (size := _shape(module))]
    if any(out == embedded for out, _ in sizes):
        return embedded
    norms = [next(module.parameters()).numel() for module in stack.modules() if _is_norm(module, None)]
    return norms[0] if norms else embedded


def _block(name: str, module: nn.Module, width: int) -> Block:
    around = _adapted(module)
    inside = tuple(f"{its}." for its in around)
    parts = [its for its in module.named_modules() if not its[0].startswith(inside)]  # in the module's order
    sizes = {its: size for its, part in parts if (size := _shape(around.get(its, part)))}
    back = [its for its, (out, _) in sizes.items() if out == width]
    # What goes up belongs to the last way back in its part of the block; where that has none, to the last one of all.
    beginnings = _parts(list(sizes))
    fed: dict[str, list[str]] = {its: [] for its in back}
    for its, (_, into) in sizes.items():
        way = next((one for one in reversed(back) if beginnings[one] == beginnings[its]), back[-1] if back else its)
        if into == width and way != its:
            fed[way].append(its)
    falls = [its for its in back if _is_ffn([sizes[one][0] for one in fed[its]], sizes[its][1])]
    attends = [its for its in back if fed[its] and its not in falls]
    if len(falls) > 1 and not attends and len(fed[falls[0]]) == 1:
        attends.append(falls.pop(0))  # queries, keys and values in one that is just twice as wide; the FFN comes behind
    if len(falls) != 1 or not attends:
        what = "no attention" if falls and not attends else f"{len(falls)} FFNs, one is needed"
        raise UserError(f"{name}: {what}; layers with several experts, or in one piece, are not known")

    if adapted := [its for its in (*fed[falls[0]], falls[0]) if its in around]:
        raise UserError(
            f"{name}.{adapted[0]}: an adapter is around it; merge it into the model (merge_and_unload) first"
        )

    def projection(place: str) -> Projection:
        return Projection(f"{name}.{place}", module.get_submodule(place))

    norms = tuple(its for its in module.modules() if _is_norm(its, width))
    fall = falls[0]
    return Block(name, module, tuple(map(projection, fed[fall])), projection(fall), projection(attends[-1]), norms)


def _adapted(module: nn.Module) -> dict[str, nn.Module]:
    """The layers inside adapters, as PEFT puts them there, by the adapters' names."""
    found = ((name, getattr(its, "base_layer", None)) for name, its in module.named_modules())
    return {name: its for name, its in found if isinstance(its, nn.Module)}


def _is_ffn(rising: list[int], wide: int) -> bool:
    """Whether what goes up is as wide as what comes back: once, as gate and value, or both in one.

    Attention goes up in three, or in one that is mostly wider, or its keys are narrower than its queries.
    """
    return rising in ([wide], [wide, wide], [2 * wide])


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """[out, in] of a projection."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[0], weight.shape[1]
    return (weight.shape[1], weight.shape[0]) if hasattr(module, "nf") else None  # transformers' Conv1D


def _is_norm(module: nn.Module, width: int | None) -> bool:
    own = list(module.parameters(recurse=False))
    return (
        bool(own)
        and all(its.ndim == 1 for its in own)
        and width in (None, own[0].numel())
        and not list(module.children())
    )


def _parts(names: list[str]) -> dict[str, str]:
    """For each path its beginning, as short as it can be for the paths to have more than one."""
    for length in range(1, 1 + max((name.count(".") for name in names), default=0)):
        starts = {name: ".".join(name.split(".")[:length]) for name in names}
        if len(set(starts.values())) > 1:
            return starts
    return {name: name for name in names}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's modules, which hold the same parameters and buffers; what is put into one is in it alone."""
    held: dict[int, object] = {id(its): its for its in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, held)


def with_values(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy that shares everything but these parameters; a tied one changes wherever it is used.

    Args:
        model: is not changed.
        values: name of a parameter to its new value.
    """
    copied = sharing(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    for name, value in values.items():
        old = copied.get_parameter(name)
        new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        for module, its in places[id(old)]:
            setattr(module, its, new)
    return copied


def frozen(model: nn.Module) -> nn.Module:
    """A copy that shares all values, in evaluation mode, whose parameters take no gradient."""
    held: dict[int, object] = {id(its): its.detach() for its in model.buffers()}
    held |= {id(its): nn.Parameter(its.detach(), requires_grad=False) for its in model.parameters()}
    with torch.no_grad():
        return copy.deepcopy(model, held).eval()
