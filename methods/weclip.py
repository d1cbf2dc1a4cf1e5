"""WeCLIP: a frozen CLIP as the backbone of a single-stage segmentation network.

"Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic Segmentation" (Zhang et al., CVPR 2024).

B images, C foreground classes, K = C + 1, L blocks, D width of the image tower, F width of the decoder,
(H, W) pixels, (h, w) patches, N = h * w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import PlainView
from losses.segmentation import balanced_cross_entropy
from methods.base import Batch, Losses, Metrics, Prediction, Transform, resize_like
from methods.clip_es import ClipES
from models.backbones.vit import to_map
from models.refiners.attention_affinity import spread, transition
from models.refiners.base import create_refiner, refiner_options
from ops.cam import normalize_cam
from ops.labels import affinity_label, ignore_outside_box
from utils.distributed import global_mean
from utils.image import IGNORE_INDEX, denormalize, resize
from utils.precision import full_precision


class Encoded(NamedTuple):
    """What the frozen tower and the decoder make of images."""

    before_last: Tensor  # (B, 1 + N, D) the sequence that enters the last block
    attention: Tensor  # (L, B, N, N)
    size: tuple[int, int]
    affinity: Tensor  # (B, N, N) in (0, 1), the decoder's
    seg_logits: Tensor  # (B, K, h, w)
    class_logits: Tensor  # (B, C)


class WeCLIP(ClipES):
    """CLIP-ES refined by the attention maps that agree with a decoder, which learns from these CAMs.

    Args:
        width, depth, heads: of the decoder.
        radius: patches further apart than this, in rows or columns, are no pair of the affinity loss.
        refiner: of the pseudo labels.
        loss_weights: of ``seg`` and ``aff``.
        Others as in ``ClipES``.
    """

    crf_preset = "toco"

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        words: Sequence[str | Sequence[str]],
        background_words: Sequence[str],
        prompt: str = "a clean origami {}.",
        box_threshold: float = 0.4,
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0,),
        width: int = 256,
        depth: int = 3,
        heads: int = 8,
        radius: int = 8,
        refiner: str | Mapping[str, Any] = "par",
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            words,
            background_words,
            prompt,
            box_threshold=box_threshold,
            loss_weights=loss_weights or {"seg": 1.0, "aff": 0.1},
            background_threshold=background_threshold,
            cam_scales=cam_scales,
        )
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
            "seg": balanced_cross_entropy(resize_like(out.seg_logits, label), label),
            "aff": affinity_loss(out.affinity, pairs),
        }, {"fg": ((label > 0) & (label != IGNORE_INDEX)).float().mean()}

    def encode(self, image: Tensor) -> Encoded:
        """Images (B, 3, H, W), their sides rounded up to whole patches."""
        with torch.no_grad():
            x, size = self.backbone.embed(self.whole(image))
            sequences, maps = self.backbone.walk(x)
            similarity = self.similarity(sequences[-1])
        features, seg_logits = self.decoder([to_map(s[:, 1:], size) for s in sequences])
        flat = features.flatten(2).float()
        c = self.num_classes - 1
        return Encoded(
            sequences[-2],
            torch.stack([a[:, 1:, 1:] for a in maps]),
            size,
            (flat.transpose(1, 2) @ flat).sigmoid(),
            seg_logits,
            similarity[:, :c] - similarity[:, c:].amax(1, keepdim=True),
        )

    def cams(self, out: Encoded, class_label: Tensor) -> Tensor:
        """CAMs (B, C, h, w) in [0, 1] of the tagged classes, 0 for the others."""
        cam = out.affinity.new_zeros(len(class_label), self.num_classes - 1, *out.size)
        with torch.no_grad(), full_precision(cam):
            walk = transition(agreeing(out.attention.float(), out.affinity) * out.affinity)
            for i, tags in enumerate(class_label):
                if len(channels := tags.nonzero()[:, 0]):
                    raw = normalize_cam(self.grad_cam(out.before_last[i : i + 1], out.size, channels), 1e-7)
                    cam[i, channels] = normalize_cam(spread(raw, walk[i : i + 1], self.box_threshold), 1e-7)[
                        0
                    ]
        return cam

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

    @torch.no_grad()
    def predict_tagged(
        self, image: Tensor, class_label: Tensor | None, scales: Sequence[float]
    ) -> Prediction:
        out = self.encode(image)
        if not scales:
            return Prediction(None, None, out.class_logits, out.seg_logits)
        class_label = (out.class_logits > 0).float() if class_label is None else class_label
        total = image.new_zeros(len(image), self.num_classes - 1, *image.shape[-2:])
        for scale in (1.0, *(s for s in scales if s != 1.0)):
            scaled = self.whole(image, scale)
            for flip in (False, True):
                cam = self.cams(self.encode(scaled.flip(-1) if flip else scaled), class_label)
                total += resize(cam.flip(-1) if flip else cam, image.shape[-2:])
        return Prediction(normalize_cam(total), None, out.class_logits, out.seg_logits)

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
