"""F1 of the predicted image tags."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.scores.base import ImagePrediction, Sample, Score, Values


class TagF1(Score):
    """Mean over the images with known tags of the F1 of their predicted tags (logit > 0)."""

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(class_names, device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # of F1, of images

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        if prediction.class_logits is not None and "class_label" in sample:
            self.sums[0] += tag_f1(prediction.class_logits, sample["class_label"])
            self.sums[1] += 1

    def tensors(self) -> list[Tensor]:
        return [self.sums]

    def compute(self) -> dict[str, Values]:
        total, images = self.sums.tolist()
        return {"": Values(total / images)} if images else {}


def tag_f1(prediction: Tensor, class_label: Tensor) -> Tensor:
    """Binary F1 (...,) float64 of tags (..., C): logits or booleans against the multi-hot ``class_label``.

    As in the reference, an image without any tag and without any predicted tag counts as 0.
    """
    predicted, label = prediction > 0, class_label > 0
    hits = (predicted & label).sum(-1).double()
    positives = predicted.sum(-1).double() + label.sum(-1)
    return 2 * hits / positives.clamp(min=1)
