"""Views of a training image: sample dict -> sample dict. H, W: pixels; S: side of a crop.

A view makes ``image`` (3, S, S), bytes or normalised, ``valid_box`` (4,) int64 y0, y1, x0, x1 of what is not
padding, and labels (S, S), 255 outside of it. Draws come from torch's global generator, which is seeded
per sample. Changes of the finished crops are drawn, not made: see ``datasets.base.with_changes``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.base import LABELS, VIEWS, Sample
from datasets.colour import change_picture
from utils.colour import GREY, HUE, LAST, no_change
from utils.image import IGNORE_INDEX, normalize, rescale_picture

Draw = Callable[[int], int]  # draw(n) is an integer from 0 to n - 1


class PlainView:
    """A randomly rescaled, mirrored and cropped image with black padding."""

    def __init__(self, crop_size: int, scale_range: tuple[float, float] = (0.5, 2.0)) -> None:
        self.crop_size, self.scale_range = crop_size, _checked(scale_range)

    def __call__(self, sample: Sample) -> Sample:
        sample = random_crop(sample, self.crop_size, self.scale_range)
        return sample | {"image": to_tensor(sample["image"])}


class ResizedView:
    """A random part of the image, stretched to a square, mirrored and recoloured (1-stage-wseg, WS-FCN).

    Args:
        area_range: smallest and largest share of the image's area; the aspect ratio changes by up to 4/3.
    """

    def __init__(self, crop_size: int, area_range: tuple[float, float] = (0.9, 1.0)) -> None:
        self.crop_size, area = crop_size, _checked(area_range)
        if area[1] > 1:
            raise ValueError(f"data.scale_range {list(area)} is a share of the image's area here: at most 1")
        # torchvision resizes a tv_tensors.Mask to the nearest pixel.
        self.geometry = v2.Compose(
            [
                v2.RandomResizedCrop(crop_size, scale=area, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.jitter = colour_jitter()

    def __call__(self, sample: Sample) -> Sample:
        labels = {key: tv_tensors.Mask(sample[key]) for key in LABELS if key in sample}
        image, labels = self.geometry(sample["image"], labels)
        valid_box = torch.tensor([0, self.crop_size, 0, self.crop_size])
        changed = {key: label.as_subclass(Tensor) for key, label in labels.items()}
        changed |= {"image": to_tensor(image), "changes": self.jitter.drawn()[None]}
        return sample | changed | {"valid_box": valid_box}


class StageView:
    """A resized, mirrored and cropped image, for the classifiers of PSA, SEAM and IRN and IRN's boundaries.

    The image is resized bicubically and cropped after the normalisation, so padding has the mean colour.

    Args:
        scale_range: smallest and largest factor of the resizing (IRN's boundaries: 0.5, 1.5).
        long_side: smallest and largest long side after it, in pixels, instead of ``scale_range``
            (classifiers).
        jitter: brightness, contrast and saturation by up to 0.3, hue by up to 0.1 (PSA, SEAM).
    """

    def __init__(
        self,
        crop_size: int,
        scale_range: tuple[float, float] = (1.0, 1.0),
        long_side: tuple[int, int] | None = None,
        jitter: bool = False,
    ) -> None:
        self.crop_size, self.range = crop_size, _checked(long_side or scale_range)
        self.has_long_side = long_side is not None
        self.jitter = colour_jitter() if jitter else None

    def __call__(self, sample: Sample) -> Sample:
        image = sample["image"]
        low, high = self.range
        if self.has_long_side:
            resized = resize_long_side(image, int(low) + random_draw(int(high - low) + 1))
        else:
            resized = rescale_picture(image, low + (high - low) * torch.rand(()).item())
        mirrored = random_draw(2) == 1
        pixels = to_tensor(resized)
        if self.jitter is not None:
            pixels = self.jitter(pixels)
        pixels = normalize(pixels)
        box = crop_box((resized.height, resized.width), self.crop_size)
        changed = {
            "image": crop(pixels.flip(-1) if mirrored else pixels, self.crop_size, box, fill=0.0),
            "valid_box": box.valid_box,
        }
        for key in LABELS:
            if key in sample:
                label = _nearest(sample[key], resized.size)
                changed[key] = crop(label.flip(-1) if mirrored else label, self.crop_size, box, IGNORE_INDEX)
        return sample | changed


class WeakStrongViews:
    """The three views that ToCo, MCC and SeCo train on.

    * ``image``: crop of the rescaled and mirrored image; augmented: then colour, flip, blur; plain: as is.
    * ``global_view``: 0.4 to 1 of the original image's area at size S; colour, flip, rarely blur, solarise.
    * ``strong_view``: the same crop as ``image``; colour, flip, half of the time blur.

    Padding is black; labels follow ``image``.

    Args:
        main_view: ``augmented`` (ToCo, MCC) or ``plain`` (SeCo).
        consistent_flip: whether ``image``, ``strong_view`` and ``valid_box`` are mirrored together. The
            published programs mirror each view on its own and never the box (rulixiang/ToCo, zwyang6/SeCo,
            fwu11/MCC), so half of the regions that are looked up in one view lie mirrored in the other; their
            numbers were reached that way.
    """

    def __init__(
        self,
        crop_size: int,
        scale_range: tuple[float, float] = (0.5, 2.0),
        main_view: str = "augmented",
        consistent_flip: bool = False,
    ) -> None:
        self.crop_size, self.scale_range = crop_size, _checked(scale_range)
        self.main_view, self.consistent_flip = main_view, consistent_flip
        self.global_part = v2.RandomResizedCrop(
            crop_size, scale=(0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC
        )
        self.jitter = ColourJitter(0.4, contrast=0.4, saturation=0.2, hue=0.1)

    def __call__(self, sample: Sample) -> Sample:
        original = sample["image"]
        sample = random_crop(sample, self.crop_size, self.scale_range)
        crop = to_tensor(sample["image"])
        flip_image = self.main_view == "augmented" and _chance(0.5)
        flip_strong = flip_image if self.consistent_flip else _chance(0.5)

        image_change = no_change() if self.main_view == "plain" else self.drawn_change(blur=1.0)
        strong_change = self.drawn_change(blur=0.5)
        flip_global = _chance(0.5)
        global_view = to_tensor(self.global_part(original))
        global_change = self.drawn_change(blur=0.1)
        if _chance(0.2):
            global_change[LAST, 1] = 128  # solarised

        views = zip(VIEWS, (crop, global_view, crop), (flip_image, flip_global, flip_strong), strict=True)
        sample |= {key: view.flip(-1) if mirrored else view for key, view, mirrored in views}
        sample["changes"] = torch.stack([image_change, global_change, strong_change])
        if flip_image:
            sample |= {key: sample[key].flip(-1) for key in LABELS if key in sample}
        if flip_image and self.consistent_flip:
            sample["valid_box"] = flip_box(sample["valid_box"], self.crop_size)
        return sample

    def drawn_change(self, blur: float) -> Tensor:
        """Mostly other colours, sometimes grey, and with probability ``blur`` a blur of 0.1 to 2 pixels."""
        change = self.jitter.drawn() if _chance(0.8) else no_change()
        if _chance(0.2):
            change[GREY] = torch.tensor([1.0, 0.0, 0.0])
        if _chance(blur):
            change[LAST, 0] = 0.1 + 1.9 * torch.rand(()).item()
        return change


def random_crop(sample: Sample, crop_size: int, scale_range: tuple[float, float]) -> Sample:
    """Rescale by a random factor, mirror half of the time, crop a random square.

    A side shorter than the crop is padded at a random offset: black around the image, 255 around labels.

    Returns:
        The sample with ``image`` (PIL, S x S), ``valid_box`` and labels.
    """
    image = sample["image"]
    low, high = scale_range
    factor = low + (high - low) * torch.rand(()).item()
    width, height = max(int(factor * image.width), 1), max(int(factor * image.height), 1)
    image_left, left = _random_offsets(width, crop_size)
    image_top, top = _random_offsets(height, crop_size)
    mirrored = _chance(0.5)

    box = CropBox(top, left, image_top, image_left, min(height, crop_size), min(width, crop_size))
    window = (image_left, image_top, image_left + box.width, image_top + box.height)
    square = Image.new("RGB", (crop_size, crop_size))
    square.paste(resized_window(image, (width, height), window), (left, top))
    changed: Sample = {
        "image": square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square,
        "valid_box": flip_box(box.valid_box, crop_size) if mirrored else box.valid_box,
    }
    for key in LABELS:
        if key in sample:
            label = crop(_nearest(sample[key], (width, height)), crop_size, box, IGNORE_INDEX)
            changed[key] = label.flip(-1) if mirrored else label
    return sample | changed


def resized_window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int]
) -> Image.Image:
    """The window (left, top, right, bottom) of the image resized bilinearly to (width, height).

    Equals ``image.resize(size).crop(window)``, but computes only what is kept.
    """
    margin = 4  # the filter looks at neighbours of the window
    left, top = max(window[0] - margin, 0), max(window[1] - margin, 0)
    right, bottom = min(window[2] + margin, size[0]), min(window[3] + margin, size[1])
    scale_x, scale_y = image.width / size[0], image.height / size[1]
    lower_right = min(right * scale_x, image.width), min(bottom * scale_y, image.height)
    source = (left * scale_x, top * scale_y, *lower_right)
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)
    return part.crop((window[0] - left, window[1] - top, window[2] - left, window[3] - top))


def flip_box(box: Tensor, width: int) -> Tensor:
    """The box (..., 4) y0, y1, x0, x1 in the mirrored picture of that width."""
    y0, y1, x0, x1 = box.unbind(-1)
    return torch.stack([y0, y1, width - x1, width - x0], dim=-1)


def random_draw(n: int) -> int:
    """A number from 0 to n - 1 from torch's global generator, which the data set seeds per sample."""
    return int(torch.randint(n, ()))


class CropBox(NamedTuple):
    """Which part of an image lies where in its crop."""

    top: int  # in the crop
    left: int
    image_top: int
    image_left: int
    height: int
    width: int

    @property
    def valid_box(self) -> Tensor:
        """(4,) int64 y0, y1, x0, x1 of the image in the crop."""
        return torch.tensor([self.top, self.top + self.height, self.left, self.left + self.width])


def crop_box(size: tuple[int, int], crop_size: int, draw: Draw = random_draw) -> CropBox:
    """A place for a crop of side S in an image of ``size`` (H, W); a small image is placed in the crop.

    Draws once for the columns, then once for the rows.
    """
    image_left, left = _offsets(size[1], crop_size, draw)
    image_top, top = _offsets(size[0], crop_size, draw)
    return CropBox(top, left, image_top, image_left, min(size[0], crop_size), min(size[1], crop_size))


def crop(values: Tensor, crop_size: int, box: CropBox, fill: float) -> Tensor:
    """The crop (..., S, S) of values (..., H, W), with ``fill`` where there is no image."""
    cropped = values.new_full((*values.shape[:-2], crop_size, crop_size), fill)
    rows = slice(box.image_top, box.image_top + box.height)
    columns = slice(box.image_left, box.image_left + box.width)
    part = values[..., rows, columns]
    cropped[..., box.top : box.top + box.height, box.left : box.left + box.width] = part
    return cropped


def resize_long_side(image: Image.Image, long_side: int) -> Image.Image:
    """The image, bicubic, with its long side at ``long_side`` pixels."""
    longest = max(image.size)
    width, height = (max(round(side * long_side / longest), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class ColourJitter(v2.ColorJitter):
    """torchvision's, with the same draws, for pictures (3, H, W) uint8."""

    def drawn(self) -> Tensor:
        """The table of a change, see ``utils.colour``."""
        drawn: dict[str, Any] = self.make_params([])
        steps = [
            (0.0, 0.0, drawn["brightness_factor"]),
            (0.0, 1.0, drawn["contrast_factor"]),
            (1.0, 0.0, drawn["saturation_factor"]),
            (1.0, int(255 * drawn["hue_factor"]) % 256, 1.0),
        ]
        order, change = drawn["fn_idx"].tolist(), no_change()
        first = HUE - order.index(3)
        change[first : first + 4] = torch.tensor([steps[step] for step in order])
        return change

    def forward(self, picture: Tensor) -> Tensor:
        return change_picture(picture, self.drawn())


def colour_jitter() -> ColourJitter:
    """The colour changes of PSA, SEAM, 1-stage-wseg and WS-FCN, on the picture before its normalisation."""
    return ColourJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


def _offsets(length: int, crop_size: int, draw: Draw) -> tuple[int, int]:
    """Along one axis: where the crop begins in the image, and where the image begins in the crop."""
    offset = draw(abs(length - crop_size) + 1)
    return (offset, 0) if length > crop_size else (0, offset)


def _random_offsets(length: int, crop_size: int) -> tuple[int, int]:
    """The same as `_offsets` with the draws of the single-stage methods: for padding and for crop."""
    left = random_draw(max(crop_size - length, 0) + 1)
    return random_draw(max(length - crop_size, 0) + 1), left


def _chance(p: float) -> bool:
    return torch.rand(()).item() < p


def _nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (H, W) resized to (width, height) by the nearest pixel."""
    picture = Image.fromarray(label.to(torch.uint8 if label.max() <= 255 else torch.int32).numpy())
    return F.pil_to_tensor(picture.resize(size, Image.Resampling.NEAREST))[0].to(label.dtype)


def to_tensor(image: Image.Image) -> Tensor:
    """The picture as (3, H, W) uint8."""
    return F.pil_to_tensor(image).contiguous()


def _checked(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"the range {list(bounds)} must be two ascending positive numbers")
    return float(low), float(high)
