"""CAM: Learning Deep Features for Discriminative Localization (Zhou et al., CVPR 2016).

Plain classifiers: the baseline of the single-stage ViTs, and the first stage of PSA and IRN.
B images, C foreground classes, D features, (H, W) pixels, (h, w) pixels of the deep map.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import StageView
from losses.classification import multilabel_loss
from methods.base import Batch, Losses, Method, Metrics, Prediction, Transform, parameter_group
from methods.vit_base import SingleStageViT
from models.backbones import GivesMaps, create_backbone, require
from models.heads import POOLINGS, pooled_logits
from ops.cam import divide_by_maximum, summed_cam
from utils.build import check_choice
from utils.image import strided_size
from utils.precision import full_precision


class CAMNetwork(SingleStageViT):
    """The single-stage ViT without a decoder; its losses ``cls`` and ``cls_aux`` weigh 1 by default."""

    losses = ("cls", "cls_aux")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            decoder=None,
            loss_weights=loss_weights or {"cls": 1.0, "cls_aux": 1.0},
            background_threshold=background_threshold,
            cam_scales=cam_scales,
        )

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        out = self.network(batch["image"])
        return {
            "cls": multilabel_loss(out.class_logits, batch["class_label"]),
            "cls_aux": multilabel_loss(out.aux_class_logits, batch["class_label"]),
        }, {}


class PooledCAMNetwork(Method):
    """The multi-label classifier of PSA and IRN: pooled features, then a 1x1 classifier without bias.

    The classifier applied to every pixel gives the CAM.

    Args:
        backbone: arguments of ``create_backbone`` for a backbone that gives a list of maps. IRN: ``resnet50``
            with ``frozen: [conv1, bn1, layer1, layer2]`` and ``train_affine: true``; PSA: ``resnet38d``.
        loss_weights: of ``cls``, 1 by default.
        dropout: share of channels that are dropped before the pooling (PSA: 0.5).
        pooling: ``mean`` of each feature over the image (published, for CNNs) or its ``max``, which a ViT
            needs: attention tells every token what the image shows, so their mean gives CAMs without place.
        cam_size: what the maps of all scales are resized to before they are summed: ``image`` (PSA), or
            ``stride16``, the image size rounded up to whole steps of 16 pixels and then cut (IRN).
        long_side: smallest and largest long side of a training image before the crop, in pixels (IRN: 320,
            640; PSA: 256, 512); None: rescaled by a factor from ``data.scale_range`` instead.
        colour_jitter: change the colours of training images (PSA).
        xavier: start the classifier from Xavier's uniform distribution (PSA) instead of PyTorch's (IRN).
    """

    losses = ("cls",)

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.15,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
        dropout: float = 0.0,
        pooling: Literal["mean", "max"] = "mean",
        cam_size: Literal["image", "stride16"] = "image",
        long_side: tuple[int, int] | None = None,
        colour_jitter: bool = False,
        xavier: bool = False,
    ) -> None:
        super().__init__(num_classes, loss_weights or {"cls": 1.0}, background_threshold, cam_scales)
        check_choice("method.cam_size", cam_size, ("image", "stride16"))
        check_choice("method.pooling", pooling, POOLINGS)
        self.pooling, self.cam_size = pooling, cam_size
        self.long_side, self.colour_jitter = long_side, colour_jitter
        self.backbone = create_backbone(**backbone)
        require(self, GivesMaps)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.backbone.dims[-1], num_classes - 1, 1, bias=False)
        if xavier:
            nn.init.xavier_uniform_(self.classifier.weight)

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        class_logits = self.class_logits(self.features(batch["image"]))
        return {"cls": multilabel_loss(class_logits, batch["class_label"])}, {}

    def features(self, image: Tensor) -> Tensor:
        """The deep map (B, D, h, w) of normalised images (B, 3, H, W)."""
        return self.backbone(image)[-1]

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits (B, C)."""
        return pooled_logits(self.dropout(features), self.classifier, self.pooling)

    def class_activation(self, features: Tensor) -> Tensor:
        """Rectified activation maps (B, C, h, w) float32."""
        with full_precision(features):
            return F.conv2d(features.float(), self.classifier.weight.float()).relu()

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        if not scales:
            return Prediction(None, None, self.class_logits(self.features(image)), None)

        def activation(views: Tensor) -> tuple[Tensor, Tensor]:
            features = self.features(views)
            return self.class_activation(features), self.class_logits(features)

        height, width = size = image.shape[-2:]
        if self.cam_size == "stride16":
            rows, columns = strided_size(size, 16)
            size = 16 * rows, 16 * columns
        sizes = [size, strided_size((height, width), 4)]
        (cam, strided), (class_logits,) = summed_cam(activation, image, scales, sizes)
        cam, strided = divide_by_maximum(cam[..., :height, :width]), divide_by_maximum(strided)
        return Prediction(cam, None, class_logits, None, strided)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            parameter_group("backbone", self.backbone),
            parameter_group("classifier", self.classifier, lr_scale=10.0),
        ]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return StageView(crop_size, scale_range, self.long_side, self.colour_jitter)
