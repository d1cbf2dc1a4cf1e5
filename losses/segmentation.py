"""Losses between a decoder's logits and a pseudo label."""

import torch.nn.functional as F
from torch import Tensor

from utils.device import positions
from utils.distributed import global_mean
from utils.precision import full_precision


def pixel_cross_entropy(seg_logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross entropy over the labelled pixels of the whole batch, on all processes; 0 if there is none.

    Args:
        seg_logits: (B, K, H, W).
        label: (B, H, W) int64; ``ignore_index`` does not count.
    """
    with full_precision(seg_logits):
        total = F.cross_entropy(seg_logits.float(), label, ignore_index=ignore_index, reduction="sum")
        return global_mean(total, (label != ignore_index).sum(), offset=1e-6)


def balanced_cross_entropy(seg_logits: Tensor, pseudo_label: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy with equal weight for background and foreground pixels, however many there are of each.

    The two means run over the pixels of the whole batch, on all processes. With SeCo's ``count + 1e-6`` a
    batch without confident foreground counts 0; ToCo's plain mean is NaN there.

    Args:
        seg_logits: (B, K, H, W).
        pseudo_label: (B, H, W) int64: 0 background, ``ignore_index`` not counted.
    """
    with full_precision(seg_logits):
        loss = F.cross_entropy(seg_logits.float(), pseudo_label, ignore_index=ignore_index, reduction="none")
        background = pseudo_label == 0
        foreground = background ^ (pseudo_label != ignore_index)  # labelled, but not as background
        means = [
            global_mean((loss * part).sum(), part.sum(), offset=1e-6) for part in (background, foreground)
        ]
        return 0.5 * (means[0] + means[1])


def mask_loss(
    seg_logits: Tensor, pseudo_label: Tensor, class_label: Tensor, ignore_index: int = 255
) -> Tensor:
    """Class-balanced cross entropy with the network's own refined masks (1-stage-wseg, self-supervised loss).

    A pixel of class c weighs ``(N - n_c) / (1 + N)``, with n_c of the N labelled pixels of its image in the
    class. An image counts only if its background and every class that it is tagged with got a pixel.

    Args:
        seg_logits: (B, K, H, W).
        pseudo_label: (B, H, W) int64: 0 background, tagged classes, ``ignore_index`` not counted.
        class_label: (B, C), 0 or 1.

    Returns:
        (B,) losses of the images: means over all pixels, ignored ones (which add 0) included, as published.
    """
    with full_precision(seg_logits):
        k = seg_logits.shape[1]
        loss = F.cross_entropy(seg_logits.float(), pseudo_label, ignore_index=ignore_index, reduction="none")
        ignored = pseudo_label == ignore_index
        label = pseudo_label.masked_fill(ignored, k)  # one bin more, for what is ignored
        classes = positions(k, label.device)[:, None]
        count = (label.flatten(1)[:, None] == classes).sum(2).float()  # (B, K)
        total = count.sum(1, keepdim=True)
        weight = F.pad((total - count) / (1 + total), (0, 1))  # (B, K + 1), 0 for what is ignored
        complete = (count > 0).sum(1) == class_label.sum(1) + 1
        pixel_weight = weight.gather(1, label.flatten(1)).view_as(loss)
        return complete * (pixel_weight * loss).mean((1, 2))
