"""Views of a training image: sample dict -> sample dict.

Whatever moves pixels acts on image, mask and valid_box together. Every draw comes from torch's global
generator, which the data set seeds per sample, so a view is a pure function of image and sample seed. S: side
of a crop in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.image import IGNORE_INDEX, normalize

Sample = dict[str, Any]


class PlainView:
    """A randomly rescaled, mirrored and cropped image, for plain classification and segmentation.

    Args:
        crop_size: S.
        scale_range: smallest and largest factor of the rescaling.

    A sample gets ``image`` (3, S, S) normalised, ``valid_box`` (4,) int64 y0, y1, x0, x1 and, if it had one,
    ``mask`` (S, S), 255 outside the box. Padding is black before the normalisation.
    """

    def __init__(self, crop_size: int, scale_range: tuple[float, float] = (0.5, 2.0)) -> None:
        self.crop_size, self.scale_range = _checked(crop_size, scale_range)

    def __call__(self, sample: Sample) -> Sample:
        sample = random_crop(sample, self.crop_size, self.scale_range)
        return sample | {"image": _to_input(sample["image"])}


class ResizedView:
    """A random part of the image, stretched to a square, mirrored and recoloured (1-stage-wseg, WS-FCN).

    Nothing is padded: an image smaller than the crop is enlarged.

    Args:
        crop_size: S.
        area_range: smallest and largest share of the image's area; the aspect ratio changes by up to 4/3.

    A sample gets ``image`` (3, S, S) normalised, ``valid_box`` (4,) int64, the whole crop, and, if it had
    one, ``mask`` (S, S), which follows the image.
    """

    def __init__(self, crop_size: int, area_range: tuple[float, float] = (0.9, 1.0)) -> None:
        self.crop_size, area = _checked(crop_size, area_range)
        if area[1] > 1:
            raise ValueError(
                f"data.scale_range {list(area)} is a share of the image's area here, so at most 1: the "
                "published values are [0.9, 1.0]"
            )
        # Masks are told by their type, and resized to the nearest pixel.
        self.geometry = v2.Compose(
            [
                v2.RandomResizedCrop(crop_size, scale=area, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.colour = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)

    def __call__(self, sample: Sample) -> Sample:
        changed: Sample = {"valid_box": torch.tensor([0, self.crop_size, 0, self.crop_size])}
        if "mask" in sample:
            image, mask = self.geometry(_as_pil(sample["image"]), tv_tensors.Mask(sample["mask"]))
            changed["mask"] = mask.as_subclass(Tensor)
        else:
            image = self.geometry(_as_pil(sample["image"]))
        return sample | changed | {"image": _to_input(self.colour(image))}


class WeakStrongViews:
    """The three views that ToCo, MCC and SeCo train on.

    * ``image``: crop of the rescaled and mirrored image; augmented: then colour, flip, blur; plain: as is.
    * ``global_view``: random part of the original image at size S; colour, flip, sometimes blur and solarise.
    * ``strong_view``: the same crop as ``image``; colour, flip, half of the time blur.

    Each is (3, S, S), normalised. ``valid_box`` (4,) int64 is the part of the crop that is not black padding;
    ``mask``, if the sample has one, follows ``image``.

    Args:
        crop_size: S.
        scale_range: smallest and largest factor of the rescaling.
        main_view: ``augmented`` (ToCo, MCC) or ``plain`` (SeCo).
        consistent_flip: whether ``image``, ``strong_view`` and ``valid_box`` are mirrored together. The
            published programs mirror each view on its own and never the box (rulixiang/ToCo, zwyang6/SeCo,
            fwu11/MCC), so half of the regions that are looked up in one view lie mirrored in the other; their
            numbers were reached that way.
        global_scale: smallest and largest share of the original image's area in ``global_view``.
    """

    def __init__(
        self,
        crop_size: int,
        scale_range: tuple[float, float] = (0.5, 2.0),
        main_view: str = "augmented",
        consistent_flip: bool = False,
        global_scale: tuple[float, float] = (0.4, 1.0),
    ) -> None:
        if main_view not in ("augmented", "plain"):
            raise ValueError(f"main_view is '{main_view}': choose augmented or plain")
        self.crop_size, self.scale_range = _checked(crop_size, scale_range)
        self.main_view = main_view
        self.consistent_flip = consistent_flip
        self.global_part = v2.RandomResizedCrop(
            crop_size, scale=tuple(global_scale), interpolation=v2.InterpolationMode.BICUBIC
        )
        self.colour = v2.Compose(
            [
                v2.RandomApply(
                    [v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8
                ),
                v2.RandomGrayscale(p=0.2),
            ]
        )
        self.solarize = v2.RandomSolarize(threshold=128, p=0.2)

    def __call__(self, sample: Sample) -> Sample:
        original = _as_pil(sample["image"])
        sample = random_crop(sample, self.crop_size, self.scale_range)
        crop = sample["image"]
        flip_image = self.main_view == "augmented" and _chance(0.5)
        flip_strong = flip_image if self.consistent_flip else _chance(0.5)

        image = crop
        if self.main_view == "augmented":
            image = random_blur(self.colour(_flip_if(flip_image, crop)), p=1.0)
        strong_view = random_blur(self.colour(_flip_if(flip_strong, crop)), p=0.5)
        global_view = self.colour(_flip_if(_chance(0.5), self.global_part(original)))
        global_view = self.solarize(random_blur(global_view, p=0.1))

        views = {"image": image, "global_view": global_view, "strong_view": strong_view}
        sample = sample | {name: _to_input(view) for name, view in views.items()}
        if flip_image and "mask" in sample:
            sample["mask"] = sample["mask"].flip(-1)
        if flip_image and self.consistent_flip:
            sample["valid_box"] = flip_box(sample["valid_box"], self.crop_size)
        return sample


def random_crop(
    sample: Sample, crop_size: int, scale_range: tuple[float, float], flip: float = 0.5
) -> Sample:
    """Rescale by a random factor, mirror with probability ``flip``, crop a random square.

    A side shorter than the crop is padded: black around the image and 255 around the mask, at a random
    offset.

    Returns:
        The sample with ``image`` (PIL, S x S), ``valid_box`` (4,) int64 and, if it had one, ``mask`` (S, S).
    """
    image = _as_pil(sample["image"])
    low, high = scale_range
    factor = low + (high - low) * torch.rand(()).item()
    width, height = max(int(factor * image.width), 1), max(int(factor * image.height), 1)
    left, x0, x1 = _random_window(width, crop_size)
    top, y0, y1 = _random_window(height, crop_size)
    mirrored = _chance(flip)

    window = (left, top, left + x1 - x0, top + y1 - y0)
    part = resized_window(image, (width, height), window)
    crop = Image.new("RGB", (crop_size, crop_size))
    crop.paste(part, (x0, y0))
    valid_box = torch.tensor([y0, y1, x0, x1])
    changed: Sample = {
        "image": _flip_if(mirrored, crop),
        "valid_box": flip_box(valid_box, crop_size) if mirrored else valid_box,
    }
    if "mask" in sample:
        labels = Image.fromarray(sample["mask"].to(torch.uint8).numpy())
        mask = sample["mask"].new_full((crop_size, crop_size), IGNORE_INDEX)
        resized = labels.resize((width, height), Image.Resampling.NEAREST).crop(window)
        mask[y0:y1, x0:x1] = F.pil_to_tensor(resized)[0]
        changed["mask"] = mask.flip(-1) if mirrored else mask
    return sample | changed


def resized_window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int]
) -> Image.Image:
    """The window (left, top, right, bottom) of the image resized bilinearly to (width, height).

    Equals ``image.resize(size).crop(window)``, but computes only what is kept.
    """
    # A few pixels more than the window, because the filter looks at neighbours.
    margin = 4
    left, top = max(window[0] - margin, 0), max(window[1] - margin, 0)
    right, bottom = min(window[2] + margin, size[0]), min(window[3] + margin, size[1])
    scale_x, scale_y = image.width / size[0], image.height / size[1]
    source = (
        left * scale_x,
        top * scale_y,
        min(right * scale_x, image.width),
        min(bottom * scale_y, image.height),
    )
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)
    return part.crop((window[0] - left, window[1] - top, window[2] - left, window[3] - top))


def random_blur(image: Image.Image, p: float) -> Image.Image:
    """Gaussian blur with a radius drawn from [0.1, 2.0] pixels, with probability ``p``."""
    if not _chance(p):
        return image
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))


def flip_box(box: Tensor, width: int) -> Tensor:
    """The box (..., 4) y0, y1, x0, x1 in the mirrored picture of that width."""
    y0, y1, x0, x1 = box.unbind(-1)
    return torch.stack([y0, y1, width - x1, width - x0], dim=-1)


def _random_window(length: int, crop_size: int) -> tuple[int, int, int]:
    """Along one axis: start in the image, and start and end in the crop, of the part that is shown."""
    padded = max(length, crop_size)
    offset = int(torch.randint(padded - length + 1, ()))
    start = int(torch.randint(padded - crop_size + 1, ()))
    return (start, 0, crop_size) if length >= crop_size else (0, offset, offset + length)


def _chance(p: float) -> bool:
    return torch.rand(()).item() < p


def _flip_if(flip: bool, image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def _as_pil(image: Image.Image | Tensor) -> Image.Image:
    return F.to_pil_image(image) if isinstance(image, Tensor) else image


def _to_input(image: Image.Image) -> Tensor:
    return normalize(F.pil_to_tensor(image))


def _checked(crop_size: int, scale_range: tuple[float, float]) -> tuple[int, tuple[float, float]]:
    low, high = scale_range
    if crop_size < 1 or not 0 < low <= high:
        raise ValueError(
            f"crop_size={crop_size} must be at least 1 and scale_range={list(scale_range)} two rising "
            "positive factors"
        )
    return crop_size, (float(low), float(high))
