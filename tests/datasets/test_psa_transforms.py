"""Views of training images as PSA's and SEAM's programs draw them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datasets.transforms import CropBox, crop, crop_box, resize_long_side
from utils.image import normalize


@pytest.fixture
def case(golden):
    return golden("ms_psa_imutils")


def picture(case):
    """(3, H, W) uint8."""
    return case.input("image").permute(2, 0, 1)


def draws_of(case, key):
    """A draw that gives the recorded values, in their order."""
    values = iter(case.meta["draws"][key])

    def draw(n):
        function, (recorded_n,), value = next(values)
        assert function == "randrange" and recorded_n == n
        return value

    return draw


def entries(case, name):
    return [key for key in case if key.startswith(name)]


def test_long_side_matches_reference_values(case):
    image = Image.fromarray(picture(case).permute(1, 2, 0).numpy())
    for key in entries(case, "resize_long_"):
        ((_, _, long_side),) = case.meta["draws"][key]
        found = torch.from_numpy(np.array(resize_long_side(image, long_side))).int()
        assert found.shape == case[key].shape
        # Another Pillow may round by one grey level.
        assert (found - case[key].int()).abs().max() <= 1


def test_crops_match_reference_values(case):
    image, label = picture(case), case.input("label")
    for key in entries(case, "crop48_"):
        size = len(case[key])
        box = crop_box(tuple(label.shape), size, draws_of(case, key))
        assert torch.equal(crop(image.float(), size, box, 0).permute(1, 2, 0), case[key])
    size = len(case["random_crop44_label"])
    box = crop_box(tuple(label.shape), size, draws_of(case, "random_crop_44"))
    assert torch.equal(crop(image, size, box, 0).permute(1, 2, 0), case["random_crop44_image"])
    assert torch.equal(crop(label, size, box, 255), case["random_crop44_label"])


def test_crop_at_a_given_place_matches_reference_values(case):
    top, bottom, left, right, image_top, _, image_left, _ = case["box"].tolist()
    box = CropBox(top, left, image_top, image_left, bottom - top, right - left)
    image, label, expected = picture(case), case.input("label"), case["crop_with_box_label"]
    # The reference fills a canvas of any shape, ours a square one that holds it.
    size, (rows, columns) = max(expected.shape), expected.shape
    assert torch.equal(crop(label, size, box, 255)[:rows, :columns], expected)
    assert torch.equal(crop(image, size, box, 0)[:, :rows, :columns].permute(1, 2, 0), case["crop_with_box"])


def test_centre_crops_match_reference_values(case):
    image = picture(case)
    for key in entries(case, "center"):
        size = int(key.removeprefix("center"))
        # The offset is half of the space, rounded half to even.
        box = crop_box(tuple(image.shape[1:]), size, lambda n: round((n - 1) / 2))
        assert torch.equal(crop(image, size, box, 0).permute(1, 2, 0), case[key])


def test_mirroring_and_normalisation_match_reference_values(case):
    image = picture(case)
    for key in entries(case, "flip_"):
        ((_, _, mirrored),) = case.meta["draws"][key]
        found = (image.flip(-1) if mirrored else image).permute(1, 2, 0)
        rows, columns, _ = case[key].shape
        assert torch.equal(found[:rows, :columns], case[key])
    expected = case["normalize"]
    found = normalize(image).permute(1, 2, 0)
    rows, columns = (-(-full // part) for full, part in zip(found.shape[:2], expected.shape[:2]))
    assert_close(found[::rows, ::columns], expected, rtol=1e-5, atol=1e-5)
