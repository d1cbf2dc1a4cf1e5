"""Small ToCo, MCC and SeCo, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.contrastive_vit import ContrastiveViT
from methods.mcc import MCC
from methods.seco import SeCo
from methods.toco import ToCo

VIT = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48}
CROPS = {"local_crop_size": 24, "num_local_crops": 3}
FAST = {"head": {"hidden_dim": 32}, "refiner": {"name": "par", "iterations": 2}}
HEAD = {"head": {"hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 64}}
OPTIONS: dict[type[ContrastiveViT], dict[str, Any]] = {
    ToCo: CROPS | HEAD | {"loss_weights": {"cls": 1, "cls_aux": 1, "ptc": 0.2, "ctc": 0.5, "seg": 0.1}},
    MCC: HEAD
    | {
        "loss_weights": {"cls": 1, "cls_aux": 1, "aff": 0.2, "mcc": 0.5, "seg": 0.1},
        "mask_rate": 0.7,
        "mask_scale": 2,
    },
    SeCo: CROPS
    | {
        "loss_weights": {"cls": 1, "cls_aux": 1, "ptc": 0.3, "lil": 0.5, "lig": 0.5, "seg": 0.12},
        "queue_size": 100,
        "prototype_from_step": 0,
    },
}


def demo_method(kind: type[ContrastiveViT], **options: Any) -> Any:
    torch.manual_seed(0)
    base = next(base for base in OPTIONS if issubclass(kind, base))
    return kind(6, VIT, **(FAST | OPTIONS[base] | options))


def demo_batch(b: int = 3, size: int = 48, classes: int = 5) -> dict[str, Tensor]:
    """Noise; image i shows class i, the first also class 2."""
    generator = torch.Generator().manual_seed(0)
    names = ("image", "global_view", "strong_view")
    views = {name: torch.randn(b, 3, size, size, generator=generator) for name in names}
    class_label = torch.eye(b, classes)
    class_label[0, 2] = 1
    box = torch.tensor([[0, size, 0, size]]).repeat(b, 1)
    box[1] = torch.tensor([4, size - 8, 0, size])
    return views | {"class_label": class_label, "valid_box": box, "sample_seed": torch.arange(b)}
