"""The last stage: a segmentation network that learns from pseudo labels as if they were ground truth.

B images, C foreground classes, K = C + 1, (H, W) pixels, (h, w) positions of the head's map.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from datasets.transforms import PlainView
from losses.segmentation import pixel_cross_entropy
from methods.base import Batch, Losses, Method, Metrics, Prediction, Transform, parameter_group, resize_like
from models.backbones import GivesTokens, create_backbone
from models.blocks import conv_norm_relu
from models.heads import DECODERS, create_decoder
from utils.build import build_part, check_choice

HEADS = ("deeplab", *DECODERS)


class Segmentor(Method):
    """A backbone and a head, trained by cross entropy; ignored pixels (255) of the labels do not count.

    Args:
        num_classes: with background.
        backbone: arguments of ``create_backbone``: a CNN, a ViT, or a ViT with ``pyramid``.
        head: ``linear`` (1x1 convolution of the deep map), ``large_fov``, ``aspp`` (DeepLab v2) or
            ``deeplab`` (DeepLab v3+, which needs a backbone that gives a list of maps).
        head_options: further arguments of the head's class, such as ``hidden``.
        loss_weights: of ``seg``, 1 by default.
        head_lr_scale: how much faster the head learns than the backbone.
    """

    labels = "label images, for example those of tools/infer_seg.py"
    losses = ("seg",)

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        head: str = "linear",
        head_options: Mapping[str, Any] | None = None,
        loss_weights: Mapping[str, Any] | None = None,
        head_lr_scale: float = 10.0,
    ) -> None:
        super().__init__(num_classes, loss_weights or {"seg": 1.0})
        check_choice("method.head", head, HEADS)
        self.head_lr_scale = head_lr_scale
        self.backbone = create_backbone(**backbone)
        self.reads_tokens = isinstance(self.backbone, GivesTokens)
        dims = (self.backbone.embed_dim,) if self.reads_tokens else self.backbone.dims
        self.skip: int | None = None  # index of the shallow map that the head takes as well
        key = "method.head_options"
        if head == "deeplab":
            if self.reads_tokens:
                raise ValueError("the head 'deeplab' needs a shallow map: set method.backbone.pyramid=true")
            self.skip = self.backbone.shallow
            widths = dims[-1], dims[self.skip], num_classes
            self.head: nn.Module = build_part(DeepLabHead, head_options, *widths, key=key)
        else:
            self.head = create_decoder(head, dims[-1], num_classes, head_options, key=key)

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        label = batch["pseudo_label"]  # (B, H, W)
        seg_logits = resize_like(self.network(batch["image"]), label)
        return {"seg": pixel_cross_entropy(seg_logits, label)}, {}

    def network(self, image: Tensor) -> Tensor:
        """Logits (B, K, h, w) of normalised images (B, 3, H, W)."""
        maps = self.backbone(image)
        if self.reads_tokens:
            return self.head(maps.patch_tokens)
        return self.head(maps[-1]) if self.skip is None else self.head(maps[-1], maps[self.skip])

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        """Without CAMs. A class logit is positive if the class is more likely than not at some position."""
        seg_logits = self.network(image)
        strongest = seg_logits.float().softmax(1)[:, 1:].amax((2, 3))
        return Prediction(None, None, strongest.logit(eps=1e-6), seg_logits)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            parameter_group("backbone", self.backbone),
            parameter_group("head", self.head, lr_scale=self.head_lr_scale),
        ]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return PlainView(crop_size, scale_range)


class DeepLabHead(nn.Module):
    """The decoder of DeepLab v3+ (Chen et al., ECCV 2018), with plain instead of separable convolutions.

    Group norms instead of batch norms: a step must not depend on how the batch is split over processes.

    Args:
        hidden: channels inside.
        skip_dim: channels that the shallow map is reduced to.
        dilations: of the pyramid; those of the paper at stride 16.
    """

    def __init__(
        self,
        deep_dim: int,
        shallow_dim: int,
        num_classes: int,
        hidden: int = 256,
        skip_dim: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        self.pyramid = with_group_norms(ASPP(deep_dim, list(dilations), hidden))
        block = partial(conv_norm_relu, norm=group_norm)
        self.skip = block(shallow_dim, skip_dim, 1)
        self.fuse = nn.Sequential(block(hidden + skip_dim, hidden, 3), block(hidden, hidden, 3))
        self.output = nn.Conv2d(hidden, num_classes, 1)

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """(B, D, ., .) and (B, D', h, w) -> (B, K, h, w)."""
        context = self.pyramid(deep)
        context = F.interpolate(context, size=shallow.shape[-2:], mode="bilinear", align_corners=False)
        return self.output(self.fuse(torch.cat([context, self.skip(shallow)], 1)))


def group_norm(dim: int) -> nn.GroupNorm:
    """Up to 32 groups of at least two channels: the pyramid also norms maps of a single pixel."""
    return nn.GroupNorm(math.gcd(32, dim // 2), dim)


def with_group_norms(module: nn.Module) -> nn.Module:
    """The module with a group norm in the place of every batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, group_norm(child.num_features))
        else:
            with_group_norms(child)
    return module
