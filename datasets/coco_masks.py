"""Masks and tags of MS COCO out of its annotations.

H x W the image.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from datasets.coco import CLASS_NAMES
from datasets.lists import refuse_hidden
from utils.files import read_json
from utils.image import IGNORE_INDEX


class Annotation(NamedTuple):
    """One object, or one crowd of objects."""

    value: int  # of the mask, 1..80
    is_crowd: bool
    region: Any  # run-length code of pycocotools


class Photo(NamedTuple):
    """One annotated image."""

    size: tuple[int, int]  # height, width
    annotations: list[Annotation]


def read_annotations(file: Path) -> dict[str, Photo]:
    """Annotated images of COCO itself: `read_instances`, and the classes must be the 80."""
    names, photos = read_instances(file)
    if names != CLASS_NAMES:
        raise ValueError(f"{file} has {len(names) - 1} other classes than the 80 of COCO")
    return {name: photo for name, photo in photos.items() if photo.annotations}


def read_instances(file: Path) -> tuple[tuple[str, ...], dict[str, Photo]]:
    """Class names, background first, and image name -> its annotations, in ascending order of the ids.

    A name is that of the file, or its path where two folders have files of one name.

    Raises:
        FileNotFoundError, ValueError: no file, or an annotation or image, named by its id, unlike COCO's.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: unpack annotations_trainval2014.zip")
    content = read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise ValueError(f"{file} must have images, annotations and categories, as COCO's instances have")
    categories = {_number(c, "id", f"{file}, category"): str(c.get("name")) for c in content["categories"]}
    names = ("background", *(categories[k] for k in sorted(categories)))
    value_of = {category: value for value, category in enumerate(sorted(categories), start=1)}

    photos: dict[int, Photo] = {}
    paths: dict[int, Path] = {}
    for image in content["images"]:
        place = f"{file}, image {image.get('id')!r}"
        key = _number(image, "id", place)
        refuse_hidden(str(image.get("file_name")), place)
        if key in photos or "file_name" not in image:
            raise ValueError(f"{place} appears twice, or has no file_name")
        photos[key] = Photo((_number(image, "height", place), _number(image, "width", place)), [])
        paths[key] = Path(image["file_name"]).with_suffix("")
    for entry in content["annotations"]:
        place = f"{file}, annotation {entry.get('id')!r}"
        known = {"image_id": photos, "category_id": value_of, "iscrowd": (0, 1)}
        numbers = {key: _number({"iscrowd": 0, **entry}, key, place) for key in known}
        for key, number in numbers.items():
            if number not in known[key]:
                raise ValueError(f"{place}: {key} {number} is unknown")
        photo, value = photos[numbers["image_id"]], value_of[numbers["category_id"]]
        region = _region(entry, photo.size, place)
        photo.annotations.append(Annotation(value, numbers["iscrowd"] == 1, region))

    stems = Counter(path.name for path in paths.values())
    named = {key: path.as_posix() if stems[path.name] > 1 else path.name for key, path in paths.items()}
    if len(set(named.values())) < len(named):
        raise ValueError(f"{file} lists two images with the same file_name")
    return names, {named[key]: photos[key] for key in sorted(photos)}


def _number(entry: Mapping[str, Any], key: str, place: str) -> int:
    value = entry.get(key)
    if not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise ValueError(f"{place}: {key} is {value!r}, expected a whole number")
    return int(value)


def _region(entry: Mapping[str, Any], size: tuple[int, int], place: str) -> Any:
    """The run-length code of an annotation: polygons, or a run-length code of its own."""
    shape = entry.get("segmentation")
    polygons = shape if isinstance(shape, list) else []
    # pycocotools takes a list of four numbers for a box.
    if polygons and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
        return rle.merge(rle.frPyObjects(polygons, *size))
    if not isinstance(shape, dict) or not {"counts", "size"} <= set(shape):
        raise ValueError(f"{place}: segmentation must be polygons [[x, y, x, y, x, y, ...]] or run lengths")
    if list(shape["size"]) != list(size):
        raise ValueError(f"{place}: segmentation is of size {shape['size']}, its image of {list(size)}")
    return rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape


def draw(photo: Photo) -> np.ndarray:
    """The mask (H, W) of an image: the first of several instances stays; crowds behind them are 255."""
    mask = np.zeros(photo.size, dtype=np.int32)
    for item in sorted(photo.annotations, key=lambda item: item.is_crowd):
        value = IGNORE_INDEX if item.is_crowd else item.value
        mask[rle.decode(item.region).astype(bool) & (mask == 0)] = value
    return mask


def tags_of(photo: Photo, mask: np.ndarray, with_crowds: bool) -> list[str]:
    """The classes that a mask shows or, if asked for, a crowd is of.

    Where a mask holds no class, its objects being smaller than a pixel, the annotations decide.
    """
    present = set(np.unique(mask).tolist()) - {0, IGNORE_INDEX}
    if with_crowds:
        present |= {item.value for item in photo.annotations if item.is_crowd}
    present = present or {item.value for item in photo.annotations}
    return [CLASS_NAMES[value] for value in sorted(present)]
