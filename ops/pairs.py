"""Pairs of neighbouring pixels, and the pixels on the path between them (PSA, SEAM, IRN).

A destination is to the right or below of its source, so every pair comes once. r radius, (h, w) pixels of a
map, P directions, N = (h - r + 1) * (w - 2r + 2) sources, the pixels with all P destinations.
"""

import torch
from torch import Tensor

from utils.device import positions, to_device


def search_directions(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) of the destinations: first to the right, then row by row, closer than the radius."""
    right, across = [(0, dx) for dx in range(1, radius)], range(1 - radius, radius)
    return right + [(dy, dx) for dy in range(1, radius) for dx in across if dx**2 + dy**2 < radius**2]


def path_points(dy: int, dx: int) -> list[tuple[int, int]]:
    """The pixels less than one pixel from the line from (dy, dx) to the origin, farthest first."""
    rows = range(min(dy, 0), max(dy, 0) + 1)
    columns = range(min(dx, 0), max(dx, 0) + 1)
    near = [(y, x) for y in rows for x in columns if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
    return sorted(near, key=lambda point: -abs(point[0]) - abs(point[1]))


def fitting_radius(radius: int, size: tuple[int, int]) -> int:
    """The radius, or the largest smaller one that leaves a map of ``size`` with sources."""
    return max(min(radius, size[0], (size[1] + 1) // 2), 1)


def seam_radius(radius: int, size: tuple[int, int]) -> int:
    """SEAM's rule, which shrinks the radius earlier: on maps with a side of up to twice the radius."""
    return radius if min(size) > 2 * radius else max((min(size) - 1) // 2, 1)


class PixelPairs:
    """All pairs of pixels closer than a radius, in the order of ``search_directions`` (PSA, SEAM)."""

    def __init__(self, radius: int) -> None:
        if radius < 1:
            raise ValueError(f"the radius of pixel pairs must be at least 1, got {radius}")
        self.radius = radius
        self.reach = radius - 1
        # (P, 2) dy, dx; indices stay on the CPU whatever the default device is.
        self.directions = torch.tensor(self._directions(), dtype=torch.int64, device="cpu").view(-1, 2)

    def _directions(self) -> list[tuple[int, int]]:
        return search_directions(self.radius)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the sources in a map of ``size``; N is their product."""
        rows, columns = size[0] - self.reach, size[1] - 2 * self.reach
        if rows < 1 or columns < 1:
            raise ValueError(f"a map of {size} has no pixel pairs of radius {self.radius}: crop larger")
        return rows, columns

    def view(self, maps: Tensor, offset: tuple[int, int]) -> Tensor:
        """Maps (..., h, w) at every source plus (dy, dx), (..., rows, columns); its gradient is cheap."""
        rows, columns = self.grid((maps.shape[-2], maps.shape[-1]))
        top, left = offset[0], self.reach + offset[1]
        return maps[..., top : top + rows, left : left + columns]

    def at(self, maps: Tensor, offsets: Tensor) -> Tensor:
        """Values of maps (..., h, w) at every source plus ``offsets`` (*S, 2) -> (..., *S, N).

        Offsets are (dy, dx) with 0 <= dy < r and -r < dx < r.
        """
        rows, columns = self.grid((maps.shape[-2], maps.shape[-1]))
        # All shifted windows as one view: (..., r, 2r - 1, rows, columns).
        windows = maps.unfold(-2, rows, 1).unfold(-2, columns, 1)
        dy, dx = to_device(offsets, maps.device).unbind(-1)
        return windows[..., dy, dx + self.reach, :, :].flatten(-2)

    def source(self, maps: Tensor) -> Tensor:
        """Values (..., N) of maps (..., h, w) at the sources."""
        return self.view(maps, (0, 0)).flatten(-2)

    def destination(self, maps: Tensor) -> Tensor:
        """Values (..., P, N) of maps (..., h, w) at the destinations."""
        return self.at(maps, self.directions)

    def indices(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Pixel numbers, row by row, of the sources (N,) and of the destinations (P, N)."""
        numbers = _pixel_numbers(size, torch.device("cpu"))
        return self.source(numbers), self.destination(numbers)


class PathPairs(PixelPairs):
    """Pixel pairs with the path between them, in the order of increasing path length (IRN).

    ``paths`` holds one tensor (n, L, 2) for each length: the points of n directions, destination first.
    """

    def _directions(self) -> list[tuple[int, int]]:
        # Sorting is stable: directions with paths of one length keep their order.
        return sorted(super()._directions(), key=lambda direction: len(path_points(*direction)))

    def __init__(self, radius: int) -> None:
        super().__init__(radius)
        by_length: dict[int, list[list[tuple[int, int]]]] = {}
        for dy, dx in self.directions.tolist():
            points = path_points(dy, dx)
            by_length.setdefault(len(points), []).append(points)
        self.paths = [torch.tensor(group, device="cpu") for group in by_length.values()]

    def path_max(self, maps: Tensor) -> Tensor:
        """The largest value on the path of every pair, ends included: (..., h, w) -> (..., P, N).

        The gradient goes to the pixel of the maximum, of several the one nearest to the destination.
        """
        with torch.no_grad():
            index = torch.cat(
                [self._path_argmax(maps, to_device(x, maps.device)) for x in self.paths], dim=-2
            )
        return maps.flatten(-2).gather(-1, index.flatten(-2)).view_as(index)

    def _path_argmax(self, maps: Tensor, paths: Tensor) -> Tensor:
        """Pixel numbers (..., n, N) of the maxima on paths (n, L, 2), one point of all paths at a time."""
        numbers = _pixel_numbers((maps.shape[-2], maps.shape[-1]), maps.device)
        first = paths[:, 0]
        best = self.at(maps, first)
        index = self.at(numbers, first).expand(best.shape)
        for points in paths[:, 1:].unbind(1):
            value = self.at(maps, points)
            index = torch.where(value > best, self.at(numbers, points), index)
            best = torch.maximum(value, best)
        return index


def _pixel_numbers(size: tuple[int, int], device: torch.device) -> Tensor:
    return positions(size[0] * size[1], device).view(size)
