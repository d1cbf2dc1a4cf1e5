"""Masks that speak of other classes than the tags do not get a score."""

import numpy as np
import pytest
from PIL import Image

from datasets.agreement import compare_masks_with_tags, tag_warnings
from datasets.base import Record, Split
from utils.image import write_mask

NAMES = ("background", "cat", "dog", "cow", "sheep")


def split_of(folder, shown, tags):
    """A split of images whose masks show one class each."""
    records = []
    for k, (value, present) in enumerate(zip(shown, tags)):
        path = folder / f"{k}.png"
        Image.new("RGB", (4, 3)).save(path)
        write_mask(folder / "masks" / f"{k}.png", np.array([[value] * 4, [0] * 4, [255] * 4]))
        records.append(Record(str(k), path, folder / "masks" / f"{k}.png", present))
    return Split(str(folder), NAMES, tuple(records))


@pytest.mark.parametrize("swapped", [0, 2, 4])
def test_swapped_classes_are_found(tmp_path, caplog, swapped):
    truth = np.arange(1, 5).repeat(4)
    order = np.arange(5)
    order[1 : swapped + 1] = order[1 : swapped + 1][::-1]
    split = split_of(tmp_path, order[truth], [(int(k),) for k in truth])
    if swapped == 4:
        with pytest.raises(ValueError, match="disagree"):
            compare_masks_with_tags(split)
    else:
        compare_masks_with_tags(split)
        assert ("cat 0 of 4, dog 0 of 4" in caplog.text) == (swapped == 2)


def test_odd_tags_are_worth_a_warning():
    records = tuple(Record(str(k), None, None, (1, *more)) for k, more in enumerate([(2,), (2,), (3,)]))
    every, spelling = tag_warnings(Split("train", ("background", "cow", "person", "persn"), records))
    assert "all 3 images have the tag 'cow'" in every and "'person' (2 images) and 'persn' (1)" in spelling


def test_images_without_mask_or_tags_are_left_out(tmp_path):
    split = split_of(tmp_path, [1, 2, 3], [(1,), None, (3,)])
    split.records[2].mask.unlink()
    compare_masks_with_tags(split)
    split.records[0].mask.unlink()
    compare_masks_with_tags(split)


def test_objects_without_a_tag_are_no_reason_to_stop(tmp_path, caplog):
    compare_masks_with_tags(split_of(tmp_path, [1, 1, 1, 2], [(1,), (1, 2), (), (1,)]))
    assert not caplog.text
