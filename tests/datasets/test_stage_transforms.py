"""Views of training images in the stages of PSA, SEAM and IRN."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.transforms import CropBox, StageView, crop, crop_box, resize_long_side
from tests.recorded import recorded
from utils.image import normalize, rescale_picture, strided_size


def replay(draws):
    """A draw that gives the recorded values, in their order."""
    values = iter(draws)

    def draw(n):
        function, (recorded_n,), value = next(values)
        assert function == "randrange" and recorded_n == n
        return value

    return draw


def centre(n):
    """The draw that puts a crop into the middle: half of the space, rounded half to even."""
    return round((n - 1) / 2)


@recorded("ms_irn_imutils", "ms_psa_imutils")
def test_views_match_reference_values(case):
    image, label = case.input("image").permute(2, 0, 1), case.input("label")
    pictures = {
        "image": Image.fromarray(case.input("image").numpy()),
        "label": Image.fromarray(label.numpy()),
    }
    low, high = case.setting("scale_range", (0.5, 1.5))

    def rescaled(factor):
        return [rescale_picture(pictures[kind], factor, kind == "label") for kind in ("image", "label")]

    def cropped(box, size):
        return crop(image, size, box, 0), crop(label, size, box, 255)

    def drawn(size, draw):
        return cropped(crop_box(tuple(label.shape), size, draw), size)

    for key, draws in case.meta["draws"].items():
        value = draws[0][2]
        if key.startswith("resize_long"):
            check_pictures(case, key, (resize_long_side(pictures["image"], value),), grey_level=1)
        elif key.startswith("scale"):
            check_pictures(case, key, rescaled(low + value * (high - low)), grey_level=1)
        elif key.startswith("flip"):
            shown = len(case[key]) if key in case else None  # of each side
            found = ((x.flip(-1) if value else x)[..., :shown, :shown] for x in (image, label))
            check_pictures(case, key, found)
        elif "crop" in key:
            name = key.replace("random_crop_", "random_crop")
            check_pictures(case, name, drawn(int(re.search(r"\d+", name)[0]), replay(draws)))
    for name, draw in {"top_left": lambda n: 0, "center": centre}.items():
        for key in case.starting(name):
            check_pictures(case, key, drawn(len(case[key]), draw))
    for key in case.starting("rescale_"):
        _, factor, kind = key.split("_")
        check_pictures(case, key, [rescaled(float(factor))[kind == "label"]], grey_level=int(kind == "image"))
    if "box" in case:
        top, bottom, left, right, image_top, _, image_left, _ = case["box"].tolist()
        box = CropBox(top, left, image_top, image_left, bottom - top, right - left)
        # The reference fills a canvas of any shape, ours a square one that holds it.
        rows, columns = case["crop_with_box_label"].shape
        found = [x[..., :rows, :columns] for x in cropped(box, max(rows, columns))]
        check_pictures(case, "crop_with_box", found)
    if "boxes" in case:
        draw, found = replay(case.meta["draws"]["boxes"]), []
        size = case.setting("box_crop|crop_size|crop", 48)
        for sides in case.setting("box_sizes", [(37, 53), (60, 60), (48, 48), (20, 90)]):
            box = crop_box(tuple(sides), size, draw)
            found.append([
                box.top, box.top + box.height, box.left, box.left + box.width,
                box.image_top, box.image_top + box.height, box.image_left, box.image_left + box.width,
            ])  # fmt: skip
        case.same("boxes", found)
    if "strided" in case:
        # Rows come in pairs: sides at stride 16, and those times 16.
        other = tuple(case["strided"][3].tolist())
        rounded = [16 * side for side in strided_size(label.shape, 16)]
        case.same("strided", [strided_size(label.shape, 4), rounded, strided_size(other, 16), other])
    found = normalize(image).permute(1, 2, 0)
    rows, columns = (-(-full // part) for full, part in zip(found.shape[:2], case["normalize"].shape[:2]))
    case.compare("normalize", found[::rows, ::columns], rtol=1e-5, atol=1e-5)


def check_pictures(case, name, found, grey_level=0):
    """An image and its label; another Pillow may resize an image to other values by one grey level."""
    for entries, x in zip(((name, f"{name}_image"), (f"{name}_label",)), found):
        x = torch.as_tensor(np.array(x)).float()
        x = x.permute(1, 2, 0) if x.ndim == 3 and x.shape[0] == 3 else x
        for entry in filter(case.__contains__, entries):
            case.compare(entry, x, rtol=0, atol=grey_level if x.ndim == 3 else 0)


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
