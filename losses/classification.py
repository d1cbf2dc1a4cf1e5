"""Losses on image-level logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.precision import full_precision


def multilabel_loss(class_logits: Tensor, class_label: Tensor) -> Tensor:
    """Multi-label soft margin loss: binary cross entropy of every class, averaged over classes and images.

    Args:
        class_logits: (B, C) of any float type; computed in float32.
        class_label: (B, C), 0 or 1.
    """
    with full_precision(class_logits):
        return F.multilabel_soft_margin_loss(class_logits.float(), class_label.float())


def multilabel_hinge_loss(class_logits: Tensor, class_label: Tensor) -> Tensor:
    """Multi-label margin loss: every present class beats every absent one by 1; averaged over images.

    Sums ``max(0, 1 - (present - absent))`` over all pairs of an image and divides by the number of classes.

    Args:
        class_logits: (B, C) of any float type; computed in float32.
        class_label: (B, C), 0 or 1.
    """
    with full_precision(class_logits):
        # PyTorch wants the numbers of the present classes, and -1 behind the last.
        present = class_label > 0
        order = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        target = order.masked_fill(~present.gather(1, order), -1)
        return F.multilabel_margin_loss(class_logits.float(), target)
