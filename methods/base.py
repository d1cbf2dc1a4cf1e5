"""What a method is: a module that turns a batch into named losses, and an image into a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.schedule import Schedule

Batch = dict[str, Any]  # keys: see datasets/base.py
Transform = Callable[[dict[str, Any]], dict[str, Any]]


class Prediction(NamedTuple):
    """What a method says about a batch of images; B images, C foreground classes, K = C + 1."""

    cam: Tensor | None  # (B, C, H, W) in [0, 1], last block
    aux_cam: Tensor | None  # (B, C, H, W) in [0, 1], auxiliary block
    class_logits: Tensor  # (B, C)
    seg_logits: Tensor | None  # (B, K, h, w) at the network's stride


class Method(nn.Module):
    """Base of all methods. Everything that training changes is a parameter or a buffer.

    Args:
        num_classes: with background.
        loss_weights: name of a loss -> weight, constant or ``[[from_step, value], ...]``. A loss without
            weight counts as weight 0.
        background_threshold: CAM score up to which a pixel is background when nothing is ignored.
        cam_scales: image scales of multi-scale CAMs.
    """

    def __init__(
        self,
        num_classes: int,
        loss_weights: Mapping[str, Any],
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background, so it is at least 2, not {num_classes}")
        self.num_classes = num_classes
        self.loss_weights = {name: Schedule(weight) for name, weight in loss_weights.items()}
        self.background_threshold = background_threshold
        self.cam_scales = tuple(cam_scales)

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Unweighted losses by name.

        A term may be left out while its weight is 0 if no parameter depends on it alone.
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
        raise NotImplementedError

    def segment(self, image: Tensor) -> Tensor:
        """Segmentation logits (B, K, h, w) from one forward pass, without gradient."""
        raise NotImplementedError

    def localize(self, image: Tensor, scales: Sequence[float]) -> tuple[Tensor | None, Tensor | None]:
        """Normalised multi-scale CAMs ``(cam, aux_cam)`` at image size, without gradient."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters as ``{"name", "params", "lr_scale"}``; a group learns at ``lr * lr_scale``."""
        return [{"name": "all", "params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        """The augmentation that makes this method's batch out of a sample."""
        raise NotImplementedError


def resize_like(logits: Tensor, label: Tensor) -> Tensor:
    """Logits (B, K, h, w) at the size of a label (B, H, W), bilinear."""
    logits = logits.float()  # losses are float32 under mixed precision too
    if logits.shape[-2:] == label.shape[-2:]:
        return logits
    return torch.nn.functional.interpolate(
        logits, size=label.shape[-2:], mode="bilinear", align_corners=False
    )
