"""Label images out of other label images, or of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.image import IGNORE_INDEX


def merge_confident_labels(foreground_run: Tensor, background_run: Tensor, ignore_index: int = 255) -> Tensor:
    """One label from a strict and a lax run (ToCo, IRN, CDA, PSA, SEAM).

    Background of the strict run is ignored, unless the lax run agrees: then it is background.

    Args:
        foreground_run, background_run: integer class ids of the same shape, 0 background, from the strict
            (high threshold, small alpha) and the lax run.
    """
    merged = torch.where(foreground_run == 0, ignore_index, foreground_run)
    return torch.where((foreground_run == 0) & (background_run == 0), 0, merged)


def merge_readings(scores: Tensor) -> Tensor:
    """Where two readings of an image are sure (PSA section 3.2); everything else is ignored.

    Args:
        scores: (2, 1 + P, h, w): with much background (low alpha), then with little (high alpha). Channel 0
            is the background; 0 in all channels outside of the image.

    Returns:
        (h, w) int64: p where class p wins against much background, but 0 where even little background wins,
        and 255 elsewhere.
    """
    against_much, against_little = scores.max(1).indices
    label = against_much.masked_fill(against_much == 0, IGNORE_INDEX).masked_fill(against_little == 0, 0)
    return label.masked_fill(scores.amax((0, 1)) < 1e-5, IGNORE_INDEX)
