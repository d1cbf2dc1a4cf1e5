"""Gaussian filter ``out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j`` in linear time, for DenseCRF and its loss.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010),
as in Krähenbühl and Koltun's code (2013): no homogeneous coordinate and unnormalised blur weights.

B images, N points of one image, d feature dimensions, D = d + 1, C channels, M lattice points of the batch.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BAG = 128
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
    sigma = image_rgb.new_tensor(sigma_rgb, dtype=torch.float32).expand(3)[:, None]
    colour = image_rgb.to(torch.float32).flatten(2) / sigma
    planar = torch.cat([position.expand(batch, -1, -1), colour], dim=1)
    return planar.transpose(1, 2)


def _planar_features(
    height: int, width: int, sigma_xy: float | tuple[float, float], device: torch.device | str
) -> Tensor:
    sigma = torch.tensor(sigma_xy, dtype=torch.float32, device=device).expand(2)
    x = torch.arange(width, dtype=torch.float32, device=device) / sigma[0]
    y = torch.arange(height, dtype=torch.float32, device=device) / sigma[1]
    return torch.stack([x.expand(height, width).flatten(), y[:, None].expand(height, width).flatten()])


class PermutohedralLattice:
    """Lattice of one batch of feature vectors; build it once, filter any number of channels.

    Every stage (splat, blur along each axis, slice) is a product with a fixed sparse matrix, written as a sum
    over bags: no atomic operations, so results are deterministic on every device. Memory: 16 D bytes per
    pixel and 12 D + 20 per lattice point (375x500 photo, d = 5: 18 MB and 1 to 30 MB).

    Args:
        features: (B, N, d) finite numbers, d <= 7. Images of a batch do not interact.
        pad_to_four: add the vertices of the zero feature to every image whose N is not a multiple of 4, as
            the x86 builds of the published filters do. They hold no mass but pass it on between dark pixels.
        max_bag: sum the pixels of a lattice point in pieces of this size, then the pieces, so that one flat
            image region does not leave a GPU waiting for a single sum. None: 128 on a GPU, no limit on a CPU.
    """

    def __init__(self, features: Tensor, pad_to_four: bool = True, max_bag: int | None = None) -> None:
        if features.ndim != 3 or 0 in features.shape or features.shape[2] > 7:
            raise ValueError(
                f"features must be a non-empty (B, N, d) tensor with d <= 7, got {tuple(features.shape)}"
            )
        self.batch, self.points_per_image, self.dim = features.shape
        self.device = features.device
        self.is_weighted = False
        if max_bag is None and self.device.type != "cpu":
            max_bag = MAX_BAG
        with torch.no_grad():
            planar = features.detach().to(torch.float32).movedim(-1, 0).flatten(1)  # (d, B*N)
            if pad_to_four and self.points_per_image % 4:
                planar = torch.cat([planar, planar.new_zeros(self.dim, self.batch)], dim=1)
            cell, rank, weight = _simplex(planar)
            point_keys, steps = self._number_points(cell, rank, weight, max_bag)
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
            piece = torch.arange(len(points), dtype=offset.dtype, device=self.device)
            points = F.embedding_bag(piece, points, offset, mode="sum")
        return points

    def blur(self, points: Tensor, adjoint: bool = False) -> Tensor:
        """Add half of both neighbours along every axis in turn; (M + 1, C) -> (M + 1, C)."""
        for index in self.blur_index.flip(0) if adjoint else self.blur_index:
            points = F.embedding_bag(index, points, mode="sum", per_sample_weights=self.blur_weight)
        return points

    def slice(self, points: Tensor) -> Tensor:
        """Interpolate lattice points (M + 1, C) at the pixels: (B*N, C)."""
        return F.embedding_bag(self.slice_index, points, mode="sum", per_sample_weights=self.slice_weight)

    def weighted(self, before: Tensor, after: Tensor) -> PermutohedralLattice:
        """A lattice of ``after * K(before * values)`` at no extra cost; factors (B*N,). Without adjoint."""
        lattice = copy.copy(self)
        lattice.splat_weight = self.splat_weight * before.index_select(0, self.splat_index)
        lattice.slice_weight = self.slice_weight * after[:, None]
        lattice.is_weighted = True
        return lattice

    def _number_points(
        self, cell: Tensor, rank: Tensor, weight: Tensor, max_bag: int | None
    ) -> tuple[Tensor, list[int]]:
        """Find the distinct simplex vertices and store the splat and slice matrices.

        A lattice point is written as the digits ``cell_k - cell_{k+1}``, packed into one integer key, digit 0
        on top: a step along blur axis k adds one to digit k and takes one from digit k - 1. Digit k depends
        on features k and k + 1 alone, so neighbours in the image are close in memory too.

        Args:
            cell, rank, weight: (D, P) from :func:`_simplex`, P = B*N, plus B if the images are padded.

        Returns:
            Ascending keys (M,) of the points and the key difference of one step along each axis.
        """
        corners, num_rows, num_pixels = self.dim + 1, self.batch * self.points_per_image, cell.shape[1]
        digits = cell[:-1] - cell[1:]  # (d, P)
        low, high = torch.stack([digits.amin(1), digits.amax(1)]).double().tolist()
        if not math.isfinite(sum(low) + sum(high)):
            raise ValueError("features contain NaN or infinity")
        sizes = [int(b - a) + 5 for a, b in zip(low, high)]  # vertices leave the cell by 1, neighbours by 2
        key_bits = (math.prod(sizes) * self.batch - 1).bit_length()
        if key_bits > 63 or max(map(abs, low + high)) >= MAX_COORDINATE:
            raise ValueError(
                f"{self.batch} images with lattice extents {sizes} overflow the 63-bit keys or "
                "the resolution of float32; use larger sigmas or a smaller batch, or check the input range"
            )
        # Pixel and corner fit below the key as a rule: one sort of integers gives points and splat lists.
        low_bits = (8 * num_pixels - 1).bit_length()
        packed = key_bits + low_bits <= 63 and low_bits <= 31
        unit = 1 << low_bits if packed else 1
        strides = [unit * math.prod(sizes[k + 1 :]) for k in range(self.dim)]
        steps = [a - b for a, b in zip([*strides, 0], [0, *strides], strict=True)]

        key = torch.arange(num_pixels, device=self.device).mul_(8 if packed else 0)
        for digit, start, stride in zip(digits, low, strides, strict=True):
            key += digit.long().sub_(int(start) - 2).mul_(stride)
        if self.batch > 1:
            image = torch.arange(self.batch, device=self.device).mul_(unit * math.prod(sizes))
            key[:num_rows].view(self.batch, -1).add_(image[:, None])
            key[num_rows:] += image[: num_pixels - num_rows]
        # Vertex m is vertex 0 minus the steps of the m coordinates of highest rank, from a table of all sets.
        subsets = range(1 << corners)
        sums = [sum(step for k, step in enumerate(steps) if chosen >> k & 1) for chosen in subsets]
        step_sum = torch.tensor(sums, device=self.device)
        keys = key.new_empty(corners, num_pixels)
        for m in range(corners):
            chosen = torch.zeros_like(rank[0], dtype=torch.uint8)
            for k in range(corners):
                chosen |= (rank[k] > self.dim - m).view(torch.uint8) << k
            torch.sub(key, step_sum.index_select(0, chosen.int()), out=keys[m])
            key += 1 if packed else 0

        keys = keys.flatten()
        if packed:
            # NumPy sorts plain integers several times faster than torch.sort, which always carries an index.
            if keys.device.type == "cpu":
                keys.numpy().sort()
            else:
                keys = keys.sort().values
            order = keys.to(torch.int32) & (unit - 1)  # the cast keeps the low 32 bits
            row, position = order >> 3, order - (8 - corners) * (order >> 3)
            keys >>= low_bits
        else:
            keys, order = keys.sort(stable=True)
            row, position = order % num_pixels, order % num_pixels * corners + order // num_pixels
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=first[1:])
        start = first.nonzero().flatten()
        vertex = first.cumsum(0, dtype=torch.int32).sub_(1)
        weight = weight.t().contiguous()  # (P, D): `position` counts in this layout
        weight[num_rows:] = 0

        self.splat_index = row.clamp_(max=num_rows - 1).int()
        self.splat_weight = weight.flatten().index_select(0, position)
        offset = torch.cat([start, start.new_tensor([len(keys)])]).int()  # an empty bag makes the zero row
        self.splat_offsets = _split_bags(offset, len(keys), max_bag)
        slots = torch.empty_like(vertex).index_copy_(0, position.long(), vertex)
        self.slice_index = slots.view(-1, corners)[:num_rows]
        self.slice_weight = weight[:num_rows].mul_(1 / (1 + 2.0**-self.dim))
        return keys[start], [step // unit for step in steps]

    def _find_neighbours(self, point_keys: Tensor, steps: list[int]) -> None:
        """Store the blur matrices (D, M + 1, 3): a point and its neighbours, row M where there is none."""
        num_points = len(point_keys)
        own = torch.arange(num_points, dtype=torch.int32, device=self.device)
        point_keys = torch.cat([point_keys, point_keys.new_tensor([-1])])  # found by no search
        self.blur_index = own.new_full((len(steps), num_points + 1, 3), num_points)
        self.blur_index[:, :-1, 0] = own
        self.blur_weight = torch.tensor([1.0, 0.5, 0.5], device=self.device).repeat(num_points + 1, 1)
        for index, step in zip(self.blur_index, steps, strict=True):
            target = point_keys[:-1] + step
            if self.device.type == "cpu":  # NumPy's search is faster for ascending queries
                found = torch.from_numpy(np.searchsorted(point_keys[:-1].numpy(), target.numpy()))
            else:
                found = torch.searchsorted(point_keys[:-1], target)
            found = torch.where(point_keys[found] == target, found, num_points)
            index[:-1, 1] = found
            # All points without a successor write to the last row, which is reset.
            index[:, 2].scatter_(0, found, own)[-1] = num_points


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, lattice, adjoint):  # type: ignore[no-untyped-def]
        ctx.lattice, ctx.adjoint = lattice, adjoint
        points = lattice.splat(values.reshape(-1, values.shape[-1]))
        return lattice.slice(lattice.blur(points, adjoint)).view(values.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.lattice.filter(grad.contiguous(), not ctx.adjoint), None, None


def _split_bags(offset: Tensor, total: int, max_bag: int | None) -> list[Tensor]:
    """Offsets of the sums that replace one sum over bags: pieces of ``max_bag`` rows, pieces of those, ..."""
    if max_bag is None:
        return [offset]
    length = torch.diff(offset, append=offset.new_tensor([total]))
    if int(length.max()) <= max_bag:
        return [offset]
    pieces = (length + max_bag - 1) // max_bag
    first_piece = pieces.cumsum(0) - pieces
    bag = torch.repeat_interleave(pieces)
    start = offset[bag] + (torch.arange(len(bag), device=offset.device) - first_piece[bag]) * max_bag
    return [start.to(offset.dtype), *_split_bags(first_piece.to(offset.dtype), len(bag), max_bag)]


def _simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Simplex of every point: (d, P) features -> (cell, rank, weight), each (D, P).

    ``D * cell`` is the remainder-0 vertex, ``rank`` (int8, a permutation of 0..d in each column) orders the
    coordinates by decreasing distance from it and ``weight[m]`` belongs to vertex m. The float32 operations
    are in the order of the published code: it decides about points on the boundary of a simplex.
    """
    dim = len(features)
    corners = dim + 1
    inverse_std = float(np.float32(corners * math.sqrt(2 / 3)))
    scales = [float(np.float32(inverse_std / math.sqrt((k + 1) * (k + 2)))) for k in range(dim)]
    elevated = features.new_empty(corners, features.shape[1])
    total = torch.zeros_like(features[0])
    for k in range(dim, 0, -1):
        scaled = features[k - 1] * scales[k - 1]
        elevated[k] = total - k * scaled
        total = total + scaled
    elevated[0] = total

    reciprocal = float(np.float32(1 / corners))
    cell = (elevated * reciprocal).round_()
    offset = elevated - corners * cell
    rank = torch.zeros_like(offset, dtype=torch.int8)
    for i, j in itertools.combinations(range(corners), 2):
        behind = (offset[i] < offset[j]).view(torch.int8)
        rank[i] += behind
        rank[j] += 1 - behind
    # The rounded coordinates may miss the plane of zero sum: walk back along those that were rounded most.
    rank += cell.sum(0).to(torch.int8)
    wrap = (rank < 0).to(torch.int8) - (rank >= corners).to(torch.int8)
    rank += corners * wrap
    cell += wrap
    # Barycentric weights are differences of the sorted offsets.
    offset = (elevated - corners * cell) * reciprocal
    ordered = _sort_columns(list(offset))
    weight = torch.stack([ordered[0] + (1 - ordered[-1])] + [b - a for a, b in itertools.pairwise(ordered)])
    return cell, rank, weight


def _sort_columns(rows: list[Tensor]) -> list[Tensor]:
    """Sort a few long rows element-wise by odd-even transposition: torch.sort is slow for short columns."""
    rows = list(rows)
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    return rows
