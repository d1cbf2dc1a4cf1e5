"""Everything that can be wrong with the files of a split, image by image (tools/check_data.py)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from datasets.base import Record, Split, checked_mask
from utils.image import NO_FILE, is_tiff, read_bands

SAMPLE = 1000  # values of a deep image that its range is measured by


@dataclass
class Facts:
    """What reading one image and its mask has shown."""

    digest: str = ""  # of the file
    kind: str = ""  # format and depth
    size: tuple[int, int] | None = None  # width, height
    sums: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))  # pixels, values, squares by channel
    bands: np.ndarray | None = None  # (n, N) values of a deep or multi-band file
    shown: np.ndarray | None = None  # values of the mask
    image_error: str | None = None
    mask_error: str | None = None


def examine(record: Record, split: Split) -> Facts:
    """Read an image and, where there is one, its mask; what fails becomes an error of the facts."""
    facts = Facts()
    try:
        facts.digest = hashlib.sha256(record.image.read_bytes()).hexdigest()
        facts.kind, facts.bands = _kind(record)
        image = record.read_image()
    except NO_FILE as error:
        facts.image_error = f"{record.image}: {error.strerror}"
        return facts
    except Exception as error:  # of whatever kind decoders raise
        facts.image_error = str(error)
        return facts
    facts.size = image.size
    # Exact sums in whole numbers, from how often each value occurs.
    counts = np.array(image.histogram(), dtype=float).reshape(3, 256)
    facts.sums = counts @ np.stack([np.arange(256.0) ** power for power in range(3)], axis=1)
    if record.mask is not None and record.mask.is_file():
        try:
            mask = checked_mask(record.read_mask(), record.mask, record, image, split)
            facts.shown = np.unique(mask)
        except ValueError as error:
            facts.mask_error = str(error)
    return facts


def _kind(record: Record) -> tuple[str, np.ndarray | None]:
    """Format and depth of a file, and a sample of the values of one that has other than 8 bits or 3 bands."""
    if is_tiff(record.image):
        depth = "TIFF"
    else:
        with Image.open(record.image) as image:
            kind = f"{image.format} {image.mode}"
            if image.mode != "F" and not image.mode.startswith("I"):
                return kind, None
            depth = str(image.format)
    values = read_bands(record.image)
    count = values.shape[2]
    kind = f"{depth} {count} x {values.dtype}"
    if values.dtype == np.uint8 and count in (1, 3):
        return kind, None
    flat = values.reshape(-1, count)
    return kind, flat[:: -(-len(flat) // SAMPLE)].astype(np.float64)


class Measures:
    """Statistics of a split over the facts of its images."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, 3))
        self.bands: dict[int, list[np.ndarray]] = {}
        self.kinds: dict[str, int] = {}
        self.sizes: list[tuple[int, int]] = []

    def add(self, facts: Facts) -> None:
        """Count an image."""
        if facts.kind:
            self.kinds[facts.kind] = self.kinds.get(facts.kind, 0) + 1
        if facts.bands is not None:
            self.bands.setdefault(facts.bands.shape[1], []).append(facts.bands)
        if facts.size:
            self.sizes.append(facts.size)
            self.sums += facts.sums

    @cached_property
    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of red, green and blue over all pixels, as they are read, on 0..255."""
        pixels, values, squares = self.sums.T
        if not pixels.any():
            return [], []
        mean = values / pixels
        std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
        return mean.round(3).tolist(), std.round(3).tolist()

    @cached_property
    def value_range(self) -> list[float] | None:
        """Values between which 99 of 100 lie, over the bands and images of deep files."""
        sample = [values.ravel() for parts in self.bands.values() for values in parts]
        if not sample:
            return None
        low, high = np.nanpercentile(np.concatenate(sample), (0.5, 99.5))
        return [float(f"{low:.4g}"), float(f"{high:.4g}")]
