"""Make what training needs from MS COCO 2014: masks of the 80 classes, image tags, split lists.

    python tools/prepare_coco.py --root data/coco
    python tools/prepare_coco.py --root data/coco --masks other/masks       masks that somebody else made

Reads ``annotations/instances_{train,val}2014.json``. Writes below root
``SegmentationClass/{train,val}2014/*.png``, ``tags.csv``, ``ImageSets/{train,val,val_part}.txt`` (the images
that show at least one class) and ``masks.json`` (the rule of the masks, and a checksum of their label
histogram).

The rule. Mask value k is the k-th category by ascending id. Instances are drawn in the order of the file, and
where they overlap the first one stays (``--overlap smallest``: the smallest area). Crowd regions show what
instances leave free, as 255 (``--crowd class``: as their class). An image is tagged with the classes of its
mask and of its crowd regions. An interrupted run continues; masks that are there are kept.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from pycocotools import mask as rle

from datasets.coco import CLASS_NAMES
from datasets.lists import check_counts, refuse_hidden, some
from datasets.tags import write_tags
from engine.config.options import command_line, option
from utils.files import read_json, write_atomic, write_json
from utils.image import IGNORE_INDEX, read_mask, write_mask
from utils.logging import progress_bar

EXPECTED = {"train": 82081, "val": 40137, "val_part": 5000}
# Category ids 1..90 have gaps here. In masks that hold category ids these values never occur; in masks that
# number the 80 classes without gaps they all do, and 81..90 do not.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
CATEGORY_IDS = tuple(k for k in range(1, 91) if k not in UNUSED_IDS)


@dataclass(kw_only=True)
class Options:
    """Options of the tool."""

    root: Path = option(Path("data/coco"), "folder with annotations/, train2014/ and val2014/")
    overlap: str = option(
        "first",
        "which instance stays where they overlap: the first of the file or the smallest",
        choices=("first", "smallest"),
    )
    crowd: str = option("ignore", "crowd regions: 255 or their class", choices=("ignore", "class"))
    masks: Path | None = option(
        None,
        "folder of masks made elsewhere, numbered 0..80 or by category ids: used in place of drawing",
        reads=True,
    )
    any_counts: bool = option(False, "accept a part of COCO")


class Annotation(NamedTuple):
    """One object, or one crowd of objects."""

    value: int  # of the mask, 1..80
    is_crowd: bool
    area: float
    region: Any  # run-length code of pycocotools


class Photo(NamedTuple):
    """One annotated image."""

    size: tuple[int, int]  # height, width
    annotations: list[Annotation]


def run(options: Options) -> dict[str, int]:
    """Prepare the folder ``root``; returns the number of images of each list."""
    root, foreign = options.root, options.masks
    rule = {"overlap": options.overlap, "crowd": options.crowd}
    rule = rule if foreign is None else {"masks": str(foreign.absolute())}
    parts = {
        part: read_annotations(root / "annotations" / f"instances_{part}2014.json")
        for part in ("train", "val")
    }
    _claim(root, rule)
    lists: dict[str, list[str]] = {}
    tags: dict[str, list[str]] = {}
    checksums: dict[str, str] = {}
    for part, photos in parts.items():
        out = root / "SegmentationClass" / f"{part}2014"
        if foreign is not None:
            adopt(foreign, part, photos, out)
        found, histogram = convert(photos, out, options)
        text = "\n".join(f"{value} {count}" for value, count in enumerate(histogram.tolist()) if count)
        checksums[part] = hashlib.sha256(text.encode()).hexdigest()[:16]
        lists[part] = sorted(found)
        tags |= {name: found[name] for name in lists[part]}
    lists["val_part"] = lists["val"][: EXPECTED["val_part"]]
    for split, names in lists.items():
        write_atomic(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
    write_tags(root / "tags.csv", tags)
    counts = {split: len(names) for split, names in lists.items()}
    write_json(root / "masks.json", {"rule": rule, "images": counts, "label_histogram_sha256": checksums})
    check_counts(counts, EXPECTED, "COCO 2014", options.any_counts)
    return counts


def read_annotations(file: Path) -> dict[str, Photo]:
    """Annotated image name -> its annotations, in ascending order of the image ids.

    A name is that of the file, or its path where two folders have files of one name. What is not as in COCO's
    files is an error that names the annotation or image.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: unpack annotations_trainval2014.zip")
    content = read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise ValueError(
            f"{file} is not a list of COCO's instances: expected images, annotations, categories"
        )
    categories = {_number(c, "id", f"{file}, category"): str(c.get("name")) for c in content["categories"]}
    if ("background", *(categories[k] for k in sorted(categories))) != CLASS_NAMES:
        raise ValueError(f"{file} has {len(categories)} other classes than the 80 of COCO")
    value_of = {category: value for value, category in enumerate(sorted(categories), start=1)}

    photos: dict[int, Photo] = {}
    paths: dict[int, Path] = {}
    for image in content["images"]:
        place = f"{file}, image {image.get('id')!r}"
        key = _number(image, "id", place)
        size = _number(image, "height", place), _number(image, "width", place)
        refuse_hidden(str(image.get("file_name")), place)
        if key in photos or "file_name" not in image:
            raise ValueError(f"{place} appears twice, or has no file_name")
        photos[key], paths[key] = Photo(size, []), Path(image["file_name"]).with_suffix("")
    orphans = []
    for entry in content["annotations"]:
        place = f"{file}, annotation {entry.get('id')!r}"
        key, category = _number(entry, "image_id", place), _number(entry, "category_id", place)
        if key not in photos:
            orphans.append(str(entry.get("id")))
        elif category not in value_of or (is_crowd := _number({"iscrowd": 0, **entry}, "iscrowd", place)) > 1:
            raise ValueError(
                f"{place}: category_id {category} or iscrowd {entry.get('iscrowd')!r} is unknown"
            )
        else:
            region = _region(entry, photos[key].size, place)
            area = float(entry.get("area", rle.area(region)))
            photos[key].annotations.append(Annotation(value_of[category], is_crowd == 1, area, region))
    if orphans:
        what = some(orphans, len(content["annotations"]), "annotations")
        raise ValueError(f"{file}: {what} belong to images that the file does not list")
    stems = Counter(path.name for path in paths.values())
    named = {key: path.as_posix() if stems[path.name] > 1 else path.name for key, path in paths.items()}
    if len(set(named.values())) < len(named):
        raise ValueError(f"{file} lists two images with the same file_name")
    return {named[key]: photos[key] for key in sorted(photos) if photos[key].annotations}


def _number(entry: Mapping[str, Any], key: str, place: str) -> int:
    value = entry.get(key)
    if not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise ValueError(f"{place}: {key} is {value!r}, expected a whole number")
    return int(value)


def _region(entry: Mapping[str, Any], size: tuple[int, int], place: str) -> Any:
    """The run-length code of an annotation: polygons, or a run-length code of its own."""
    shape = entry.get("segmentation")
    if isinstance(shape, list):
        # pycocotools takes a list of four numbers for a box.
        if not shape or not all(
            isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in shape
        ):
            raise ValueError(f"{place}: segmentation needs polygons [[x, y, x, y, x, y, ...], ...]")
        return rle.merge(rle.frPyObjects(shape, *size))
    try:
        region = rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
    except (TypeError, KeyError) as error:
        raise ValueError(f"{place}: segmentation is neither polygons nor a run-length code") from error
    if list(region["size"]) != list(size):
        raise ValueError(f"{place}: segmentation is of size {region['size']}, its image of {list(size)}")
    return region


def convert(
    photos: Mapping[str, Photo], out: Path, options: Options
) -> tuple[dict[str, list[str]], np.ndarray]:
    """Write the masks that are not there yet.

    A class is a tag of an image when a pixel of the mask or, unless masks were made elsewhere, a crowd region
    is of it. Where a mask holds no class, its objects being smaller than a pixel, the annotations decide.

    Returns:
        Image name -> its classes, and the number of pixels of every mask value (256,).
    """
    tags, histogram = {}, np.zeros(256, dtype=np.int64)
    for name, photo in progress_bar(photos.items(), desc=out.name, unit="image"):
        path = out / f"{name}.png"
        if path.is_file():
            mask = read_mask(path)
        else:
            mask = draw(photo, options.overlap, options.crowd)
            write_mask(path, mask)
        histogram += np.bincount(mask.ravel(), minlength=256)
        present = set(np.unique(mask).tolist()) - {0, IGNORE_INDEX}
        if options.masks is None:
            present |= {item.value for item in photo.annotations if item.is_crowd}
        present = present or {item.value for item in photo.annotations}
        tags[name] = [CLASS_NAMES[value] for value in sorted(present)]
    return tags, histogram


def draw(photo: Photo, overlap: str = "first", crowd: str = "ignore") -> np.ndarray:
    """The mask (H, W) uint8 of one image, by the rule that the module states."""
    instances = [item for item in photo.annotations if not item.is_crowd]
    if overlap == "smallest":
        instances.sort(key=lambda item: item.area)
    mask = np.zeros(photo.size, dtype=np.uint8)
    for item in [*instances, *(item for item in photo.annotations if item.is_crowd)]:
        value = IGNORE_INDEX if item.is_crowd and crowd == "ignore" else item.value
        mask[rle.decode(item.region).astype(bool) & (mask == 0)] = value
    return mask


def adopt(masks: Path, part: str, names: Collection[str], out: Path) -> None:
    """Write masks that were made elsewhere under our names and numbers; those that are there are kept.

    Two layouts are known, ``{part}2014/COCO_{part}2014_000000000009.png`` and ``{part}/000000000009.png``,
    and two numberings, which the values that occur tell apart: the 80 classes without gaps, and category ids.
    """
    places = {
        name: (masks / f"{part}2014" / f"{name}.png", masks / part / f"{name.rpartition('_')[2]}.png")
        for name in names
    }
    paths = {name: path for name, both in places.items() for path in both[::-1] if path.is_file()}
    if missing := [name for name in names if name not in paths]:
        raise FileNotFoundError(
            f"{some(missing, len(names), 'masks')} of {part}2014 are missing in {masks}: looked for "
            f"{part}2014/NAME.png and {part}/NUMBER.png"
        )
    used = np.zeros(256, dtype=bool)
    for path in progress_bar(paths.values(), desc=f"numbering of {part}2014", unit="image"):
        used[np.unique(read_mask(path))] = True
    table = numbering(np.flatnonzero(used).tolist(), masks)
    for name, path in progress_bar(paths.items(), desc=out.name, unit="image"):
        if not (out / f"{name}.png").is_file():
            write_mask(out / f"{name}.png", table[read_mask(path)])


def numbering(values: Iterable[int], source: str | Path) -> np.ndarray:
    """(256,) uint8 table from the values of masks in circulation to ours, by all that occur in them."""
    seen = set(values) - {0, IGNORE_INDEX}
    contiguous = all(value <= 80 for value in seen)
    categories = not seen & set(UNUSED_IDS) and all(value <= 90 for value in seen)
    if contiguous == categories:
        why = "fit both numberings" if contiguous else f"fit neither ({sorted(seen)[-5:]} among them)"
        raise ValueError(
            f"the values of the masks in {source} {why}: known are 1..80 without gaps, and category ids "
            "1..90; leave --masks out to draw them from the annotations"
        )
    table = np.arange(256, dtype=np.uint8)
    if categories:
        table[list(CATEGORY_IDS)] = np.arange(1, 81, dtype=np.uint8)
    kind = "81 ids (0 and the 80 classes)" if contiguous else "91 ids (0 and category ids), mapped to 81"
    print(f"{source}: {kind}")
    return table


def _claim(root: Path, rule: Mapping[str, str]) -> None:
    """Masks of two rules must not mix: what is there must have been made by this one."""
    record, folder = root / "masks.json", root / "SegmentationClass"
    if record.is_file() and folder.is_dir() and read_json(record)["rule"] != rule:
        raise ValueError(
            f"the masks in {folder} follow another rule ({read_json(record)['rule']}, now "
            f"{dict(rule)}); move that folder and {record} away first"
        )
    write_json(record, {"rule": dict(rule)})


if __name__ == "__main__":
    command_line(Options, run, __doc__)
