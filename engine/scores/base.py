"""What a score is: it sees every image once, keeps sums, and gives values per class and their mean.

A file of this folder is a score that ``eval.scores`` can name: ``boundary_f.py`` holds ``BoundaryF``.
Letters: K classes with background 0, C = K - 1 foreground classes, H x W pixels of a mask.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.lists import real_classes
from engine.scores.tables import number, text_table
from ops.cam import strongest_class
from ops.labels import threshold_label
from utils.build import suggest
from utils.cam_files import load_cam
from utils.image import IGNORE_INDEX, read_mask

# What a method predicts, and the head of its column in tables.
OUTPUTS = {"cam": "CAM", "aux_cam": "aux_CAM", "seg": "Seg_Pred"}
NO_SCORES = ("base", "evaluation", "records", "tables")  # the other files of this folder

Sample = Mapping[str, Any]  # ``mask`` (H, W) class ids or 255, and ``class_label`` (C,) where tags are known


@dataclass
class ImagePrediction:
    """What is predicted for one image, at the size of its mask; the keys are `OUTPUTS`."""

    labels: dict[str, Tensor] = field(default_factory=dict)  # class ids (H, W)
    # Score (H, W) in [0, 1] and class id (H, W) of the strongest class, before a threshold.
    cams: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    class_logits: Tensor | None = None  # (C,)
    seg_probs: Callable[[], Tensor] | None = None  # scores (K, H, W) of the segmentation, >= 0
    _matrices: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def add_cam(
        self, output: str, cam: Tensor, class_ids: Tensor, size: Sequence[int], threshold: float
    ) -> None:
        """Add the CAMs (n, h, w) of the classes (n,) of an image of ``size`` (H, W)."""
        score, label = self.cams[output] = strongest_class(cam, class_ids, size)
        self.labels[output] = threshold_label(score, label, threshold)

    def matrix(self, output: str, mask: Tensor, num_classes: int) -> Tensor:
        """(K, K) confusion matrix of an output, counted once for all scores that ask."""
        if output not in self._matrices:
            self._matrices[output] = confusion_matrix(mask, self.labels[output], num_classes)
        return self._matrices[output]


def predicted_file(path: Path, threshold: float, device: torch.device | str = "cpu") -> ImagePrediction:
    """What a label image or a CAM file predicts for its image."""
    if path.suffix == ".png":
        return ImagePrediction({"seg": torch.from_numpy(read_mask(path)).to(device)})
    prediction, cams = ImagePrediction(), load_cam(path)
    for output, cam in (("cam", cams.cam), ("aux_cam", cams.aux_cam)):
        if cam is not None:
            prediction.add_cam(output, cam.to(device), cams.class_ids.to(device), cams.size, threshold)
    return prediction


class Values(NamedTuple):
    """What a score says of one output; names and plain values are those of ``scores.json``."""

    mean: float  # for logs and tables; nan where it is not defined
    per_class: Mapping[str, Tensor] = {}  # (K,) float64
    more: Mapping[str, Any] = {}
    about: Mapping[str, Any] = {}  # how the score was made


class Score:
    """Base of all scores."""

    title = ""  # in tables; default: the name
    key = ""  # of the mean in ``scores.json``; default: the name
    is_share = True  # shown in percent, also in the log of a training
    validates = True  # computed in the validation of a training

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.class_names, self.num_classes, self.device = class_names, len(class_names), device
        self.name = type(self).__module__.rpartition(".")[2]
        self.title, self.key = self.title or self.name, self.key or self.name

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        """Add one image."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that was counted; the sums over processes are the counts of the whole split."""
        raise NotImplementedError

    def compute(self) -> dict[str, Values]:
        """Values by output, of those that occurred; under ``""`` what belongs to no output."""
        raise NotImplementedError

    def table(self, found: Mapping[str, Values]) -> str:
        """A table of ``compute()`` for people; empty where one line says all."""
        return ""


class LabelScore(Score):
    """A score of label images: a function of a sum over images, by default of the confusion matrix."""

    mean_title = "mean"
    dtype = torch.int64  # of what ``count`` gives

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(class_names, device)
        self.images = torch.zeros(len(OUTPUTS), dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(OUTPUTS), *self.shape, dtype=self.dtype, device=device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what ``count`` gives."""
        return self.num_classes, self.num_classes

    def count(self, mask: Tensor, prediction: ImagePrediction, output: str) -> Tensor:
        """What one image adds."""
        return prediction.matrix(output, mask, self.num_classes)

    def values(self, sums: Tensor) -> Values:
        """The score of an output."""
        raise NotImplementedError

    def update(self, sample: Sample, prediction: ImagePrediction) -> None:
        for i, output in enumerate(OUTPUTS):
            if output in prediction.labels:
                self.images[i] += 1
                self.sums[i] += self.count(sample["mask"], prediction, output)

    def tensors(self) -> list[Tensor]:
        return [self.images, self.sums]

    def compute(self) -> dict[str, Values]:
        images, sums = self.images.tolist(), self.sums.cpu()
        return {output: self.values(sums[i]) for i, output in enumerate(OUTPUTS) if images[i]}

    def table(self, found: Mapping[str, Values]) -> str:
        columns = [next(iter(values.per_class.values())) for values in found.values()]
        rows = [
            [name, *(number(column[k], self.is_share) for column in columns)]
            for k, name in real_classes(self.class_names).items()
        ]
        rows.append([self.mean_title, *(number(values.mean, self.is_share) for values in found.values())])
        suffix = "" if self.name == "miou" else f" {self.title}"
        return text_table(["Class", *(OUTPUTS[output] + suffix for output in found)], rows)


def create_score(name: str, class_names: Sequence[str], device: torch.device | str = "cpu") -> Score:
    """The score of a name.

    Raises:
        KeyError: there is none; names the closest one.
    """
    known = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - set(NO_SCORES)
    if name not in known:
        raise KeyError(f"eval.scores: unknown score '{name}'{suggest(name, known)}")
    module = import_module(f"engine.scores.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))(class_names, device)


def confusion_matrix(mask: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64 pixel counts, rows truth, columns prediction; pixels of truth 255 are left out.

    Args:
        mask, label: equal shapes of integers; classes 0..K - 1, and 255 in the mask.
    """
    # A joint histogram of all values needs no selection of pixels, which costs more than the counting.
    values = max(num_classes, IGNORE_INDEX + 1)
    pair = torch.add(label.long(), mask.long(), alpha=values)
    pairs = torch.bincount(pair.flatten(), minlength=values**2).view(values, values)
    pairs[IGNORE_INDEX] = 0
    return pairs[:num_classes, :num_classes]


def finite(values: Tensor) -> Tensor:
    """The finite ones of some values, flat."""
    return values[values.isfinite()]


def plain(value: Tensor | float) -> float | str | None:
    """A JSON value: null for nan, "inf" for infinity (JSON knows neither)."""
    number = float(value)
    if math.isnan(number):
        return None
    return "inf" if math.isinf(number) else number
