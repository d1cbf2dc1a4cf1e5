"""Labels from CAMs, from scores and from other labels; the pairs of a label; what is outside of an image.

B images, C foreground classes, P <= C of them kept, (H, W) pixels, (h, w) tokens. Nothing here carries
gradient. All comparisons are "<= threshold".
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cam import PresentClasses, best_class
from utils.device import positions
from utils.image import IGNORE_INDEX, resize


def threshold_label(score: Tensor, label: Tensor, background_threshold: float) -> Tensor:
    """``label`` where its score exceeds the threshold, background elsewhere."""
    return label.masked_fill(score <= background_threshold, 0)


def cam_to_confident_label(
    cam: Tensor,
    class_label: Tensor,
    low_threshold: float,
    high_threshold: float,
    class_ids: Tensor | None = None,
    uncertain: int = IGNORE_INDEX,
) -> Tensor:
    """Label (B, H, W) int64: background up to low, ``uncertain`` up to high, else the best class."""
    score, label = best_class(cam, class_label, class_ids)
    return label.masked_fill_(score <= high_threshold, uncertain).masked_fill_(score <= low_threshold, 0)


def region_mask(cam: Tensor, class_label: Tensor, low_threshold: float, high_threshold: float) -> Tensor:
    """(B, H, W) uint8: 0 background (score <= low), 1 uncertain, 2 foreground (score >= high)."""
    score, _ = best_class(cam, class_label)
    region = torch.ones_like(score, dtype=torch.uint8)
    return region.masked_fill_(score <= low_threshold, 0).masked_fill_(score >= high_threshold, 2)


def outside_box(valid_box: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) bool, False inside of ``valid_box`` (B, 4; y0, y1, x0, x1, half-open)."""
    place, box = positions(max(size), valid_box.device), valid_box.unflatten(1, (2, 2))
    begun, ended = (place >= box[..., None]).unbind(2)  # (B, 2, longer side)
    outside = begun == ended
    return outside[:, 0, : size[0], None] | outside[:, 1, None, : size[1]]


def ignore_outside_box(label: Tensor, valid_box: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Set labels (B, H, W) outside of ``valid_box`` (B, 4; y0, y1, x0, x1, half-open) to ``ignore_index``."""
    return label.masked_fill(outside_box(valid_box.to(label.device), label.shape[1:]), ignore_index)


def box_on_tokens(valid_box: Tensor, patch_size: int) -> Tensor:
    """The box (B, 4) in tokens instead of pixels: the tokens whose centre lies inside."""
    return (valid_box + (patch_size // 2 - 1)).div(patch_size, rounding_mode="floor")


def affinity_label(label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Whether two places carry the same label.

    Args:
        label: (B, h, w) integers.

    Returns:
        (B, hw, hw) uint8: 1 same (background with background included), 0 different, ``ignore_index`` where
        either is ignored and on the diagonal.
    """
    flat = label.flatten(1)
    ignored = flat == ignore_index
    affinity = (flat[:, :, None] == flat[:, None, :]).view(torch.uint8)
    affinity.masked_fill_(ignored[:, :, None] | ignored[:, None, :], ignore_index)
    affinity.diagonal(dim1=1, dim2=2).fill_(ignore_index)
    return affinity


def refined_label(
    refine: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
    image_rgb: Tensor,
    cam: Tensor,
    present: PresentClasses,
    low_threshold: float,
    high_threshold: float,
) -> Tensor:
    """Foreground that beats a high background score, background that beats a low one, at half resolution.

    Args:
        refine: ``refine_all`` of a refiner (models/refiners/base.py).
        image_rgb: (B, 3, H, W) in [0, 1].
        cam: (B, P, H, W) in [0, 1], channels as in ``present``.

    Returns:
        (B, H, W) int64: 0, a present class, or ``IGNORE_INDEX``.
    """
    height, width = cam.shape[-2:]
    half = height // 2, width // 2
    image_rgb, cam = (resize(x, half) for x in (image_rgb, cam))
    # Padding takes no part in the softmax.
    cam = cam.masked_fill(present.label[:, :, None, None] == 0, -torch.inf)
    probs = [
        F.pad(cam, (0, 0, 0, 0, 1, 0), value=background).softmax(1)  # (B, 1 + P, H/2, W/2)
        for background in (high_threshold, low_threshold)
    ]
    class_ids = F.pad(present.class_ids, (1, 0))  # channel 0 is background
    refined = resize(torch.cat(list(refine(image_rgb, probs))), (height, width))
    # On a CPU max().indices is eight times faster than argmax over a dimension that is not the last.
    channel = refined.max(1).indices.unflatten(0, (2, -1))  # (2, B, H, W)
    labels = class_ids.expand(2, -1, -1).gather(2, channel.flatten(2)).view_as(channel)
    return merge_confident_labels(*labels)


def merge_confident_labels(foreground_run: Tensor, background_run: Tensor, ignore_index: int = 255) -> Tensor:
    """One label from a strict (high threshold, small alpha) and a lax run (ToCo, IRN, CDA, PSA, SEAM).

    Background of the strict run is ignored, unless the lax run agrees: then it is background.
    """
    only_there = foreground_run < (background_run != 0)  # 0 here, and a class there
    return foreground_run.masked_fill(only_there, ignore_index)


def merge_readings(scores: Tensor) -> Tensor:
    """Where two readings of an image are sure (PSA section 3.2); everything else is ignored.

    Args:
        scores: (2, 1 + P, h, w): with much background (low alpha), then with little (high alpha), background
            first; 0 in all channels outside of the image.

    Returns:
        (h, w) int64: p where class p wins against much background, but 0 where even little background wins,
        and 255 elsewhere.
    """
    against_much, against_little = scores.max(1).indices
    label = against_much.masked_fill(against_much == 0, IGNORE_INDEX).masked_fill(against_little == 0, 0)
    return label.masked_fill(scores.amax((0, 1)) < 1e-5, IGNORE_INDEX)
