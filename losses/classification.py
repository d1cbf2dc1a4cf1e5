"""Losses on image-level logits."""

from __future__ import annotations

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
