"""Views of training images in the stages of PSA, SEAM and IRN."""

import re

import numpy as np
import torch
from PIL import Image

from datasets.transforms import CropBox, crop, crop_box, resize_long_side
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
