"""Context decoupling: objects cut out by pseudo labels, pasted into images that do not show their class.

"Context Decoupling Augmentation for Weakly Supervised Semantic Segmentation" (Su et al., ICCV 2021). It works
on a sample before the transform of the method. H, W: pixels of the image; h, w: of an object's box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.base import LABELS, Record, Sample, WeakSegDataset
from utils.cam_files import label_path
from utils.files import atomic_file, has_date, keep_date, read_json, require_files, write_json
from utils.image import IGNORE_INDEX, read_mask
from utils.seed import sample_generator

MAX_DEGREE = 90  # of the rotation, either way
MAX_SHARE = 0.7  # of the image's height and width that a pasted object may take
RESCALE = (0.8, 1.2)  # factors of `rescale`


class MinedObject(NamedTuple):
    """One object in its box; around it, inside the box, are pixels of its old background."""

    class_id: int
    image_rgb: np.ndarray  # (h, w, 3) uint8
    mask: np.ndarray  # (h, w) bool


def extract_object(
    image_rgb: np.ndarray, label: np.ndarray, min_share: float = 0.1, max_share: float = 0.7
) -> MinedObject | None:
    """All pixels of the class of an image whose label holds a single class; else None.

    Args:
        image_rgb: (H, W, 3) uint8.
        label: (H, W) class ids; ignored pixels (255) count as background.
        min_share, max_share: bounds of the object's share of the image, both allowed.
    """
    mask = (label != 0) & (label != IGNORE_INDEX)
    classes = np.unique(label[mask])
    if len(classes) != 1 or not min_share <= mask.mean() <= max_share:
        return None
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return MinedObject(int(classes[0]), image_rgb[box], mask[box])


def mine_object(record: Record, labels: Path, out: Path, min_share: float, max_share: float) -> int | None:
    """Cut the object out of one image unless that is done; returns its class id, None without object."""
    path = label_path(labels, record.name)
    label, image = read_mask(path), record.read_image()
    if label.shape != (image.height, image.width):
        raise ValueError(f"label {path} is {label.shape[::-1]} pixels, its image {record.image} {image.size}")
    item = extract_object(np.asarray(image), label, min_share, max_share)
    if item is None:
        return None
    cut = object_path(out, item.class_id, record.name)
    if not has_date(cut, path, record.image):
        save_object(out, record.name, item)
        keep_date(cut, path, record.image)
    return item.class_id


class ObjectBank:
    """The mined objects on disk: ``<class id>/<name>.png``, colours with the mask as alpha, and an index.

    Args:
        folder: output of tools/mine_objects.py.
        class_names: of the data set that objects are pasted into, background first.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"object bank {path} does not exist: make one with tools/mine_objects.py")
        index = read_json(path)
        if index["class_names"] != list(class_names):
            raise ValueError(f"the object bank {self.folder} has other classes: {index['class_names'][:4]}")
        self.names: dict[int, list[str]] = {int(k): names for k, names in index["objects"].items() if names}
        require_files(
            (object_path(self.folder, k, name) for k, names in self.names.items() for name in names),
            "objects of the bank",
            "run tools/mine_objects.py again",
        )

    def __len__(self) -> int:
        return sum(len(names) for names in self.names.values())

    def load(self, class_id: int, name: str) -> MinedObject:
        """One object of the index."""
        with Image.open(object_path(self.folder, class_id, name)) as picture:
            pixels = np.array(picture)
        return MinedObject(class_id, pixels[..., :3], pixels[..., 3] > 0)


def object_path(folder: Path, class_id: int, name: str) -> Path:
    """The file of an object of a bank."""
    return folder / str(class_id) / f"{name}.png"


def save_object(folder: Path, name: str, item: MinedObject) -> None:
    """Write an object into a bank; the index follows when all are there."""
    with atomic_file(object_path(folder, item.class_id, name)) as file:
        _with_alpha(item).save(file, "PNG")


def write_index(folder: Path, class_names: Sequence[str], objects: Mapping[int, Sequence[str]]) -> None:
    """Finish a bank: which objects (sorted names) there are of each class id."""
    listed = {str(k): sorted(objects.get(k, ())) for k in range(1, len(class_names))}
    write_json(folder / "index.json", {"class_names": list(class_names), "objects": listed})


class SampleDraw:
    """Random numbers of one sample, whichever process or worker loads it; a test replays recorded ones."""

    def __init__(self, sample_seed: int) -> None:
        self._generator = sample_generator(sample_seed, "context decoupling")

    def integer(self, low: int, high: int) -> int:
        """Uniform over low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def real(self) -> float:
        """Uniform in [0, 1)."""
        return torch.rand((), generator=self._generator).item()


@dataclass(frozen=True)
class Paste:
    """How an object gets into an image. By default as in the published program, but with a clean mask.

    Args:
        paste_mask: ``binary`` turns the mask as a mask. ``reference`` turns it as the published program
            (suyukun666/CDA) does, as label values by cubic splines: the mask of class 20 grows by a pixel all
            around and gets specks, that of class 1 hardly.
    """

    rotate: bool = True
    rescale: bool = False
    blend: bool = False
    paste_mask: str = "binary"

    def __call__(
        self, image_rgb: np.ndarray, item: MinedObject, draw: SampleDraw
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws, in this order: degrees, factor (as far as they are used), row, column.

        Returns:
            The image (H, W, 3) uint8 with the object, and where it covers the image, (H, W) bool.
        """
        degrees = draw.integer(-MAX_DEGREE, MAX_DEGREE) if self.rotate else 0
        turn = turned_labels if self.paste_mask == "reference" else turned_picture
        pictures, least = turn(item, degrees)
        height, width = limited_size(pictures[0].height, pictures[0].width, image_rgb.shape)
        if self.rescale:
            factor = RESCALE[0] + (RESCALE[1] - RESCALE[0]) * draw.real()
            height, width = factor * height, factor * width
        size = max(int(width), 1), max(int(height), 1)
        layers = [np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in pictures]
        pixels = np.dstack(layers)  # (h, w, 4)
        colours, mask = pixels[..., :3], pixels[..., 3] >= least

        top = draw.integer(0, image_rgb.shape[0] - mask.shape[0])
        left = draw.integer(0, image_rgb.shape[1] - mask.shape[1])
        window = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
        pasted, covered = image_rgb.copy(), np.zeros(image_rgb.shape[:2], bool)
        opacity = softened(mask)[..., None] if self.blend else mask[..., None]
        # Cut to whole grey levels, as the published program stores the picture; the offset is for products
        # that rounding left just below theirs.
        pasted[window] = (1 - opacity) * image_rgb[window] + opacity * colours + 1e-6
        covered[window] = mask
        return pasted, covered


def turned_picture(item: MinedObject, degrees: int) -> tuple[list[Image.Image], int]:
    """The object turned as a picture with transparency, and the opacity from which a pixel counts.

    Pillow weighs colours by their opacity, so those beside the object do not bleed into it.
    """
    return [_with_alpha(item).rotate(degrees, Image.Resampling.BILINEAR, expand=True)], 128


def _with_alpha(item: MinedObject) -> Image.Image:
    return Image.fromarray(np.dstack([item.image_rgb, item.mask.astype(np.uint8) * 255]))


def turned_labels(item: MinedObject, degrees: int) -> tuple[list[Image.Image], int]:
    """The same as the published program does it: colours and label values, each by cubic splines."""
    from scipy import ndimage  # slow to import

    labels = item.mask.astype(np.uint8) * np.uint8(min(item.class_id, 255))  # bytes, as published
    layers = [item.image_rgb, labels]
    if degrees:
        layers = [ndimage.rotate(layer, degrees) for layer in layers]
    return [Image.fromarray(layer) for layer in layers], 1


def limited_size(height: float, width: float, image_size: Sequence[int]) -> tuple[float, float]:
    """The object's size with its shape kept, at most 0.7 of the image's; small objects stay small."""
    ratio = width / height
    if height > MAX_SHARE * image_size[0]:
        height = MAX_SHARE * image_size[0]
        width = height * ratio
    if width > MAX_SHARE * image_size[1]:
        width = MAX_SHARE * image_size[1]
        height = width / ratio
    return height, width


def softened(mask: np.ndarray) -> np.ndarray:
    """(h, w) opacity in [0, 1] in steps of 1/255: the mask after a 3 x 3 filter.

    The weights are those of the published program: even from row to row (a Gaussian of 4 pixels), binomial
    from column to column.
    """
    rows = np.exp(-np.array([1, 0, 1]) / (2 * 4**2))
    weights = np.outer(rows / rows.sum(), [0.25, 0.5, 0.25])
    padded = np.pad(mask.astype(np.float64), 1, mode="edge")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return (255 * (shifted * weights).sum((2, 3))).round() / 255


class ContextDecoupledDataset(Dataset[tuple[Sample, Sample]]):
    """Every image twice: as it is, and with an object of a class that it is not tagged with.

    Both versions pass the transform of the wrapped data set, each with a ``sample_seed`` of its own. An image
    that is tagged with every class of the bank stays as it is.
    """

    def __init__(self, dataset: WeakSegDataset, bank: ObjectBank, paste: Paste) -> None:
        self.dataset, self.bank, self.paste = dataset, bank, paste

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Sample, Sample]:
        """The two versions of an (index, sample_seed) pair; a plain index has seed 0."""
        sample = self.dataset.read(key)
        seed = int(sample["sample_seed"])
        pasted = self.decoupled(sample, SampleDraw(seed))
        pasted |= {"sample_seed": sample_generator(seed, "pasted version").initial_seed()}
        return self.dataset.transformed(sample), self.dataset.transformed(pasted)

    def decoupled(self, sample: Sample, draw: SampleDraw) -> Sample:
        """A raw sample with a pasted object; draws the class, then the object, then what ``Paste`` draws."""
        if "label_scores" in sample:
            raise ValueError("data.context_decoupling cannot change label scores, only tags and label images")
        class_label: Tensor = sample["class_label"]
        absent = [k for k in sorted(self.bank.names) if not class_label[k - 1]]
        if not absent:
            return dict(sample)
        class_id = absent[draw.integer(0, len(absent) - 1)]
        names = self.bank.names[class_id]
        item = self.bank.load(class_id, names[draw.integer(0, len(names) - 1)])
        pixels, covered = self.paste(np.asarray(sample["image"]), item, draw)
        class_label = class_label.clone()
        class_label[class_id - 1] = 1
        changed: Sample = {"image": Image.fromarray(pixels), "class_label": class_label}
        for key in LABELS:
            if key in sample:
                changed[key] = sample[key].masked_fill(torch.from_numpy(covered), class_id)
        return sample | changed
