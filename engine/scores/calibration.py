"""Calibration: whether what a network says with 0.9 is right nine times of ten (Guo et al., ICML 2017)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.scores.base import ImagePrediction, Sample, Score, Values
from engine.scores.tables import number, text_table
from utils.image import IGNORE_INDEX

BINS = 10
SUBJECTS = {"": "classifier", "seg": "segmentation"}


class Calibration(Score):
    """Expected calibration error: mean distance of a score from the share of its bin that is right.

    A score of the classifier is the sigmoid of a logit, for each class of an image. That of the segmentation
    is the probability of a pixel's label.
    """

    title = "calibration error"

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(class_names, device)
        # By bin: how many, how many are right, sum of the scores.
        self.bins = torch.zeros(len(SUBJECTS), BINS, 3, dtype=torch.float64, device=device)

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        if prediction.class_logits is not None and "class_label" in sample:
            self.bins[0] += binned(prediction.class_logits.sigmoid(), sample["class_label"] > 0)
        if prediction.seg_probs is not None:
            probs, label = prediction.seg_probs(), prediction.labels["seg"]
            known = sample["mask"] != IGNORE_INDEX
            score = (probs / probs.sum(0).clamp(min=1e-12)).gather(0, label[None])[0]
            self.bins[1] += binned(score[known], (label == sample["mask"])[known])

    def tensors(self) -> list[Tensor]:
        return [self.bins]

    def compute(self) -> dict[str, Values]:
        counts = zip(SUBJECTS, self.bins.cpu(), strict=True)
        return {output: self.values(output, bins) for output, bins in counts if bins.any()}

    def values(self, output: str, bins: Tensor) -> Values:
        count, right, total = bins.T
        error = float((total - right).abs().sum() / count.sum())
        said = bins[BINS // 2 :].sum(0)
        reading = f"The {SUBJECTS[output]} says nothing with more than 0.5."
        if said[0]:
            mean, share = (said[2] / said[0]).item(), (said[1] / said[0]).item()
            what = f"What the {SUBJECTS[output]} says with more than 0.5, on average {mean:.2f},"
            reading = f"{what} is right in {100 * share:.0f} %."
        reading += f" Calibration error: {100 * error:.1f} %."
        rows = [(s / n, r / n, n) for n, r, s in bins.tolist() if n]
        return Values(error, {}, {"calibration_bins": rows, "calibration_reading": reading})

    def table(self, found: Mapping[str, Values]) -> str:
        parts = []
        for output, values in found.items():
            rows = [
                [f"{score:.2f}", number(right), f"{count:.0f}"]
                for score, right, count in values.more["calibration_bins"]
            ]
            table = text_table([f"score of the {SUBJECTS[output]}", "right %", "count"], rows)
            parts.append(f"{table}\n{values.more['calibration_reading']}")
        return "\n\n".join(parts)


def binned(score: Tensor, is_right: Tensor) -> Tensor:
    """(BINS, 3) of scores in [0, 1]: by bin how many, how many are right, and the sum of the scores."""
    score = score.double().flatten()
    index = (score * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(score), is_right.double().flatten(), score], 1)
    return columns.new_zeros(BINS, 3).index_add(0, index, columns)
