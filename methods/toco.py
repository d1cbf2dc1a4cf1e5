"""ToCo: Token Contrast for Weakly-Supervised Semantic Segmentation (Ru et al., CVPR 2023).

B images, P present classes, V local crops of each, s their side, D width, (H, W) pixels.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from losses.segmentation import balanced_cross_entropy
from methods.base import Batch, Losses, Metrics, resize_like
from methods.contrastive_vit import ContrastiveViT
from methods.vit_base import label_shares
from models.backbones import whole_crop
from ops.cam import PresentClasses
from ops.crops import crop_positions, cut, random_order
from ops.labels import region_mask
from utils.build import check_number
from utils.seed import sample_generator


class ToCo(ContrastiveViT):
    """Contrast of patch tokens by labels from an inner block, of class tokens by uncertain regions.

    Args:
        loss_weights: of ``cls, cls_aux, ptc, ctc, seg, reg``.
        local_crop_size: side of the local crops in pixels.
        num_local_crops: local crops per image.
        temperature: of the class token contrast.
        **options: of ``ContrastiveViT``.
    """

    losses = ("cls", "cls_aux", "ptc", "ctc", "seg", "reg")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        local_crop_size: int = 96,
        num_local_crops: int = 8,
        temperature: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, backbone, loss_weights=loss_weights, **options)
        check_number("method.num_local_crops", num_local_crops, 1, math.inf)
        self.local_crop_size = whole_crop(self, local_crop_size, "method.local_crop_size")
        self.num_local_crops = num_local_crops
        self.temperature = temperature

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        class_label, valid_box = batch["class_label"], batch["valid_box"]
        image_rgb, views, out, present, cams, pseudo_label, affinity = self.begin(batch, step)

        crops, is_positive = self.sample_crops(batch, cams["aux_cam"], present)  # (V*B, 3, s, s), (B, 2 + V)
        student = self.proj_head(torch.cat([views.cls_token, self.backbone(crops).cls_token]))
        teacher = self.teach(views.cls_token, step)
        cls, cls_aux = multilabel_loss(torch.stack([out.class_logits, out.aux_class_logits]), class_label)
        seg_logits = resize_like(out.seg_logits, pseudo_label)

        return {
            "cls": cls,
            "cls_aux": cls_aux,
            "ptc": patch_affinity_loss(out.tokens.patch_tokens, affinity),
            "ctc": class_token_contrast(student, teacher, is_positive, self.temperature),
            "seg": balanced_cross_entropy(seg_logits, pseudo_label),
            "reg": self.dense_energy(image_rgb, seg_logits, pseudo_label, valid_box, step),
        }, label_shares(pseudo_label)

    def sample_crops(self, batch: Batch, aux_cam: Tensor, present: PresentClasses) -> tuple[Tensor, Tensor]:
        """Local crops (V*B, 3, s, s) view-major, and which of the views show an object, (B, 2 + V)."""
        region = region_mask(aux_cam, present.label, self.low_threshold, self.high_threshold)
        # The paper speaks of uncertain regions; the authors' program centres crops on confident background
        # too, and in black padding as well.
        candidates, size = region <= 1, self.local_crop_size
        positions = crop_positions(candidates, size, self.num_local_crops, partial(self.crop_order, batch))
        crops = cut(batch["strong_view"], positions, size)
        return crops.flatten(0, 1), object_flags(cut(region[:, None], positions, size))

    def crop_order(self, batch: Batch, n: Tensor) -> Tensor:
        """Which of the n (B,) crop candidates are taken (B, V); random, and it belongs to the sample."""
        generators = [sample_generator(int(seed), "crops") for seed in batch["sample_seed"]]
        return random_order(n, self.num_local_crops, generators)


def object_flags(regions: Tensor, object_share: float = 0.2) -> Tensor:
    """Which views show an object, (B, 2 + V) float, from the crops (V, B, 1, s, s) of the region mask.

    The two global views always do, a crop if the mean of its region mask (0 background, 1 uncertain, 2
    foreground, which so counts twice as in the authors' program) is above ``object_share``.
    """
    share = (regions.flatten(2).float().sum(2) / regions[0, 0].numel()).T  # (B, V)
    return torch.cat([share.new_ones(len(share), 2), (share > object_share).float()], 1)
