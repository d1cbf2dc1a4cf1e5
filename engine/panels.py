"""What a network sees in an image, as pictures: CAMs, the label that its decoder learns, its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.base import Record
from engine.inference import LoadedMethod
from engine.scores.evaluation import truth_path
from methods.base import Decomposes, MakesPseudoLabels, Prediction, Predicts
from ops.cam import present_classes
from ops.crops import cut
from utils.drawing import cam_overlay, framed_tiles, label_overlay
from utils.image import normalize, resize

LEGEND_SHARE = 0.01  # of the image: a class of fewer predicted pixels is not explained in the legend


class Seen(NamedTuple):
    """An image (1, 3, S, S) as the network gets it, what the network says, and the image's tags."""

    image: Tensor
    prediction: Prediction
    tags: list[int]

    @property
    def class_label(self) -> Tensor:
        """(1, C) of the tags."""
        label = torch.zeros_like(self.prediction.class_logits)
        label[0, [k - 1 for k in self.tags]] = 1
        return label


def see(loaded: LoadedMethod, record: Record, image_rgb: Tensor, size: int) -> Seen:
    """Show a (3, H, W) uint8 image to a network, as a square of ``size`` pixels; predict unknown tags."""
    if not isinstance(loaded.method, Predicts):
        raise ValueError(f"{type(loaded.method).__name__} predicts nothing to draw")
    image = resize(normalize(image_rgb)[None], (size, size))
    prediction = loaded.method.predict(image, loaded.method.cam_scales)
    found = loaded.method.present(prediction.class_logits[0]).nonzero()[:, 0].add(1).tolist()
    return Seen(image, prediction, found if record.tags is None else list(record.tags))


def panels_of(
    loaded: LoadedMethod, record: Record, image_rgb: Tensor, seen: Seen
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Pictures by column title for one (3, H, W) uint8 image, and the classes that occur in them."""
    size = image_rgb.shape[-2:]
    photo = image_rgb.permute(1, 2, 0).cpu().numpy()
    image, out, tags = seen
    panels, classes = {"image": photo}, set(tags)
    if truth_path(record):
        truth = record.read_mask()
        panels["truth"] = label_overlay(photo, truth)
        classes |= set(np.unique(truth).tolist()) - {0}
    for title, cam in (("CAM", out.cam), ("auxiliary CAM", out.aux_cam)):
        if cam is not None:
            panels[title] = cam_overlay(photo, enlarged(cam[0, [k - 1 for k in tags]], size), tags)
    pseudo_label = None
    if isinstance(loaded.method, MakesPseudoLabels):
        pseudo_label = loaded.method.decoder_target(image, out, seen.class_label, loaded.step or 0)
    if pseudo_label is not None:
        label = F.interpolate(pseudo_label[:, None].float(), size, mode="nearest-exact")[0, 0]
        panels["pseudo label"] = label_overlay(photo, label.to(torch.uint8).cpu().numpy())
        classes |= set(pseudo_label.unique().tolist()) - {0}
    if out.seg_logits is not None:
        scores = resize(out.seg_logits.float(), size)
        scores = loaded.method.finish_scores(scores, out.class_logits[:, None].float())
        label = scores.argmax(1)[0].to(torch.uint8)
        panels["prediction"] = label_overlay(photo, label.cpu().numpy())
        shares = torch.bincount(label.flatten().long(), minlength=loaded.method.num_classes) / label.numel()
        classes |= set((shares >= LEGEND_SHARE).nonzero()[:, 0].tolist()) - {0}
    return panels, sorted(classes)


def enlarged(maps: Tensor, size: Sequence[int]) -> np.ndarray:
    """Maps (n, h, w), n from 0, at another height and width."""
    if not len(maps):
        return np.zeros((0, *size), np.float32)
    return resize(maps[None].float(), size)[0].cpu().numpy()


def crop_tiles(loaded: LoadedMethod, image_rgb: Tensor, seen: Seen) -> np.ndarray | None:
    """The image and its local crops as a training step would take and tag them; None for other methods."""
    method, size = loaded.method, seen.image.shape[2:]
    if not isinstance(method, Decomposes):
        return None
    present = present_classes(seen.class_label)
    cam = present.select(getattr(seen.prediction, method.tag_source(loaded.step or 0)))
    whole = torch.tensor([[0, size[0], 0, size[1]]], device=cam.device)
    positions, crop_tags = method.decompose({"valid_box": whole, "sample_seed": torch.zeros(1)}, cam, present)
    square = resize(image_rgb[None].float(), size).round().to(torch.uint8)
    parts = cut(square, positions, method.local_crop_size)[:, 0]  # (V, 3, s, s)
    pictures = [part.permute(1, 2, 0).cpu().numpy() for part in (square[0], *parts)]
    # One of the two equal tags of the whole image, then the crops'.
    return framed_tiles(pictures, crop_tags[0, 1:].tolist())
