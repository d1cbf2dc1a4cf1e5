"""Views of a training image as PSA, SEAM and IRN make them, for the stages of their pipelines.

They differ from those of datasets/transforms.py: images are resized bicubically, and, where nothing else is
said, cropped after the normalisation, so that padding has the mean colour. Parts that draw take the draw as
an argument: ``draw(n)`` is an integer from 0 to n - 1. H, W: pixels; S: side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.image import IGNORE_INDEX, normalize

Sample = dict[str, Any]
Draw = Callable[[int], int]


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
    part = values[
        ...,
        box.image_top : box.image_top + box.height,
        box.image_left : box.image_left + box.width,
    ]
    cropped[..., box.top : box.top + box.height, box.left : box.left + box.width] = part
    return cropped


def resize_long_side(image: Image.Image, long_side: int) -> Image.Image:
    """The image, bicubic, with its long side at ``long_side`` pixels."""
    longest = max(image.size)
    width, height = (max(round(side * long_side / longest), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def rescale(image: Image.Image, factor: float, nearest: bool = False) -> Image.Image:
    """The image with sides ``round(side * factor)``; bicubic, or nearest for labels."""
    width, height = (max(round(side * factor), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)


class StageView:
    """A resized, mirrored and cropped image, for the classifiers of PSA, SEAM and IRN and IRN's boundaries.

    Args:
        crop_size: S.
        scale_range: smallest and largest factor of the resizing (IRN's boundaries: 0.5, 1.5).
        long_side: smallest and largest long side after it, in pixels, instead of ``scale_range``
            (classifiers).
        colour_jitter: brightness, contrast and saturation by up to 0.3, hue by up to 0.1 (PSA, SEAM).

    A sample gets ``image`` (3, S, S) normalised, ``valid_box`` (4,) int64 y0, y1, x0, x1 and, if it had one,
    ``mask`` (S, S), 255 outside the box. Padding of the image is 0, the mean colour.
    """

    def __init__(
        self,
        crop_size: int,
        scale_range: tuple[float, float] = (1.0, 1.0),
        long_side: tuple[int, int] | None = None,
        colour_jitter: bool = False,
    ) -> None:
        for name, (low, high) in {"scale_range": scale_range, "long_side": long_side or (1, 1)}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]} must be two rising positive numbers")
        if crop_size < 1:
            raise ValueError(f"crop_size={crop_size} must be at least 1")
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.long_side = long_side
        self.jitter = colour_jitter_of_psa() if colour_jitter else None

    def __call__(self, sample: Sample) -> Sample:
        image = sample["image"]
        image = F.to_pil_image(image) if isinstance(image, Tensor) else image
        factor = self._factor()
        resized = resize_long_side(image, factor) if isinstance(factor, int) else rescale(image, factor)
        mirrored = random_draw(2) == 1
        if self.jitter is not None:
            resized = self.jitter(resized)
        box = crop_box((resized.height, resized.width), self.crop_size)
        pixels = normalize(_flip_if(mirrored, F.pil_to_tensor(resized)))
        changed: Sample = {
            "image": crop(pixels, self.crop_size, box, fill=0.0),
            "valid_box": box.valid_box,
        }
        if "mask" in sample:
            label = Image.fromarray(sample["mask"].to(torch.uint8).numpy())
            label = F.pil_to_tensor(label.resize(resized.size, Image.Resampling.NEAREST))[0]
            label = _flip_if(mirrored, label).to(sample["mask"].dtype)
            changed["mask"] = crop(label, self.crop_size, box, fill=IGNORE_INDEX)
        return sample | changed

    def _factor(self) -> int | float:
        """A random long side in pixels, or a random factor."""
        if self.long_side is not None:
            low, high = self.long_side
            return low + random_draw(high - low + 1)
        return self.scale_range[0] + (self.scale_range[1] - self.scale_range[0]) * torch.rand(()).item()


def colour_jitter_of_psa() -> v2.ColorJitter:
    """The colour changes of PSA and SEAM, on the picture before its normalisation."""
    return v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


def _offsets(length: int, crop_size: int, draw: Draw) -> tuple[int, int]:
    """Along one axis: where the crop begins in the image, and where the image begins in the crop."""
    offset = draw(abs(length - crop_size) + 1)
    return (offset, 0) if length > crop_size else (0, offset)


def _flip_if(flip: bool, values: Tensor) -> Tensor:
    return values.flip(-1) if flip else values
