"""Dense-energy loss: a CRF energy that pulls pixels of similar colour and position towards the same class.

Tang et al., "On Regularized Losses for Weakly-supervised CNN Segmentation" (ECCV 2018), with the confidence
gate that SeCo, ToCo and MCC train with. Letters: B images, K classes with background, H W pixels, h w pixels
of the shrunk maps, N = h*w.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.lattice import PermutohedralLattice, bilateral_features
from utils.image import IGNORE_INDEX

# Pixels whose lattice is in memory at once (about 350 bytes each, plus 20 per class).
MAX_PIXELS = 2**20


def dense_energy_loss(
    image_rgb: Tensor,
    seg_logits: Tensor,
    label: Tensor,
    valid_box: Tensor | None = None,
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    weight: float = 1e-7,
) -> Tensor:
    """Negative bilateral affinity between pixels of the same soft class, on maps shrunk by ``scale``.

    A sum over pixels, hence the tiny ``weight``. The gradient is defined, not derived, as published: neither
    the gate nor the asymmetry of the lattice filter is differentiated.

    Args:
        image_rgb: (B, 3, H, W) colours in 0..255, neither rounded nor clipped; no gradient flows to it.
        seg_logits: (B, K, H, W), any scale.
        label: (B, H, W) integers; only 255 (unlabelled: the loss is not gated there) differs from the rest.
        valid_box: (B, 4) integers y0, y1, x0, x1, ends exclusive: the part of a padded crop that is image.
        sigma_rgb: grey levels. sigma_xy: pixels of the full-size image.

    Returns:
        Scalar, zero or negative, a mean over the B images.
    """
    batch, _, height, width = seg_logits.shape
    if image_rgb.shape != (batch, 3, height, width) or label.shape != (batch, height, width):
        sizes = f"{(height, width)}, got {tuple(image_rgb.shape)} and {tuple(label.shape)}"
        raise ValueError(f"image and label must be of the size of the logits, {sizes}")
    if valid_box is not None and valid_box.shape != (batch, 4):
        raise ValueError(f"valid_box must be ({batch}, 4): y0, y1, x0, x1, got {tuple(valid_box.shape)}")
    h, w = int(height * scale), int(width * scale)
    if min(batch, h, w) == 0:
        raise ValueError(f"nothing left of a batch of {batch} images of {height}x{width} at scale {scale}")

    probs = F.interpolate(seg_logits.float().softmax(1), size=(h, w), mode="bilinear", align_corners=False)
    place = _nearest_places((height, width), (h, w), label.device)  # (2, longer side)
    rows, columns = place[0, :h], place[1, :w]
    image_rgb = image_rgb[:, :, rows[:, None], columns]
    unlabelled = label[:, rows[:, None], columns] == IGNORE_INDEX
    if valid_box is None:
        inside = torch.ones_like(probs[:, 0])
    else:
        box = valid_box.to(label.device).unflatten(1, (2, 2))[..., None]
        begun, ended = (place[:, None] >= box).unbind(2)  # (B, 2, longer side)
        within = (begun != ended).to(probs.dtype)
        inside = within[:, 0, :h, None] * within[:, 1, None, :w]
    return weight * gated_bilateral_energy(image_rgb, probs, unlabelled, inside, sigma_rgb, sigma_xy * scale)


def gated_bilateral_energy(
    image_rgb: Tensor, probs: Tensor, unlabelled: Tensor, inside: Tensor, sigma_rgb: float, sigma_xy: float
) -> Tensor:
    """``-(1/B) sum_ik s_ik G_i (K s)_ik`` with s = probs inside the region of interest and K the bilateral
    lattice filter.

    The gate G is 1 - (largest probability), so that confident pixels are left alone, and 1 where there is no
    label.

    Args:
        image_rgb: (B, 3, h, w). probs: (B, K, h, w). unlabelled: (B, h, w) bool. inside: the same, 0 or 1.
        sigma_rgb: grey levels. sigma_xy: pixels of these maps.
    """
    return _GatedBilateralEnergy.apply(probs, image_rgb, unlabelled, inside, sigma_rgb, sigma_xy)


class _GatedBilateralEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs, image_rgb, unlabelled, inside, sigma_rgb, sigma_xy):  # type: ignore[no-untyped-def]
        batch = len(probs)
        inside = inside.to(probs.dtype)
        gate = (inside - probs.amax(1)).clamp_(min=0)
        gate = gate.masked_fill(unlabelled, 1.0)
        segment = (probs * inside[:, None]).flatten(2).transpose(1, 2).contiguous()  # (B, N, K)
        chunk = max(1, MAX_PIXELS // segment.shape[1])
        filtered = [
            PermutohedralLattice(bilateral_features(images, sigma_xy, sigma_rgb), compact=False).filter(
                values
            )
            for images, values in zip(image_rgb.split(chunk), segment.split(chunk), strict=True)
        ]
        affinity = torch.cat(filtered) if len(filtered) > 1 else filtered[0]  # (B, N, K)
        affinity = affinity.mul_(gate.flatten(1)[:, :, None])
        # Half a million small terms per image: a float32 running sum would lose digits.
        loss = (segment * affinity).sum(dtype=torch.float64).to(probs.dtype) / -batch
        affinity *= inside.flatten(1)[:, :, None]
        ctx.save_for_backward(affinity)
        ctx.shape = probs.shape
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (affinity,) = ctx.saved_tensors
        grad_probs = (-2 / len(affinity) * grad) * affinity
        return grad_probs.transpose(1, 2).reshape(ctx.shape), None, None, None, None, None


@lru_cache(maxsize=8)
def _nearest_places(size: tuple[int, int], out_size: tuple[int, int], device: torch.device) -> Tensor:
    """Source rows and columns (2, longer side) of nearest-neighbour resizing, like F.interpolate."""
    places = []
    for n, m in zip(size, out_size):
        index = torch.arange(n, dtype=torch.float32, device=device)
        index = F.interpolate(index[None, None], size=m, mode="nearest").flatten().long()
        places.append(F.pad(index, (0, max(out_size) - m)))
    return torch.stack(places)
