"""Class activation maps: multi-scale fusion, normalisation, the strongest class.

B images, C foreground classes, P <= C of them kept, (H, W) pixels, (h, w) tokens. Channel c of a CAM is
foreground class c + 1 unless ``class_ids`` says otherwise. Nothing here carries gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.image import rescale, resize
from utils.precision import full_precision


class PresentClasses(NamedTuple):
    """The classes of every image, padded to the largest number in the batch (at least 1), in ascending order.

    Channels do not interact and absent classes reach no label, so training works on these alone.
    """

    channels: Tensor  # (B, P) int64 channel numbers
    class_ids: Tensor  # (B, P) class numbers as in masks
    label: Tensor  # (B, P) float, 1 where the class is present, 0 in the padding

    def select(self, maps: Tensor) -> Tensor:
        """(..., B, C, h, w) maps -> the (..., B, P, h, w) maps of these classes."""
        index = self.channels[:, :, None, None]
        return maps.gather(-3, index.expand(*maps.shape[:-4], -1, -1, *maps.shape[-2:]))


def present_classes(class_label: Tensor, most: Tensor | None = None) -> PresentClasses:
    """The classes of each image of ``class_label`` (B, C), multi-hot.

    Args:
        most: () the largest number of classes of an image, where the CPU knows it.
    """
    present = (class_label > 0).view(torch.uint8)
    count = max(int(present.sum(1).max() if most is None else most), 1)
    index = present.argsort(dim=1, descending=True, stable=True)[:, :count]
    return PresentClasses(index, index + 1, class_label.gather(1, index))


@torch.no_grad()
def multi_scale_cam(
    activation: Callable[[Tensor], tuple[Tensor, ...]],
    image: Tensor,
    scales: Sequence[float],
    *,
    first: tuple[Tensor, ...] | None = None,
    select: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Sum over scales of the larger of image and mirrored image, each channel normalised.

    Args:
        activation: images (N, 3, ., .) -> raw maps, one or more tensors (N, C, h, w).
        image: (B, 3, H, W) normalised.
        scales: factors of the image size. Scale 1 is always used, as in the published programs.
        first: raw maps of ``image`` itself where they are known already.
        select: keeps some channels of the raw maps before they are enlarged (``PresentClasses.select``).

    Returns:
        As many maps as ``activation`` gives, (B, P, H, W) float32 in [0, 1].
    """
    size = image.shape[-2:]
    total: Tensor | None = None
    for scale in (1.0, *(s for s in scales if s != 1.0)):
        scaled = image
        if scale != 1.0:
            scaled_size = [max(1, int(scale * side)) for side in size]
            scaled = F.interpolate(image, size=scaled_size, mode="bilinear", align_corners=False)
        if scale == 1.0 and first is not None:
            pairs = list(zip(first, activation(scaled.flip(-1)), strict=True))
        else:
            pairs = [raw.unflatten(0, (2, -1)) for raw in activation(torch.cat([scaled, scaled.flip(-1)]))]
        with full_precision(image):
            upright, mirrored = ([raw.float() for raw in side] for side in zip(*pairs, strict=True))
            maps = torch.stack([*upright, *(m.flip(-1) for m in mirrored)])  # (2 * maps, B, C, h, w)
            maps = maps if select is None else select(maps)
            enlarged = F.interpolate(maps.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
            larger = torch.maximum(*enlarged.unflatten(0, (2, -1))).relu_()
        total = larger if total is None else total.add_(larger)
    return normalize_cam(total).unflatten(0, (len(upright), -1)).unbind()


@torch.no_grad()
def summed_cam(
    activation: Callable[[Tensor], tuple[Tensor, ...]],
    image: Tensor,
    scales: Sequence[float],
    sizes: Sequence[tuple[int, int]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Sum over scales of the maps of image and mirrored image (PSA, IRN, SEAM), not normalised.

    Args:
        activation: images (N, 3, ., .) -> maps (N, C, h, w), rectified where the method rectifies, and other
            outputs (N, ...).
        image: (B, 3, H, W) normalised.
        scales: factors of the image size. Scale 1 is always used.
        sizes: what the maps are resized to (bilinear) before they are summed.

    Returns:
        (B, C, *size) float32 for each of ``sizes``, and the other outputs (B, ...) of the image itself.
    """
    totals: list[Tensor] = []
    of_image: list[Tensor] = []
    for scale in (1.0, *(s for s in scales if s != 1.0)):
        scaled = image if scale == 1.0 else rescale(image, scale)
        maps, *others = activation(torch.cat([scaled, scaled.flip(-1)]))
        of_image = of_image or [x[: image.shape[0]] for x in others]
        with full_precision(image):
            upright, mirrored = maps.float().unflatten(0, (2, -1))
            both = upright + mirrored.flip(-1)
            sized = [F.interpolate(both, size=size, mode="bilinear", align_corners=False) for size in sizes]
        totals = [t.add_(m) for t, m in zip(totals, sized)] if totals else sized
    return totals, of_image


def divide_by_maximum(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide every channel of (B, C, H, W) by its maximum + ``eps`` (PSA, IRN)."""
    return cam / (cam.amax((2, 3), keepdim=True) + eps)


def background_score(cam: Tensor, alpha: float) -> Tensor:
    """(..., P, H, W) of the P >= 1 present classes -> (..., H, W): what the strongest class leaves, to the
    power ``alpha``; large exponents leave little background (PSA equation 2).
    """
    return (1 - cam.amax(-3)).clamp(min=0) ** alpha


def normalize_cam(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """Stretch channels of (B, C, H, W) to [0, 1]: subtract the minimum, divide by maximum + ``eps``."""
    return divide_by_maximum(cam - cam.amin((2, 3), keepdim=True), eps)


def best_class(cam: Tensor, class_label: Tensor, class_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The strongest present class of every pixel.

    Args:
        cam: (B, C, H, W) in [0, 1].
        class_label: (B, C), 1 for present classes.
        class_ids: (B, C) class numbers of the channels; c + 1 by default.

    Returns:
        Score (B, H, W), 0 where no class is present, and class number (B, H, W) int64.
    """
    score, channel = (cam * class_label[:, :, None, None].to(cam.dtype)).max(1)
    if class_ids is None:
        return score, channel + 1
    return score, class_ids.gather(1, channel.flatten(1)).view_as(channel)


def strongest_class(cam: Tensor, class_ids: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The strongest class of every pixel of one image, from maps that are resized to its mask.

    Args:
        cam: (n, h, w) in [0, 1] of the n >= 0 classes of the image.
        class_ids: (n,) int64 mask values of the channels, ascending.

    Returns:
        Score (H, W), and class number (H, W) int64; both are 0 for an image without classes.
    """
    if not len(class_ids):
        return cam.new_zeros(*size), class_ids.new_zeros(*size)
    score, label = best_class(resize(cam[None], size), torch.ones_like(class_ids)[None], class_ids[None])
    return score[0], label[0]
