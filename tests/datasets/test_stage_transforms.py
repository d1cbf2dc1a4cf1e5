"""Views of training images in the stages of PSA, SEAM and IRN."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datasets.transforms import StageView, crop, crop_box, resize_long_side
from tests.formula import formula_array
from utils.image import normalize, rescale_picture, strided_size


@pytest.fixture
def case(golden):
    return golden("ms_irn_imutils")


def picture(case, name):
    spec = case.meta["inputs"][name]
    return formula_array(spec["name"], spec["shape"], spec["low"], spec["high"]).astype(spec["astype"])


def recorded(draws):
    """A draw that gives the recorded values, in their order."""
    values = iter(draws)

    def draw(n):
        _, (recorded_n,), value = next(values)
        assert recorded_n == n
        return value

    return draw


def centre(n):
    """The draw that puts a crop into the middle."""
    return round((n - 1) / 2)


def chw(array):
    return torch.from_numpy(array).permute(2, 0, 1)


def close_pixels(found, expected):
    """Resized pictures may differ by one grey level under another Pillow."""
    found, expected = torch.as_tensor(np.array(found)).int(), expected.int()
    assert found.shape == expected.shape and (found - expected).abs().max() <= 1


def test_resizing_matches_reference_values(case):
    image, label = (Image.fromarray(picture(case, name)) for name in ("image", "label"))
    draws = case.meta["draws"]
    for key in (key for key in draws if key.startswith("resize_long")):
        close_pixels(resize_long_side(image, draws[key][0][2]), case[f"{key}_image"])
    low, high = 0.5, 1.5
    for key in (key for key in draws if key.startswith("scale_")):
        factor = low + draws[key][0][2] * (high - low)
        close_pixels(rescale_picture(image, factor), case[f"{key}_image"])
        assert np.array_equal(rescale_picture(label, factor, nearest=True), case[f"{key}_label"])
    for key in (key for key in case if key.startswith("rescale_")):
        _, factor, kind = key.split("_")
        source, nearest = (label, True) if kind == "label" else (image, False)
        close_pixels(rescale_picture(source, float(factor), nearest), case[key])


def test_crops_match_reference_values(case):
    image, label = chw(picture(case, "image")), torch.from_numpy(picture(case, "label"))
    for key, draws in case.meta["draws"].items():
        if key.startswith("crop"):
            size = case[f"{key}_label"].shape[0]
            box = crop_box(tuple(label.shape), size, recorded(draws))
            assert torch.equal(crop(image, size, box, 0), case[f"{key}_image"].permute(2, 0, 1))
            assert torch.equal(crop(label, size, box, 255), case[f"{key}_label"])
        if key.startswith("flip"):
            flipped = (image.flip(-1), label.flip(-1)) if draws[0][2] else (image, label)
            assert torch.equal(flipped[0], case[f"{key}_image"].permute(2, 0, 1))
            assert torch.equal(flipped[1], case[f"{key}_label"])
    for name, draw in {"top_left": lambda n: 0, "center": centre}.items():
        for key in (key for key in case if key.startswith(name)):
            size = len(case[key])
            found = crop(image, size, crop_box(tuple(label.shape), size, draw), 0)
            assert torch.equal(found, case[key].permute(2, 0, 1))


def test_crop_boxes_match_reference_values(case):
    sizes, crop_size = [(37, 53), (60, 60), (48, 48), (20, 90)], 48
    sizes = case.setting("box_sizes", sizes)
    draw = recorded(case.meta["draws"]["boxes"])
    for size, expected in zip(sizes, case["boxes"].tolist(), strict=True):
        box = crop_box(size, crop_size, draw)
        assert expected == [
            box.top, box.top + box.height, box.left, box.left + box.width,
            box.image_top, box.image_top + box.height, box.image_left, box.image_left + box.width,
        ]  # fmt: skip


def test_sizes_of_strided_maps_match_reference_values(case):
    quarter, rounded, *other = (tuple(size) for size in case["strided"].tolist())
    size = picture(case, "label").shape
    assert strided_size(size, 4) == quarter
    assert tuple(16 * side for side in strided_size(size, 16)) == rounded
    # Rows come in pairs: sides at stride 16, and those times 16.
    assert strided_size(other[1], 16) == other[0]


def test_normalisation_matches_reference_values(case):
    expected = case["normalize"]
    found = normalize(chw(picture(case, "image"))).permute(1, 2, 0)
    step = [-(-full // part) for full, part in zip(found.shape[:2], expected.shape[:2])]
    assert_close(found[:: step[0], :: step[1]], expected, rtol=1e-5, atol=1e-5)


def coordinate_sample(height=30, width=44):
    """Red and green tell the place of a pixel, and so does the mask."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([4 * y, 4 * x, 0 * x], -1).astype(np.uint8)
    mask = torch.from_numpy((x > width // 2).astype(np.int64) * 3)
    return {"image": Image.fromarray(image), "mask": mask}


@pytest.mark.parametrize("size", [20, 64])
@pytest.mark.parametrize("seed", range(4))
def test_image_and_mask_stay_together_and_padding_is_ignored(size, seed):
    torch.manual_seed(seed)
    sample = StageView(size, scale_range=(0.8, 1.3))(coordinate_sample())
    image, mask, (y0, y1, x0, x1) = sample["image"], sample["mask"], sample["valid_box"].tolist()
    assert image.shape == (3, size, size) and mask.dtype == torch.int64
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert (mask[~inside] == 255).all() and not image[:, ~inside].any()
    assert set(mask[inside].unique().tolist()) <= {0, 3}
    # Right half: bright green; away from the border between the halves all pixels agree.
    green = (image[1] * 57.12 + 116.28)[inside]
    right = mask[inside] == 3
    assert (green[right] > 4 * 20).all() and (green[~right] < 4 * 26).all()


@pytest.mark.parametrize("seed", range(3))
def test_long_side_is_drawn_from_its_range(seed):
    torch.manual_seed(seed)
    sample = StageView(200, long_side=(50, 60))({"image": coordinate_sample()["image"]})
    y0, y1, x0, x1 = sample["valid_box"].tolist()
    assert 50 <= x1 - x0 <= 60 and abs((y1 - y0) - (x1 - x0) * 30 / 44) <= 0.5


def test_colours_change_only_if_asked_for():
    same, changed = (
        StageView(44, jitter=jitter)(coordinate_sample(44, 44))["image"].sort().values.sort(1).values
        for jitter in (False, True)
    )
    plain = normalize(torch.from_numpy(np.array(coordinate_sample(44, 44)["image"])).permute(2, 0, 1))
    plain = plain.sort().values.sort(1).values
    assert torch.equal(same, plain) and not torch.equal(changed, plain)


@pytest.mark.parametrize("wrong", [{"long_side": (60, 50)}, {"scale_range": (0, 1)}, {"crop_size": 0}])
def test_wrong_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match="rising"):
        StageView(**{"crop_size": 32, **wrong})
