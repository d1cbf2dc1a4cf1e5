"""The archive for the VOC server, and what it refuses."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.stages import call
from tools import voc_submission
from utils.image import write_mask


@pytest.fixture
def voc(tmp_path):
    """A test set of two photos, and their labels."""
    for folder in ("ImageSets/Segmentation", "JPEGImages", "labels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/test.txt").write_text("a\nb\n")
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"JPEGImages/{name}.jpg")
        write_mask(tmp_path / f"labels/{name}.png", np.full((20, 30), 20, np.uint8))
    return tmp_path


def submit(voc, **options):
    values = {"labels": voc / "labels", "root": voc, "out": voc / "results.tgz", **options}
    return call(voc_submission, values)


def test_archive_has_the_folders_of_the_server(voc):
    write_mask(voc / "labels/val_image.png", np.zeros((20, 30), np.uint8))
    with tarfile.open(submit(voc)) as archive:
        names = archive.getnames()
        content = archive.extractfile(names[0]).read()
    assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in "ab"]
    assert content == (voc / "labels/a.png").read_bytes()
    with tarfile.open(submit(voc, competition=5)) as archive:
        assert archive.getnames()[1] == "results/VOC2012/Segmentation/comp5_test_cls/b.png"


def spoil(kind, path):
    mask = np.zeros((20, 30), np.uint8)
    if kind == "missing":
        path.unlink()
    elif kind == "mode L":
        Image.fromarray(mask).save(path)
    elif kind == "another size":
        write_mask(path, mask.T)
    elif kind == "255":
        write_mask(path, mask + 255)
    elif kind == "above 20":
        write_mask(path, mask + 21)


@pytest.mark.parametrize("kind", ["missing", "mode L", "another size", "255", "above 20"])
def test_each_mistake_is_refused_with_its_reason(voc, kind):
    spoil(kind, voc / "labels" / "b.png")
    with pytest.raises(ValueError, match=f"1 of 2, first b.*{kind}"):
        submit(voc)
    assert not (voc / "results.tgz").exists()


def test_labels_without_objects_are_refused(voc):
    for name in ("a", "b"):
        write_mask(voc / f"labels/{name}.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(ValueError, match="background alone"):
        submit(voc)
