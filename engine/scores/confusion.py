"""Segmentation scores from one streaming confusion matrix, and the F1 score of image-level tags.

Letters: K classes with background 0, C = K - 1 foreground classes, B images.

Nothing but the K x K matrix is kept, so memory does not grow with the number of images, and the matrices of
several processes add up to the matrix of the whole split: sharded and single-process scores are equal to the
last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum
from utils.image import IGNORE_INDEX


@dataclass(frozen=True)
class SegScores:
    """Scores of a split, all derived from its confusion matrix.

    Undefined ratios stay visible instead of becoming 0: ``iou`` is nan for a class that occurs neither in the
    truth nor in the prediction, ``precision`` is nan for a class that was never predicted, ``recall`` nan for
    one that never occurs. ``confusion`` (FP / TP, lower is better, equals 1 / precision - 1) is inf for a
    class that was predicted but never right, and nan for one that was never predicted; its mean is taken over
    the finite values only.

    Args:
        matrix: (K, K) int64 pixel counts, rows truth, columns prediction.
    """

    matrix: Tensor

    @property
    def num_classes(self) -> int:
        return self.matrix.shape[0]

    @property
    def pixels(self) -> int:
        """Number of scored pixels."""
        return int(self.matrix.sum())

    @cached_property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(K,) float64 true positives, truth pixels, predicted pixels; exact up to 2**53."""
        matrix = self.matrix.double()
        return matrix.diagonal(), matrix.sum(1), matrix.sum(0)

    @property
    def pixel_accuracy(self) -> float:
        """Share of right pixels; nan without any pixel."""
        hits, truth, _ = self._counts
        return float(hits.sum() / truth.sum())

    @property
    def mean_accuracy(self) -> float:
        """Mean recall over the classes that occur in the truth."""
        return float(self.recall.nanmean())

    @property
    def iou(self) -> Tensor:
        """(K,) float64 intersection over union."""
        hits, truth, predicted = self._counts
        return hits / (truth + predicted - hits)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in the truth, the number that papers report."""
        return float(self.iou[self._counts[1] > 0].mean())

    @property
    def precision(self) -> Tensor:
        """(K,) float64 TP / (TP + FP)."""
        hits, _, predicted = self._counts
        return hits / predicted

    @property
    def recall(self) -> Tensor:
        """(K,) float64 TP / (TP + FN)."""
        hits, truth, _ = self._counts
        return hits / truth

    @property
    def confusion(self) -> Tensor:
        """(K,) float64 confusion ratio FP / TP (SeCo): how many wrong pixels come with each right one."""
        hits, _, predicted = self._counts
        return (predicted - hits) / hits

    @property
    def mean_confusion(self) -> float:
        """Mean of the finite confusion ratios: classes with at least one true positive."""
        return float(_finite(self.confusion).mean())

    @property
    def share(self) -> Tensor:
        """(K, K) float64: share of the pixels of class k predicted as c; nan rows for absent classes."""
        return self.matrix.double() / self._counts[1][:, None]

    def top_confusions(self, count: int = 20, foreground: bool = True) -> list[tuple[int, int, float]]:
        """The ``count`` largest ``(truth class, predicted class, share of its pixels)`` off the diagonal.

        With ``foreground`` both classes are objects: what the co-occurrence of two objects costs. Without it
        one of the two is background: objects that leak into their context, and objects that were missed.
        """
        share = self.share.nan_to_num(0.0).fill_diagonal_(0.0)
        object_class = torch.arange(self.num_classes) > 0
        both = object_class[:, None] & object_class
        share = share.where(both if foreground else ~both, share.new_zeros(()))
        values, order = share.flatten().topk(min(count, share.numel()))
        pairs = [divmod(int(i), self.num_classes) for i in order]
        return [(k, c, float(v)) for (k, c), v in zip(pairs, values, strict=True) if v > 0]

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Plain values for ``scores.json``: nan becomes null, inf the string "inf", ratios stay in [0, 1]."""
        if len(class_names) != self.num_classes:
            raise ValueError(f"{len(class_names)} class names for a matrix of {self.num_classes} classes")
        finite = _finite(self.confusion)
        per_class = {
            name: {key: _plain(getattr(self, key)[i]) for key in ("iou", "precision", "recall", "confusion")}
            for i, name in enumerate(class_names)
        }
        return {
            "miou": _plain(self.miou),
            "miou_classes": int((self._counts[1] > 0).sum()),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "mean_accuracy": _plain(self.mean_accuracy),
            "mean_precision": _plain(_finite(self.precision).mean()),
            "mean_recall": _plain(_finite(self.recall).mean()),
            "mean_confusion": _plain(finite.mean()),
            "median_confusion": _plain(finite.median() if len(finite) else math.nan),
            "confusion_classes": len(finite),
            "pixels": self.pixels,
            "per_class": per_class,
            "confused_objects": self._named(self.top_confusions(foreground=True), class_names),
            "confused_with_background": self._named(self.top_confusions(foreground=False), class_names),
            "matrix": [" ".join(map(str, row)) for row in self.matrix.tolist()],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SegScores:
        """The scores whose :meth:`to_dict` is ``record``; its matrix holds all that is needed."""
        return cls(
            torch.tensor([[int(v) for v in row.split()] for row in record["matrix"]], dtype=torch.int64)
        )

    @staticmethod
    def _named(pairs: Iterable[tuple[int, int, float]], names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"truth": names[k], "predicted": names[c], "share": round(share, 6)} for k, c, share in pairs]


@dataclass
class ConfusionMatrix:
    """Pixel counts (truth, prediction) over a split, kept on ``device``.

    Values that are neither a class nor ``ignore_index`` are counted as well and refused when scores are asked
    for: a wrong label format should not look like a low score.
    """

    num_classes: int
    device: torch.device | str = "cpu"
    ignore_index: int = IGNORE_INDEX
    # (K * K + 3,): the matrix, then ignored pixels, truth out of range, prediction out of range.
    counts: Tensor = field(init=False, repr=False)
    reduced: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.num_classes**2 + 3, dtype=torch.int64, device=self.device)

    def update(self, truth: Tensor, prediction: Tensor) -> None:
        """Add the pixels of two integer tensors of equal shape, but those with truth ``ignore_index``."""
        if truth.shape != prediction.shape:
            raise ValueError(
                f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} differ in shape"
            )
        if truth.is_floating_point() or prediction.is_floating_point():
            raise ValueError(f"labels must be integers, not {truth.dtype} and {prediction.dtype}")
        if self.reduced:
            raise ValueError("the matrix has been summed over processes already: make a new one")
        self.counts += torch.bincount(self._entry(truth, prediction), minlength=len(self.counts))

    def _entry(self, truth: Tensor, prediction: Tensor) -> Tensor:
        """Which entry of ``counts`` each pixel belongs to, flat."""
        k = self.num_classes
        truth, prediction = (t.to(self.device, torch.int64).flatten() for t in (truth, prediction))
        index = truth * k + prediction
        index = index.where((prediction >= 0) & (prediction < k), k * k + 2)
        index = index.where((truth >= 0) & (truth < k), k * k + 1)
        return index.where(truth != self.ignore_index, k * k)

    def reduce(self) -> ConfusionMatrix:
        """Sum over all processes (in place, once); a collective call. Returns itself."""
        if not self.reduced:
            self.counts = all_reduce_sum(self.counts)
            self.reduced = True
        return self

    @property
    def lacks_classes(self) -> bool:
        """Whether the truth so far holds ignored pixels, but none of an object, as masks of 0 and 255 do."""
        k = self.num_classes
        return bool(self.counts[k * k]) and not self.counts[k : k * k].any()

    def scores(self) -> SegScores:
        """Scores of what has been counted so far.

        Raises:
            ValueError: some label was out of range.
        """
        counts = self.counts.cpu()
        bad_truth, bad_prediction = counts[-2:].tolist()
        if bad_truth or bad_prediction:
            which, bad = ("ground truth", bad_truth) if bad_truth else ("prediction", bad_prediction)
            raise ValueError(
                f"{bad} pixels of the {which} are neither one of the {self.num_classes} classes (0.."
                f"{self.num_classes - 1}) nor, in the ground truth, {self.ignore_index}: are these index "
                "images of this data set, and is the number of classes right?"
            )
        return SegScores(counts[:-3].reshape(self.num_classes, self.num_classes))


class ThresholdSweep:
    """Confusion matrices of a scored label at many background thresholds, in one pass over the pixels.

    A pixel is background at every threshold from its score on, so how many thresholds its score exceeds is
    all that has to be counted.

    Args:
        thresholds: a pixel whose score is at most the threshold is background.
    """

    def __init__(
        self, num_classes: int, thresholds: Iterable[float], device: torch.device | str = "cpu"
    ) -> None:
        self.thresholds = sorted(set(thresholds))
        self.cuts = torch.tensor(self.thresholds, dtype=torch.float32, device=device)
        self.matrix = ConfusionMatrix(num_classes, device)  # of the label without any threshold
        # Row b: pixels whose score exceeds the first b thresholds only.
        shape = len(self.thresholds) + 1, len(self.matrix.counts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, truth: Tensor, label: Tensor, score: Tensor) -> None:
        """Add the pixels of a truth and a label (H, W), integers, and of the label's score (H, W) float."""
        self.matrix.update(truth, label)
        exceeded = torch.bucketize(score.to(self.cuts).flatten(), self.cuts)
        entry = exceeded * self.counts.shape[1] + self.matrix._entry(truth, label)
        self.counts += torch.bincount(entry, minlength=self.counts.numel()).view_as(self.counts)

    def reduce(self) -> ThresholdSweep:
        """Sum over all processes (in place, once); a collective call. Returns itself."""
        if not self.matrix.reduced:
            self.matrix.reduce()
            self.counts = all_reduce_sum(self.counts)
        return self

    def scores(self) -> dict[float, SegScores]:
        """Scores at every threshold of what has been counted so far.

        Raises:
            ValueError: some label was out of range.
        """
        k = self.matrix.num_classes
        self.matrix.scores()
        counts = self.counts[:, : k * k].cpu().view(-1, k, k)
        # Entry i: those whose score exceeds threshold i.
        kept = counts.flip(0).cumsum(0).flip(0)[1:]
        found = {}
        for threshold, matrix in zip(self.thresholds, kept, strict=True):
            matrix[:, 0] += (counts.sum(0) - matrix).sum(1)
            found[threshold] = SegScores(matrix)
        return found


def tag_f1(prediction: Tensor, class_label: Tensor) -> Tensor:
    """Binary F1 score of the predicted tags of every image.

    Args:
        prediction: (..., C) boolean, or logits that count as a tag above 0.
        class_label: (..., C) multi-hot.

    Returns:
        (...,) float64 in [0, 1]. As in the reference, an image without any tag and without any predicted tag
        counts as 0.
    """
    predicted = prediction if prediction.dtype == torch.bool else prediction > 0
    label = class_label > 0
    hits = (predicted & label).sum(-1).double()
    positives = predicted.sum(-1).double() + label.sum(-1)
    return 2 * hits / positives.clamp(min=1)


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def _plain(value: Tensor | float) -> float | str | None:
    """A JSON value: null for nan, "inf" for infinity (JSON knows neither)."""
    number = float(value)
    if math.isnan(number):
        return None
    return "inf" if math.isinf(number) else number
