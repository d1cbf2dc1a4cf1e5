"""Boundary F-score: how well outlines agree (Csurka et al., What is a good evaluation measure for semantic
segmentation?, BMVC 2013)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.scores.base import ImagePrediction, LabelScore, Values
from utils.image import IGNORE_INDEX

TOLERANCE = 0.0075  # of the image's diagonal, as published: 5 pixels of a VOC image


class BoundaryF(LabelScore):
    """F1 of outline pixels per class, from sums over the split; the mean is over classes in the truth.

    Precision is the share of the predicted outline near the true one, recall the share of the true outline
    near the predicted one; near is a Chebyshev distance up to the tolerance. Ignored pixels belong to no
    class, in the prediction too. A class without any outline is nan.
    """

    title = "boundary F"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_classes, 4

    def count(self, mask: Tensor, prediction: ImagePrediction, output: str) -> Tensor:
        label = prediction.labels[output].masked_fill(mask == IGNORE_INDEX, IGNORE_INDEX)
        reach = tolerance(mask)
        counts = torch.zeros_like(self.sums[0])
        for k in torch.cat([mask.unique(), label.unique()]).unique().tolist():
            if k != IGNORE_INDEX:
                truth, predicted = outline(mask == k), outline(label == k)
                hits = predicted & grown(truth, reach), truth & grown(predicted, reach)
                counts[k] = torch.stack([x.sum() for x in (*hits, predicted, truth)])
        return counts

    def values(self, sums: Tensor) -> Values:
        near_truth, near_predicted, predicted, truth = sums.double().unbind(1)
        precision, recall = near_truth / predicted.clamp(min=1), near_predicted / truth.clamp(min=1)
        f = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        f = f.where(predicted + truth > 0, torch.nan)
        return Values(float(f[truth > 0].mean()), {"boundary_f": f})


def tolerance(mask: Tensor) -> int:
    """Pixels that count as near in an image (H, W)."""
    return max(1, round(TOLERANCE * (mask.shape[0] ** 2 + mask.shape[1] ** 2) ** 0.5))


def outline(region: Tensor) -> Tensor:
    """Pixels of a region (H, W) with a pixel above, below, left or right that is not in it."""
    outside = (~region).float()[None]
    beside = F.max_pool2d(outside, (3, 1), 1, (1, 0)) + F.max_pool2d(outside, (1, 3), 1, (0, 1))
    return region & (beside[0] > 0)


def grown(region: Tensor, reach: int) -> Tensor:
    """Pixels (H, W) that are at most ``reach`` rows and columns away from a region."""
    rows = F.max_pool2d(region.float()[None], (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(rows, (1, 2 * reach + 1), 1, (0, reach))[0] > 0
