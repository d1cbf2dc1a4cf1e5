"""Large images as overlapping tiles: a split of tiles, and results of tiles put together again.

A tile is a window (top, left, bottom, right) of its image. Splits list images, which are cut into tiles
afterwards, so no image has tiles in two splits. H, W: pixels of the image.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from datasets.base import Record, Split
from utils.image import IGNORE_INDEX, picture_size

Window = tuple[int, int, int, int]


def tile_split(split: Split, side: int, overlap: int = 64, tags: str = "image") -> Split:
    """The split with every image that is larger than a tile as its tiles, called ``<name>__<top>_<left>``.

    Args:
        side: of a tile, pixels.
        overlap: pixels that neighbours share at least.
        tags: of a tile: those of its ``image``, or the classes of its part of the ``mask``.
    """
    records: list[Record] = []
    for record in split.records:
        width, height = picture_size(record.image, record.reading)
        if max(height, width) <= side:
            records.append(record)
            continue
        mask = record.read_mask() if tags == "mask" else None
        for window, _ in tiles((height, width), side, overlap):
            top, left, bottom, right = window
            present = record.tags if mask is None else _classes(mask[top:bottom, left:right])
            tile = replace(record, name=f"{record.name}__{top}_{left}", window=window, tags=present)
            records.append(tile)
    return replace(split, records=tuple(records))


def tiles(size: tuple[int, int], side: int, overlap: int) -> Iterator[tuple[Window, Window]]:
    """Windows that cover an image (H, W), row by row, and the part of each that no other one answers for.

    Neighbours meet in the middle of what they share, so every pixel of a part is at least ``overlap // 2``
    pixels away from a side of its window that is not a side of the image.

    Raises:
        ValueError: tiles that do not advance.
    """
    if not 0 <= overlap < side:
        raise ValueError(f"tiles of {side} pixels cannot share {overlap}: choose a smaller overlap")
    columns = _intervals(size[1], side, overlap)
    for top, bottom, first_row, last_row in _intervals(size[0], side, overlap):
        for left, right, first_column, last_column in columns:
            yield (top, left, bottom, right), (first_row, first_column, last_row, last_column)


def in_tiles(work: Callable[[Tensor], Tensor], image: Tensor, side: int, overlap: int) -> Tensor:
    """What ``work`` makes of an image (C, H, W), (..., H, W), done tile by tile.

    The same as ``work(image)`` if no pixel of a result depends on pixels further than ``overlap // 2`` away.
    """
    size = (image.shape[-2], image.shape[-1])
    made: Tensor | None = None
    for (top, left, bottom, right), (y0, x0, y1, x1) in tiles(size, side, overlap):
        part = work(image[..., top:bottom, left:right])
        if made is None:
            made = part.new_empty(*part.shape[:-2], *size)
        made[..., y0:y1, x0:x1] = part[..., y0 - top : y1 - top, x0 - left : x1 - left]
    assert made is not None
    return made


def _intervals(length: int, side: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Along one axis: start and end of each tile, and of its own part. The last tile ends with the image."""
    starts = [*range(0, max(length - side, 0), side - overlap), max(length - side, 0)]
    ends = [min(start + side, length) for start in starts]
    seams = [(end + start) // 2 for end, start in zip(ends, starts[1:])]
    return list(zip(starts, ends, [0, *seams], [*seams, length], strict=True))


def _classes(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(k) for k in np.unique(mask) if k not in (0, IGNORE_INDEX))
