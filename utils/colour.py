"""Changes of colour and blur of many pictures in one pass on a GPU, to the bit as Pillow makes them.

N pictures of H x W pixels, whose levels are whole numbers after every step. A change of a picture is a table
(9, 3) of numbers, in this order:

* 0 to 6: blends with black, with grey levels or with their mean: (1 or 0, 1 or 0, factor). Only 3 is the hue:
  (1 or 0, shift of 256 levels, 1).
* 7: the blend that makes the picture grey, or not.
* 8: blur and solarisation: (radius up to 2 pixels or 0, level from which colours are inverted or 256, 1).
"""

import torch
from torch import Tensor

from utils.device import constant, to_device

HUE, GREY, LAST = 3, 7, 8
GREY_WEIGHTS = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # products with levels are exact in float32


def no_change() -> Tensor:
    """The table of a picture that stays as it is."""
    table = torch.tensor([[0.0, 0.0, 1.0]] * 9)
    table[LAST, 1] = 256
    return table


def change_pictures(pictures: Tensor, changes: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) uint8 after their changes (N, 9, 3), which are still on the CPU."""
    given = to_device(changes, pictures.device)[..., None, None, None]
    rgb, pixels = pictures.float(), pictures.shape[2] * pictures.shape[3]
    for step in range(LAST):
        first, second, factor = given[:, step].unbind(1)
        if step == HUE:
            rgb = torch.where(first > 0, turn_hue(rgb, second), rgb)
        else:
            grey = (rgb * constant(GREY_WEIGHTS, rgb.device)[:, None, None]).sum(1, keepdim=True)
            grey.add_(0.5).floor_()
            total = grey.sum((2, 3), keepdim=True, dtype=torch.int64)
            mean = ((2 * total + pixels) // (2 * pixels)).float()
            other = grey * first + mean * second
            rgb.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()
    radii = changes[:, LAST, 0]
    rows = to_device(radii.nonzero()[:, 0], rgb.device)
    rgb[rows] = blur(rgb[rows], radii[radii > 0])
    return torch.where(rgb < given[:, LAST, 1], rgb, 255 - rgb).byte()


def turn_hue(rgb: Tensor, shift: Tensor) -> Tensor:
    """Levels (N, 3, H, W) whose hue is shifted by (N, 1, 1, 1) of 256 levels, in Pillow's precisions."""
    top = rgb.amax(1, keepdim=True)
    spread = top - rgb.amin(1, keepdim=True)
    saturation = (spread / top.clamp(min=1)).double().mul_(255).floor_()
    red, green, blue = ((top - rgb) / spread.clamp(min=1)).double().split(1, 1)
    hue = torch.where(rgb[:, 1:2] == top, 2 + red - blue, 4 + green - red)
    hue = torch.where(rgb[:, :1] == top, blue - green, hue).float().double()
    hue = (hue / 6 + 1).fmod_(1).float().double().mul_(255).floor_()
    hue = torch.where(spread > 0, hue + shift, shift) % 256
    place = (hue * 6 / 255 + constant((5, 3, 1), rgb.device)[:, None, None]) % 6
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return (top * (1 - share * saturation / 255) + 0.5).floor_().float()


def blur(rgb: Tensor, radii: Tensor) -> Tensor:
    """Levels (N, 3, H, W) after Pillow's Gaussian blur of radii (N,), on the CPU, up to 2 pixels.

    Along each axis three means over boxes, each rounded.
    """
    weights = to_device(_box_weights(radii), rgb.device)
    centre, near, far, rounding = weights[..., None, None, None]
    levels = rgb.int() - 128  # so that sums fit into 32 bits
    for axis in (3, 2):
        side = levels.shape[axis]
        for _ in range(3):
            start, end = levels.narrow(axis, 0, 1), levels.narrow(axis, side - 1, 1)
            padded = torch.cat([start, start, levels, end, end], axis)
            far_left, left, _, right, far_right = (padded.narrow(axis, k, side) for k in range(5))
            total = levels * centre + (left + right) * near + (far_left + far_right) * far
            levels = total + rounding >> 24
    return (levels + 128).float()


def _box_weights(radii: Tensor) -> Tensor:
    """(4, N) int32: 2**24 times the weights of a pixel, its neighbours and theirs, and what rounds the sum.

    As Pillow computes them, in float32 but for the root: a box of 2 r + 1 pixels, and parts of two more.
    """
    variance = radii * radii / 3
    length = (12 * variance.double() + 1).sqrt().float()
    r = ((length - 1) / 2).floor()
    part = (2 * r + 1) * (r * (r + 1) - 3 * variance) / (6 * (variance - (r + 1) * (r + 1)))
    inner = (2**24 / ((r + part) * 2 + 1)).int()
    outer = (2**24 - (2 * r.int() + 1) * inner) // 2
    near, far = torch.where(r > 0, inner, outer), torch.where(r > 0, outer, 0)
    missing = 2**24 - inner - 2 * near - 2 * far
    return torch.stack([inner, near, far, 2**23 - 128 * missing])
