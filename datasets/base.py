"""Records, splits and the one data set class: images, image-level tags and, for scoring only, masks.

C: foreground classes; class ids 1..C are the values that masks hold, 0 is background, 255 is ignored.
H, W: pixels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.colour import change_picture
from datasets.lists import some
from utils.cam_files import open_arrays
from utils.colour import change_pictures, no_change
from utils.device import to_device
from utils.files import require_files
from utils.image import AS_TYPED, IGNORE_INDEX, Reading, UnreadableImageError, read_image, read_mask

Sample = dict[str, Any]  # of one image; see `WeakSegDataset`

# A collated list of transformed samples, which is what a method gets:
#   image         (B, 3, H, W) normalised; bytes until `engine.trainer.batch_to_device` normalises them
#   class_label   (B, C) 0 or 1
#   most_classes  () the largest number of classes of an image, which a GPU need not be asked for
#   valid_box     (B, 4) y0, y1, x0, x1
#   index, sample_seed   (B,)
#   name          list[str]
#   mask          (B, H, W) ground truth, only if asked for
#   pseudo_label  (B, H, W) label of an earlier stage, only with data.label_dir
#   global_view, strong_view   the same as image, if the transform makes them
#   changes       (B, V, 9, 3) what is still to be done to these pictures, until `with_changes` does it
Batch = dict[str, Any]

LABELS = ("mask", "pseudo_label")  # what a transform moves together with the image
VIEWS = ("image", "global_view", "strong_view")


@dataclass(frozen=True)
class Record:
    """One image: where it is and which classes it is tagged with."""

    name: str  # unique in its split; files made from the image are called after it
    image: Path
    mask: Path | None  # its ground truth, if there is any; need not exist until it is asked for
    tags: tuple[int, ...] | None  # ascending class ids 1..C; () without objects; None: unknown
    reading: Reading = AS_TYPED  # how the file becomes RGB
    context: Path | None = None  # map of the contexts of a generated scene
    has_background: bool = True  # without it 0 in a mask is a pixel that does not count
    window: tuple[int, int, int, int] | None = None  # top, left, bottom, right of a tile (datasets/tiles.py)

    def read_image(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            UnreadableImageError: the file holds none that can be decoded.
        """
        if self.window is None:
            return read_image(self.image, self.reading)
        top, left, bottom, right = self.window
        return _last_whole_image(self.image, self.reading).crop((left, top, right, bottom))

    def read_mask(self) -> np.ndarray:
        """The ground truth (H, W) of an image that has one."""
        assert self.mask is not None
        mask = self._cut(read_mask(self.mask))
        return mask if self.has_background else np.where(mask == 0, np.uint8(IGNORE_INDEX), mask)

    def read_context(self) -> np.ndarray:
        """The contexts (H, W) of an image that has a map of them."""
        assert self.context is not None
        return self._cut(read_mask(self.context))

    def _cut(self, mask: np.ndarray) -> np.ndarray:
        if self.window is None:
            return mask
        top, left, bottom, right = self.window
        return mask[top:bottom, left:right]


@dataclass(frozen=True)
class Split:
    """The images of one list, and what the classes are called: ``class_names[k]`` is mask value k."""

    name: str
    class_names: tuple[str, ...]
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(f"split '{self.name}' has no class but background")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """With background."""
        return len(self.class_names)

    @property
    def has_tags(self) -> bool:
        """Whether those of every image are known."""
        return all(record.tags is not None for record in self.records)

    def class_label(self, index: int) -> Tensor:
        """(C,) float multi-hot tags of one image."""
        tags = self.records[index].tags
        if tags is None:
            raise ValueError(f"image '{self.records[index].name}' of split '{self.name}' has no tags")
        label = torch.zeros(self.num_classes - 1)
        label[[tag - 1 for tag in tags]] = 1
        return label

    def require(self, folder: Path, path_of: Callable[[Path, str], Path], maker: str) -> None:
        """Raise a FileNotFoundError unless a folder has the file of every image; ``maker`` makes them."""
        paths = (path_of(folder, record.name) for record in self.records)
        require_files(paths, f"files of split '{self.name}'", f"finish {maker}, or name other images")

    def fingerprint(self) -> str:
        """12 hex digits that name the data of a score: class names, image names, tags and file sizes.

        Independent of where the data set is and of the order of its list.
        """
        lines = [
            f"{record.name}\t{record.tags}\t{_file_size(record.image)}\t{_file_size(record.mask)}"
            + ("" if record.reading == AS_TYPED else f"\t{record.reading}")
            + ("" if record.has_background else "\tno background")
            for record in sorted(self.records, key=lambda record: record.name)
        ]
        text = "\n".join(["\t".join(self.class_names), *lines])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class WeakSegDataset(Dataset[Sample]):
    """Images with image-level tags: with a transform for training, where every image needs tags.

    A sample before its transform: ``name``, ``index``, ``sample_seed``, ``image`` (PIL, RGB), ``class_label``
    (C,) float, if tags are known, and ``mask`` (H, W), if asked for. Without a transform ``image`` is a
    (3, H, W) uint8 tensor of native size.

    Args:
        transform: sample -> sample. All it draws from torch's global generator belongs to the sample's seed,
            whichever process or worker loads the sample; that generator is left as it was.
        with_mask: load the masks too.
        mask_key: what a sample calls its mask: ``mask`` to score with, ``pseudo_label`` to learn from.
        label_dir: folder of labels that an earlier stage made. Label images ``<name>.png`` become
            ``pseudo_label``; files ``<name>.npz`` become ``label_scores``, arrays by name, which the
            transform turns into tensors.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Sample], Sample] | None = None,
        with_mask: bool = False,
        label_dir: Path | None = None,
        mask_key: str = "mask",
    ) -> None:
        self.split = split
        self.transform = transform
        self.with_mask = with_mask
        self.mask_key = mask_key
        self.labels = None if label_dir is None else _label_files(split, label_dir)
        untagged = [record.name for record in split.records if transform and record.tags is None]
        unmasked = [record.name for record in split.records if with_mask and record.mask is None]
        no_mask = "ground-truth mask: set data.options.masks, or data.val_set=null"
        for names, what in ((untagged, "tags to train on"), (unmasked, no_mask)):
            if names:
                images = some(names, len(split), "images")
                raise ValueError(f"{images} of split '{split.name}' have no {what}")
        if with_mask:
            masks = (record.mask for record in split.records if record.mask is not None)
            advice = "complete them (docs/data.md), or set data.root or data.options.masks"
            require_files(masks, f"masks of split '{split.name}'", advice)

    def __len__(self) -> int:
        return len(self.split.records)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample of an index, or of an (index, sample_seed) pair; a plain index has seed 0."""
        sample = self.read(key)
        if self.transform is not None:
            return self.transformed(sample)
        return sample | {"image": torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1).contiguous()}

    def read(self, key: int | tuple[int, int]) -> Sample:
        """The sample before its transform."""
        index, sample_seed = key if isinstance(key, tuple) else (key, 0)
        return self._load(index) | {"sample_seed": sample_seed}

    def transformed(self, sample: Sample) -> Sample:
        """The sample after its transform, which draws by the sample's seed."""
        assert self.transform is not None
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(sample["sample_seed"])
            return self.transform(sample)

    def _load(self, index: int) -> Sample:
        record = self.split.records[index]
        try:
            image = record.read_image()
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{error}; repair the file, or remove it") from error
        sample: Sample = {"name": record.name, "index": index, "image": image}
        if record.tags is not None:
            sample["class_label"] = self.split.class_label(index)
        if self.labels is not None and self.labels[index].suffix == ".npz":
            with open_arrays(self.labels[index], "score file", "the stage that makes it") as arrays:
                sample["label_scores"] = dict(arrays)
        elif self.labels is not None:
            label = read_mask(self.labels[index])
            sample["pseudo_label"] = checked_mask(label, self.labels[index], record, image, self.split)
        if self.with_mask:
            assert record.mask is not None
            sample[self.mask_key] = checked_mask(record.read_mask(), record.mask, record, image, self.split)
            if record.context is not None:
                sample["context"] = torch.from_numpy(record.read_context()).long()
        return sample


# Of a large image all tiles in a row need the whole.
_last_whole_image = lru_cache(maxsize=1)(read_image)


def checked_mask(mask: np.ndarray, path: Path, record: Record, image: Image.Image, split: Split) -> Tensor:
    """The mask (H, W) of an image as int64.

    Args:
        path: its file, for messages.

    Raises:
        ValueError: it is of another size than its image, or has values that are no classes.
    """
    if mask.shape != (image.height, image.width):
        raise ValueError(f"mask {path} is {mask.shape[::-1]} pixels, its image {record.image} {image.size}")
    foreign = mask[(mask >= split.num_classes) & (mask != IGNORE_INDEX)]
    if foreign.size:
        raise ValueError(f"mask {path} has the value {foreign.max()}; classes end at {split.num_classes - 1}")
    return torch.from_numpy(mask).long()


def collate(samples: Sequence[Sample] | Sequence[tuple[Sample, ...]]) -> Batch:
    """Stack samples of equal sizes into a batch; ``name`` stays a list.

    Of images in several versions (tuples of samples) it holds first all first versions, then all second ones.
    """
    if isinstance(samples[0], tuple):
        samples = [sample for version in zip(*samples, strict=True) for sample in version]
    batch: Batch = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, int):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    if "class_label" in batch:
        batch["most_classes"] = batch["class_label"].sum(1).amax()
    return batch


def with_changes(batch: Batch) -> Batch:
    """The batch after the changes of its pictures that the transform drew; ``changes`` are on the CPU."""
    if "changes" not in batch:
        return batch
    names = [name for name in VIEWS if name in batch]
    changes = batch["changes"].transpose(0, 1).flatten(0, 1)
    pictures = torch.cat([batch[name] for name in names])
    rows = (changes != no_change()).flatten(1).any(1).nonzero()[:, 0]
    if pictures.device.type == "cpu":
        for row in rows.tolist():
            pictures[row] = change_picture(pictures[row], changes[row])
    else:
        places = to_device(rows, pictures.device)
        pictures[places] = change_pictures(pictures[places], changes[rows])
    kept = {key: value for key, value in batch.items() if key != "changes"}
    return kept | dict(zip(names, pictures.chunk(len(names)), strict=True))


def _label_files(split: Split, folder: Path) -> list[Path]:
    """The label of every image: ``<name>.npz`` if the folder holds that of the first one, else ``.png``."""
    suffix = ".npz" if (folder / f"{split.records[0].name}.npz").is_file() else ".png"
    paths = [folder / f"{record.name}{suffix}" for record in split.records]
    advice = "finish the stage that makes them, or correct data.label_dir"
    require_files(paths, f"labels of split '{split.name}'", advice)
    return paths


def _file_size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else -1
    except OSError:
        return -1
