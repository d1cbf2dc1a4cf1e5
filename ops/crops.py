"""Square crops at chosen places of a batch of maps.

B images, V crops of each, M channels, (H, W) pixels, s side of a crop in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def crop_positions(
    candidates: Tensor, size: int, count: int, permutation: Callable[[int, int], Tensor]
) -> Tensor:
    """Top-left corners of crops that are centred on candidate pixels, or anywhere if there are too few.

    Args:
        candidates: (B, H, W) bool. Only those count whose crop lies within the image.
        size: s.
        count: V.
        permutation: (image, n) -> random permutation of range(n).

    Returns:
        (B, V, 2) int64 rows and columns, on the CPU.

    Raises:
        ValueError: if the image has no room for ``count`` different crops.
    """
    margin = size // 2
    height, width = candidates.shape[1:]
    window = candidates[:, margin : height - margin, margin : width - margin].cpu()
    if window[0].numel() < count:
        raise ValueError(
            f"an image of {height} x {width} pixels is too small for {count} crops of {size} pixels: "
            "make method.local_crop_size smaller or data.crop_size larger"
        )
    columns = window.shape[2]
    places = []
    for i, allowed in enumerate(window.flatten(1)):
        index = allowed.nonzero().flatten()
        if len(index) < count:
            index = torch.arange(len(allowed))
        places.append(index[permutation(i, len(index))[:count]])
    flat = torch.stack(places)
    # A place in the window is the corner of the crop in the image, for both are shifted by the margin.
    return torch.stack([flat // columns, flat % columns], -1)


def cut(maps: Tensor, positions: Tensor, size: int) -> Tensor:
    """Crops (V, B, M, s, s) of maps (B, M, H, W) at top-left corners ``positions`` (B, V, 2)."""
    rows, columns = positions.to(maps.device).transpose(0, 1).unbind(-1)  # (V, B)
    side = torch.arange(size, device=maps.device)
    image = torch.arange(len(maps), device=maps.device)[None, :, None, None]
    crops = maps[image, :, (rows[..., None] + side)[..., None], (columns[..., None] + side)[..., None, :]]
    return crops.movedim(-1, 2)  # the indexed dimensions come first
