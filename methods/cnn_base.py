"""What 1-stage-wseg and its baseline and WS-FCN share: parameter groups and the rules of test time.

B images, V views of each, C foreground classes, K = C + 1, (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from datasets.transforms import ResizedView
from losses.classification import multilabel_hinge_loss, multilabel_loss
from methods.base import LR_SCALES, Method, Prediction, Transform, groups_by_origin
from models.backbones import GivesMaps, create_backbone, require
from ops.cam import summed_cam
from utils.build import check_choice

CLASS_LOSSES = {"soft_margin": multilabel_loss, "hinge": multilabel_hinge_loss}


class Reading(NamedTuple):
    """What a network says about images in one pass."""

    class_logits: Tensor  # (B, C)
    masks: Tensor  # (B, K, H, W) in [0, 1], background first


class SingleStageCNN(Method):
    """A classifier that predicts masks: what differs is in ``read`` and the training step.

    Args:
        backbone: arguments of ``create_backbone``, for a backbone that gives a list of maps.
        class_loss: ``soft_margin`` or ``hinge``.
        class_threshold: confidence above which a class counts as present at test time, in any view.
        background: its score at test time: ``[power, p]`` (its mean mask to the power p) or ``[score, s]``.
        crf_background_power: the CRF's background is ``(1 - largest foreground score)`` to this power; None:
            the background's score.
        lr_scales: factors of the learning rate of the parameter groups, which depend on the backbone.
        background_threshold, cam_scales: of ``Method``; CAMs are masks, means over scales and mirror images.
    """

    needs_background = True

    crf_preset = "one_stage"
    LR_SCALES: Mapping[str, float] = LR_SCALES

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None,
        class_loss: Literal["soft_margin", "hinge"] = "soft_margin",
        class_threshold: float = 0.1,
        background: tuple[str, float] = ("power", 3.0),
        crf_background_power: float | None = None,
        lr_scales: Mapping[str, float] | None = None,
        background_threshold: float = 0.25,
        cam_scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(num_classes, loss_weights, background_threshold, cam_scales)
        check_choice("method.class_loss", class_loss, CLASS_LOSSES)
        if len(background) != 2 or background[0] not in ("power", "score"):
            raise ValueError(f"method.background must be [power, p] or [score, s], got {background}")
        self.class_loss = CLASS_LOSSES[class_loss]
        self.class_threshold = class_threshold
        self.background_rule, self.background_value = background
        self.crf_background_power = crf_background_power
        self.lr_scales = {**self.LR_SCALES, **(lr_scales or {})}
        for name in self.lr_scales:
            check_choice("every key of method.lr_scales", name, self.LR_SCALES)
        self.backbone = create_backbone(**backbone)
        require(self, GivesMaps)

    def read(self, image: Tensor) -> Reading:
        """Class scores and masks of normalised images (B, 3, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        """``seg_logits`` are masks (B, K, H, W) in [0, 1], because the papers merge masks."""
        if not scales:
            out = self.read(image)
            return Prediction(None, None, out.class_logits, out.masks)

        def foreground(views: Tensor) -> tuple[Tensor, ...]:
            out = self.read(views)
            return out.masks[:, 1:], *out

        (total,), (class_logits, masks) = summed_cam(foreground, image, scales, [image.shape[-2:]])
        count = 2 * (1 + sum(scale != 1.0 for scale in scales))
        return Prediction(total / count, None, class_logits, masks)

    def present(self, class_logits: Tensor) -> Tensor:
        return class_logits.sigmoid() > self.class_threshold

    def finish_scores(
        self, scores: Tensor, class_logits: Tensor, class_label: Tensor | None = None
    ) -> Tensor:
        """Keep the classes that any view is confident of, or the true ones, and set the background."""
        if class_label is None:
            class_label = self.present(class_logits).any(1)
        background, foreground = scores[:, :1], scores[:, 1:] * class_label[:, :, None, None]
        if self.background_rule == "power":
            background = background**self.background_value
        else:
            background = torch.full_like(background, self.background_value)
        return torch.cat([background, foreground], 1)

    def crf_probs(self, scores: Tensor) -> Tensor:
        if self.crf_background_power is None:
            return scores
        foreground = scores[:, 1:]
        background = (1 - foreground.amax(1, keepdim=True)) ** self.crf_background_power
        return torch.cat([background, foreground], 1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return groups_by_origin(self, self.lr_scales)

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return ResizedView(crop_size, scale_range)
