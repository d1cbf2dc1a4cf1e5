"""What a method is: a module that turns a batch into named losses, and images into a prediction.

Letters: B images, C foreground classes, K = C + 1, (H, W) pixels, (h, w) positions of a network's map.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.base import Batch
from utils.build import check_number, suggest
from utils.device import constant
from utils.image import IGNORE_INDEX, resize
from utils.schedule import Schedule

Losses = dict[str, Tensor]  # unweighted scalars by name
Metrics = dict[str, Tensor]  # detached scalars for the log
Transform = Callable[[dict[str, Any]], dict[str, Any]]

NEVER = -1e4  # a logit whose softmax is 0, also in half precision; finite, for maps of it are resized


@dataclass
class Prediction:
    """What a method says about images; None for what it does not make."""

    cam: Tensor | None  # (B, C, H, W) in [0, 1], last block
    aux_cam: Tensor | None  # (B, C, H, W) in [0, 1], auxiliary block
    class_logits: Tensor  # (B, C)
    seg_logits: Tensor | None  # (B, K, h, w) at the network's stride
    strided_cam: Tensor | None = None  # (B, C, ceil(H / 4), ceil(W / 4)) in [0, 1], for IRN's random walk

    def __post_init__(self) -> None:
        """No image or pixel is found to be class 255, which is none (datasets/lists.py)."""
        if self.class_logits.shape[1] >= IGNORE_INDEX:
            hole = constant((IGNORE_INDEX,), self.class_logits.device, torch.int64)
            self.class_logits = self.class_logits.index_fill(1, hole - 1, NEVER)
            if self.seg_logits is not None:
                self.seg_logits = self.seg_logits.index_fill(1, hole, NEVER)


class Method(nn.Module):
    """Base of all methods. Everything that training changes is a parameter or a buffer.

    Args:
        num_classes: with background.
        loss_weights: name of a loss -> weight, constant or ``[[from_step, value], ...]``; 0 without.
        background_threshold: CAM score up to which a pixel is background when nothing is ignored.
        cam_scales: image scales of multi-scale CAMs.
    """

    crf_preset = "toco"  # DenseCRF of the paper, which a plain --crf of tools/infer_seg.py takes
    needs_background = False  # whether it cannot work where every pixel shows a class
    has_background = True
    losses: tuple[str, ...] = ()  # of the ``training_step`` in the same class; (): its first step names them
    decoder_loss: str | None = None  # the loss without which the decoder learns nothing, if there is one
    training_only: tuple[str, ...] = ()  # how the names of weights begin that no prediction needs

    def __init__(
        self,
        num_classes: int,
        loss_weights: Mapping[str, Any] | None,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes includes the background and must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.loss_weights = {name: Schedule(weight) for name, weight in (loss_weights or {}).items()}
        losses = vars(next(c for c in type(self).__mro__ if "training_step" in vars(c))).get("losses")
        for name, weight in self.loss_weights.items():
            if losses:
                self.check_loss_weight(name, losses)
            for value in weight.values:
                check_number(f"method.loss_weights.{name}", value, -math.inf, math.inf)
        check_number("method.background_threshold", background_threshold)
        if isinstance(cam_scales, (str, int, float)) or not cam_scales:
            raise ValueError(f"method.cam_scales must be a list of image scales, got {cam_scales!r}")
        for scale in cam_scales:
            check_number("method.cam_scales: every scale", scale, 1e-3, 100)
        self.background_threshold = background_threshold
        self.cam_scales = tuple(cam_scales)

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        """Unweighted losses by name, all of them at every step, and numbers for the log.

        A costly loss may be a plain 0 while its weight is 0, if no parameter depends on it alone.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        """``training_step``, under the name that distributed wrappers call."""
        return self.training_step(batch, step)

    def loss_weight(self, name: str, step: int) -> float:
        """Weight of a loss at ``step``; 0 for a loss that the config does not name."""
        return self.loss_weights[name](step) if name in self.loss_weights else 0.0

    def check_loss_weight(self, name: str, losses: Collection[str]) -> None:
        """Raise a ValueError if a loss that ``losses`` lacks has a weight."""
        if name not in losses and any(self.loss_weights[name].values):
            whose = type(self).__name__
            raise ValueError(f"method.loss_weights.{name} has no loss in {whose}{suggest(name, losses)}")

    def present(self, class_logits: Tensor) -> Tensor:
        """Which classes the classifier finds: bool of the shape of ``class_logits`` (..., C)."""
        return class_logits > 0

    def finish_scores(
        self, scores: Tensor, class_logits: Tensor, class_label: Tensor | None = None
    ) -> Tensor:
        """Scores whose largest is the label, from ``seg_logits`` (B, K, H, W) merged over V views.

        Args:
            class_logits: (B, V, C) of the views.
            class_label: (B, C) true image tags where a protocol allows them: other classes are ruled out.
        """
        if class_label is None and self.has_background:
            return scores
        known = torch.ones_like(scores[:, 1:, 0, 0]) if class_label is None else class_label
        absent = F.pad(known, (1, 0), value=float(self.has_background)) == 0
        return scores.masked_fill(absent[:, :, None, None], -torch.inf)

    def drop_background(self) -> None:
        """Label and predict no background, for data whose every pixel shows a class.

        Raises:
            ValueError: a method that is built on background.
        """
        if self.needs_background:
            raise ValueError(f"{type(self).__name__} needs background: data.background=false is not for it")
        self.has_background, self.background_threshold = False, -1.0

    def crf_probs(self, scores: Tensor) -> Tensor:
        """What the DenseCRF starts from, (B, K, H, W) in [0, 1], given finished scores."""
        return scores.softmax(1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters as ``{"name", "params", "lr_scale"}``; a group learns at ``lr * lr_scale``."""
        return [parameter_group("all", self)]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        """The augmentation that makes this method's batch out of a sample."""
        raise NotImplementedError


# What only some methods can do. The engine asks with isinstance.


@runtime_checkable
class Predicts(Protocol):
    """Sees classes, places or labels in images by itself."""

    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        """All outputs for normalised images (B, 3, H, W), without gradient; no CAM for empty ``scales``."""


@runtime_checkable
class PredictsTagged(Protocol):
    """Looks for the places of all classes of an image together, so that it asks for the tags."""

    def predict_tagged(self, image: Tensor, class_label: Tensor, scales: Sequence[float]) -> Prediction:
        """As ``predict``, of the classes of ``class_label`` (B, C)."""


@runtime_checkable
class LearnsFromLabels(Protocol):
    """Trained on what ``data.label_dir`` adds to a batch (datasets/base.py) instead of tags alone."""

    labels: str  # what the folder must hold, for messages


@runtime_checkable
class MakesPseudoLabels(Protocol):
    """Its decoder learns from labels that it makes during training."""

    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        """The pseudo label (B, H, W) at ``step``, 255 ignored, for pictures.

        Args:
            image: (B, 3, H, W) normalised, without padding.
            prediction: of the images, with CAMs.
            class_label: (B, C) image tags.
        """


@runtime_checkable
class Propagates(Protocol):
    """Spreads CAMs by a random walk."""

    walk_stride: int  # of the CAMs that the walk starts from: 1, or 4 for ``Prediction.strided_cam``

    def propagate(self, image: Tensor, cam: Tensor) -> Tensor:
        """Scores (1 + n, H, W), background first, after a random walk; the largest is the pseudo label.

        Args:
            image: (1, 3, H, W) normalised.
            cam: (n, ., .) in [0, 1] of the n >= 1 classes of the image, best of ``walk_stride``.
        """


@runtime_checkable
class FindsBoundaries(Protocol):
    """Sees the boundaries between classes."""

    def boundaries(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary probability (h, w) and displacements (2, h, w) of one image (1, 3, H, W)."""


def parameter_group(name: str, *modules: nn.Module, lr_scale: float = 1.0) -> dict[str, Any]:
    """The trained parameters of modules, see ``Method.parameter_groups``."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    return {"name": name, "params": trained, "lr_scale": lr_scale}


LR_SCALES = {"backbone_weight": 1.0, "backbone_bias": 2.0, "new_weight": 10.0, "new_bias": 20.0}


def groups_by_origin(method: nn.Module, lr_scales: Mapping[str, float] = LR_SCALES) -> list[dict[str, Any]]:
    """Parameter groups of SEAM, AffinityNet and 1-stage-wseg; biases do not decay."""
    chosen: dict[str, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            origin = "backbone" if name.startswith("backbone.") else "new"
            kind = "bias" if name.endswith("bias") else "weight"
            chosen.setdefault(f"{origin}_{kind}", []).append(parameter)
    return [
        {"name": name, "params": p, "lr_scale": lr_scales[name], "decay_scale": float("bias" not in name)}
        for name, p in chosen.items()
    ]


def resize_like(logits: Tensor, label: Tensor) -> Tensor:
    """Maps (B, K, h, w) as float32 at the size of a label (B, H, W), bilinear."""
    resized = resize(logits.float(), label.shape[-2:])
    # Logits of a ViT have their channels last. On a CPU every softmax, and its gradient, would copy them.
    return resized.contiguous() if resized.device.type == "cpu" else resized
