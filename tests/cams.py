"""Labels of CAMs as the scores of validation and inference see them."""

import torch

from ops.cam import strongest_class
from ops.labels import threshold_label


def scored_label(cam, class_label, threshold, size=None):
    """(B, H, W) from CAMs (B, C, h, w) and tags (B, C)."""
    labels = []
    for maps, tags in zip(cam, class_label, strict=True):
        class_ids = tags.nonzero()[:, 0] + 1
        score, label = strongest_class(maps[class_ids - 1], class_ids, size or maps.shape[-2:])
        labels.append(threshold_label(score, label, threshold))
    return torch.stack(labels)
