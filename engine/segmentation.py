"""From an image to its label: scales and mirror images merged, then refined.

Letters: K classes with background 0, H x W the image, h x w the size at which the network sees it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.tiles import in_tiles
from engine.config.load import to_plain
from engine.config.options import fill
from engine.config.schema import Infer
from engine.inference import LoadedMethod
from methods.base import Method, Predicts
from models.refiners.base import Refiner, create_refiner, refiner_options
from utils.distributed import world_size
from utils.image import label_dtype, normalize, rescale, resize, write_mask
from utils.pool import core_count
from utils.precision import autocast


def inference_refiner(
    config: str | Mapping[str, Any] | None, device: torch.device | str = "cpu", key: str = "infer.refiner"
) -> tuple[Refiner | None, str | None]:
    """The refiner of a config and its part of a protocol id; None, None for null.

    Raises:
        KeyError, ValueError: an unknown refiner, or an option that it does not have.
    """
    if config is None:
        return None, None
    options = refiner_options(config, "dense_crf")
    refiner = create_refiner(**options, key=key)
    if isinstance(refiner, nn.Module):
        refiner.to(device)
    changes = ",".join(f"{key}={value}" for key, value in options.items() if key != "name")
    usual = options["name"] + (f"({changes})" if changes else "")
    return refiner, getattr(refiner, "protocol", usual)


def infer_section(loaded: LoadedMethod, crf: str | None = None) -> Infer:
    """The ``infer`` section of a checkpoint's config, tiles as in training.

    Args:
        crf: ``none``; ``config``, which is the section's refiner, or else the DenseCRF of the method's paper;
            or a preset of it. None: as the section says.
    """
    config = to_plain(loaded.cfg.infer)
    refiner = config["refiner"]
    if crf == "config":
        refiner = refiner or {"name": "dense_crf", "preset": loaded.method.crf_preset}
    elif crf is not None:
        refiner = None if crf == "none" else {"name": "dense_crf", "preset": crf}
    infer = fill(Infer, {**config, "refiner": refiner}, "infer")
    tiles = loaded.cfg.data.get("tiles") or {}
    infer.tile = infer.tile or tiles.get("side")
    if infer.tile and infer.tile_overlap is None:
        infer.tile_overlap = tiles.get("overlap", infer.tile // 4)
    return infer


def segment(
    method: Method,
    image_rgb: Tensor,
    infer: Infer,
    refiner: Refiner | None,
    precision: str = "fp32",
    max_side: int = 1024,
    class_label: Tensor | None = None,
) -> Tensor:
    """The label (H, W) of an image, one above ``infer.tile`` in tiles; arguments as in `segment_scores`."""

    def whole(pixels: Tensor) -> Tensor:
        made = segment_scores(method, pixels, infer, precision, max_side, class_label)
        return label_of(*made, refiner, pixels.shape[-2:])

    if infer.tile and max(image_rgb.shape[-2:]) > infer.tile:
        return in_tiles(whole, image_rgb, infer.tile, infer.tile_overlap or 0)
    return whole(image_rgb)


def segment_scores(
    method: Method,
    image_rgb: Tensor,
    infer: Infer,
    precision: str = "fp32",
    max_side: int = 1024,
    class_label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An image (1, 3, h, w) uint8 and its scores (1, K, h, w), for a refiner probabilities.

    At native size an image is shrunk until its sides are at most ``max_side`` and its largest scale fits on
    the canvas ``infer.pad_to``.

    Args:
        image_rgb: (3, H, W) uint8.
        class_label: (C,) true tags, to which the label is restricted.
    """
    image = image_rgb[None]
    if infer.size == "native":
        size = image.shape[-2:]
        small = [max(1, round(side * min(1.0, max_side / max(size)))) for side in size]
        if infer.pad_to is not None:
            canvas = zip(_pair(infer.pad_to), small, strict=True)
            room = [side / (max(infer.scales) * n) for side, n in canvas]
            small = [max(1, int(side * min(1.0, *room) + 1e-6)) for side in small]
        image = shrink(image, small)
    tags = None if class_label is None else class_label[None]
    with autocast(image.device, precision):
        scores = multi_scale_segment(method, normalize(image), infer, tags)
    return image, scores if infer.refiner is None else method.crf_probs(scores)


def shrink(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image (1, 3, H, W) uint8 at a smaller size, antialiased; untouched when the size is right."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image.float(), tuple(size), mode="bilinear", antialias=True).round().to(torch.uint8)


def write_label(
    image: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    refiner: Refiner | None,
    size: Sequence[int],
    path: Path,
) -> None:
    """Refine and write the label of the given size, from `segment_scores`.

    Workers get arrays: tensors travel in shared memory, of which containers have little.
    """
    write_mask(path, label_of(torch.as_tensor(image), torch.as_tensor(scores), refiner, size))


def label_of(image: Tensor, scores: Tensor, refiner: Refiner | None, size: Sequence[int]) -> Tensor:
    """The refined label (H, W) of the given size, from `segment_scores`."""
    if refiner is not None:
        scores = refiner.refine(image / 255, scores)
    return enlarge(scores.argmax(1)[0], size, scores.shape[1])


def enlarge(label: Tensor, size: Sequence[int], num_classes: int) -> Tensor:
    """A label (h, w) at another size (H, W), as `label_dtype`."""
    dtype = label_dtype(num_classes)
    if label.shape == tuple(size):
        return label.to(dtype)
    maps = label[None, None].to(dtype if dtype == torch.uint8 else torch.float32)  # torch resizes no int32
    return F.interpolate(maps, tuple(size), mode="nearest-exact")[0, 0].to(dtype)


def multi_scale_segment(
    method: Method, image: Tensor, infer: Infer, class_label: Tensor | None = None
) -> Tensor:
    """Segmentation scores of one image: mirror images merged at every scale, then the scales, then finished
    by the method (``Method.finish_scores``). Scores are resized bilinearly, without corner alignment.

    Args:
        image: (1, 3, H, W) normalised; what is around it on a canvas is 0.
        class_label: (1, C) true image tags where a protocol allows them.

    Returns:
        (1, K, H, W) finished scores, float32. Of logits only the order and the softmax mean anything: a sum
        of two is twice as sharp.

    Raises:
        ValueError: no scale, or a canvas that is smaller than the image at some scale.
    """
    if not infer.scales or min(infer.scales) <= 0:
        raise ValueError(f"scales must be positive numbers, not {list(infer.scales)}")
    size = infer.size
    base = image if isinstance(size, str) else resize(image, (size, size))
    merged: Tensor | None = None
    class_logits = []
    # Merged as they come: memory holds two maps of scores, however many scales there are.
    for scale in infer.scales:
        scaled = scaled_image(base, scale, infer.resample)
        views = torch.cat([scaled, scaled.flip(-1)]) if infer.flip else scaled
        if infer.pad_to is None:
            scores, view_logits = segment_views(method, views)
        else:
            canvas, inside = on_canvas(views, infer.pad_to)
            scores, view_logits = segment_views(method, canvas)
            scores = resize(scores, canvas.shape[-2:])[inside]
        scores = resize(scores.float(), image.shape[-2:])
        if infer.flip:
            scores = _merge(scores[:1], scores[1:].flip(-1), infer.merge_flips)
            scores = scores / 2 if infer.merge_flips == "mean" else scores
        merged = scores if merged is None else _merge(merged, scores, infer.merge_scales)
        class_logits.append(view_logits)
    assert merged is not None
    if infer.merge_scales == "mean":
        merged = merged / len(infer.scales)
    return method.finish_scores(merged, torch.cat(class_logits)[None], class_label)


def segment_views(method: Method, images: Tensor) -> tuple[Tensor, Tensor]:
    """Segmentation scores (B, K, h, w) at the network's stride, and class logits (B, C) float32.

    Raises:
        ValueError: a method that does not segment.
    """
    out = method.predict(images, ()) if isinstance(method, Predicts) else None
    if out is None or out.seg_logits is None:
        raise ValueError(f"{type(method).__name__} has no decoder, so it cannot segment")
    return out.seg_logits, out.class_logits.float()


def scaled_image(image: Tensor, scale: float, resample: str) -> Tensor:
    """A normalised image (B, 3, H, W) at a scale.

    ``bilinear`` to ``(int(s * h), int(s * w))``, as the ViT programs do, or ``bicubic``, as Pillow resizes
    pictures, to rounded sides (CNN programs).
    """
    if resample == "bicubic":
        return image if scale == 1 else rescale(image, scale)
    return resize(image, [max(int(scale * side), 1) for side in image.shape[-2:]])


def on_canvas(image: Tensor, size: int | Sequence[int]) -> tuple[Tensor, tuple[Any, slice, slice]]:
    """Normalised images (B, 3, h, w) in the middle of zeros, and the index of that part in the canvas.

    Raises:
        ValueError: if the canvas is smaller.
    """
    height, width = _pair(size)
    h, w = image.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"{h} x {w} pixels do not fit on infer.pad_to={size}: take smaller infer.scales")
    top, left = (height - h) // 2, (width - w) // 2
    canvas = F.pad(image, (left, width - w - left, top, height - h - top))
    return canvas, (..., slice(top, top + h), slice(left, left + w))


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _merge(a: Tensor, b: Tensor, how: str) -> Tensor:
    """Two maps into one; whoever asks for a mean divides the sum."""
    return torch.maximum(a, b) if how == "max" else a + b


def refining_processes(asked: int | None, refiner: Refiner | None, device: torch.device, images: int) -> int:
    """Number of processes that refine: starting them is not worth it for few images, and a GPU needs none."""
    if refiner is None or device.type != "cpu":
        return 0
    if asked is not None:
        return asked
    return max(1, core_count() // world_size() - 1) if images >= 20 else 0
