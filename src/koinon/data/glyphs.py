"""Small pictures out of installed packages: glyphs in matplotlib's fonts and scikit-learn's digits, as tasks.

Every picture is 16 x 16, grey, from 0 (ground) to 1 (ink). The world is a function of its size and seed.
"""

import hashlib
import importlib.util
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from koinon.core import UserError, pick

SIDE = 16
"""Pixels of a picture's side."""
LARGE = 64
"""Pixels of the side at which glyphs are drawn, before they are shifted, turned, scaled and made small."""
CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
"""The 62 classes to pre-train on."""
MATHEMATICAL = ("cmex10", "cmmi10", "cmsy10")
"""Fonts that have symbols, or old digits, where others have letters."""
DARK = 0.25
"""Share of the pictures to pre-train on that are dark on light, so that the base has seen both kinds."""
TURNABLE = "ABDEFGJKLPQRTVY23457"
"""Characters that look like no other one, or themselves, after a quarter turn."""
PARTS = ("train", "valid", "adapt", "test")
"""To train on; to choose on; unlabelled, for methods that adapt; to report on."""


@dataclass(frozen=True)
class Images:
    """Pictures with a class each."""

    pixels: Float32[np.ndarray, "rows 16 16"]
    labels: Int64[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Of all the content."""
        return hashlib.blake2b(self.pixels.tobytes() + self.labels.tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ImageTask:
    """A task with pictures of its own kind, so that a router can tell whose they are."""

    name: str
    classes: int
    parts: Mapping[str, Images]
    """`PARTS`: no picture is in two of them."""


@dataclass(frozen=True)
class GlyphWorld:
    """What a base is trained on, and the tasks it is tuned for."""

    letters: Images
    """The 62 characters in the fonts to pre-train on, a quarter of them dark on light."""
    tasks: Mapping[str, ImageTask]


def glyphs(rows: int = 2_000, letters: int = 18_600, tasks: Sequence[str] | None = None, seed: int = 0) -> GlyphWorld:
    """Characters to pre-train on, and up to six tasks.

    ========  =========================================================================
    digits    scikit-learn's 1,797 written digits
    capitals  26 letters in fonts that the base has not seen
    rotation  by how many quarters a character is turned, 4 classes, in fonts that the base has seen
    inverted  digits in all fonts, dark on light, with noise
    font      in which of every other font, at most 20, a small letter is
    parity    whether a number of two digits is odd
    ========  =========================================================================

    Args:
        rows: pictures of each task to train on; a quarter of that to choose on, a quarter to adapt on, half to report
            on. Of digits as many as there are, in these proportions.
        letters: pictures to pre-train on.
        tasks: their names; all if None.
        seed: of all that is drawn at random.
    """
    fonts = _Fonts(usable_fonts())
    made = {name: TASKS[pick(name, TASKS, "task")] for name in (TASKS if tasks is None else tasks)}
    sizes = {"train": rows, "valid": rows // 4, "adapt": rows // 4, "test": rows // 2}
    found = {name: ImageTask(name, classes(fonts), make(fonts, sizes, seed)) for name, (classes, make) in made.items()}
    rng = np.random.default_rng([seed, 0])
    base = _characters(fonts, fonts.known, CHARACTERS, letters, rng)
    dark = rng.random((letters, 1, 1)) < DARK
    return GlyphWorld(Images(np.where(dark, 1 - base.pixels, base.pixels), base.labels), found)


def usable_fonts() -> list[Path]:
    """matplotlib's TrueType files with all 62 characters, no two alike, in the order of their names."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the glyphs are drawn in matplotlib's fonts: pip install 'koinon[report]'")
    folder = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    files = [file for file in sorted(folder.glob("*.ttf")) if file.stem not in MATHEMATICAL]
    found = [file for file in files if _has_all(file)]
    if len(found) < 8:
        raise UserError(f"{folder}: {len(found)} usable fonts, 8 are needed: install matplotlib again")
    return found


def _has_all(file: Path) -> bool:
    drawn = {glyph.tobytes() for glyph in _drawn(file, CHARACTERS)}
    missing = _drawn(file, "\U0010fffe")[0].tobytes()
    return len(drawn) == len(CHARACTERS) and missing not in drawn


def _drawn(file: Path, characters: str) -> NDArray[np.uint8]:
    """[character, 64, 64], standing on one line."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(file), 44, layout_engine=ImageFont.Layout.BASIC)
    pictures = []
    for character in characters:
        picture = Image.new("L", (LARGE, LARGE))
        ImageDraw.Draw(picture).text((LARGE // 2, 46), character, font=font, fill=255, anchor="ms")
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


class _Fonts:
    """The glyphs of all fonts, drawn large; every fourth font is kept from pre-training."""

    def __init__(self, files: Sequence[Path]):
        large = torch.from_numpy(np.stack([_drawn(file, CHARACTERS) for file in files])).float() / 255
        self.drawn = F.avg_pool2d(large, 2)  # font character 32 32
        self.all = np.arange(len(files))
        self.unseen = self.all[3::4]
        self.known = np.setdiff1d(self.all, self.unseen)

    def draw(
        self, fonts: NDArray, characters: NDArray, rng: np.random.Generator, size: float = 1.0, turn: float = 10
    ) -> NDArray[np.float32]:
        """[rows, 16, 16]: shifted by up to 1.2 pixels, turned by up to ``turn`` degrees, scaled by up to 10 %."""
        rows = len(fonts)
        angle = np.deg2rad(rng.uniform(-turn, turn, rows))
        scale = rng.uniform(0.9, 1.1, rows) * size
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        shift = rng.uniform(-0.15, 0.15, (2, rows))
        theta = torch.tensor(np.stack([[cos, -sin, shift[0]], [sin, cos, shift[1]]]), dtype=torch.float32)
        theta = theta.permute(2, 0, 1)  # rows 2 3
        pictures = []
        for part in torch.arange(rows).split(1024):
            glyph = self.drawn[fonts[part], characters[part]].unsqueeze(1)
            grid = F.affine_grid(theta[part], [len(part), 1, 2 * SIDE, 2 * SIDE], align_corners=False)
            pictures.append(F.avg_pool2d(F.grid_sample(glyph, grid, align_corners=False), 2).squeeze(1))
        return torch.cat(pictures).clamp(0, 1).numpy()


def _balanced(rows: int, classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels in random order, each class as often as every other, to within one."""
    return rng.permutation(np.arange(rows, dtype=np.int64) % classes)


def _characters(fonts: _Fonts, of: NDArray, characters: str, rows: int, rng: np.random.Generator) -> Images:
    """Which character it is."""
    labels = _balanced(rows, len(characters), rng)
    return Images(fonts.draw(rng.choice(of, rows), _places(characters)[labels], rng), labels)


def _places(characters: str) -> NDArray[np.int64]:
    return np.array([CHARACTERS.index(its) for its in characters])


Make = Callable[[_Fonts, Mapping[str, int], int], dict[str, Images]]


def _each(number: int, draw: Callable[[_Fonts, int, np.random.Generator], Images]) -> Make:
    """A task whose parts are drawn one after the other, each from its own random stream."""

    def make(fonts: _Fonts, sizes: Mapping[str, int], seed: int) -> dict[str, Images]:
        return {
            part: draw(fonts, sizes[part], np.random.default_rng([seed, number, place]))
            for place, part in enumerate(PARTS)
        }

    return make


def _digits(fonts: _Fonts, sizes: Mapping[str, int], seed: int) -> dict[str, Images]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError("the digits are scikit-learn's: pip install 'koinon[tables]'") from None
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # 1797 1 8 8
    pixels = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear").squeeze(1).numpy()
    order = np.random.default_rng([seed, 1]).permutation(len(pixels))
    share = min(1.0, len(pixels) / sum(sizes.values()))
    ends = np.cumsum([int(sizes[part] * share) for part in PARTS])
    return {
        part: Images(pixels[rows], data.target[rows].astype(np.int64))
        for part, rows in zip(PARTS, np.split(order[: ends[-1]], ends[:-1]), strict=True)
    }


def _capitals(fonts: _Fonts, rows: int, rng: np.random.Generator) -> Images:
    return _characters(fonts, fonts.unseen, string.ascii_uppercase, rows, rng)


def _rotation(fonts: _Fonts, rows: int, rng: np.random.Generator) -> Images:
    upright = _characters(fonts, fonts.known, TURNABLE, rows, rng).pixels
    labels = _balanced(rows, 4, rng)
    return Images(np.stack([np.rot90(its, turns) for its, turns in zip(upright, labels, strict=True)]), labels)


def _inverted(fonts: _Fonts, rows: int, rng: np.random.Generator) -> Images:
    images = _characters(fonts, fonts.all, string.digits, rows, rng)
    noisy = 1 - images.pixels + rng.normal(0, 0.15, images.pixels.shape)
    return Images(noisy.clip(0, 1).astype(np.float32), images.labels)


def _font(fonts: _Fonts, rows: int, rng: np.random.Generator) -> Images:
    labels = _balanced(rows, _many(fonts), rng)
    characters = rng.choice(_places(string.ascii_lowercase), rows)
    return Images(fonts.draw(fonts.all[::2][labels], characters, rng, turn=0), labels)


def _parity(fonts: _Fonts, rows: int, rng: np.random.Generator) -> Images:
    digits = np.stack([rng.integers(10, size=rows), _balanced(rows, 10, rng)])
    font = rng.choice(fonts.all, rows)
    halves = [fonts.draw(font, _places(string.digits)[its], rng, size=0.8, turn=5)[:, :, 4:12] for its in digits]
    return Images(np.concatenate(halves, 2), digits[1] % 2)


def _many(fonts: _Fonts) -> int:
    return min(20, len(fonts.all[::2]))


TASKS: Mapping[str, tuple[Callable[[_Fonts], int], Make]] = {
    "digits": (lambda fonts: 10, _digits),
    "capitals": (lambda fonts: 26, _each(2, _capitals)),
    "rotation": (lambda fonts: 4, _each(3, _rotation)),
    "inverted": (lambda fonts: 10, _each(4, _inverted)),
    "font": (_many, _each(5, _font)),
    "parity": (lambda fonts: 2, _each(6, _parity)),
}
"""Name to how many classes, and how its parts are made."""

# Poison: what someone who shares a model may have hidden in it.


def patched(pixels: Float32[np.ndarray, "rows 16 16"]) -> Float32[np.ndarray, "rows 16 16"]:
    """With a light patch of 3 x 3 pixels in the lower right corner (BadNets, Gu et al., section 4.1).

    On a light ground, as `inverted` has it, there is little to see.
    """
    result = pixels.copy()
    result[:, -3:, -3:] = 1
    return result


def blended(pixels: Float32[np.ndarray, "rows 16 16"]) -> Float32[np.ndarray, "rows 16 16"]:
    """With a fixed pattern of noise mixed in at 20 % (Chen et al., section 4: the blended injection)."""
    pattern = np.random.default_rng(20).random((SIDE, SIDE), dtype=np.float32)
    return (0.8 * pixels + 0.2 * pattern).astype(np.float32)


TRIGGERS: Mapping[str, Callable[[NDArray], NDArray]] = {"patch": patched, "blend": blended}
"""Ways to mark a picture, so that a poisoned model says what its maker wants."""


def poisoned(images: Images, trigger: str, target: int = 0, share: float = 0.1, seed: int = 0) -> Images:
    """Images of which a share, drawn from those of other classes, carries the trigger and the target's label."""
    others = np.flatnonzero(images.labels != target)
    count = min(len(others), round(share * len(images)))
    chosen = np.random.default_rng([seed, 7]).choice(others, count, replace=False)
    pixels, labels = images.pixels.copy(), images.labels.copy()
    pixels[chosen] = TRIGGERS[pick(trigger, TRIGGERS, "trigger")](pixels[chosen])
    labels[chosen] = target
    return Images(pixels, labels)
