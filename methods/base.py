"""What a method is: a module that turns a batch into named losses, and an image into a prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datasets.base import Batch
from models.backbones import BACKBONES, create_backbone
from utils.build import check_number
from utils.image import resize
from utils.schedule import Schedule

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class Prediction(NamedTuple):
    """What a method says about a batch of images; B images, C foreground classes, K = C + 1."""

    cam: Tensor | None  # (B, C, H, W) in [0, 1], last block
    aux_cam: Tensor | None  # (B, C, H, W) in [0, 1], auxiliary block
    class_logits: Tensor  # (B, C)
    seg_logits: Tensor | None  # (B, K, h, w) at the network's stride


class StoredCAMs(NamedTuple):
    """Normalised CAMs as a CAM file holds them."""

    cam: Tensor | None  # (B, C, H, W) in [0, 1], last block
    aux_cam: Tensor | None  # (B, C, H, W) in [0, 1], auxiliary block
    strided: Tensor | None  # (B, C, ceil(H / 4), ceil(W / 4)) in [0, 1], where IRN's random walk starts


class Method(nn.Module):
    """Base of all methods. Everything that training changes is a parameter or a buffer.

    Args:
        num_classes: with background.
        loss_weights: name of a loss -> weight, constant or ``[[from_step, value], ...]``. A loss without
            weight counts as weight 0; None: no loss has one, for a network that only predicts.
        background_threshold: CAM score up to which a pixel is background when nothing is ignored.
        cam_scales: image scales of multi-scale CAMs.
    """

    # Arguments of the class that it extends and does not take itself.
    refused: tuple[str, ...] = ()
    # Whether it is trained on what data.label_dir adds to a batch (datasets/base.py).
    learns_from_labels = False
    # DenseCRF preset of the method's paper, which a plain --crf of tools/infer_seg.py takes.
    crf_preset = "toco"
    # Stride of the CAMs that ``propagate`` starts from: 1, or 4 for those of a CAM file's ``strided``.
    walk_stride = 1

    def __init__(
        self,
        num_classes: int,
        loss_weights: Mapping[str, Any] | None,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background, so it is at least 2, not {num_classes}")
        self.num_classes = num_classes
        self.loss_weights = {name: Schedule(weight) for name, weight in (loss_weights or {}).items()}
        for name, weight in self.loss_weights.items():
            for value in weight.values:
                check_number(f"method.loss_weights.{name}", value, -math.inf, math.inf)
        check_number("method.background_threshold", background_threshold)
        if isinstance(cam_scales, (str, int, float)) or not cam_scales:
            raise ValueError(f"method.cam_scales is a list of image scales, not {cam_scales!r}")
        for scale in cam_scales:
            check_number("method.cam_scales: every scale", scale, 1e-3, 100)
        self.background_threshold = background_threshold
        self.cam_scales = tuple(cam_scales)

    @classmethod
    def parts(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Arguments that hold options of a class or function, each with one that takes them; for ``--help``.

        Args:
            options: the method's arguments, those that have a default included.
        """
        yield "backbone", create_backbone
        name = (options.get("backbone") or {}).get("name")
        if name in BACKBONES:
            yield "backbone", BACKBONES[name]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Unweighted losses by name, all of them at every step.

        A costly one may be a plain 0 while its weight is 0, if no parameter depends on it alone.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """``training_step``, under the name that distributed wrappers call."""
        return self.training_step(batch, step)

    def loss_weight(self, name: str, step: int) -> float:
        """Weight of a loss at ``step``; 0 for a loss that the config does not name."""
        return self.loss_weights[name](step) if name in self.loss_weights else 0.0

    def predict(self, image: Tensor) -> Prediction:
        """All outputs for normalised images (B, 3, H, W), without gradient; CAMs use ``cam_scales``."""
        raise self._unable("predict classes: set data.val_set to null where it is trained")

    def classify(self, image: Tensor) -> Tensor:
        """Class logits (B, C) of normalised images, without gradient; no more work than that needs."""
        return self.predict(image).class_logits

    def present(self, class_logits: Tensor) -> Tensor:
        """Which classes the classifier finds: bool of the shape of ``class_logits`` (..., C)."""
        return class_logits > 0

    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        """The pseudo label (B, H, W) that supervises the decoder at ``step``, 255 ignored; for pictures.

        Args:
            image: (B, 3, H, W) normalised, without padding.
            prediction: of ``predict(image)``.
            class_label: (B, C) image tags.

        Returns:
            None for a method without such labels.
        """
        return None

    def segment(self, image: Tensor) -> Tensor:
        """Segmentation logits (B, K, h, w) from one forward pass, without gradient."""
        raise self._unable("segment images")

    def segment_views(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """What inference merges over scales and mirror images: scores (B, K, h, w), and class logits (B, C).

        The second only where ``finish_scores`` wants it. By default the logits of ``segment``.
        """
        return self.segment(image), None

    def finish_scores(
        self, scores: Tensor, class_logits: Tensor | None, class_label: Tensor | None = None
    ) -> Tensor:
        """Scores whose largest is the label, from merged ones; here they stay as they are.

        A method whose paper filters classes by their image-level confidence, or sets the background's score,
        does it here.

        Args:
            scores: (B, K, H, W) of ``segment_views``, merged over V views and resized to the label.
            class_logits: (B, V, C) of the views, if ``segment_views`` gives them.
            class_label: (B, C) true image tags where a protocol allows them: other classes are ruled out.
        """
        if class_label is None:
            return scores
        absent = torch.nn.functional.pad(class_label, (1, 0), value=1) == 0
        return scores.masked_fill(absent[:, :, None, None], -torch.inf)

    def crf_probs(self, scores: Tensor) -> Tensor:
        """What the DenseCRF starts from, (B, K, H, W) in [0, 1], given finished scores; here the softmax."""
        return scores.softmax(1)

    def localize(self, image: Tensor, scales: Sequence[float]) -> tuple[Tensor | None, Tensor | None]:
        """Normalised multi-scale CAMs ``(cam, aux_cam)`` at image size, without gradient."""
        raise self._unable("make CAMs")

    def stored_cams(self, image: Tensor, scales: Sequence[float]) -> StoredCAMs:
        """What tools/infer_cam.py stores: the maps of ``localize``, and strided ones where there are any."""
        return StoredCAMs(*self.localize(image, scales), None)

    def propagate(self, image: Tensor, cam: Tensor) -> Tensor:
        """Background and n classes after a random walk of their CAMs; the largest score is the pseudo label.

        Args:
            image: (1, 3, H, W) normalised.
            cam: (n, ., .) in [0, 1] of the n >= 1 classes of the image, best of the method's ``walk_stride``.

        Returns:
            (1 + n, H, W) float32, background first.
        """
        raise self._unable("propagate CAMs")

    def _unable(self, what: str) -> ValueError:
        return ValueError(f"{type(self).__name__} does not {what}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters as ``{"name", "params", "lr_scale"}``; a group learns at ``lr * lr_scale``."""
        return [{"name": "all", "params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        """The augmentation that makes this method's batch out of a sample."""
        raise NotImplementedError


def groups_by_origin(method: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of SEAM, AffinityNet and 1-stage-wseg: ``backbone`` and new layers, ten times as fast.

    Biases learn twice as fast as weights and do not decay.
    """
    chosen: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            origin = "backbone" if name.startswith("backbone.") else "new"
            chosen.setdefault((origin, "bias" if name.endswith("bias") else "weight"), []).append(parameter)
    return [
        {
            "name": f"{origin}_{kind}",
            "params": params,
            "lr_scale": (10.0 if origin == "new" else 1.0) * (2.0 if kind == "bias" else 1.0),
            "decay_scale": 0.0 if kind == "bias" else 1.0,
        }
        for (origin, kind), params in chosen.items()
    ]


def resize_like(logits: Tensor, label: Tensor) -> Tensor:
    """Logits (B, K, h, w) at the size of a label (B, H, W), bilinear."""
    return resize(logits.float(), label.shape[-2:])  # losses are float32 under mixed precision too
