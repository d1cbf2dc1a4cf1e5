"""Plain classification network with CAMs: the baseline, and the first stage of multi-stage methods.

"Learning Deep Features for Discriminative Localization" (Zhou et al., CVPR 2016), here with the backbone,
the two classifiers and the CAM inference of the single-stage methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datasets.transforms import PlainView
from losses.classification import multilabel_loss
from methods.base import Batch, Transform
from methods.vit_base import SingleStageViT


class CAMNetwork(SingleStageViT):
    """A multi-label classifier; ``seg_logits`` of its predictions is None.

    Args:
        loss_weights: of ``cls`` and ``cls_aux``.
        Others as in ``SingleStageViT``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.5,
        cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5),
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            decoder=None,
            loss_weights=loss_weights or {"cls": 1.0, "cls_aux": 1.0},
            background_threshold=background_threshold,
            cam_scales=cam_scales,
        )

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        out = self.network(batch["image"])
        return {
            "cls": multilabel_loss(out.class_logits, batch["class_label"]),
            "cls_aux": multilabel_loss(out.aux_class_logits, batch["class_label"]),
        }

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return PlainView(crop_size, scale_range)
