"""Mean intersection over union, the number that papers report."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.scores.base import LabelScore, Values, plain


class Miou(LabelScore):
    """IoU per class, nan for a class that occurs neither in the truth nor in the prediction.

    The mean is over the classes that occur in the truth. ``scores.json`` holds the whole confusion matrix,
    so that every other score of pixels can be computed later (`matrix_of`).
    """

    title = mean_title = "mIoU"

    def values(self, sums: Tensor) -> Values:
        matrix = sums.double()  # exact up to 2**53 pixels
        hits, truth = matrix.diagonal(), matrix.sum(1)
        iou, mean = iou_of(matrix)
        more = {
            "miou_classes": int((truth > 0).sum()),
            "pixel_accuracy": plain(hits.sum() / truth.sum()),
            "mean_accuracy": plain((hits / truth).nanmean()),
            "pixels": int(sums.sum()),
            "matrix": [" ".join(map(str, row)) for row in sums.tolist()],
        }
        return Values(mean, {"iou": iou}, more)


def iou_of(matrix: Tensor) -> tuple[Tensor, float]:
    """IoU (K,) of a confusion matrix (K, K) float64, and its mean over the classes in the truth."""
    hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = hits / (truth + predicted - hits)
    return iou, float(iou[truth > 0].mean())


def matrix_of(score: Mapping[str, Any]) -> Tensor:
    """The confusion matrix (K, K) int64 of the ``score`` of a record of ``scores.json``."""
    return torch.tensor([[int(n) for n in row.split()] for row in score["matrix"]])
