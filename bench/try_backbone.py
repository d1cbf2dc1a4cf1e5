"""One row of the table that bench/backbones.py writes."""

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from methods.base import Predicts
from methods.seco import SeCo
from methods.segmentor import Segmentor
from models.backbones import PRETRAINED_TAGS, GivesTokens, create_backbone, whole_crop
from models.backbones.timm_net import renormalize, timm_name
from utils.image import resize


def row(name: str, sizes: list[int]) -> str:
    """Build, compare, train two steps and predict."""
    torch.manual_seed(0)
    backbone = {"name": name}
    tokens = isinstance(create_backbone(**backbone), GivesTokens)
    method: Any = Segmentor(3, backbone)
    if tokens:
        weights = dict.fromkeys(("cls", "cls_aux", "ptc", "lil", "lig", "seg", "reg"), 0.1)
        sizing = dict(
            cam_scales=(1.0, 0.5),
            num_local_crops=2,
            queue_size=12,
            head={"hidden_dim": 64},
            prototype_from_step=0,
        )
        method = SeCo(3, backbone, loss_weights=weights, **sizing)
    crops = [whole_crop(method, size, "crop") for size in sizes]
    images = [torch.randn(1, 3, crop, crop) for crop in crops]
    forward = [milliseconds(lambda image=image: method.eval().backbone(image)) for image in images]
    difference = (
        f"{agreement(method.backbone, images[0]):.0e}" if hasattr(method.backbone, "net") and tokens else ""
    )
    training = [milliseconds(lambda image=image: train(method, image)) for image in images]
    inference = [milliseconds(lambda image=image: predict(method.eval(), image)) for image in images]
    net = getattr(method.backbone, "net", method.backbone)
    place = method.backbone.patch_size if tokens else ", ".join(map(str, method.backbone.strides))
    tag = PRETRAINED_TAGS.get(name) or timm_name(name)
    licence = timm.models.get_pretrained_cfg(tag).license if tag else ""
    prefix = getattr(net, "num_prefix_tokens", 0) if tokens else ""
    parts = [name, "tokens" if tokens else "maps", place, prefix, ", ".join(map(str, crops)), difference]
    parts += [", ".join(f"{ms:.0f}" for ms in times) for times in (forward, training, inference)]
    return f"| {' | '.join(map(str, parts))} | {licence or ''} |"


def milliseconds(call: Callable[[], Any]) -> float:
    """Of CPU time, which a machine that does other work as well changes less than the time on the clock."""
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def agreement(backbone: nn.Module, image: torch.Tensor) -> float:
    """Largest difference between the tokens and those of timm's whole network."""
    whole = backbone.whole().eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    tokens = backbone.eval()(image).patch_tokens.flatten(2).mT
    expected = whole.forward_features(renormalize(backbone, image))
    return (tokens - expected[:, -tokens.shape[1] :]).abs().max().item()


def train(method: Any, image: torch.Tensor) -> None:
    """Two steps.

    Raises:
        ValueError: a loss is not finite.
    """
    side = image.shape[-1]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    label = torch.randint(0, 3, (1, side // 8, side // 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    batch = {
        "image": image,
        "global_view": image.flip(-1),
        "strong_view": image.flip(-1),
        "class_label": torch.tensor([[1.0, 0.0]]),
        "valid_box": torch.tensor([[0, side, 0, side]]),
        "sample_seed": torch.tensor([1]),
        "pseudo_label": torch.nn.functional.interpolate(label[None].float(), size=(side, side))[0].long(),
    }
    for step in range(2):
        losses, _ = method.train().training_step(batch, step)
        total = torch.stack([method.loss_weight(key, step) * loss for key, loss in losses.items()]).sum()
        if not total.isfinite():
            raise ValueError(f"the loss is {total.item()} at step {step}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


@torch.no_grad()
def predict(method: Predicts, image: torch.Tensor) -> None:
    """At scales 1 and 0.5: CAMs where the method has them, and labels."""
    side = image.shape[-1]
    scales = () if isinstance(method, Segmentor) else (1.0, 0.5)
    method.predict(image, scales)
    method.predict(resize(image, (side // 2, side // 2)), ())
