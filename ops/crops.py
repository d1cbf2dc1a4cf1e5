"""Square crops at chosen places of a batch of maps.

B images, V crops of each, M channels, (H, W) pixels, s side of a crop in pixels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.device import positions, to_device


def raw_draws(count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64: the numbers below 2**32 that ``torch.randperm`` draws first from a CPU generator."""
    pairs = torch.empty(-(-count // 2), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return torch.stack([(pairs >> 32) & 0xFFFFFFFF, pairs & 0xFFFFFFFF], 1).flatten()[:count]


def first_of_permutation(draws: Tensor, n: Tensor) -> Tensor:
    """The first V numbers of ``torch.randperm(n)``, for an ``n`` that only a GPU may know.

    Its step k exchanges the places k and ``k + draw % (n - k)`` of 0, 1, ..., n - 1.

    Args:
        draws: (B, V) of ``raw_draws``. n: (B,) at least V.

    Returns:
        (B, V) int64, different numbers in each row.
    """
    count, step = draws.shape[1], positions(draws.shape[1], draws.device)
    place = step + draws % (n[:, None] - step)  # (B, V)
    # Step k reads the places k and ``place``: which earlier step exchanged them last? None is 0, else 1 + it.
    read = torch.stack([step.expand_as(place), place])
    hit = (place[:, None] == read[..., None]).tril(-1)  # (2, B, k, earlier step)
    last = (hit * positions(1 + count, place.device)[1:]).amax(3)
    first_time, (before, at_place) = last == 0, (last - 1).clamp(min=0)
    # What is at place k when step k takes it: the start of the chain of steps that put it there.
    origin = torch.where(first_time[0], step, before)
    for _ in range((count - 1).bit_length()):
        origin = origin.gather(1, origin)
    return torch.where(first_time[1], place, origin.gather(1, at_place))


def random_order(n: Tensor, count: int, generators: Iterable[torch.Generator]) -> Tensor:
    """The first V = ``count`` of a permutation of each image's n (B,) candidates: (B, V)."""
    draws = torch.stack([raw_draws(count, generator) for generator in generators])
    return first_of_permutation(to_device(draws, n.device), n)


def check_room(height: int, width: int, size: int, count: int) -> None:
    """Raise a ValueError if an image (H, W) has no room for V = ``count`` different crops."""
    rows, columns = (max(side - size // 2 * 2, 0) for side in (height, width))
    if rows * columns < count:
        raise ValueError(
            f"{height} x {width} has no room for {count} crops of {size} pixels: enlarge data.crop_size, or "
            "lower method.local_crop_size"
        )


def crop_positions(candidates: Tensor, size: int, count: int, order: Callable[[Tensor], Tensor]) -> Tensor:
    """Top-left corners of crops that are centred on candidate pixels, or anywhere if there are too few.

    Args:
        candidates: (B, H, W) bool. Only those count whose crop lies within the image.
        size: s.
        count: V.
        order: numbers of candidates (B,) -> which of them are taken (B, V), counted row by row.

    Returns:
        (B, V, 2) int64 rows and columns.

    Raises:
        ValueError: if the image has no room for V different crops.
    """
    margin = size // 2
    height, width = candidates.shape[1:]
    check_room(height, width, size, count)
    window = candidates[:, margin : height - margin, margin : width - margin]
    columns, number = window.shape[2], window.flatten(1).cumsum(1)  # of the candidates up to a place
    too_few = number[:, -1:] < count
    number = torch.where(too_few, positions(1 + number.shape[1], number.device)[1:], number)
    flat = torch.searchsorted(number, order(number[:, -1]), right=True)
    # A place in the window is the corner of the crop in the image, for both are shifted by the margin.
    return torch.stack([flat // columns, flat % columns], -1)


def cut(maps: Tensor, corners: Tensor, size: int) -> Tensor:
    """Crops (V, B, M, s, s) of maps (B, M, H, W) at their top-left ``corners`` (B, V, 2)."""
    places = corners.transpose(0, 1)[..., None] + positions(size, maps.device)  # (V, B, 2, s)
    rows, columns = places[:, :, 0, None, :, None], places[:, :, 1, None, None]
    image, channel = (positions(n, maps.device) for n in maps.shape[:2])
    return maps[image[:, None, None, None], channel[:, None, None], rows, columns]
