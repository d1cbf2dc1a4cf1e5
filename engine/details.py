"""What a report shows of a validation beyond its scores: the IoU and the found tags of every image."""

from typing import Any

import torch
from torch import Tensor

from datasets.base import Split
from engine.scores.base import OUTPUTS, ImagePrediction, Sample, plain
from engine.scores.cam_sweep import CAMS, CamSweep
from engine.scores.miou import iou_of


class Details:
    """Numbers of every image of a split, and the mIoU of its CAMs over background thresholds."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = split
        # IoU, and 1 where it is known. Processes share the images: the sum over processes has all of them.
        self.iou = torch.zeros(len(OUTPUTS), len(split), 2, dtype=torch.float64, device=device)
        self.found = torch.zeros(len(split), split.num_classes - 1, dtype=torch.int64, device=device)
        self.sweep = CamSweep(split.class_names, device)

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        """Add one image, which ``sample["index"]`` names."""
        index = int(sample["index"])
        for i, output in enumerate(OUTPUTS):
            if output in prediction.labels:
                matrix = prediction.matrix(output, sample["mask"], self.split.num_classes).double()
                hits, truth = matrix.diagonal(), matrix.sum(1)
                iou = hits / (truth + matrix.sum(0) - hits)
                self.iou[i, index, 0] = iou.masked_fill(truth == 0, torch.nan).nanmean()
                self.iou[i, index, 1] = 1
        if prediction.class_logits is not None:
            self.found[index] = prediction.class_logits > 0
        self.sweep.update(sample, prediction)

    def tensors(self) -> list[Tensor]:
        """All that was counted, as `Score.tensors`."""
        return [self.iou, self.found, *self.sweep.tensors()]

    def content(self) -> dict[str, Any]:
        """Plain values: name, IoU in percent by output, tags and found tags of every image; the sweep."""
        values, is_known = self.iou[..., 0].cpu(), self.iou[..., 1].cpu() > 0
        rounded = [[_percent(v) if k else None for v, k in zip(*pair)] for pair in zip(values, is_known)]
        return {
            "names": [record.name for record in self.split.records],
            "iou": {output: rounded[i] for i, output in enumerate(OUTPUTS) if is_known[i].any()},
            "tags": [record.tags for record in self.split.records],
            "found": [(row.nonzero()[:, 0] + 1).tolist() for row in self.found.cpu()],
            "sweep": {
                output: [
                    _percent(iou_of(matrix.double())[1]) for matrix in self.sweep.matrices(output).values()
                ]
                for output in CAMS
                if is_known[list(OUTPUTS).index(output)].any()
            },
        }


def tag_pairs(split: Split) -> list[list[int]]:
    """(C, C): of how many images two classes are tags together; the diagonal counts the images of each."""
    labels = torch.zeros(len(split), split.num_classes - 1, dtype=torch.float64)
    for label, record in zip(labels, split.records):
        label[[tag - 1 for tag in record.tags or ()]] = 1
    return (labels.T @ labels).long().tolist()


def _percent(value: Tensor | float) -> Any:
    number = plain(value)
    return None if number is None else round(100 * float(number), 2)
