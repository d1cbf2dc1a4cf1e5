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
mask and of its crowd regions. Can be stopped and run again; masks that are there are kept.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from pycocotools.coco import COCO

from datasets.coco import CLASS_NAMES
from datasets.tags import write_tags
from engine.config.options import command_line, option
from utils.files import read_json, write_atomic, write_json
from utils.image import IGNORE_INDEX, read_mask, write_mask
from utils.logging import progress_bar

EXPECTED = {"train": 82081, "val": 40137, "val_part": 5000}
PARTS = ("train", "val")
# Category ids 1..90 have gaps here. In masks that hold category ids these values never occur; in masks that
# number the 80 classes without gaps they all do, and 81..90 do not.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
CATEGORY_IDS = tuple(k for k in range(1, 91) if k not in UNUSED_IDS)


@dataclass(kw_only=True)
class Options:
    """What the tool is told."""

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


def run(options: Options) -> dict[str, int]:
    """Prepare the folder ``root``; returns the number of images of each list.

    Raises:
        FileNotFoundError: an annotation file, or a mask of ``masks``, is missing.
        ValueError: the counts are not those of COCO 2014 (``any_counts`` accepts them), other classes, masks
            of another rule in the way, or ``masks`` that are of neither known numbering.
    """
    root, foreign = options.root, options.masks
    rule = {"overlap": options.overlap, "crowd": options.crowd}
    rule = rule if foreign is None else {"masks": str(foreign.absolute())}
    files = {part: root / "annotations" / f"instances_{part}2014.json" for part in PARTS}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: unpack annotations_trainval2014.zip in {root}")
    if foreign is not None and not foreign.is_dir():
        raise FileNotFoundError(f"there is no folder {foreign} (--masks)")
    _claim(root, rule)
    lists: dict[str, list[str]] = {}
    tags: dict[str, list[str]] = {}
    histogram: dict[str, np.ndarray] = {}
    for part, file in files.items():
        coco, out = _annotations(file), root / "SegmentationClass" / f"{part}2014"
        if foreign is not None:
            adopt(foreign, part, image_names(coco), out)
        found, histogram[part] = convert(coco, out, **(rule if foreign is None else {"is_foreign": True}))
        lists[part] = sorted(found)
        tags |= {name: found[name] for name in lists[part]}
    lists["val_part"] = lists["val"][: EXPECTED["val_part"]]
    for split, names in lists.items():
        write_atomic(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
    write_tags(root / "tags.csv", tags)
    counts = {split: len(names) for split, names in lists.items()}
    checksums = {part: checksum(values) for part, values in histogram.items()}
    write_json(root / "masks.json", {"rule": rule, "images": counts, "label_histogram_sha256": checksums})
    for split, count in counts.items():
        verdict = "as expected" if count == EXPECTED[split] else f"EXPECTED {EXPECTED[split]}"
        told = f"   label histogram {checksums[split]}" if split in checksums else ""
        print(f"{split:<9} {count:>6} images, {verdict}{told}")
    if counts != EXPECTED and not options.any_counts:
        raise ValueError(
            f"this is not the whole of COCO 2014: {counts} instead of {EXPECTED}; everything was written, "
            "accept it with --any_counts"
        )
    return counts


def convert(
    coco: COCO,
    out: Path,
    overlap: Literal["first", "smallest"] = "first",
    crowd: Literal["ignore", "class"] = "ignore",
    is_foreign: bool = False,
) -> tuple[dict[str, list[str]], np.ndarray]:
    """Write the masks of one annotation file that are not there yet.

    A class is a tag of an image when a pixel of the mask, or a crowd region, is of it. Masks made elsewhere
    (``is_foreign``) speak for themselves. Where a mask holds no class at all, its objects being smaller than
    a pixel, the annotations say which there are.

    Returns:
        Annotated image name -> its classes, and the number of pixels of every mask value (256,).
    """
    value_of = _values(coco)
    tags, histogram = {}, np.zeros(256, dtype=np.int64)
    for image_id in progress_bar(sorted(coco.imgs), desc=out.name, unit="image"):
        annotations = coco.imgToAnns[image_id]
        if not annotations:
            continue
        info = coco.imgs[image_id]
        name = Path(info["file_name"]).stem
        path = out / f"{name}.png"
        if path.is_file():
            mask = read_mask(path)
        else:
            mask = draw(coco, annotations, (info["height"], info["width"]), value_of, overlap, crowd)
            write_mask(path, mask)
        histogram += np.bincount(mask.ravel(), minlength=256)
        present = set(np.unique(mask).tolist()) - {0, IGNORE_INDEX}
        if not is_foreign:
            present |= {value_of[a["category_id"]] for a in annotations if a.get("iscrowd")}
        present = present or {value_of[a["category_id"]] for a in annotations}
        tags[name] = [CLASS_NAMES[value] for value in sorted(present)]
    return tags, histogram


def draw(
    coco: COCO,
    annotations: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    value_of: Mapping[int, int],
    overlap: str = "first",
    crowd: str = "ignore",
) -> np.ndarray:
    """The mask (H, W) uint8 of one image, by the rule that the module states."""
    instances = [a for a in annotations if not a.get("iscrowd")]
    if overlap == "smallest":
        instances = sorted(instances, key=lambda annotation: annotation["area"])
    crowds = [a for a in annotations if a.get("iscrowd")]
    mask = np.zeros(size, dtype=np.uint8)
    for annotation in [*instances, *crowds]:
        value = value_of[annotation["category_id"]]
        if annotation.get("iscrowd") and crowd == "ignore":
            value = IGNORE_INDEX
        mask[coco.annToMask(annotation).astype(bool) & (mask == 0)] = value
    return mask


def adopt(masks: Path, part: str, names: Sequence[str], out: Path) -> None:
    """Write masks that were made elsewhere under our names and numbers; those that are there are kept.

    Two layouts are known, ``{part}2014/COCO_{part}2014_000000000009.png`` and ``{part}/000000000009.png``,
    and two numberings, told apart by the values that occur: the 80 classes without gaps, and category ids.
    """
    paths = {name: _foreign_mask(masks, part, name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} masks of {part}2014 are missing in {masks}, first that of "
            f"{missing[0]}; looked for {part}2014/NAME.png and {part}/NUMBER.png"
        )
    left = {name: path for name, path in paths.items() if not (out / f"{name}.png").is_file()}
    used = np.zeros(256, dtype=bool)
    for path in progress_bar(paths.values(), desc=f"numbering of {part}2014", unit="image"):
        assert path is not None
        used[np.unique(read_mask(path))] = True
    table = numbering(np.flatnonzero(used).tolist(), masks)
    for name, path in progress_bar(left.items(), desc=out.name, unit="image"):
        assert path is not None
        write_mask(out / f"{name}.png", table[read_mask(path)])


def numbering(values: Iterable[int], source: str | Path) -> np.ndarray:
    """(256,) uint8 table from the values of masks in circulation to ours.

    Args:
        values: all values that occur in the masks.

    Raises:
        ValueError: the values fit both numberings or none.
    """
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


def checksum(histogram: np.ndarray) -> str:
    """16 hex digits of the number of pixels of every mask value."""
    text = "\n".join(f"{value} {count}" for value, count in enumerate(histogram.tolist()) if count)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def image_names(coco: COCO) -> list[str]:
    """Names of the annotated images, in ascending order of their ids."""
    return [Path(coco.imgs[k]["file_name"]).stem for k in sorted(coco.imgs) if coco.imgToAnns[k]]


def _values(coco: COCO) -> dict[int, int]:
    """Mask value of every category id."""
    categories = sorted(coco.loadCats(coco.getCatIds()), key=lambda category: category["id"])
    names = ("background", *(category["name"] for category in categories))
    if names != CLASS_NAMES:
        raise ValueError(f"the annotations have {len(categories)} other classes than the 80 of COCO")
    return {category["id"]: value for value, category in enumerate(categories, start=1)}


def _foreign_mask(masks: Path, part: str, name: str) -> Path | None:
    candidates = (masks / f"{part}2014" / f"{name}.png", masks / part / f"{name.rpartition('_')[2]}.png")
    return next((path for path in candidates if path.is_file()), None)


def _annotations(file: Path) -> COCO:
    try:
        coco = COCO(file)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); unpack it again") from error
    if lacking := {"images", "annotations", "categories"} - set(coco.dataset):
        raise ValueError(f"{file} has no {', '.join(sorted(lacking))}: it is no list of COCO's instances")
    return coco


def _claim(root: Path, rule: Mapping[str, str]) -> None:
    """Masks of two rules must not mix: what is there must have been made by this one."""
    record, folder = root / "masks.json", root / "SegmentationClass"
    if record.is_file() and folder.is_dir() and read_json(record)["rule"] != rule:
        raise ValueError(
            f"the masks in {folder} were made by another rule ({read_json(record)['rule']}, now "
            f"{dict(rule)}); move that folder and {record} away first"
        )
    write_json(record, {"rule": dict(rule)})


if __name__ == "__main__":
    command_line(Options, run, __doc__)
