"""WeCLIP: a frozen CLIP as the backbone of a single-stage segmentation network.

"Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic Segmentation" (Zhang et al., CVPR 2024).
Letters of methods/clip_es.py; K = C + 1, (H, W) pixels, F width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import PlainView
from losses.segmentation import pixel_cross_entropy
from methods.base import Batch, Losses, Metrics, Prediction, Transform, resize_like
from methods.clip_es import ClipES, Encoded
from models.backbones.vit import to_map
from models.refiners.base import create_refiner, refiner_options
from ops.labels import affinity_label, ignore_outside_box
from utils.distributed import global_mean
from utils.image import IGNORE_INDEX, denormalize, resize
from utils.precision import full_precision


class WeCLIP(ClipES):
    """CLIP-ES refined by the attention maps that agree with a decoder, which learns from these CAMs.

    Args:
        loss_weights: of ``seg`` and ``aff``.
        layers: last blocks whose attention may agree; 0: all.
        width, depth, heads: of the decoder.
        radius: patches further apart than this, in rows or columns, are no pair of the affinity loss.
        refiner: of the pseudo labels.
        **options: of ``ClipES``.
    """

    crf_preset = "toco"
    losses = ("seg", "aff")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        layers: int = 0,
        width: int = 256,
        depth: int = 3,
        heads: int = 8,
        radius: int = 8,
        refiner: str | Mapping[str, Any] = "par",
        **options: Any,
    ) -> None:
        options |= {"loss_weights": loss_weights or {"seg": 1.0, "aff": 0.1}, "layers": layers}
        super().__init__(num_classes, backbone, **options)
        self.radius = radius
        self.refiner = create_refiner(**refiner_options(refiner, "par"), key="method.refiner")
        self.decoder = Decoder(
            self.backbone.embed_dim, len(self.backbone.blocks), num_classes, width, depth, heads
        )

    def train(self, mode: bool = True) -> WeCLIP:
        super().train(mode)
        self.backbone.eval()
        return self

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        image, class_label = batch["image"], batch["class_label"]
        out = self.encode(image)
        label = self.pseudo_label(image, self.cams(out, class_label), class_label)  # (B, H, W)
        label = ignore_outside_box(label, batch["valid_box"])
        patch_label = F.interpolate(label[:, None].float(), out.size, mode="nearest")[:, 0].long()
        pairs = affinity_label(patch_label).masked_fill(~self.near(out.size, label.device), IGNORE_INDEX)
        return {
            "seg": pixel_cross_entropy(resize_like(out.seg_logits, label), label),
            "aff": affinity_loss(out.affinity, pairs),
        }, {"fg": ((label > 0) & (label != IGNORE_INDEX)).float().mean()}

    def encode(self, image: Tensor) -> Encoded:
        with torch.no_grad():
            out = super().encode(image)
        features, seg_logits = self.decoder([to_map(s[:, 1:], out.size) for s in out.sequences])
        with full_precision(features):
            flat = features.flatten(2).float()
            affinity = (flat.transpose(1, 2) @ flat).sigmoid()
        return out._replace(affinity=affinity, seg_logits=seg_logits)

    def patch_affinity(self, out: Encoded) -> Tensor:
        return agreeing(out.attention[-self.layers :], out.affinity) * out.affinity

    @torch.no_grad()
    def pseudo_label(self, image: Tensor, cam: Tensor, class_label: Tensor) -> Tensor:
        """(B, H, W): the strongest of the tagged classes and the background, which is 1 - the largest CAM."""
        with full_precision(image):
            cam = resize(cam.float(), image.shape[-2:])
            scores = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)
            image_rgb = denormalize(image.float()).clamp(0, 255) / 255
            scores = self.refiner.refine(image_rgb, scores)
            absent = F.pad(class_label, (1, 0), value=1) == 0
            return scores.masked_fill(absent[:, :, None, None], -torch.inf).max(1).indices

    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        return self.pseudo_label(image, self.cams(self.encode(image), class_label), class_label)

    def near(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """(N, N) bool: pairs of patches within the radius."""
        rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
        distance = [(p.flatten()[:, None] - p.flatten()).abs() for p in (rows, columns)]
        return torch.maximum(*distance) <= self.radius

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return PlainView(crop_size, scale_range)


class Decoder(nn.Module):
    """All blocks' patches through perceptrons into one map, and a small transformer on it."""

    def __init__(self, dim: int, blocks: int, num_classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(blocks)
        )
        self.fuse = nn.Conv2d(blocks * width, width, 1)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.output = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L maps (B, D, h, w) -> features (B, F, h, w) and logits (B, K, h, w)."""
        features = self.fuse(torch.cat([p(m) for p, m in zip(self.project, maps, strict=True)], 1))
        decoded = self.layers(features.flatten(2).transpose(1, 2))
        return features, self.output(to_map(decoded, (features.shape[-2], features.shape[-1])))


def agreeing(attention: Tensor, affinity: Tensor) -> Tensor:
    """The mean (B, N, N) of the blocks whose attention differs from an affinity no more than on average.

    Args:
        attention: (L, B, N, N), of which every image chooses its own.
        affinity: (B, N, N) in [0, 1].
    """
    difference = (attention - affinity).abs().sum((2, 3))  # (L, B)
    kept = (difference <= difference.mean(0) * (1 + 1e-6)).to(attention.dtype)
    return torch.einsum("lb,lbnm->bnm", kept / kept.sum(0), attention)


def affinity_loss(affinity: Tensor, pairs: Tensor) -> Tensor:
    """Patches of one label get affinity 1, those of two labels 0; means over the pairs of each kind.

    Args:
        affinity: (B, N, N) in [0, 1].
        pairs: the same shape: 1, 0, or 255 ignored.
    """
    same, different = pairs == 1, pairs == 0
    pull = global_mean(((1 - affinity) * same).sum(), same.sum(), offset=1)
    return 0.5 * (pull + global_mean((affinity * different).sum(), different.sum(), offset=1))
