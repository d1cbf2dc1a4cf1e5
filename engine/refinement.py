"""Label images and CAM files through any refiner.

n foreground classes of an image, (H, W) pixels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.refiners.base import Refiner
from ops.cam import normalize_cam
from utils.cam_files import CamFile
from utils.image import IGNORE_INDEX, read_mask, resize

CONFIDENCE = 0.7  # of a label, as in IRN; what is left are the other classes' equal shares


def refine_label(refiner: Refiner, image_rgb: Tensor, label: Tensor) -> Tensor:
    """A label after refinement; an ignored pixel (255) stays one unless the refiner gives it an object.

    Args:
        image_rgb: (3, H, W) in [0, 1].
        label: (H, W) integers.
    """
    known = label[label != IGNORE_INDEX].unique()
    class_ids = torch.cat([known.new_zeros(1), known[known > 0]])  # ascending, background first
    if len(class_ids) == 1:
        return label
    ignored, share = label == IGNORE_INDEX, 1 / len(class_ids)
    other = (1 - CONFIDENCE) / (len(class_ids) - 1)
    scores = (label == class_ids[:, None, None]).float() * (CONFIDENCE - other) + other
    scores[:, ignored] = share
    scores[0, ignored] += 1e-3  # so that an ignored pixel counts for no class in a vote
    refined = class_ids[refiner.refine(image_rgb[None], scores[None])[0].max(0).indices]
    return refined.masked_fill(ignored & (refined == 0), IGNORE_INDEX)


def cam_to_refined_label(refiner: Refiner, image_rgb: Tensor, cams: CamFile, threshold: float) -> Tensor:
    """Label (H, W) of CAMs beside a constant background score, refined together."""
    size = image_rgb.shape[-2:]
    if not len(cams.class_ids):
        return cams.class_ids.new_zeros(*size)
    cam = resize(cams.cam[None].to(image_rgb), size)
    scores = refiner.refine(image_rgb[None], torch.cat([torch.full_like(cam[:, :1], threshold), cam], 1))
    return cams.label_ids.to(scores.device)[scores[0].max(0).indices]


def refine_cam(refiner: Refiner, image_rgb: Tensor, cams: CamFile) -> CamFile:
    """CAMs after refinement, each stretched to [0, 1] again.

    Raises:
        ValueError: a refiner whose maps compete needs the background's too.
    """
    if refiner.maps_compete:
        raise ValueError(f"{type(refiner).__name__} needs a background among its maps: write labels instead")
    cam = cams.cam[None].to(image_rgb)
    if len(cams.class_ids):
        cam = normalize_cam(refiner.refine(image_rgb[None], cam))
    return CamFile(cams.class_ids, cam[0], None, cams.size)


def read_label(path: Path, image_rgb: Tensor) -> Tensor:
    """The label (H, W) of an image (3, H, W), on its device.

    Raises:
        ValueError: it has another size.
    """
    label = torch.from_numpy(read_mask(path)).to(image_rgb.device).long()
    if label.shape != image_rgb.shape[1:]:
        raise ValueError(f"{path} is {tuple(label.shape)}, its image {tuple(image_rgb.shape[1:])}")
    return label


def tagged_label(label: Tensor, class_label: Tensor | None) -> Tensor:
    """A label (H, W) with 255 in the place of classes that ``class_label`` (C,) rules out."""
    if class_label is None:
        return label
    allowed = F.pad(class_label.nonzero()[:, 0] + 1, (1, 0))
    return label.masked_fill(~torch.isin(label.long(), allowed), IGNORE_INDEX)


def tagged_cams(cams: CamFile, class_label: Tensor | None) -> CamFile:
    """The CAMs without those of classes that ``class_label`` (C,) rules out."""
    if class_label is None:
        return cams
    kept = torch.isin(cams.class_ids, class_label.cpu().nonzero()[:, 0] + 1)
    return CamFile(cams.class_ids[kept], cams.cam[kept], None, cams.size)
