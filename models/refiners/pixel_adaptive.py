"""Pixel-adaptive refinement of score maps: repeated averaging over neighbours of similar colour.

B images, M maps, K neighbours, (H, W) pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.refiners.base import Refiner
from utils.device import constant, positions
from utils.image import resize
from utils.precision import full_precision
from utils.regions import region

# Row-major order around the centre, which is left out: up-left, up, up-right, left, right, ...
DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


def neighbour_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """(row, column) offsets of the eight neighbours at every dilation, dilation by dilation."""
    return [(d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS]


def shifted_views(maps: Tensor, offsets: Sequence[tuple[int, int]]) -> list[Tensor]:
    """``maps`` (B, M, H, W) seen from every offset; pixels outside repeat the border. Views, not copies."""
    h, w = maps.shape[-2:]
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    return [padded[..., reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in offsets]


@lru_cache(maxsize=4)
def neighbour_index(
    size: tuple[int, int], offsets: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    """Pixel numbers (K, H*W) of the neighbours of all pixels; outside of the image, of the border's."""
    h, w = size
    y, x = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    rows = [(y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1) for dy, dx in offsets]
    return torch.stack(rows).flatten(1)


def neighbours(maps: Tensor, offsets: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Maps (B, M, H, W) at every offset; on a CPU without copies, elsewhere by one operation."""
    if maps.device.type == "cpu":
        return shifted_views(maps, offsets)
    index = neighbour_index((maps.shape[-2], maps.shape[-1]), tuple(offsets), maps.device)
    return maps.flatten(2)[:, :, index].unflatten(3, maps.shape[-2:]).movedim(2, 0)  # (K, B, M, H, W)


def propagate(maps: Tensor, affinity: Tensor, offsets: Sequence[tuple[int, int]], iterations: int) -> Tensor:
    """Replace every value by the affinity-weighted sum of its neighbours, ``iterations`` times.

    Args:
        maps: (B, M, H, W).
        affinity: (B, K, H, W), one weight per neighbour in the order of ``offsets``, shared by the M maps.
    """
    on_cpu = maps.device.type == "cpu"
    return (_propagate_views if on_cpu else _propagate_rows)(maps, affinity, offsets, iterations)


@region
def _propagate_views(
    maps: Tensor, affinity: Tensor, offsets: Sequence[tuple[int, int]], iterations: int
) -> Tensor:
    for _ in range(iterations):
        # One multiply-add per neighbour: K times less memory than gathering them, and faster on a CPU.
        total = torch.zeros_like(maps)
        for k, view in enumerate(shifted_views(maps, offsets)):
            total.addcmul_(view, affinity[:, k : k + 1])
        maps = total
    return maps


def _propagate_rows(
    maps: Tensor, affinity: Tensor, offsets: Sequence[tuple[int, int]], iterations: int
) -> Tensor:
    """``propagate`` as a product with a sparse matrix: one operation an iteration, as a GPU needs."""
    b, m, h, w = maps.shape
    # From 22 megapixels on the positions of the bags, of which there may be twice as many, need 64 bits.
    dtype = torch.int32 if b * h * w * len(offsets) < 2**30 else torch.int64
    index = _neighbour_rows(b, (h, w), tuple(offsets), maps.device, dtype)
    offset = positions(b * h * w, maps.device, dtype, step=len(offsets))
    weight = affinity.flatten(2).transpose(1, 2).flatten()
    rows = maps.flatten(2).transpose(1, 2).reshape(-1, m)
    for _ in range(iterations):
        rows = F.embedding_bag(index, rows, offset, mode="sum", per_sample_weights=weight)
    return rows.view(b, h, w, m).movedim(-1, 1)


@lru_cache(maxsize=2)
def _neighbour_rows(
    batch: int,
    size: tuple[int, int],
    offsets: tuple[tuple[int, int], ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers (B*H*W*K,) of the neighbours' rows, where images are B*H*W rows."""
    index = neighbour_index(size, offsets, device).T.to(dtype)
    first = positions(batch, device, dtype, step=size[0] * size[1])[:, None, None]
    return (index + first).flatten()


def spread(samples: Sequence[Tensor]) -> Tensor:
    """Unbiased standard deviation over tensors of equal shape, element by element."""
    if isinstance(samples, Tensor):
        return samples.std(0)
    # One pass per tensor instead of one stack of all: a fifth of the time on a CPU, and no large tensors.
    mean = sum(samples) / len(samples)
    return (sum((x - mean).square_() for x in samples) / (len(samples) - 1)).sqrt()


def over_channels(views: Sequence[Tensor], distance: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean distance (B, K, H, W) of the colours of ``neighbours``, which a CPU takes one by one."""
    if isinstance(views, Tensor):
        return distance(views).mean(2).transpose(0, 1)
    return torch.stack([distance(view).mean(1) for view in views], 1)


class LocalFilter(Refiner):
    """Average score maps over neighbours, weighted by the ``affinity`` of an image; a subclass defines it.

    Args:
        dilations: distances of the neighbours in pixels; eight neighbours each.
        iterations: filter passes.
        softness: bandwidth of the kernel in units of the local standard deviation.
    """

    def __init__(
        self, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), iterations: int = 10, softness: float = 0.3
    ) -> None:
        self.dilations, self.iterations, self.softness = tuple(dilations), iterations, softness
        self.offsets = neighbour_offsets(self.dilations)

    def affinity(self, image: Tensor) -> Tensor:
        """Weights of the neighbours, (B, K, H, W) float32, for an image (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def refine(self, image_rgb: Tensor, scores: Tensor) -> Tensor:
        """Refined scores; the maps do not interact, and sums over them grow by the weights of a pixel."""
        with full_precision(image_rgb):
            scores = resize(scores.float(), image_rgb.shape[-2:], align_corners=True)
            if scores.device.type != "cpu":
                return propagate(scores, self.affinity(image_rgb), self.offsets, self.iterations)
            # Image by image, of which more stays in the cache.
            parts = zip(image_rgb.split(1), scores.split(1), strict=True)
            return torch.cat(
                [propagate(x, self.affinity(rgb), self.offsets, self.iterations) for rgb, x in parts]
            )

    def refine_all(self, image_rgb: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
        return list(self.refine(image_rgb, torch.cat(list(scores), 1)).split([s.shape[1] for s in scores], 1))


class PAMR(LocalFilter):
    """Pixel-adaptive mask refinement of 1-stage-wseg (Araslanov & Roth, CVPR 2020); weights add up to 1."""

    def __init__(self, *args: Any, softness: float = 0.1, **options: Any) -> None:
        super().__init__(*args, softness=softness, **options)

    @region
    @torch.no_grad()
    def affinity(self, image: Tensor) -> Tensor:
        with full_precision(image):
            image = image.float()
            scale = 1e-8 + self.softness * self.local_spread(image)
            views = neighbours(image, self.offsets)
            return torch.softmax(-over_channels(views, lambda x: (x - image).div_(scale).abs_()), 1)

    def local_spread(self, image: Tensor) -> Tensor:
        """Standard deviation (B, 3, H, W) of the colours around each pixel.

        The pixel itself counts once for every dilation: the authors take nine samples of each stencil.
        """
        views = neighbours(image, self.offsets)
        if isinstance(views, Tensor):
            return spread(torch.cat([views, image.expand(len(self.dilations), *image.shape)]))
        return spread([*views, *[image] * len(self.dilations)])


class PAR(LocalFilter):
    """Pixel-adaptive refinement of "Learning Affinity from Attention" (Ru et al., CVPR 2022).

    Args:
        position_weight: of the position kernel, ``w2`` of the authors' code (``softness``: ``w1``). The
            weights of a pixel add up to 1 more than this, as published.
    """

    def __init__(self, *args: Any, position_weight: float = 0.01, **options: Any) -> None:
        super().__init__(*args, **options)
        length = torch.tensor([math.hypot(dy, dx) for dy, dx in self.offsets], device="cpu")
        weights = torch.softmax(-((length / (length.std() + 1e-8) / self.softness) ** 2), 0)
        # (K,) weights that depend on the distance of the neighbours alone.
        self.position_affinity = tuple((position_weight * weights).tolist())

    @region
    @torch.no_grad()
    def affinity(self, image: Tensor) -> Tensor:
        with full_precision(image):
            image = image.float()
            views = neighbours(image, self.offsets)
            # Spread of the neighbours alone, without the pixel itself, per colour channel.
            scale = self.softness * (spread(views) + 1e-8)
            colour = torch.softmax(-over_channels(views, lambda x: (x - image).div_(scale).square_()), 1)
            return colour.add_(constant(self.position_affinity, image.device)[:, None, None])
