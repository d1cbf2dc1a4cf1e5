"""Losses of SEAM (Wang et al., CVPR 2020): an image and a smaller copy must have equal maps. In float32.

B images, K classes with background 0, C = K - 1, (h, w) pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def max_norm(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Stretch every map of (..., h, w), rectified, to [0, 1]; gradients reach its minimum and maximum too.

    A map that is nowhere positive becomes 0.
    """
    maps = maps.float().relu()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return F.relu(maps - low - eps) / (high - low + eps)


def min_pool_loss(maps: Tensor, share: float = 0.25) -> Tensor:
    """Mean activation of the least activated pixels, which keeps maps from covering whole images.

    Args:
        maps: (B, C, h, w) of the present classes, zero for the others. A pixel counts with its strongest
            class.
        share: of the pixels of every image that is averaged.

    Returns:
        Scalar, 0 where the pixels are not activated at all.
    """
    strongest = maps.float().amax(1).flatten(1)  # (B, hw)
    count = max(int(strongest.shape[1] * share), 1)
    return strongest.topk(count, largest=False).values.relu().mean()


def strongest_only(cam: Tensor) -> Tensor:
    """(B, K, h, w) maps in which of all foreground classes only the strongest of a pixel keeps its value.

    The background is left as it is, and equally strong classes stay all.
    """
    background, foreground = cam[:, :1], cam[:, 1:]
    kept = foreground == foreground.amax(1, keepdim=True)
    return torch.cat([background, foreground * kept], 1)


def with_background(foreground: Tensor) -> Tensor:
    """(B, C, h, w) maps in [0, 1] -> (B, K, h, w): the background is what the strongest class leaves."""
    return torch.cat([1 - foreground.amax(1, keepdim=True), foreground], 1)


def equivariant_regularization(cam: Tensor, small_cam: Tensor) -> Tensor:
    """Mean absolute difference of the maps (B, C, h, w) of an image and of its smaller copy (SEAM, ER)."""
    return (cam.float() - small_cam.float()).abs().mean()


def equivariant_cross_regularization(refined: Tensor, target: Tensor, hard_share: float = 0.2) -> Tensor:
    """Distance of refined maps from the plain maps of the other view, over the hardest entries (SEAM, ECR).

    Args:
        refined: (B, K, h, w) maps after the pixel correlation module.
        target: (B, K, h, w) of the other view, without gradient; only its strongest class counts.
        hard_share: of all entries of an image that enters its mean, the largest ones.
    """
    difference = (strongest_only(target.detach().float()) - refined.float()).abs().flatten(1)  # (B, Khw)
    count = max(int(difference.shape[1] * hard_share), 1)
    return difference.topk(count).values.mean()
