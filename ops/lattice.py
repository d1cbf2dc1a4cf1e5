"""Gaussian filter ``out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j`` in linear time, for DenseCRF and its loss.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010),
as in Krähenbühl and Koltun's code (2013): no homogeneous coordinate and unnormalised blur weights.

B images, N points of one image, d feature dimensions, D = d + 1, C channels, M lattice points of the batch.
"""

from __future__ import annotations

import copy
import itertools
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import constant, positions
from utils.regions import region

# float32 holds integers up to 2^24; beyond a quarter of it the position inside a simplex is rounding noise.
MAX_COORDINATE = 2.0**22


def spatial_features(
    height: int, width: int, sigma_xy: float | tuple[float, float], device: torch.device | str = "cpu"
) -> Tensor:
    """Features (1, H*W, 2) of the Gaussian kernel: (x, y) / sigma_xy, row-major; sigma_xy may be a pair."""
    return _planar_features(height, width, sigma_xy, device)[None].transpose(1, 2)


def bilateral_features(
    image_rgb: Tensor, sigma_xy: float | tuple[float, float], sigma_rgb: float | tuple[float, float, float]
) -> Tensor:
    """Features (B, H*W, 5) of the bilateral kernel: (x, y) / sigma_xy and (R, G, B) / sigma_rgb.

    Args:
        image_rgb: (B, 3, H, W), 0..255, any real dtype; not rounded.
        sigma_xy: pixels. sigma_rgb: grey levels. Both may be given per axis.
    """
    if image_rgb.ndim != 4 or image_rgb.shape[1] != 3:
        raise ValueError(f"image_rgb must be (B, 3, H, W), got {tuple(image_rgb.shape)}")
    batch, _, height, width = image_rgb.shape
    position = _planar_features(height, width, sigma_xy, image_rgb.device)
    # A tensor: CUDA replaces division by a number with multiplication, which can move a pixel's simplex.
    colour = image_rgb.to(torch.float32).flatten(2).transpose(0, 1)
    colour = colour / _sigmas(sigma_rgb, 3, image_rgb.device)[:, None, None]  # (3, B, H*W)
    planar = torch.cat([position[:, None].expand(-1, batch, -1), colour])
    return planar.movedim(0, 2)


@lru_cache(maxsize=4)
def _planar_features(
    height: int, width: int, sigma_xy: float | tuple[float, float], device: torch.device | str
) -> Tensor:
    sigma = _sigmas(sigma_xy, 2, torch.device(device))
    x = torch.arange(width, dtype=torch.float32, device=device) / sigma[0]
    y = torch.arange(height, dtype=torch.float32, device=device) / sigma[1]
    return torch.stack([x.expand(height, width).flatten(), y[:, None].expand(height, width).flatten()])


def _sigmas(sigma: float | tuple[float, ...], count: int, device: torch.device) -> Tensor:
    return constant(tuple(sigma) if isinstance(sigma, tuple | list) else (sigma,) * count, device)


class PermutohedralLattice:
    """Lattice of one batch of feature vectors; build it once, filter any number of channels.

    Every stage (splat, blur along each axis, slice) is a product with a fixed sparse matrix, written as a sum
    over bags: no atomic operations, so results are deterministic on every device. Memory: 16 D bytes per
    pixel and 12 D + 20 per lattice point (375x500 photo, d = 5: 18 MB and 1 to 30 MB).

    Args:
        features: (B, N, d) finite numbers, d <= 7. Images of a batch do not interact.
        pad_to_four: add the vertices of the zero feature to every image whose N is not a multiple of 4, as
            the x86 builds of the published filters do. They hold no mass but pass it on between dark pixels.
        piece: sum the pixels of a lattice point in pieces of at most this size, then the pieces, so that one
            flat image region does not leave a GPU waiting for a single sum. None: no pieces on a CPU.
        compact: read the number of lattice points from the GPU, and check the features. Otherwise there is
            room for as many as could be, and the host waits for nothing. A CPU is always compact.
    """

    def __init__(
        self, features: Tensor, pad_to_four: bool = True, piece: int | None = None, compact: bool = True
    ) -> None:
        if features.ndim != 3 or 0 in features.shape or features.shape[2] > 7:
            raise ValueError(f"features must be non-empty (B, N, d) with d <= 7, got {tuple(features.shape)}")
        self.batch, self.points_per_image, self.dim = features.shape
        self.device = features.device
        self.is_weighted = False
        with torch.no_grad():
            planar = features.detach().to(torch.float32).movedim(-1, 0).flatten(1)  # (d, B*N)
            if pad_to_four and self.points_per_image % 4:
                planar = torch.cat([planar, planar.new_zeros(self.dim, self.batch)], dim=1)
            constants = tuple(constant(x, self.device)[:, None] for x in _simplex_constants(self.dim))
            cell, rank, weight = _simplex(planar, *constants)
            on_cpu = self.device.type == "cpu"
            if compact or on_cpu:
                self._check_range(cell)
            keys, row, position, steps = (self._sort_on_cpu if on_cpu else self._sort)(cell, rank)
            point_keys = self._number_points(keys, row, position, weight, piece, compact or on_cpu)
            self._find_neighbours(point_keys, steps)

    @property
    def num_points(self) -> int:
        """Number of lattice points M that the images touch."""
        return self.blur_index.shape[1] - 1

    def filter(self, values: Tensor, adjoint: bool = False) -> Tensor:
        """Unnormalised sums (B, N, C) of ``values`` (B, N, C) float32, differentiable.

        Args:
            adjoint: multiply with the transpose, which differs slightly: the blur passes along different axes
                do not commute where lattice points are missing.
        """
        expected = (self.batch, self.points_per_image)
        if values.ndim != 3 or values.shape[:2] != expected:
            raise ValueError(f"values must be {expected} + (C,), got {tuple(values.shape)}")
        assert not self.is_weighted or not (adjoint or values.requires_grad)
        return _Filter.apply(values, self, adjoint)

    def splat(self, rows: Tensor) -> Tensor:
        """Distribute pixel values (B*N, C) to lattice points (M + 1, C), of which the last row is zero."""
        first, *rest = self.splat_offsets
        points = F.embedding_bag(
            self.splat_index, rows, first, mode="sum", per_sample_weights=self.splat_weight
        )
        for offset in rest:
            piece = positions(len(points), self.device, torch.int32)
            points = F.embedding_bag(piece, points, offset, mode="sum")
        return points

    def blur(self, points: Tensor, adjoint: bool = False) -> Tensor:
        """Add half of both neighbours along every axis in turn; (M + 1, C) -> (M + 1, C)."""
        indices, weight = self.blur_index.flatten(1), self.blur_weight.flatten()
        offset = positions(len(points), self.device, torch.int32, step=3)
        for index in reversed(indices) if adjoint else indices:
            points = F.embedding_bag(index, points, offset, mode="sum", per_sample_weights=weight)
        return points

    def slice(self, points: Tensor) -> Tensor:
        """Interpolate lattice points (M + 1, C) at the pixels: (B*N, C)."""
        index, weight = self.slice_index.flatten(), self.slice_weight.flatten()
        offset = positions(len(self.slice_index), self.device, torch.int32, step=self.dim + 1)
        return F.embedding_bag(index, points, offset, mode="sum", per_sample_weights=weight)

    def weighted(self, before: Tensor, after: Tensor) -> PermutohedralLattice:
        """A lattice of ``after * K(before * values)`` at no extra cost; factors (B*N,). Without adjoint."""
        lattice = copy.copy(self)
        lattice.splat_weight = self.splat_weight * before.index_select(0, self.splat_index)
        lattice.slice_weight = self.slice_weight * after[:, None]
        lattice.is_weighted = True
        return lattice

    def _sort_on_cpu(self, cell: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``_sort``: with little memory, and by NumPy, which sorts plain integers several times faster.

        Pixel and corner fit below the key as a rule: one sort of integers gives points and splat lists.
        """
        corners, num_pixels = self.dim + 1, cell.shape[1]
        low, sizes = self.low, self.sizes
        key_bits = (math.prod(sizes) * self.batch - 1).bit_length()
        low_bits = (8 * num_pixels - 1).bit_length()
        packed = key_bits + low_bits <= 63 and low_bits <= 31
        unit = 1 << low_bits if packed else 1
        strides = [unit * math.prod(sizes[k + 1 :]) for k in range(self.dim)]
        steps = [a - b for a, b in zip([*strides, 0], [0, *strides], strict=True)]

        key = torch.arange(num_pixels).mul_(8 if packed else 0)
        for k, stride in enumerate(strides):
            key += (cell[k] - cell[k + 1]).long().sub_(int(low[k]) - 2).mul_(stride)
        key += (
            _image_of(self.batch, self.points_per_image, num_pixels, self.device) * (unit * math.prod(sizes))
            if self.batch > 1
            else 0
        )
        # Vertex m is vertex 0 minus the steps of the m coordinates of highest rank, from a table of all sets.
        subsets = range(1 << corners)
        sums = [sum(step for k, step in enumerate(steps) if chosen >> k & 1) for chosen in subsets]
        step_sum = torch.tensor(sums)
        keys = key.new_empty(corners, num_pixels)
        for m in range(corners):
            chosen = torch.zeros_like(rank[0], dtype=torch.uint8)
            for k in range(corners):
                chosen |= (rank[k] > self.dim - m).view(torch.uint8) << k
            torch.sub(key, step_sum.index_select(0, chosen.int()), out=keys[m])
            key += 1 if packed else 0

        keys = keys.flatten()
        if packed:
            keys.numpy().sort()
            order = keys.to(torch.int32) & (unit - 1)  # the cast keeps the low 32 bits
            row, position = order >> 3, order - (8 - corners) * (order >> 3)
            keys >>= low_bits
        else:
            keys, order = keys.sort(stable=True)
            row, position = order % num_pixels, order % num_pixels * corners + order // num_pixels
        return keys, row, position, torch.tensor([step // unit for step in steps])

    def _sort(self, cell: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys of all simplex vertices in ascending order, with few large operations.

        A lattice point is written as the digits ``cell_k - cell_{k+1}``, packed into one integer key, digit 0
        on top: a step along blur axis k adds one to digit k and takes one from digit k - 1. Digit k depends
        on features k and k + 1 alone, so neighbours in the image are close in memory too.

        Args:
            cell, rank: (D, P) from :func:`_simplex`, P = B*N, plus B if the images are padded.

        Returns:
            Keys (P * D,), their pixels, their places in a (P, D) layout, and the key difference of one step
            along each axis (D,).
        """
        corners, num_pixels = cell.shape
        digits = cell[:-1] - cell[1:]
        low, high = torch.aminmax(digits, dim=1)
        size = high - low + 5  # vertices leave the cell by 1, neighbours by 2
        below = size.masked_fill(_lower_triangle(corners, self.device)[:, :-1], 1)
        below = below.prod(1, dtype=torch.int64)  # of the sizes from k on
        steps = F.pad(below[1:], (1, 1)).diff()
        key = ((digits - low[:, None]).long() * below[1:, None]).sum(0)
        if self.batch > 1:
            image = _image_of(self.batch, self.points_per_image, num_pixels, self.device)
            key = key.addcmul_(image, below[0])
        # Vertex m is vertex 0 minus the steps of the m coordinates of highest rank.
        least = constant(tuple(range(self.dim, -1, -1)), self.device, torch.int8)
        keys = key[:, None] - ((rank.T[:, None] > least[:, None]) * steps).sum(2)  # (P, D)
        keys, position = keys.flatten().sort(stable=True)
        row = torch.empty_like(position, dtype=torch.int32)
        return keys, torch.floor_divide(position, corners, out=row), position, steps

    def _check_range(self, cell: Tensor) -> None:
        """Refuse features whose keys would not fit."""
        digits = cell[:-1] - cell[1:]
        low, high = torch.stack([digits.amin(1), digits.amax(1)]).double().tolist()
        if not math.isfinite(sum(low) + sum(high)):
            raise ValueError("features contain NaN or infinity")
        self.low, self.sizes = low, [int(b - a) + 5 for a, b in zip(low, high)]
        too_far = max(map(abs, low + high)) >= MAX_COORDINATE
        if too_far or (math.prod(self.sizes) * self.batch - 1).bit_length() > 63:
            raise ValueError(f"lattice extents {self.sizes} of {self.batch} images overflow: enlarge sigmas")

    def _number_points(
        self, keys: Tensor, row: Tensor, position: Tensor, weight: Tensor, piece: int | None, compact: bool
    ) -> Tensor:
        """Store the splat and slice matrices of sorted keys; returns the keys (M,) of the distinct points."""
        corners, num_rows, total = self.dim + 1, self.batch * self.points_per_image, len(keys)
        is_new = keys[1:] != keys[:-1]
        vertex = F.pad(is_new, (1, 0)).cumsum(0, dtype=torch.int32)
        # The rows of a point begin at its offset; an empty bag makes the zero row.
        if compact:
            offset = F.pad(is_new.nonzero().flatten().int() + 1, (1, 1))
            offset[-1] = total
        else:  # points that do not exist begin behind the last row
            offset = torch.searchsorted(vertex, positions(total + 1, self.device), out_int32=True)
            keys = F.pad(keys, (0, 1), value=2**62)
        weight = weight.t().contiguous()  # (P, D): `position` counts in this layout
        if len(weight) > num_rows:  # padding
            weight[num_rows:].zero_()
            row = row.clamp_(max=num_rows - 1)

        self.splat_index = row.int()
        self.splat_weight = weight.flatten().index_select(0, position)
        if piece is None and self.device.type != "cpu":
            piece = 2 ** (total.bit_length() // 2 + 1)  # about as many rows in a piece as pieces in the whole
        self.splat_offsets = [offset] if piece is None else _split_bags(offset, total, piece)
        slots = torch.empty_like(vertex).index_copy_(0, position.long(), vertex)
        self.slice_index = slots.view(-1, corners)[:num_rows]
        self.slice_weight = weight[:num_rows].mul_(1 / (1 + 2.0**-self.dim))
        return keys[offset[:-1]]

    def _find_neighbours(self, point_keys: Tensor, steps: Tensor) -> None:
        """Store the blur matrices (D, M + 1, 3): a point and its neighbours, row M where there is none."""
        num_points = len(point_keys)
        target = point_keys + steps[:, None]  # (D, M)
        if self.device.type == "cpu":  # NumPy's search is faster for ascending queries
            found = torch.from_numpy(np.searchsorted(point_keys.numpy(), target.numpy()))
        else:
            found = torch.searchsorted(point_keys, target)
        missing = F.pad(point_keys, (0, 1), value=-1)[found] != target
        found.masked_fill_(missing, num_points)
        own = positions(num_points + 1, self.device, torch.int32).expand(len(steps), -1)
        self.blur_index = own[..., None].repeat(1, 1, 3)
        own, after, before = self.blur_index.unbind(2)
        after[:, :-1].copy_(found)
        # All points without a successor write to the last row, which is reset.
        before.fill_(num_points).scatter_(1, found, own[:, :-1])
        before[:, -1].fill_(num_points)
        self.blur_weight = _blur_weights(1 << num_points.bit_length(), self.device)[: num_points + 1]


@lru_cache(maxsize=4)
def _blur_weights(n: int, device: torch.device) -> Tensor:
    """(n, 3) of a lattice point, and of its neighbours along an axis."""
    return constant((1.0, 0.5, 0.5), device).repeat(n, 1)


@lru_cache(maxsize=2)
def _image_of(batch: int, points_per_image: int, num_pixels: int, device: torch.device) -> Tensor:
    """The image (P,) of every pixel, those behind the last image's being the padding of each."""
    rows, last = torch.arange(num_pixels, device=device), batch * points_per_image
    return torch.where(rows < last, rows // points_per_image, rows - last)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, lattice, adjoint):  # type: ignore[no-untyped-def]
        ctx.lattice, ctx.adjoint = lattice, adjoint
        points = lattice.splat(values.reshape(-1, values.shape[-1]))
        return lattice.slice(lattice.blur(points, adjoint)).view(values.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.lattice.filter(grad.contiguous(), not ctx.adjoint), None, None


def _split_bags(offset: Tensor, total: int, piece: int) -> list[Tensor]:
    """Offsets of the sums that replace one sum over bags: of pieces of up to ``piece`` rows, and of those."""
    cuts = positions(-(-total // piece), offset.device, offset.dtype, step=piece)
    pieces = torch.cat([offset, cuts]).sort().values
    return [pieces, torch.searchsorted(pieces, offset, out_int32=True)]


@lru_cache
def _simplex_constants(dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """In float32: what scales the d features, and the numbers 1 to d."""
    inverse_std = float(np.float32((dim + 1) * math.sqrt(2 / 3)))
    scales = [float(np.float32(inverse_std / math.sqrt((k + 1) * (k + 2)))) for k in range(dim)]
    return tuple(scales), tuple(range(1, dim + 1))


@region
def _simplex(features: Tensor, scales: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Simplex of every point: (d, P) features -> (cell, rank, weight), each (D, P).

    ``D * cell`` is the remainder-0 vertex, ``rank`` (int8, a permutation of 0..d in each column) orders the
    coordinates by decreasing distance from it and ``weight[m]`` belongs to vertex m. The float32 operations
    are in the order of the published code: it decides about points on the boundary of a simplex.
    """
    corners = len(features) + 1
    scaled = features * scales
    totals = list(itertools.accumulate(scaled.unbind()[::-1]))
    elevated = torch.stack([*totals[::-1], torch.zeros_like(totals[0])])  # sums from k on
    elevated[1:].sub_(scaled * numbers)

    reciprocal = 1 / corners
    cell = (elevated * reciprocal).round_()
    rank = _rank(torch.sub(elevated, cell, alpha=corners))  # the product is a whole number
    # The rounded coordinates may miss the plane of zero sum: walk back along those that were rounded most.
    rank += cell.sum(0).to(torch.int8)
    wrap = (rank < 0).view(torch.int8) - (rank >= corners).view(torch.int8)
    rank.add_(wrap, alpha=corners)
    cell += wrap
    # Barycentric weights are differences of the sorted offsets.
    ordered = _sort_columns(torch.sub(elevated, cell, alpha=corners) * reciprocal)
    return cell, rank, ordered.diff(dim=0, prepend=ordered[-1:] - 1)


@lru_cache(maxsize=8)
def _lower_triangle(n: int, device: torch.device) -> Tensor:
    """(n, n) bool, True below the diagonal."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)


def _rank(offset: Tensor) -> Tensor:
    """(D, P) int8: how many numbers of a column are larger, of equal ones those before."""
    if offset.device.type != "cpu":
        before = _lower_triangle(len(offset), offset.device)[..., None]
        larger = torch.where(before, offset >= offset[:, None], offset > offset[:, None])
        return larger.sum(1, dtype=torch.int8)
    rank = torch.zeros_like(offset, dtype=torch.int8)
    for i, j in itertools.combinations(range(len(offset)), 2):
        behind = (offset[i] < offset[j]).view(torch.int8)
        rank[i] += behind
        rank[j] += 1 - behind
    return rank


def _sort_columns(values: Tensor) -> Tensor:
    """Sort a few long rows element-wise; on a CPU by odd-even transposition, for torch.sort is slow there."""
    if values.device.type != "cpu":
        return values.sort(0).values
    rows = list(values)
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    return torch.stack(rows)
