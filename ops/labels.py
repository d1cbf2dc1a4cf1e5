"""Label images out of other label images."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_confident_labels(foreground_run: Tensor, background_run: Tensor, ignore_index: int = 255) -> Tensor:
    """One label from a strict and a lax run (ToCo, IRN, CDA, PSA, SEAM).

    Background of the strict run is ignored, unless the lax run agrees: then it is background.

    Args:
        foreground_run, background_run: integer class ids of the same shape, 0 background, from the strict
            (high threshold, small alpha) and the lax run.
    """
    merged = torch.where(foreground_run == 0, ignore_index, foreground_run)
    return torch.where((foreground_run == 0) & (background_run == 0), 0, merged)
