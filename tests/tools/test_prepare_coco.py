import json

import numpy as np
import pytest

from datasets.coco import CLASS_NAMES, coco_split
from tools.prepare_coco import run
from utils.image import read_mask


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture
def coco(tmp_path):
    """One train image with a person (id 1) before a toothbrush (id 90) that overlaps, one without anything;
    one val image."""
    ids = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [{"id": k, "name": name} for k, name in zip(ids, CLASS_NAMES[1:], strict=True)]
    objects = {"train": [(1, box(0, 0, 4, 4)), (90, box(2, 2, 6, 6))], "val": [(63, box(0, 0, 3, 3))]}
    for part, entries in objects.items():
        images = [
            {"id": k, "file_name": f"COCO_{part}2014_{k:012d}.jpg", "height": 10, "width": 12} for k in (7, 8)
        ]
        annotations = [
            {
                "id": k,
                "image_id": 7,
                "category_id": category,
                "segmentation": polygon,
                "iscrowd": 0,
                "area": 1,
                "bbox": [0, 0, 1, 1],
            }
            for k, (category, polygon) in enumerate(entries, start=1)
        ]
        file = tmp_path / "annotations" / f"instances_{part}2014.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        (tmp_path / f"{part}2014").mkdir()
        (tmp_path / f"{part}2014" / images[0]["file_name"]).write_bytes(b"")
    return tmp_path


def test_masks_tags_and_lists(coco):
    assert run({"root": coco, "any_counts": True}) == {"train": 1, "val": 1, "val_part": 1}
    record = coco_split(coco, "train").records[0]
    assert record.name == "COCO_train2014_000000000007" and record.tags == (1, 80)
    mask = read_mask(record.mask)
    assert mask.shape == (10, 12) and set(np.unique(mask)) == {0, 1, 80}
    assert (mask[2:4, 2:4] == 1).all(), "the first annotation wins"
    assert (mask[5:8, 5:8] == 80).all()
    assert coco_split(coco, "val_part").records[0].tags == (CLASS_NAMES.index("couch"),)


def test_counts_and_files_are_checked(coco):
    with pytest.raises(ValueError, match="not the whole of COCO 2014"):
        run({"root": coco})
    (coco / "annotations" / "instances_val2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations_trainval2014\.zip"):
        run({"root": coco, "any_counts": True})
