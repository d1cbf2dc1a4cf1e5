"""1-stage-wseg: Single-Stage Semantic Segmentation from Image Labels (Araslanov & Roth, CVPR 2020).

With its CAM baseline. B images, C foreground classes, P of them present, K = C + 1, D decoder width,
(H, W) pixels, (h, w) places of the shallow feature map at stride 4.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.segmentation import mask_loss
from methods.base import Batch, Losses, Metrics, Prediction
from methods.cnn_base import Reading, SingleStageCNN
from models.blocks import FixedStatisticsNorm, ImagePooling, conv_norm_relu, kaiming
from models.heads import pooled_logits
from models.refiners.base import create_refiner, refiner_options
from ops.cam import PresentClasses, present_classes
from utils.build import check_number
from utils.image import IGNORE_INDEX, denormalize, resize
from utils.precision import full_precision


class OneStage(SingleStageCNN):
    """Classification by normalised global weighted pooling of masks that train on their own refinement.

    The decoder's batch norms see the images of one process, so numbers change with the number of processes.

    Args:
        loss_weights: of ``cls`` and ``mask``.
        focal_power, focal_floor: p and lambda of the focal mask penalty.
        gate: psi of the stochastic gate, the share of the shallow branch.
        foreground_share, background_share, confidence_floor: see ``confident_label``.
        context_dilations: of the dilated branches of the context module.
        width: D.
        refiner: of the masks, by name, or a mapping of ``name`` and options.
        **options: of ``SingleStageCNN``.
    """

    losses = ("cls", "mask")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        focal_power: float = 3.0,
        focal_floor: float = 0.01,
        gate: float = 0.3,
        foreground_share: float = 0.6,
        background_share: float = 0.7,
        confidence_floor: float = 0.2,
        context_dilations: Sequence[int] = (12, 24, 36),
        width: int = 256,
        refiner: str | Mapping[str, Any] = "pamr",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, backbone, loss_weights, **options)
        self.focal_power, self.focal_floor = focal_power, focal_floor
        self.foreground_share, self.background_share = foreground_share, background_share
        self.confidence_floor = confidence_floor
        self.refiner = create_refiner(**refiner_options(refiner, "pamr"), key="method.refiner")
        shallow, deep = self.backbone.dims[self.backbone.shallow], self.backbone.dims[-1]
        self.build_decoder(shallow, deep, width, tuple(context_dilations))
        self.gate = StochasticGate(gate)
        self.head = nn.Sequential(
            *conv_norm_relu(width, width, 3),
            nn.Dropout(0.5),
            *conv_norm_relu(width, width, 3),
            nn.Dropout(0.1),
            nn.Conv2d(width, num_classes - 1, 1),
        )
        kaiming(self.head)

    def build_decoder(self, shallow: int, deep: int, width: int, dilations: tuple[int, ...]) -> None:
        """Make the modules of ``branches`` for maps of ``shallow`` and ``deep`` channels."""
        self.context = AtrousPyramid(deep, width, dilations)
        self.cue_injection = GlobalCueInjection(shallow, width)
        self.skip = conv_norm_relu(shallow, 48, 1)
        self.deep_and_skip = conv_norm_relu(width + 48, width, 3)
        kaiming(self.skip)
        kaiming(self.deep_and_skip)

    def branches(self, shallow: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        """What the gate mixes, deep and shallow, each (B, D, h, w), from two maps of the backbone."""
        context = resize(self.context(deep), shallow.shape[-2:], align_corners=True)
        deep = self.deep_and_skip(torch.cat([context, self.skip(shallow)], 1))
        return deep, self.cue_injection(shallow, deep)

    def network(self, image: Tensor) -> Tensor:
        """Logits (B, K, h, w) float32; that of the background is the constant 1."""
        maps = self.backbone(image)
        foreground = self.head(self.gate(*self.branches(maps[self.backbone.shallow], maps[-1]))).float()
        return torch.cat([torch.ones_like(foreground[:, :1]), foreground], 1)

    def class_scores(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Image-level scores (B, C): weighted pooling and focal penalty of the foreground classes."""
        with full_precision(logits):
            penalty = focal_penalty(masks, self.focal_power, self.focal_floor)
            return (weighted_pooling(logits, masks) + penalty)[:, 1:]

    def read(self, image: Tensor) -> Reading:
        logits = self.network(image)
        masks = logits.softmax(1)
        return Reading(self.class_scores(logits, masks), resize(masks, image.shape[-2:], align_corners=True))

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        image, class_label = batch["image"], batch["class_label"]
        logits = self.network(image)  # (B, K, h, w)
        masks = logits.softmax(1)
        class_logits = self.class_scores(logits, masks)  # (B, C)

        mask = logits.new_zeros(())  # and no work while its weight is 0
        if self.loss_weight("mask", step):
            pseudo_label = self.pseudo_ground_truth(image, masks, class_label, batch.get("most_classes"))
            seg_logits = resize(logits, image.shape[-2:], align_corners=True)
            mask = mask_loss(seg_logits, pseudo_label, class_label).mean()
        metrics = {"fg": mean_foreground(masks.detach(), class_label).mean()}
        return {"cls": self.class_loss(class_logits, class_label), "mask": mask}, metrics

    @torch.no_grad()
    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        return self.pseudo_ground_truth(image, self.network(image).softmax(1), class_label)

    @torch.no_grad()
    def pseudo_ground_truth(
        self, image: Tensor, masks: Tensor, class_label: Tensor, most: Tensor | None = None
    ) -> Tensor:
        """The target (B, H, W) int64 that the masks (B, K, h, w) of an image give after refinement."""
        present = present_classes(class_label, most)
        return confident_label(
            self.refine(image, masks, present),
            F.pad(present.class_ids, (1, 0)),  # channel 0 is the background
            self.foreground_share,
            self.background_share,
            self.confidence_floor,
        )

    @torch.no_grad()
    def refine(self, image: Tensor, masks: Tensor, present: PresentClasses) -> Tensor:
        """Masks (B, 1 + P, H, W) of background and present classes, refined on (h, w); padding is 0."""
        with full_precision(image):
            image_rgb = resize(denormalize(image.float()) / 255, masks.shape[-2:], align_corners=True)
            kept = torch.cat([masks[:, :1], present.select(masks[:, 1:])], 1)
            refined = resize(self.refiner.refine(image_rgb, kept), image.shape[-2:], align_corners=True)
            return refined * F.pad(present.label.float(), (1, 0), value=1)[:, :, None, None]


class CAMBaseline(SingleStageCNN):
    """The baseline of both papers: a classifier on averaged features; its CAMs are the masks.

    Args:
        background_score: constant mask of the background.
        dropout: of the features, channel by channel.
    """

    losses = ("cls",)

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        background_score: float = 0.1,
        dropout: float = 0.5,
        **options: Any,
    ) -> None:
        # The mask of the background is a constant already.
        options = {"background": ("power", 1.0), "background_threshold": background_score} | options
        super().__init__(num_classes, backbone, loss_weights or {"cls": 1.0}, **options)
        self.background_score = background_score
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.backbone.dims[-1], num_classes - 1, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)

    def class_scores(self, features: Tensor) -> Tensor:
        """(B, C) from the deep map of the backbone."""
        return pooled_logits(self.dropout(features), self.classifier, "mean").float()

    def read(self, image: Tensor) -> Reading:
        features = self.backbone(image)[-1]
        cam = resize(self.classifier(features).float(), image.shape[-2:], align_corners=True).relu()
        cam = cam / (1e-5 + cam.amax((2, 3), keepdim=True))
        background = torch.full_like(cam[:, :1], self.background_score)
        return Reading(self.class_scores(features), torch.cat([background, cam], 1))

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        class_logits = self.class_scores(self.backbone(batch["image"])[-1])
        return {"cls": self.class_loss(class_logits, batch["class_label"])}, {}


def weighted_pooling(logits: Tensor, masks: Tensor) -> Tensor:
    """Normalised global weighted pooling (B, K): the mean of logits (B, K, h, w), weighted by their masks."""
    return (masks * logits).sum((2, 3)) / (1 + masks.sum((2, 3)))


def focal_penalty(masks: Tensor, power: float, floor: float) -> Tensor:
    """Focal mask penalty (B, K) of masks (B, K, h, w): below 0 where a class covers little of the image."""
    mean = masks.mean((2, 3))
    return (1 - mean) ** power * torch.log(floor + mean)


@torch.no_grad()
def mean_foreground(masks: Tensor, class_label: Tensor) -> Tensor:
    """(B,) mean mask of the present classes, 0 without any; only logged."""
    mean = masks[:, 1:].mean((2, 3))
    return (mean * class_label).sum(1) / class_label.sum(1).clamp(min=1)


@torch.no_grad()
def confident_label(
    masks: Tensor, class_ids: Tensor, foreground_share: float, background_share: float, floor: float
) -> Tensor:
    """Pixels near the maximum of exactly one mask, (B, H, W) int64; the others are ignored.

    Args:
        masks: (B, M, H, W) in [0, 1], background first.
        class_ids: (B, M) class numbers of the masks.
        foreground_share, background_share: a pixel must exceed this share of the largest value of its mask.
        floor: it must exceed this as well.
    """
    share = masks.new_full((masks.shape[1], 1, 1), foreground_share)
    share[0] = background_share
    confident = masks > (share * masks.amax((2, 3), keepdim=True)).clamp(min=floor)
    channel = confident.to(torch.uint8).max(1).indices  # faster than argmax
    label = class_ids.gather(1, channel.flatten(1)).view_as(channel)
    return label.masked_fill(confident.sum(1) != 1, IGNORE_INDEX)


class AtrousPyramid(nn.Module):
    """DeepLab v3's pyramid, (B, F, h, w) -> (B, D, h, w); its norm statistics stay 0 and 1, as published."""

    def __init__(self, dim_in: int, width: int, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        block = partial(conv_norm_relu, norm=FixedStatisticsNorm)
        self.branches = nn.ModuleList(
            [block(dim_in, width, 1), *(block(dim_in, width, 3, dilation) for dilation in dilations)]
        )
        self.pooling = ImagePooling(dim_in, width)
        self.merge = block((len(dilations) + 2) * width, width, 1)
        self.dropout = nn.Dropout(0.5)
        kaiming(self)

    def forward(self, features: Tensor) -> Tensor:
        parts = [branch(features) for branch in self.branches]
        return self.dropout(self.merge(torch.cat([*parts, self.pooling(features)], 1)))


class GlobalCueInjection(nn.Module):
    """Shallow features, scaled and shifted channel by channel by what the deep ones say of the whole image.

    (B, S, h, w) and (B, D, h, w) -> (B, D, h, w).
    """

    def __init__(self, dim_shallow: int, width: int) -> None:
        super().__init__()
        self.cue = conv_norm_relu(width, 2 * width, 1)
        self.shallow = nn.Sequential(
            nn.Conv2d(dim_shallow, width, 1, bias=False), nn.BatchNorm2d(width, affine=False)
        )
        self.out = conv_norm_relu(width, width, 1)
        kaiming(self)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        gamma, beta = self.cue(deep).amax((2, 3), keepdim=True).chunk(2, 1)
        return self.out(F.relu(self.shallow(shallow) * (gamma + 1) + beta))


class StochasticGate(nn.Module):
    """Mix a deep and a shallow branch: element by element one of them in training, their mean at test time.

    Args:
        psi: probability of the shallow branch, in [0, 1).
    """

    def __init__(self, psi: float) -> None:
        super().__init__()
        check_number("method.gate", psi, 0, 0.999)
        self.psi = psi

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        if not self.training:
            # Not the expectation in training, which is `deep`: kept for parity with the authors' program.
            return (1 - self.psi) * deep + self.psi * shallow
        return torch.where(self.keep_mask(deep), (deep - self.psi * shallow) / (1 - self.psi), shallow)

    def keep_mask(self, deep: Tensor) -> Tensor:
        """Which elements come from the deep branch."""
        return torch.rand(deep.shape, device=deep.device) >= self.psi
