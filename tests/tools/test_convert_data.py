"""Annotations of other programs become a data set of one's own, and masks survive the way there and back."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets.custom import custom_split
from tools.convert_data import Options, run
from utils.image import read_mask, write_mask

SIZE = 40, 50  # rows, columns


@pytest.fixture
def photos(tmp_path):
    """Three photos; the third shows nothing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        Image.fromarray(np.full((*SIZE, 3), 80 * k, np.uint8)).save(folder / f"p{k}.jpg")
    return folder


@pytest.fixture
def masks(tmp_path):
    """Two squares of a class each, one of them in two parts, and ignored pixels."""
    masks = np.zeros((3, *SIZE), np.uint8)
    masks[0, 5:20, 5:25], masks[0, 25:38, 30:48] = 1, 2
    masks[1, 2:12, 2:20], masks[1, 22:34, 28:45] = 2, 2
    masks[1, 36:40] = 255
    for k, mask in enumerate(masks):
        write_mask(tmp_path / "masks" / f"p{k}.png", mask)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return masks


def converted(tmp_path, **options):
    return run(Options(out=tmp_path / "out", **options))


def tags_of(folder):
    split = custom_split(folder, "all", class_names="class_names.txt", untagged="no_object")
    return {r.name: [split.class_names[k] for k in r.tags] for r in split.records}


def test_masks_through_coco_stay_as_they_are(tmp_path, photos, masks):
    names = tmp_path / "names.txt"
    run(Options(write="coco", source=tmp_path / "masks", images=photos, names=names, out=tmp_path / "coco"))
    out = converted(tmp_path, read="coco", source=tmp_path / "coco" / "instances.json", images=photos)
    for k, mask in enumerate(masks):
        assert (read_mask(out / "masks" / f"p{k}.png") == np.where(mask == 255, 0, mask)).all()
    assert tags_of(out) == {"p0": ["cat", "dog"], "p1": ["dog"], "p2": []}


def test_masks_through_yolo_keep_their_objects(tmp_path, photos, masks):
    pytest.importorskip("cv2")
    names = tmp_path / "names.txt"
    run(Options(write="yolo", source=tmp_path / "masks", names=names, out=tmp_path / "yolo"))
    assert [len((tmp_path / f"yolo/p{k}.txt").read_text().splitlines()) for k in range(3)] == [2, 2, 0]
    labels = tmp_path / "yolo"
    out = converted(tmp_path, read="yolo", source=labels, images=photos, names=labels / "data.yaml")
    for k, mask in enumerate(masks):
        truth, found = np.where(mask == 255, 0, mask), read_mask(out / "masks" / f"p{k}.png")
        for value in (1, 2):
            in_truth, in_found = truth == value, found == value
            assert (in_truth & in_found).sum() >= 0.85 * (in_truth | in_found).sum()
    assert tags_of(out) == {"p0": ["cat", "dog"], "p1": ["dog"], "p2": []}


def test_masks_as_palette_pictures(tmp_path, photos, masks):
    Image.fromarray(masks[0]).save(tmp_path / "masks" / "p0.png")  # grey
    out = converted(tmp_path, write="voc", source=tmp_path / "masks")
    with Image.open(out / "p0.png") as picture:
        assert picture.mode == "P" and (np.asarray(picture) == masks[0]).all()


def test_labelme_shapes(tmp_path, photos):
    shapes = [
        {"label": "cat", "shape_type": "rectangle", "points": [[5, 4], [25, 20]]},
        {"label": "dog", "shape_type": "polygon", "points": [[30, 25], [48, 25], [48, 38], [30, 38]]},
        {"label": "cat", "shape_type": "circle", "points": [[10, 32], [14, 32]]},
    ]
    (tmp_path / "json").mkdir()
    for k, content in enumerate([shapes, shapes[:1], []]):
        (tmp_path / "json" / f"p{k}.json").write_text(json.dumps({"shapes": content, "flags": {}}))
    out = converted(tmp_path, read="labelme", source=tmp_path / "json", images=photos)
    mask = read_mask(out / "masks" / "p0.png")
    assert (mask[4:20, 5:25] == 1).all() and (mask[25:38, 30:48] == 2).all() and mask[32, 10] == 1
    assert not mask[0].any() and tags_of(out) == {"p0": ["cat", "dog"], "p1": ["cat"], "p2": []}
    (tmp_path / "json" / "p1.json").write_text('{"shapes": [{"label": "cat"}]}')
    with pytest.raises(ValueError, match=r"p1\.json"):
        converted(tmp_path, read="labelme", source=tmp_path / "json", images=photos)


def test_boxes_and_folders_give_tags(tmp_path, photos):
    (tmp_path / "xml").mkdir()
    for k, words in enumerate((["cat", "dog"], ["dog"], [])):
        objects = "".join(f"<object><name>{word}</name></object>" for word in words)
        (tmp_path / "xml" / f"p{k}.xml").write_text(f"<annotation>{objects}</annotation>")
    out = converted(tmp_path, read="voc", source=tmp_path / "xml", images=photos)
    assert tags_of(out) == {"p0": ["cat", "dog"], "p1": ["dog"], "p2": []} and not (out / "masks").exists()

    for k, word in enumerate(("cat", "dog", "dog")):
        (tmp_path / "sorted" / word).mkdir(parents=True, exist_ok=True)
        (photos / f"p{k}.jpg").rename(tmp_path / "sorted" / word / f"p{k}.jpg")
    out = run(Options(read="folders", source=tmp_path / "sorted", out=tmp_path / "out2"))
    assert tags_of(out) == {"cat/p0": ["cat"], "dog/p1": ["dog"], "dog/p2": ["dog"]}
