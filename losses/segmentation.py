"""Losses between a decoder's logits and a pseudo label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from utils.distributed import global_mean
from utils.precision import full_precision


def balanced_cross_entropy(seg_logits: Tensor, pseudo_label: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy with equal weight for background and foreground pixels, however many there are of each.

    The two means run over the pixels of the whole batch, on all processes. ToCo's plain means are NaN when a
    batch has no confident foreground (26 of 1000 steps on small data); SeCo's ``count + 1e-6`` gives 0 there
    and is the same elsewhere.

    Args:
        seg_logits: (B, K, H, W).
        pseudo_label: (B, H, W) int64: 0 background, ``ignore_index`` not counted.
    """
    with full_precision(seg_logits):
        loss = F.cross_entropy(seg_logits.float(), pseudo_label, ignore_index=ignore_index, reduction="none")
        background = pseudo_label == 0
        foreground = ~background & (pseudo_label != ignore_index)
        means = [
            global_mean((loss * part).sum(), part.sum(), offset=1e-6) for part in (background, foreground)
        ]
        return 0.5 * (means[0] + means[1])
