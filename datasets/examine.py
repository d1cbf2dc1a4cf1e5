"""Everything that can be wrong with the files of a split, image by image (tools/check_data.py)."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from datasets.agreement import class_counts
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


def measure(split: Split, facts: Iterable[Facts]) -> dict[str, Any]:
    """What a split consists of: counts, sizes, and what a config may need (mean, std, value_range).

    Mean and deviation of red, green and blue are those of all pixels as they are read, on 0..255. The range
    holds 99 of 100 values of the deep files; None where there are none.
    """
    facts = list(facts)
    readable = [fact for fact in facts if fact.size]
    widths, heights = zip(*(fact.size for fact in readable)) if readable else ((0,), (0,))
    pixels, values, squares = sum((fact.sums for fact in readable), np.zeros((3, 3))).T
    mean = values / np.maximum(pixels, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(pixels, 1) - mean**2, 0))
    deep = [fact.bands.ravel() for fact in facts if fact.bands is not None]
    limits = np.nanpercentile(np.concatenate(deep), (0.5, 99.5)) if deep else ()
    return {
        "images": len(split),
        "without_objects": sum(record.tags == () for record in split.records),
        "masks": sum(fact.shown is not None for fact in facts),
        "classes": class_counts(split) if any(record.tags is not None for record in split.records) else {},
        "kinds": dict(Counter(fact.kind for fact in facts if fact.kind)),
        "width": [min(widths), max(widths)],
        "height": [min(heights), max(heights)],
        "mean": mean.round(3).tolist() if readable else [],
        "std": std.round(3).tolist() if readable else [],
        "value_range": [float(f"{limit:.4g}") for limit in limits] or None,
    }
