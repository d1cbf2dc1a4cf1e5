"""MCC: Masked Collaborative Contrast for weakly supervised semantic segmentation (Wu et al., WACV 2024).

ToCo's network; its local views are the whole image seen through random masks. B images, V masked views of
each, P classes present in an image, D width, (H, W) pixels, (h, w) tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from losses.segmentation import balanced_cross_entropy
from methods.base import Batch, Losses, Metrics, resize_like
from methods.contrastive_vit import ContrastiveViT
from methods.vit_base import cam_schedule, label_shares
from models.backbones import HidesTokens, require
from ops.cam import PresentClasses
from ops.labels import region_mask
from utils.build import check_number
from utils.device import to_device
from utils.seed import sample_generator


class MCC(ContrastiveViT):
    """Class tokens of masked images are contrasted with those of whole ones, by what the visible part shows.

    Args:
        loss_weights: of ``cls, cls_aux, aff, mcc, seg, reg``.
        num_masks: masked views per image.
        mask_rate: share of the cells of a mask that are hidden.
        mask_scale: side of a cell in tokens.
        flag_source: which CAM tells what a mask leaves visible, ``cam`` or ``aux_cam``, or their schedule.
        temperature: of the contrast.
        **options: of ``ContrastiveViT``.
    """

    crf_preset = "mcc"
    losses = ("cls", "cls_aux", "aff", "mcc", "seg", "reg")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        num_masks: int = 8,
        mask_rate: float = 0.95,
        mask_scale: int = 4,
        flag_source: Any = ((0, "aux_cam"), (12001, "cam")),
        temperature: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, backbone, loss_weights=loss_weights, **options)
        require(self, HidesTokens)
        check_number("method.mask_rate", mask_rate)
        self.num_masks, self.mask_rate, self.mask_scale = num_masks, mask_rate, mask_scale
        self.flag_source = cam_schedule("flag_source", flag_source)
        self.temperature = temperature

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        class_label, valid_box = batch["class_label"], batch["valid_box"]
        image_rgb, views, out, present, cams, pseudo_label, affinity = self.begin(batch, step)

        masks = self.sample_masks(batch, out.tokens.patch_tokens.shape[-2:])  # (B, V, h, w), True: hidden
        is_positive = self.visible_objects(cams[self.flag_source(step)], present, masks)  # (B, 2 + V)
        masked = masked_class_token(self.backbone, batch["strong_view"], masks)  # (V * B, D)
        student = self.proj_head(torch.cat([views.cls_token, masked]))
        teacher = self.teach(views.cls_token, step)
        cls, cls_aux = multilabel_loss(torch.stack([out.class_logits, out.aux_class_logits]), class_label)
        seg_logits = resize_like(out.seg_logits, pseudo_label)

        return {
            "cls": cls,
            "cls_aux": cls_aux,
            "aff": patch_affinity_loss(out.tokens.patch_tokens, affinity),
            "mcc": class_token_contrast(student, teacher, is_positive, self.temperature),
            "seg": balanced_cross_entropy(seg_logits, pseudo_label),
            "reg": self.dense_energy(image_rgb, seg_logits, pseudo_label, valid_box, step),
        }, label_shares(pseudo_label)

    def sample_masks(self, batch: Batch, size: tuple[int, int]) -> Tensor:
        """Random masks (B, V, h, w) bool on the CPU, True where a token is hidden, constant over cells."""
        if size[0] % self.mask_scale or size[1] % self.mask_scale:
            raise ValueError(
                f"mask_scale={self.mask_scale} does not divide a grid of {size} tokens: change data.crop_size"
            )
        grid = size[0] // self.mask_scale, size[1] // self.mask_scale
        cells = torch.stack([self.hidden_cells(batch, i, grid) for i in range(len(batch["image"]))]).bool()
        return cells.repeat_interleave(self.mask_scale, 2).repeat_interleave(self.mask_scale, 3)

    def hidden_cells(self, batch: Batch, i: int, grid: tuple[int, int]) -> Tensor:
        """(V, *grid) random 0 / 1, 1 for hidden cells of image ``i``; they belong to the sample."""
        rate = torch.full((self.num_masks, *grid), self.mask_rate)
        return torch.bernoulli(rate, generator=sample_generator(int(batch["sample_seed"][i]), "masks"))

    @torch.no_grad()
    def visible_objects(self, cam: Tensor, present: PresentClasses, masks: Tensor) -> Tensor:
        """Which views show an object, (B, 2 + V) float, by CAMs (B, P, H, W) and masks (B, V, h, w)."""
        # Bicubic as in the authors' program, so a value can leave [0, 1]; only the thresholds look at it.
        cam = F.interpolate(cam, size=masks.shape[-2:], mode="bicubic", align_corners=False)
        region = region_mask(cam, present.label, self.low_threshold, self.high_threshold)
        return visible_flags(region, to_device(masks, cam.device))


def visible_flags(region: Tensor, masks: Tensor, object_share: float = 0.2) -> Tensor:
    """Which views show an object, (B, 2 + V) float.

    The two global views always do; a masked view if the mean of its visible tokens is above ``object_share``.

    Args:
        region: (B, h, w) region mask, 0 background, 1 uncertain, 2 foreground, which so counts twice.
        masks: (B, V, h, w) bool, True where a token is hidden.
    """
    visible = (~masks).flatten(2).float()  # (B, V, hw)
    mass = (visible * region.flatten(1)[:, None]).sum(2)
    shown = (mass > object_share * visible.sum(2)).float()
    return torch.cat([shown.new_ones(len(shown), 2), shown], 1)


def masked_class_token(backbone: HidesTokens, image: Tensor, masks: Tensor) -> Tensor:
    """Class tokens (V * B, D), view-major, of images (B, 3, H, W); masks (B, V, h, w) are True where hidden.

    The authors mask hidden tokens in attention. A token that is no key reaches the class token in no block,
    so leaving it out gives equal numbers at the cost of what is visible.
    """
    batch, views = masks.shape[:2]
    visible = (~masks).flatten(2).transpose(0, 1).flatten(0, 1)  # (V * B, hw), on the device of the masks
    length = int(visible.sum(1).max())
    prefix = backbone.num_prefix_tokens
    # Visible tokens first; shorter sequences are filled up with hidden ones, which are masked after all.
    index = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    is_key = F.pad(visible.gather(1, index), (prefix, 0), value=True)[:, None, None, :]
    index, is_key = (to_device(x, image.device) for x in (index, is_key))

    tokens = backbone.embed(image)  # (B, p + hw, D), p prefix tokens, once for all views of an image
    owner = torch.arange(batch, device=image.device).repeat(views)[:, None]
    first = torch.arange(prefix, device=image.device).expand(len(index), -1)
    x = tokens[owner, torch.cat([first, index + prefix], 1)]  # (V * B, p + length, D)
    for block in backbone.blocks:
        x = block(x, attn_mask=is_key)
    return backbone.norm(x)[:, 0]
