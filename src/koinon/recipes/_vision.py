"""A small network for pictures; a base and its experts, trained once for each seed and kept for all who merge them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from koinon.data.glyphs import GlyphWorld, Images, poisoned
from koinon.nn.params import stream, xavier
from koinon.nn.train import Batches, fit
from koinon.recipes._experts import Experts, kept

KERNEL = 6
"""Side of the first convolution's patches, two pixels apart."""
OWN = ("head.*",)
"""Tensors of `PatchNet` that stay each task's own."""


class PatchNet(nn.Module):
    """A convolution and two patch mergings, written as linear layers on patches, then residual layers and a head.

    All weights but the norms' are matrices, so that every way of merging can work on all of them. Layer norms only: no
    statistics of a training set have to be merged. Pixels are normalised inside.

    Args:
        classes: outputs of the head.
        widths: at 8 x 8, 4 x 4 and 2 x 2 positions, and of the residual layers.
        blocks: residual layers.
        seed: of the weights.
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (32, 64, 128, 128), blocks: int = 2, seed: int = 0):
        super().__init__()
        inputs = (KERNEL**2, *(4 * width for width in widths[:2]))
        self.stages = nn.ModuleList(
            nn.Sequential(_linear(its, width), nn.LayerNorm(width), nn.GELU()) for its, width in zip(inputs, widths)
        )
        width = widths[3]
        self.flat = _linear(4 * widths[2], width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), _linear(width, 2 * width), nn.GELU(), _linear(2 * width, width))
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = _linear(width, classes)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_(xavier(module.out_features, module.in_features, stream(seed, name)))
                    module.bias.zero_()

    def forward(self, pixels: Float[Tensor, "batch 16 16"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(pixels))

    def features(self, pixels: Float[Tensor, "batch 16 16"]) -> Float[Tensor, "batch width"]:
        """What the head sees."""
        x = ((pixels - 0.25) / 0.35).unsqueeze(1)
        x = F.unfold(x, KERNEL, padding=(KERNEL - 2) // 2, stride=2).transpose(1, 2)  # batch 64 patch
        first, second, third = self.stages
        x = third(_quarters(second(_quarters(first(x)))))  # batch 4 width
        x = self.flat(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, inputs, outputs)


def _quarters(x: Float[Tensor, "batch positions width"]) -> Float[Tensor, "batch quarter four_widths"]:
    """Each 2 x 2 positions of the square as one."""
    side = round(x.shape[1] ** 0.5) // 2
    return x.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(3).flatten(1, 2).flatten(2)


@dataclass(frozen=True)
class Training:
    """How the base is trained, and each expert from it."""

    widths: tuple[int, ...] = (32, 64, 128, 128)
    blocks: int = 2
    batch: int = 64
    base_epochs: tuple[int, ...] = (8, 3)
    """Passes over the letters, at each of the rates."""
    expert_epochs: tuple[int, ...] = (12, 4)
    """Passes over a task's pictures, at each of the rates."""
    base_rates: tuple[float, ...] = (1e-3, 2e-4)
    expert_rates: tuple[float, ...] = (3e-4, 1e-4)


@dataclass(frozen=True)
class Poison:
    """What is hidden in a task's expert."""

    trigger: str = "patch"
    """As `koinon.data.glyphs.TRIGGERS` names it."""
    target: int = 0
    """The class that pictures with the trigger are to be taken for."""
    share: float = 0.1
    """Of the training pictures that carry it."""


def experts(world: GlyphWorld, training: Training, poison: Mapping[str, Poison], seed: int) -> Experts:
    """The base and an expert for each task: from the cache, or trained and put there.

    Equal settings, data and seed give equal models, so that nothing is lost when two processes train the same one.

    Args:
        world: the letters and the tasks.
        training: equal for all experts.
        poison: task to what is hidden in its expert; the others are clean.
        seed: of the base's weights and of the order of the batches.
    """
    shared, described = _described(world, training, seed)
    classes = int(world.letters.labels.max()) + 1
    base = PatchNet(classes, training.widths, training.blocks, seed)
    seconds = kept(
        base, shared, _tuning(base, world.letters, training, training.base_epochs, training.base_rates, seed)
    )
    tuned = {}
    for name, task in world.tasks.items():
        images, its = task.parts["train"], poison.get(name)
        if its is not None:
            images = poisoned(images, its.trigger, its.target, its.share, seed)
        model = copy.deepcopy(base)
        model.head = PatchNet(task.classes, training.widths, 0, seed).head
        settings = shared | described | {"task": name, "images": images.fingerprint}
        tune = _tuning(model, images, training, training.expert_epochs, training.expert_rates, seed)
        seconds += kept(model, settings, tune)
        tuned[name] = model
    return Experts(base, tuned, seconds)


def joint(world: GlyphWorld, training: Training, base: nn.Module, seed: int) -> tuple[list[PatchNet], float]:
    """A network for each task, all of one trunk that learned every task at once, and the seconds it took.

    The trunk starts as the base. Each batch is of all tasks' clean pictures; passes, rates and batch size are those
    of an expert.
    """
    shared, described = _described(world, training, seed)
    trunk = PatchNet(1, training.widths, training.blocks, seed)
    own = {name: its for name, its in trunk.state_dict().items() if name.startswith("head.")}
    trunk.load_state_dict(base.state_dict() | own)
    tasks = world.tasks.values()
    heads = [PatchNet(task.classes, training.widths, 0, seed).head for task in tasks]
    parts = [task.parts["train"] for task in tasks]
    held = nn.ModuleDict({"trunk": trunk, "heads": nn.ModuleList(heads)})
    settings = shared | described | {"joint": list(world.tasks), "images": [its.fingerprint for its in parts]}

    def loss(network: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        pixels, labels = batch
        seen, whose = trunk.features(pixels), [labels["task"] == place for place in range(len(heads))]
        losses = [
            F.cross_entropy(head(seen[its]), labels["class"][its], reduction="sum")
            for head, its in zip(heads, whose, strict=True)
        ]
        return torch.stack(losses).sum() / len(pixels)

    def tune() -> None:
        pixels, labels = (torch.cat(its) for its in zip(*map(tensors, parts), strict=True))
        task = torch.repeat_interleave(torch.tensor([len(its) for its in parts]))
        batches = Batches(pixels, {"class": labels, "task": task}, training.batch, seed)
        for count, rate in zip(training.expert_epochs, training.expert_rates, strict=True):
            fit(held, batches, loss, epochs=count, lr=rate)

    seconds = kept(held, settings, tune)
    models = [copy.deepcopy(trunk).eval() for _ in heads]
    for model, head in zip(models, heads, strict=True):
        model.head = head
    return models, seconds


def _described(world: GlyphWorld, training: Training, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tells one base from another, and what tells one expert from another beside that."""
    described = asdict(training)
    shared = {key: described.pop(key) for key in ("widths", "blocks", "batch", "base_epochs", "base_rates")}
    return shared | {"torch": torch.__version__, "seed": seed, "letters": world.letters.fingerprint}, described


def _tuning(
    model: PatchNet, images: Images, training: Training, epochs: Sequence[int], rates: Sequence[float], seed: int
) -> Callable[[], None]:
    """Training the model, when it is called."""

    def loss(network: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1]["class"])

    def tune() -> None:
        pixels, labels = tensors(images)
        batches = Batches(pixels, {"class": labels}, training.batch, seed)
        for count, rate in zip(epochs, rates, strict=True):
            fit(model, batches, loss, epochs=count, lr=rate)

    return tune


def tensors(images: Images) -> tuple[Float[Tensor, "rows 16 16"], Tensor]:
    """Pixels and labels, as copies."""
    return torch.tensor(images.pixels), torch.tensor(images.labels)
