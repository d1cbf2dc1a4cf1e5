"""mIoU of CAMs over background thresholds, the scan of the multi-stage papers, in one pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.scores.base import ImagePrediction, Sample, Score, Values, plain
from engine.scores.confusion import Confusion
from engine.scores.miou import Miou, iou_of
from engine.scores.tables import number, text_table
from utils.image import IGNORE_INDEX

THRESHOLDS = tuple(i / 100 for i in range(60))
SHOWN = 5  # every so many thresholds have a row in the table
CAMS = ("cam", "aux_cam")


class CamSweep(Score):
    """Scores at the best of all thresholds, ``<output>@best``, and mIoU at every one.

    The best is chosen on the scored images: it says what the maps hold, and is no result. A pixel is
    background at every threshold from its score on, so the number of thresholds below it is all that counts.
    """

    title, key = "mIoU", "miou"  # at the best threshold
    validates = False

    def __init__(
        self,
        class_names: Sequence[str],
        device: torch.device | str = "cpu",
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        super().__init__(class_names, device)
        self.thresholds = sorted(set(thresholds))
        self.cuts = torch.tensor(self.thresholds, dtype=torch.float32, device=device)
        # Matrix b of an output: pixels whose score exceeds the first b thresholds only.
        shape = len(CAMS), len(self.thresholds) + 1, self.num_classes, self.num_classes
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        for counts, output in zip(self.counts, CAMS, strict=True):
            if output in prediction.cams:
                score, label = prediction.cams[output]
                kept = sample["mask"] != IGNORE_INDEX
                exceeded = torch.bucketize(score[kept].to(self.cuts), self.cuts)
                entry = (exceeded * self.num_classes + sample["mask"][kept]) * self.num_classes + label[kept]
                counts.view(-1).index_add_(0, entry, torch.ones_like(entry))

    def tensors(self) -> list[Tensor]:
        return [self.counts]

    def matrices(self, output: str) -> dict[float, Tensor]:
        """(K, K) confusion matrix of an output at every threshold."""
        counts = self.counts[CAMS.index(output)].cpu()
        # Entry i: pixels whose score exceeds threshold i; all others are background.
        kept = counts.flip(0).cumsum(0).flip(0)[1:]
        kept[..., 0] += (counts.sum(0) - kept).sum(-1)
        return dict(zip(self.thresholds, kept, strict=True))

    def compute(self) -> dict[str, Values]:
        miou, confusion = Miou(self.class_names), Confusion(self.class_names)
        found = {}
        for output in CAMS:
            matrices = self.matrices(output)
            if not next(iter(matrices.values())).any():
                continue
            at = {threshold: iou_of(matrix.double())[1] for threshold, matrix in matrices.items()}
            best = max(at, key=lambda threshold: at[threshold])
            own, ratios = miou.values(matrices[best]), confusion.values(matrices[best])
            more = {confusion.key: plain(ratios.mean), **own.more, **ratios.more}
            curve = {f"{threshold:.2f}": mean for threshold, mean in at.items()}
            about = {"threshold": best, "miou_by_threshold": curve}
            per_class = {**own.per_class, **ratios.per_class}
            found[f"{output}@best"] = Values(own.mean, per_class, more, about)
        return found

    def table(self, found: Mapping[str, Values]) -> str:
        curves = [values.about["miou_by_threshold"] for values in found.values()]
        rows = [[t, *(number(curve[t]) for curve in curves)] for t in list(curves[0])[::SHOWN]]
        return text_table(["Threshold", *(f"{output.removesuffix('@best')} mIoU" for output in found)], rows)
