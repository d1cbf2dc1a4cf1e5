"""Make what training needs from MS COCO 2014: masks of the 80 classes, image tags, split lists.

    python tools/prepare_coco.py --root data/coco

Reads ``annotations/instances_{train,val}2014.json``. Writes below root
``SegmentationClass/{train,val}2014/*.png``, ``tags.csv`` and ``ImageSets/{train,val,val_part}.txt``: the
images that show at least one class. Mask value k is the k-th category by ascending id; where instances
overlap the first annotation wins, as in the masks that the field uses. Can be stopped and run again; masks
that are there are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from datasets.coco import CLASS_NAMES
from datasets.lists import write_tags
from utils.artifacts import write_atomic
from utils.image import read_mask, write_mask

EXPECTED = {"train": 82081, "val": 40137, "val_part": 5000}


def run(cfg: Mapping[str, Any]) -> dict[str, int]:
    """Prepare the folder ``root``; returns the number of images of each list.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: the counts are not those of COCO 2014 (``any_counts`` accepts them), or other classes.
    """
    root = Path(cfg["root"])
    files = {part: root / "annotations" / f"instances_{part}2014.json" for part in ("train", "val")}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: unpack annotations_trainval2014.zip in {root}")
    lists: dict[str, list[str]] = {}
    tags: dict[str, list[str]] = {}
    for part, file in files.items():
        found = convert(COCO(file), root / "SegmentationClass" / f"{part}2014")
        lists[part] = sorted(found)
        tags |= {name: found[name] for name in lists[part]}
    lists["val_part"] = lists["val"][: EXPECTED["val_part"]]
    for split, names in lists.items():
        write_atomic(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
    write_tags(root / "tags.csv", tags)
    counts = {split: len(names) for split, names in lists.items()}
    for split, count in counts.items():
        verdict = "as expected" if count == EXPECTED[split] else f"EXPECTED {EXPECTED[split]}"
        print(f"{split:<9} {count:>6} images, {verdict}")
    if counts != EXPECTED and not cfg.get("any_counts"):
        raise ValueError(
            f"this is not the whole of COCO 2014: {counts} instead of {EXPECTED}; everything was written, "
            "accept it with --any_counts"
        )
    return counts


def convert(coco: COCO, out: Path) -> dict[str, list[str]]:
    """Write the masks of one annotation file; image name -> its classes, for images with at least one."""
    categories = sorted(coco.loadCats(coco.getCatIds()), key=lambda category: category["id"])
    names = ("background", *(category["name"] for category in categories))
    if names != CLASS_NAMES:
        raise ValueError(f"the annotations have {len(categories)} other classes than the 80 of COCO")
    value_of = {category["id"]: value for value, category in enumerate(categories, start=1)}
    tags = {}
    for image_id in tqdm(sorted(coco.imgs), desc=out.name, unit="image"):
        annotations = coco.imgToAnns[image_id]
        if not annotations:
            continue
        info = coco.imgs[image_id]
        name = Path(info["file_name"]).stem
        path = out / f"{name}.png"
        if path.is_file():
            mask = read_mask(path)
        else:
            mask = np.zeros((info["height"], info["width"]), dtype=np.uint8)
            for annotation in annotations:
                inside = coco.annToMask(annotation).astype(bool)
                mask[inside & (mask == 0)] = value_of[annotation["category_id"]]
            write_mask(path, mask)
        present = [names[value] for value in np.unique(mask) if value > 0]
        if present:
            tags[name] = present
    return tags


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", default="data/coco", help="folder with annotations/, train2014/ and val2014/"
    )
    parser.add_argument("--any_counts", action="store_true", help="accept a part of COCO")
    try:
        run(vars(parser.parse_args(argv)))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
