"""Score maps spread along the attention of a vision transformer.

"CLIP is Also an Efficient Segmenter" (CLIP-ES, Lin et al., CVPR 2023), class-aware attention-based affinity.

B images, M score maps, (h, w) tokens, N = h * w.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from models.refiners.base import Refiner
from utils.build import check_number
from utils.image import normalize, resize
from utils.precision import full_precision


class AttentionAffinity(Refiner):
    """Average scores over the tokens that a ViT relates, and over those that these relate.

    The maps do not interact. The network is built when it is first used.

    Args:
        backbone: arguments of ``create_backbone`` for a plain ViT: ``name``, ``pretrained``, ...
        layers: how many of the last blocks' attention maps are averaged.
        box_threshold: a map counts inside of the boxes around what exceeds this share of its maximum; None:
            everywhere.
        scale: of the image before the network; 2 gives four times as many tokens.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        layers: int = 8,
        box_threshold: float | None = 0.4,
        scale: float = 1.0,
    ) -> None:
        check_number("attention_affinity's box_threshold", box_threshold or 0.0)
        check_number("attention_affinity's layers", layers, 1, 1000)
        check_number("attention_affinity's scale", scale, 0.1, 10)
        self.backbone, self.layers, self.box_threshold, self.scale = backbone, layers, box_threshold, scale

    @property
    def protocol(self) -> str:
        """What was run, for protocol ids."""
        changes = {"layers": (self.layers, 8), "box": (self.box_threshold, 0.4), "scale": (self.scale, 1.0)}
        parts = [self.backbone["name"], *(f"{k}={v}" for k, (v, usual) in changes.items() if v != usual)]
        return f"attention_affinity({','.join(parts)})"

    @cached_property
    def network(self) -> nn.Module:
        """The ViT, frozen."""
        from models.backbones import create_backbone

        return create_backbone(**self.backbone).eval().requires_grad_(False)

    def refine(self, image_rgb: Tensor, scores: Tensor) -> Tensor:
        return self.refine_all(image_rgb, [scores])[0]

    @torch.no_grad()
    def refine_all(self, image_rgb: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
        with full_precision(image_rgb):
            image = normalize(255 * image_rgb.float())
            image = resize(image, [round(self.scale * side) for side in image.shape[-2:]])
            attention, grid = mean_attention(self.network.to(image.device), image, self.layers)
            walk = transition(attention)
            # adaptive_avg_pool2d: scores come at the size of the image as well as of a network.
            maps = [F.adaptive_avg_pool2d(stack.float(), grid) for stack in scores]
            return [resize(spread(m, walk, self.box_threshold), image_rgb.shape[-2:]) for m in maps]


def mean_attention(network: nn.Module, image: Tensor, layers: int) -> tuple[Tensor, tuple[int, int]]:
    """Attention between patches, the mean over heads and the last ``layers`` blocks, and their grid.

    Args:
        network: a backbone that gives tokens, of timm's layers, or one with an ``attention`` of its own.
        image: (B, 3, H, W) normalised.

    Returns:
        (B, N, N), row by row what a token attends to; sums of rows are below 1 by the prefix tokens' share.

    Raises:
        ValueError: a network without attention between all tokens.
    """
    kept: list[Tensor] = []
    if hasattr(network, "attention"):
        kept, size = network.attention(image)
        kept = kept[-layers:]
    else:
        blocks = [m for m in network.modules() if hasattr(m, "attn_drop") and hasattr(m, "num_heads")][
            -layers:
        ]
        hooks = [m.attn_drop.register_forward_hook(lambda *a: kept.append(a[-1].mean(1))) for m in blocks]
        fused = [getattr(m, "fused_attn", False) for m in blocks]
        try:
            for block in blocks:
                block.fused_attn = False  # the fused kernel never holds the attention map
            tokens = network(image)
        finally:
            for block, hook, was_fused in zip(blocks, hooks, fused):
                block.fused_attn = was_fused
                hook.remove()
        size = getattr(tokens, "patch_tokens", image.new_zeros(0, 0)).shape[-2:]
    count = size[0] * size[1]
    if not kept or any(len(a) != len(image) or a.shape[-1] < count for a in kept) or not count:
        raise ValueError(f"attention_affinity needs the tokens of a plain ViT, not {type(network).__name__}")
    return torch.stack([a[:, -count:, -count:] for a in kept]).mean(0), (size[0], size[1])


def transition(attention: Tensor, turns: int = 3) -> Tensor:
    """Two steps of a symmetric walk from attention (B, N, N), nearly doubly stochastic (Sinkhorn)."""
    for _ in range(turns):
        attention = attention / attention.sum(1, keepdim=True)
        attention = attention / attention.sum(2, keepdim=True)
    attention = (attention + attention.transpose(1, 2)) / 2
    return attention @ attention


def spread(maps: Tensor, walk: Tensor, box_threshold: float | None = 0.4) -> Tensor:
    """Maps (B, M, h, w), inside of their boxes, averaged by the rows of ``walk`` (B, N, N)."""
    if box_threshold is not None:
        maps = maps * box_mask(maps, box_threshold)
    return (maps.flatten(2) @ walk.transpose(1, 2)).view_as(maps)


def box_mask(maps: Tensor, threshold: float) -> Tensor:
    """1 in the bounding boxes of the parts of each map that exceed ``threshold`` times its maximum, else 0.

    Parts touch at edges or corners. Maps (B, M, h, w) are at least 0.
    """
    found = maps > threshold * maps.amax((2, 3), keepdim=True)
    boxes = torch.zeros(maps.shape)
    for box, part in zip(boxes.flatten(0, 1), found.cpu().flatten(0, 1)):
        for rows, columns in ndimage.find_objects(ndimage.label(part.numpy(), np.ones((3, 3)))[0]):
            box[rows, columns] = 1
    return boxes.to(maps)
