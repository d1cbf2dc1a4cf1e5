import json

import numpy as np
import pytest

from datasets.coco import CLASS_NAMES, coco_split
from tests.stages import call
from tools import prepare_coco
from tools.prepare_coco import CATEGORY_IDS, UNUSED_IDS, numbering
from utils.image import read_mask, write_mask


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture
def coco(tmp_path):
    """One train image with a person (id 1) before a smaller, overlapping toothbrush (id 90) and a crowd of
    sheep (id 20) below both, one image without anything; one val image."""
    categories = [{"id": k, "name": name} for k, name in zip(CATEGORY_IDS, CLASS_NAMES[1:], strict=True)]
    crowd = {"counts": [0, 120], "size": [10, 12]}  # all of the image
    objects = {
        "train": [(1, box(0, 0, 6, 6), 36, 0), (20, crowd, 120, 1), (90, box(4, 4, 4, 4), 16, 0)],
        "val": [(63, box(0, 0, 3, 3), 9, 0)],
    }
    for part, entries in objects.items():
        images = [
            {"id": k, "file_name": f"COCO_{part}2014_{k:012d}.jpg", "height": 10, "width": 12} for k in (7, 8)
        ]
        keys = ("id", "image_id", "category_id", "segmentation", "area", "iscrowd")
        annotations = [dict(zip(keys, (k, 7, *entry))) for k, entry in enumerate(entries, start=1)]
        file = tmp_path / "annotations" / f"instances_{part}2014.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        (tmp_path / f"{part}2014").mkdir()
        (tmp_path / f"{part}2014" / images[0]["file_name"]).write_bytes(b"")
    return tmp_path


def prepare(root, **options):
    return call(prepare_coco, {"root": root, "any_counts": True} | options)


def test_masks_tags_and_lists(coco):
    assert prepare(coco) == {"train": 1, "val": 1, "val_part": 1}
    record = coco_split(coco, "train").records[0]
    sheep = CLASS_NAMES.index("sheep")
    assert record.name == "COCO_train2014_000000000007" and record.tags == (1, sheep, 80)
    mask = read_mask(record.mask)
    assert mask.shape == (10, 12) and set(np.unique(mask)) == {1, 80, 255}
    assert (mask[4:6, 4:6] == 1).all(), "the first instance stays"
    assert (mask[6:8, 6:8] == 80).all() and (mask[9] == 255).all(), "a crowd shows what instances leave free"
    assert coco_split(coco, "val_part").records[0].tags == (CLASS_NAMES.index("couch"),)


@pytest.mark.parametrize("layout", ["{part}2014/{name}.png", "{part}/{number}.png"])
@pytest.mark.parametrize("ids", ["classes", "categories"])
def test_masks_in_circulation_are_recognised(coco, tmp_path, layout, ids):
    """Both layouts and both numberings end as the 80 classes without gaps."""
    values = np.array([0, *range(1, 81)] if ids == "classes" else [0, *CATEGORY_IDS], dtype=np.uint8)
    grid = np.concatenate([values, np.full(39, 255, dtype=np.uint8)]).reshape(10, 12)
    for part in ("train", "val"):
        name = f"COCO_{part}2014_{7:012d}"
        write_mask(tmp_path / "other" / layout.format(part=part, name=name, number=f"{7:012d}"), grid)
    prepare(coco, masks=tmp_path / "other")
    record = coco_split(coco, "train").records[0]
    assert read_mask(record.mask).ravel().tolist() == [*range(81), *[255] * 39]
    assert record.tags == tuple(range(1, 81))


def test_masks_made_elsewhere_speak_for_themselves(coco, tmp_path):
    """A crowd that the annotations have, but no pixel of the mask shows, is no tag."""
    for part in ("train", "val"):
        mask = np.full((10, 12), 80, dtype=np.uint8)
        mask[0, :2] = 12, 66  # numbers that only the 80 classes without gaps have
        write_mask(tmp_path / f"other/{part}/{7:012d}.png", mask)
    prepare(coco, masks=tmp_path / "other")
    assert coco_split(coco, "train").records[0].tags == (12, 66, 80)
    with pytest.raises(ValueError, match="another rule"):
        prepare(coco)


def test_an_object_smaller_than_a_pixel_keeps_its_image(coco):
    tiny = {"segmentation": box(3.1, 3.1, 0.1, 0.1)}
    edit(coco, lambda content: content["annotations"][0].update(tiny), part="val")
    assert prepare(coco)["val"] == 1
    record = coco_split(coco, "val").records[0]
    assert record.tags == (CLASS_NAMES.index("couch"),) and not read_mask(record.mask).any()


@pytest.mark.parametrize(
    ("values", "term"), [([0, 1, 2, 255], "both"), ([UNUSED_IDS[0], 85], "neither"), ([120], "neither")]
)
def test_a_numbering_that_is_not_clear_is_refused(tmp_path, values, term):
    with pytest.raises(ValueError, match=f"fit {term}"):
        numbering(values, tmp_path)


def test_counts_and_files_are_checked(coco, tmp_path):
    with pytest.raises(ValueError, match="incomplete COCO 2014"):
        prepare(coco, any_counts=False)
    (coco / "masks.json").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 masks .*COCO_train2014_000000000007"):
        prepare(coco, masks=tmp_path)
    (coco / "annotations" / "instances_val2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations_trainval2014\.zip"):
        prepare(coco)


def edit(coco, change, part="train"):
    """Change annotations."""
    file = coco / f"annotations/instances_{part}2014.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("where", "key", "value", "term"),
    [
        *(
            ("annotations", "segmentation", shape, "annotation 2: segmentation")
            for shape in (None, [0, 0, 5, 0, 5, 5], {"counts": [0, 4], "size": [2, 2]})
        ),
        ("annotations", "image_id", 99, "annotation 2: image_id"),
        ("annotations", "iscrowd", "no", "annotation 2: iscrowd"),
        ("images", "id", 7, "image 7 appears twice"),
        ("images", "file_name", "COCO_train2014_000000000007.jpg", "same file_name"),
        ("categories", "name", "giraffe", "other classes"),
    ],
)
def test_annotations_that_are_not_cocos_are_named_by_their_id(coco, where, key, value, term):
    edit(coco, lambda content: content[where][1].update({key: value}))
    with pytest.raises(ValueError, match=rf"instances_train2014\.json.*{term}"):
        prepare(coco)


def test_images_of_one_name_in_two_folders_stay_two(coco):
    def two_folders(content):
        for image, folder in zip(content["images"], "ab"):
            image["file_name"] = f"{folder}/0001.jpg"
        content["annotations"][2]["image_id"] = 8

    edit(coco, two_folders)
    assert prepare(coco)["train"] == 2
    assert (coco / "ImageSets/train.txt").read_text().split() == ["a/0001", "b/0001"]
    masks = [read_mask(coco / f"SegmentationClass/train2014/{folder}/0001.png") for folder in "ab"]
    assert [set(np.unique(mask)) for mask in masks] == [{1, 255}, {0, 80}]
