"""Images with a label each: drawn shapes, or a folder with one subfolder per class.

A row is an image [C, H, W] in -1 .. 1 and one label [1]. Images are not augmented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import ConfigError, DataError, Problem
from zoo.sections import SHAPES, DataSection, VisionSection
from zoo.train.loader import Row, Rows, TaskRows
from zoo.train.synthetic import Sample

DRAWN = 256  # images that a model of drawn ones is judged by
Region = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _radius(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y)


def _side(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y))


# where a shape of size 1 around the origin is; the number of a class is its place here
REGIONS: dict[str, Region] = {
    "disc": lambda x, y: _radius(x, y) < 1,
    "ring": lambda x, y: (_radius(x, y) < 1) & (_radius(x, y) > 0.55),
    "half disc": lambda x, y: (_radius(x, y) < 1) & (y > 0),
    "square": lambda x, y: _side(x, y) < 0.85,
    "frame": lambda x, y: (_side(x, y) < 0.85) & (_side(x, y) > 0.45),
    "triangle": lambda x, y: (y > -0.5) & (y + 3**0.5 * abs(x) < 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.28) & (_side(x, y) < 1),
    "bar": lambda x, y: (abs(x) < 0.28) & (abs(y) < 1),
}


def shapes(vision: VisionSection) -> Sample:
    """A sampler of one shape each, at a random place, size, angle and in random colours, with noise."""
    _need_classes(vision, len(REGIONS), "the shapes")
    size, regions = vision.image_size, list(REGIONS.values())
    axis = (np.arange(size) + 0.5) / size * 2 - 1

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        label, angle, scale = rng.integers(len(regions)), rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.7)
        x, y = np.meshgrid(axis, axis) - rng.uniform(scale - 1, 1 - scale, (2, 1, 1))
        turned = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        inside = regions[label](turned[0] / scale, turned[1] / scale)
        ground = rng.uniform(-1, 1, (vision.channels, 1, 1))
        colour = ground - np.copysign(rng.uniform(0.5, 1, ground.shape), ground)  # unlike the ground, in -1 .. 1
        image = np.where(inside, colour, ground) + rng.normal(0, 0.1, (vision.channels, size, size))
        return image.astype(np.float32), np.array([label])

    return sample


def _need_classes(vision: VisionSection, count: int, what: str) -> None:
    if 0 < vision.num_classes < count:
        text = f"{what} have {count} classes, num_classes is {vision.num_classes}"
        raise ConfigError([Problem(text, "vision.num_classes")])


class Splits(NamedTuple):
    """Images to train on, to look at now and then, and to judge by, with how many of the last two there are."""

    train: Rows
    seen: Rows
    fresh: Rows
    seen_images: int
    fresh_images: int
    classes: list[str]
    summary: dict[str, int | str]


def read_images(data: DataSection, vision: VisionSection, seed: int, seen_images: int) -> Splits:
    """The images of `data.source`. Drawn ones never end: `seen_images` of them are looked at, DRAWN judged by."""
    if data.source == SHAPES:
        sample, classes = shapes(vision), list(REGIONS)
        train, seen, fresh = (TaskRows(sample, seed, split) for split in range(3))
        return Splits(train, seen, fresh, seen_images, DRAWN, classes, {"task": SHAPES, "classes": len(classes)})
    folder = read_folder(data, vision)
    heldout, count = ImageRows(folder.heldout, vision), len(folder.heldout)
    train = ImageRows(folder.train, vision, seed)
    return Splits(train, heldout, heldout, min(seen_images, count), count, folder.classes, folder.summary())


# ------------------------------------------------------------------------------------------- folder
class Picture(NamedTuple):
    """A file, its name inside the folder and its class."""

    path: Path
    name: str
    label: int


class ImageFolder(NamedTuple):
    """Pictures split by the hash of their names, and the names of the classes."""

    train: list[Picture]
    heldout: list[Picture]
    classes: list[str]

    def summary(self) -> dict[str, int | str]:
        """Counts, and a hash over names and sizes of the files."""
        digest = hashlib.sha256()
        for picture in (*self.train, *self.heldout):
            digest.update(f"{picture.name} {picture.path.stat().st_size}\n".encode())
        counts = {"train_images": len(self.train), "heldout_images": len(self.heldout), "classes": len(self.classes)}
        return counts | {"sha256": digest.hexdigest()}


def read_folder(data: DataSection, vision: VisionSection) -> ImageFolder:
    """The pictures under `data.source`: one folder per class. DataError says what is missing."""
    root = Path(data.source).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; a vision model learns from {SHAPES} or a folder of images per class")
    known = {suffix for suffix, kind in _pillow().registered_extensions().items() if kind in _pillow().OPEN}
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    pictures = [
        Picture(path, path.relative_to(root).as_posix(), label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in known
    ]
    if len(pictures) < 2:
        raise DataError(f"{root}: needs at least two images, in one subfolder per class")
    _need_classes(vision, len(classes), f"the subfolders of {root}")
    if vision.channels not in _MODES:
        raise ConfigError([Problem(f"image files are read with 1 or 3, got {vision.channels}", "vision.channels")])
    pictures.sort(key=lambda p: hashlib.sha256(p.name.encode()).digest())
    count = min(max(1, round(data.heldout * len(pictures))), len(pictures) - 1)
    return ImageFolder(pictures[count:], pictures[:count], classes)


class ImageRows:
    """Pictures in a new order each epoch, or with no `seed` once in the order of the list."""

    def __init__(self, pictures: Sequence[Picture], vision: VisionSection, seed: int | None = None):
        self.pictures, self.vision, self.seed = pictures, vision, seed
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.pictures)

    def _order_of(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self))
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self))

    def row(self, index: int) -> Row:
        """Row of a global index."""
        epoch, place = divmod(index, len(self))
        picture = self.pictures[self._order(epoch)[place]]
        return Row(load_image(picture.path, self.vision), np.array([picture.label]))


_MODES = {1: "L", 3: "RGB"}


def load_image(path: Path, vision: VisionSection) -> np.ndarray:
    """[C, H, W] float32 in -1 .. 1: the shorter side resized to `image_size`, the middle of the longer one."""
    pil, size = _pillow(), vision.image_size
    try:
        with pil.open(path) as image:
            image = image.convert(_MODES[vision.channels])
            scale = size / min(image.size)
            width, height = (max(size, round(n * scale)) for n in image.size)
            image = image.resize((width, height), pil.Resampling.BICUBIC)
            left, top = (width - size) // 2, (height - size) // 2
            pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    except (OSError, ValueError, pil.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from None
    return pixels.reshape(size, size, vision.channels).transpose(2, 0, 1) / 127.5 - 1


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("image files need Pillow: pip install pillow") from None
    return Image
