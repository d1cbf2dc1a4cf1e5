"""SEAM: Self-supervised Equivariant Attention Mechanism for WSSS (Wang et al., CVPR 2020).

Its classifier; what follows (labels, pixel affinities, random walk) is PSA's with other numbers.
B images, C foreground classes, K = C + 1, (H, W) pixels, (h, w) positions of the deepest map.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import StageView
from losses.classification import multilabel_loss
from losses.equivariance import (
    equivariant_cross_regularization,
    equivariant_regularization,
    max_norm,
    min_pool_loss,
    strongest_only,
    with_background,
)
from methods.base import Batch, Losses, Method, Metrics, Prediction, Transform, groups_by_origin
from models.backbones import GivesMaps, create_backbone, require
from models.heads import POOLINGS, pooled_logits
from ops.cam import summed_cam
from utils.build import check_choice, check_number
from utils.image import resize
from utils.precision import full_precision

# Entries of the similarity matrix that are held at once: 256 MB of float32.
_MAX_PAIRS = 2**26


class Output(NamedTuple):
    """One forward pass; raw maps (B, K, H, W), float32, of which channel 0 is the background."""

    cam: Tensor
    refined: Tensor
    class_logits: Tensor  # (B, C)


class SEAM(Method):
    """CAMs that must not change when the image shrinks, and are refined by the similarity of pixels.

    Args:
        backbone: arguments of ``create_backbone``; any with maps, published is ``resnet38d``.
        loss_weights: of ``cls, min_pool, er, ecr``, 1 by default.
        small_scale: of the second view.
        dropout: of channels, before the classifier.
        pooling: logits are the ``mean`` of the enlarged maps (published), or those of the ``max`` of each
            feature, as ViTs need (``PooledCAMNetwork``).
        branch_dims, embed_dim: widths of the pixel correlation module.
        long_side, colour_jitter: of training images, see ``PooledCAMNetwork``.
    """

    needs_background = True
    losses = ("cls", "min_pool", "er", "ecr")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.26,
        cam_scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
        small_scale: float = 0.3,
        dropout: float = 0.5,
        pooling: Literal["mean", "max"] = "mean",
        branch_dims: Sequence[int] = (64, 128),
        embed_dim: int = 192,
        long_side: tuple[int, int] | None = (448, 768),
        colour_jitter: bool = True,
    ) -> None:
        weights = loss_weights or dict.fromkeys(("cls", "min_pool", "er", "ecr"), 1.0)
        super().__init__(num_classes, weights, background_threshold, cam_scales)
        check_number("method.small_scale", small_scale, 1e-3)
        check_choice("method.pooling", pooling, POOLINGS)
        self.pooling, self.small_scale = pooling, small_scale
        self.long_side, self.colour_jitter = long_side, colour_jitter
        self.backbone = create_backbone(**backbone)
        require(self, GivesMaps)
        self.dropout = nn.Dropout2d(dropout)
        # The background has a channel that no tag supervises; only its place in the maps is used.
        self.classifier = nn.Conv2d(self.backbone.dims[-1], num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.correlation = PixelCorrelation(low_level(self.backbone.dims), branch_dims, embed_dim)

    def network(self, image: Tensor) -> Output:
        """Raw and refined maps of normalised images (B, 3, H, W).

        Refined maps train the correlation module alone, plain maps everything else.
        """
        maps = self.backbone(image)
        features = self.dropout(maps[-1])
        cam = self.classifier(features).float()
        refined = self.correlation(attention_maps(cam), image, [m.detach() for m in low_level(maps)])
        size = image.shape[-2:]
        enlarged, refined = (resize(m, size, align_corners=True) for m in (cam, refined))
        if self.pooling == "mean":
            return Output(enlarged, refined, enlarged[:, 1:].mean((2, 3)))
        return Output(enlarged, refined, pooled_logits(features, self.classifier)[:, 1:].float())

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        image, class_label = batch["image"], batch["class_label"]
        present = F.pad(class_label, (1, 0), value=1.0)[:, :, None, None]  # (B, K, 1, 1) with background
        size = [max(int(side * self.small_scale), 1) for side in image.shape[-2:]]

        large, small = self.network(image), self.network(resize(image, size, align_corners=True))
        cam, refined = (
            resize(max_norm(m), size, align_corners=True) * present for m in (large.cam, large.refined)
        )
        small_cam, small_refined = (max_norm(m) * present for m in (small.cam, small.refined))
        target, small_target = (with_background(m[:, 1:]) for m in (cam, small_cam))

        cls = [multilabel_loss(view.class_logits, class_label) for view in (large, small)]
        min_pool = [min_pool_loss((view.refined * present)[:, 1:]) for view in (large, small)]
        return {
            "cls": torch.stack(cls).mean(),
            "min_pool": torch.stack(min_pool).mean(),
            "er": equivariant_regularization(cam[:, 1:], small_cam[:, 1:]),
            "ecr": equivariant_cross_regularization(refined, small_target)
            + equivariant_cross_regularization(small_refined, target),
        }, {}

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        if not scales:
            return Prediction(None, None, self.network(image).class_logits, None)

        def refined_foreground(views: Tensor) -> tuple[Tensor, Tensor]:
            out = self.network(views)
            return out.refined[:, 1:], out.class_logits

        (total,), (class_logits,) = summed_cam(refined_foreground, image, scales, [image.shape[-2:]])
        # Values below 0 (see ``stretch``) are background to every later step, whatever their size.
        return Prediction(stretch(total).clamp_(min=0), None, class_logits, None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return groups_by_origin(self)

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return StageView(crop_size, scale_range, self.long_side, self.colour_jitter)


class PixelCorrelation(nn.Module):
    """Averages attention maps over all pixels, weighted by how similar their shallow features are (PCM).

    Weights are cosine similarities, negative ones cut off, and those of a pixel sum to 1. The two shallow
    maps of ``dims`` channels are reduced to ``branch_dims``; ``embed_dim`` channels are compared.
    """

    def __init__(self, dims: Sequence[int], branch_dims: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        if len(branch_dims) != len(dims):
            raise ValueError(f"branch_dims must be {len(dims)} widths, one for each map, got {branch_dims}")
        self.branches = nn.ModuleList(nn.Conv2d(*widths, 1, bias=False) for widths in zip(dims, branch_dims))
        self.embed = nn.Conv2d(3 + sum(branch_dims), embed_dim, 1, bias=False)
        for branch in self.branches:
            nn.init.kaiming_normal_(branch.weight)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def forward(self, attention: Tensor, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """(B, K, h, w) attention, (B, 3, H, W) image and shallow maps of any size -> (B, K, h, w) refined."""
        size = attention.shape[-2:]
        parts = [F.relu(branch(m)) for branch, m in zip(self.branches, maps)]
        features = torch.cat([resize(x.float(), size, align_corners=True) for x in (image, *parts)], 1)
        return self.correlate(attention, features)

    def correlate(self, attention: Tensor, features: Tensor) -> Tensor:
        """Attention (B, K, ., .), brought to the (h, w) of the features (B, 3 + sum(branch_dims), h, w)."""
        attention = resize(attention, features.shape[-2:], align_corners=True).flatten(2)
        unit = self.embed(features).flatten(2)
        with full_precision(unit):
            unit = unit.float()
            unit = unit / (unit.norm(dim=1, keepdim=True) + 1e-5)
            # Block by block: at twice the size of a photo the whole matrix has 140 million entries.
            block = max(_MAX_PAIRS // (len(unit) * unit.shape[2]), 1)
            parts = []
            for columns in unit.split(block, dim=2):
                similarity = (unit.mT @ columns).relu()  # (B, hw, block)
                parts.append(attention.float() @ similarity / (similarity.sum(1, keepdim=True) + 1e-5))
        return torch.cat(parts, 2).unflatten(2, features.shape[-2:])


def low_level(values: Sequence[Any]) -> Sequence[Any]:
    """What pixels are compared by: of a backbone's maps the two before the deepest, or both of two."""
    return values[-3:-1] if len(values) > 2 else values[-2:]


@torch.no_grad()
def attention_maps(cam: Tensor) -> Tensor:
    """Raw maps (B, K, h, w) -> background and strongest class of every pixel in [0, 1], whatever the tags."""
    cam = cam.relu()
    cam = F.relu(cam - 1e-5) / (cam.amax((2, 3), keepdim=True) + 1e-5)
    return strongest_only(with_background(cam[:, 1:]))


def stretch(total: Tensor, eps: float = 1e-5) -> Tensor:
    """Summed maps (B, C, H, W) -> maps of at most 1, each stretched from its minimum to its maximum.

    As published: pixels at the minimum are set to 0 first and lose the minimum all the same, so they end
    below 0. An empty map becomes -1.
    """
    total = total.relu()
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total.masked_fill(total < low + eps, 0.0) - low - eps) / (high - low + eps)
