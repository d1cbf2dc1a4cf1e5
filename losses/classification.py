"""Losses on image-level logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.precision import full_precision


def multilabel_loss(class_logits: Tensor, class_label: Tensor) -> Tensor:
    """Binary cross entropy of logits (..., B, C) and labels (B, C), averaged over classes and images."""
    with full_precision(class_logits):
        logits = class_logits.float()
        return -F.logsigmoid(torch.where(class_label > 0, logits, -logits)).mean(-1).mean(-1)


def multilabel_hinge_loss(class_logits: Tensor, class_label: Tensor) -> Tensor:
    """Multi-label margin loss of logits (B, C) and labels (B, C): present classes beat absent ones by 1.

    ``max(0, 1 - (present - absent))``, summed over the pairs of an image, divided by C, averaged over images.
    """
    with full_precision(class_logits):
        # PyTorch wants the numbers of the present classes, and -1 behind the last.
        present = class_label > 0
        order = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        target = order.masked_fill(~present.gather(1, order), -1)
        return F.multilabel_margin_loss(class_logits.float(), target)
