"""Objects cut out of pseudo labels, and a picture of what was found (tools/mine_objects.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.base import Record
from datasets.context_decoupling import MinedObject, extract_object, object_path, save_object
from utils.cam_files import label_path
from utils.files import has_date, keep_date
from utils.image import read_mask

TILE = 96  # side of an object in the overview, pixels
TILES = 8  # objects of a class in the overview
NAMES = 150  # pixels beside them for the name of the class


def mine(record: Record, labels: Path, out: Path, min_share: float, max_share: float) -> int | None:
    """Cut the object out of one image unless that is done; returns its class id, None without object."""
    path = label_path(labels, record.name)
    label, image = read_mask(path), record.read_image()
    if label.shape != (image.height, image.width):
        raise ValueError(
            f"label {path} is {label.shape[1]} x {label.shape[0]} pixels, but its "
            f"image {record.image} is {image.width} x {image.height}"
        )
    item: MinedObject | None = extract_object(np.asarray(image), label, min_share, max_share)
    if item is None:
        return None
    cut = object_path(out, item.class_id, record.name)
    if not has_date(cut, path, record.image):
        save_object(out, record.name, item)
        keep_date(cut, path, record.image)
    return item.class_id


def overview(bank: Path, objects: Mapping[int, list[str]], class_names: Sequence[str]) -> Image.Image:
    """The first objects of every class on grey, a class per row."""
    step, font = TILE + 4, ImageFont.load_default(14)
    canvas = Image.new("RGB", (NAMES + TILES * step, len(objects) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (class_id, names) in enumerate(objects.items()):
        draw.text((4, row * step), f"{class_names[class_id]}\nobjects: {len(names)}", "black", font)
        for column, name in enumerate(names[:TILES]):
            with Image.open(object_path(bank, class_id, name)) as picture:
                picture.thumbnail((TILE, TILE))
                tile = Image.new("RGB", (TILE, TILE), "grey")
                tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2), picture)
            canvas.paste(tile, (NAMES + column * step, row * step))
    return canvas
