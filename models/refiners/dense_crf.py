"""Fully connected CRF with Gaussian edge potentials: mean-field inference on the permutohedral lattice.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NeurIPS
2011), with the numbers of the compiled ``pydensecrf``. Letters: B images, L labels, H W pixels, N = H*W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ops.lattice import PermutohedralLattice, bilateral_features, spatial_features

# A Potts weight, a cost for each label, or a matrix of costs between labels.
Compat = float | Sequence[float] | Sequence[Sequence[float]]

NORMALIZATIONS = ("symmetric", "before", "after", "none")
PROBABILITY_FLOOR = 1e-5  # of the published unary: probabilities are clipped to it before the logarithm

_FINAL_SEGMENTATION = dict(
    gaussian_sigma_xy=1, gaussian_compat=1, bilateral_sigma_xy=121, bilateral_sigma_rgb=5, bilateral_compat=4
)
_HARD_LABELS = dict(
    gaussian_sigma_xy=3, gaussian_compat=3, bilateral_sigma_xy=50, bilateral_sigma_rgb=5, bilateral_compat=10
)
_SOFT_MASKS = dict(
    gaussian_sigma_xy=3, gaussian_compat=3, bilateral_sigma_xy=80, bilateral_sigma_rgb=13, bilateral_compat=10
)

# Parameters of the published programs, all with 10 steps, symmetric normalisation and Potts compatibility.
PRESETS: dict[str, dict[str, float]] = {
    "toco": _FINAL_SEGMENTATION,  # multi-scale logits of the final segmentation, VOC and COCO
    "seco": _FINAL_SEGMENTATION,
    "mcc": _FINAL_SEGMENTATION,
    "toco_pseudo_label": dict(  # softmax over [threshold plane, CAMs]
        gaussian_sigma_xy=3,
        gaussian_compat=3,
        bilateral_sigma_xy=36,
        bilateral_sigma_rgb=3,
        bilateral_compat=4,
    ),
    "irn": _HARD_LABELS,  # thresholded CAMs as labels of confidence 0.7; also CDA
    "ws_fcn_label": _HARD_LABELS,
    "psa": _SOFT_MASKS,  # [(1 - largest CAM)^alpha, CAMs]
    "seam": _SOFT_MASKS,
    "one_stage": _SOFT_MASKS,  # predicted masks
    "ws_fcn": {**_SOFT_MASKS, "bilateral_sigma_xy": 30},
}


@dataclass(frozen=True)
class DenseCRF:
    """Sharpen class probabilities along the colour edges of an image.

    The energy has the unary ``-log(probs)``, a smoothness kernel on positions and an appearance kernel on
    positions and colours; equal labels of similar pixels are favoured. Call it:
    ``DenseCRF.preset("toco")(image_rgb, probs)``.

    Args:
        gaussian_sigma_xy: pixels. gaussian_compat: weight of the smoothness kernel; 0 leaves the kernel out.
        bilateral_sigma_xy: pixels. bilateral_sigma_rgb: grey levels. bilateral_compat: weight of the
            appearance kernel. A compat may be a Potts weight (positive: attraction), L numbers, or an L x L
            matrix that is made symmetric; the sign of the latter two is the opposite (they are costs), as in
            pydensecrf.
        steps: mean-field iterations, all pixels in parallel; 0 returns the normalised input.
        normalization: of both kernels by their row sums: symmetric, before, after (the filter) or none.
        drop_below: leave out labels whose probability is below this at every pixel, for speed. Not exact:
            0.01 changes results by up to 0.07. 0 keeps all.
        backend: ``lattice``, or ``pydensecrf`` if that package is installed.
        name: of the preset, for the protocol id.
    """

    gaussian_sigma_xy: float = 3
    gaussian_compat: Compat = 3
    bilateral_sigma_xy: float = 80
    bilateral_sigma_rgb: float = 13
    bilateral_compat: Compat = 10
    steps: int = 10
    normalization: str = "symmetric"
    drop_below: float = 0.0
    backend: str = "lattice"
    name: str = ""
    # Bytes that the lattices and tables of one part of a batch may take; on a CPU a part is one image.
    memory_budget: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be one of {', '.join(NORMALIZATIONS)}, got '{self.normalization}'"
            )
        if self.backend not in ("lattice", "pydensecrf"):
            raise ValueError(f"backend must be lattice or pydensecrf, got '{self.backend}'")
        if self.backend == "pydensecrf" and self.drop_below > 0:
            raise ValueError("backend pydensecrf computes all labels: drop_below needs the lattice")
        sigmas = (self.gaussian_sigma_xy, self.bilateral_sigma_xy, self.bilateral_sigma_rgb)
        if min(sigmas) <= 0 or self.steps < 0 or not 0 <= self.drop_below < 1:
            raise ValueError(f"sigmas must be positive, steps >= 0 and drop_below in [0, 1): {self}")
        for key in ("gaussian_compat", "bilateral_compat"):
            object.__setattr__(self, key, _as_tuple(getattr(self, key)))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DenseCRF:
        """Parameters of a published program (keys of ``PRESETS``), with changes."""
        if name not in PRESETS:
            raise KeyError(f"there is no DenseCRF preset '{name}': choose one of {', '.join(PRESETS)}")
        unknown = set(changes) - {f.name for f in fields(cls)}
        if unknown:
            raise KeyError(f"DenseCRF has no parameter {', '.join(map(repr, sorted(unknown)))}")
        return cls(**{**PRESETS[name], "name": name, **changes})

    @classmethod
    def from_config(cls, value: str | Mapping[str, Any]) -> DenseCRF:
        """``toco``, or a mapping of parameters that may start from a preset: {preset: toco, steps: 5}."""
        if isinstance(value, str):
            return cls.preset(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"infer.crf is a preset or a mapping of parameters, not {value!r}")
        changes = dict(value)
        name = changes.pop("preset", None)
        return cls.preset(name, **changes) if name else cls(**changes)

    @property
    def protocol(self) -> str:
        """What was run, for protocol ids: ``crf(toco)``; every deviation from the preset is named."""
        usual = {f.name: f.default for f in fields(self)} | PRESETS.get(self.name, {})
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("name", "backend", "memory_budget")
        }
        shown = [f"{k}={v:g}" if isinstance(v, int | float) else f"{k}={v}" for k, v in values.items()
                 if v != usual[k] or (not self.name and k in _FINAL_SEGMENTATION)]  # fmt: skip
        return f"crf({','.join([self.name or 'custom', *shown])})"

    def __call__(self, image_rgb: Tensor, probs: Tensor) -> Tensor:
        """Refine probabilities.

        Args:
            image_rgb: (B, 3, H, W), or (3, H, W), colours in 0..255; the published programs give the uint8
                image.
            probs: (B, L, H, W), or (L, H, W), in [0, 1]; they need not add up to 1 over labels.

        Returns:
            Probabilities of the same shape; they add up to 1 over labels. No gradient.
        """
        return self._run(image_rgb, [probs], unary_from_probs)[0]

    def infer(self, image_rgb: Tensor, unary: Tensor) -> Tensor:
        """The same for unary energies (negative log-probabilities), see the ``unary_from_`` functions."""
        return self._run(image_rgb, [unary], torch.clone)[0]

    def infer_together(self, image_rgb: Tensor, unaries: Sequence[Tensor]) -> list[Tensor]:
        """Refine several independent unaries of the same images with one set-up of the filter.

        Recipes that run the CRF twice (low and high threshold in ToCo and IRN, two alphas in PSA) share all
        but the unary.

        Args:
            image_rgb: (B, 3, H, W) or (3, H, W). unaries: each (B, L_i, H, W), or (L_i, H, W).

        Raises:
            ValueError: shapes that do not fit, or energies that are not numbers.
        """
        return self._run(image_rgb, unaries, torch.clone)

    @torch.no_grad()
    def _run(
        self, image_rgb: Tensor, inputs: Sequence[Tensor], to_unary: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """``to_unary`` makes new tensors, part by part: a batch of energies is never in memory."""
        if image_rgb.ndim == 3:
            return [q[0] for q in self._run(image_rgb[None], [x[None] for x in inputs], to_unary)]
        batch, _, height, width = image_rgb.shape
        for x in inputs:
            if (
                x.ndim != 4
                or x.shape[1] == 0
                or (len(x), *x.shape[2:]) != (batch, height, width)
                or x.numel() == 0
            ):
                raise ValueError(
                    f"probabilities or energies {tuple(x.shape)} do not fit images {tuple(image_rgb.shape)}: "
                    "(B, L, H, W) with the same B, H, W and at least one label is needed; resize them first"
                )
        if self.backend == "pydensecrf":
            return [
                torch.stack([self._pydensecrf(i, to_unary(x)) for i, x in zip(image_rgb, x, strict=True)])
                for x in inputs
            ]
        # One image at a time is fastest on a CPU: its tables stay in the cache.
        image_bytes = height * width * (1000 + 32 * sum(x.shape[1] for x in inputs))
        # Which labels are improbable is decided for an image, whatever others it is computed with.
        alone = image_rgb.device.type == "cpu" or self.drop_below > 0
        chunk = 1 if alone else max(1, self.memory_budget // image_bytes)
        parts = zip(image_rgb.split(chunk), *(x.split(chunk) for x in inputs), strict=True)
        with torch.autocast(image_rgb.device.type, enabled=False):
            results = [self._mean_field(images, [to_unary(x) for x in part]) for images, *part in parts]
        return [torch.cat(q) if len(q) > 1 else q[0] for q in zip(*results, strict=True)]

    def _mean_field(self, image_rgb: Tensor, unaries: list[Tensor]) -> list[Tensor]:
        """Refine unaries (B, L_i, H, W), which are overwritten."""
        batch, _, height, width = image_rgb.shape
        sizes = [u.shape[1] for u in unaries]
        unary = (
            (torch.cat(unaries, dim=1) if len(unaries) > 1 else unaries[0]).float().flatten(2)
        )  # (B, L, N)
        unaries.clear()
        # A single +inf rules its label out; a pixel without any finite energy has no distribution.
        if not all(torch.isfinite(part.amin(1)).all() for part in unary.split(sizes, dim=1)):
            raise ValueError("probabilities or unary energies hold NaN, -inf, or a pixel with +inf alone")
        columns = _Columns.of(unary, sizes, merge=self._is_potts, drop_below=self.drop_below)
        unary = columns.select(unary)  # (B*N, C) energies above the best label of the pixel

        kernels = self._kernels(image_rgb, sizes, columns.labels)
        q = columns.softmax_(-unary, bounded=True)
        # Messages of an attractive Potts model are not negative, and their sum over labels does not depend on
        # q.
        bounded = self._is_potts and min(self.gaussian_compat, self.bilateral_compat) >= 0  # type: ignore[type-var]
        logits = torch.empty_like(q)
        for step in range(self.steps if kernels else 0):
            logits.zero_()
            for kernel in kernels:
                kernel.add_message_(logits, q)
            if step == 0 and bounded:
                bounded = bool(columns.sum(logits).amax() < 80)  # exp(88) is the end of float32
            logits, q = q, columns.softmax_(logits.sub_(unary), bounded)
        result = columns.expand(q.view(batch, -1, q.shape[1]))  # (B, L, N)
        return [part.unflatten(2, (height, width)) for part in result.split(sizes, dim=1)]

    @property
    def _is_potts(self) -> bool:
        return isinstance(self.gaussian_compat, float) and isinstance(self.bilateral_compat, float)

    def _kernels(self, image_rgb: Tensor, sizes: list[int], labels: list[int]) -> list[_Kernel]:
        batch, _, height, width = image_rgb.shape
        kernels = []
        if self.gaussian_compat != 0:
            size, potts = (batch, height, width), _potts_weight(self.gaussian_compat)
            lattice = _gaussian_lattice(
                size, self.gaussian_sigma_xy, self.normalization, potts, image_rgb.device
            )
            kernels.append(
                _Kernel(lattice, _cost_matrix(self.gaussian_compat, sizes, labels, lattice.device))
            )
        if self.bilateral_compat != 0:
            lattice = PermutohedralLattice(
                bilateral_features(image_rgb, self.bilateral_sigma_xy, self.bilateral_sigma_rgb)
            )
            lattice = _normalized(lattice, self.normalization, _potts_weight(self.bilateral_compat))
            kernels.append(
                _Kernel(lattice, _cost_matrix(self.bilateral_compat, sizes, labels, lattice.device))
            )
        return kernels

    def _pydensecrf(self, image_rgb: Tensor, unary: Tensor) -> Tensor:
        """The compiled original on one image: (3, H, W), (L, H, W) -> (L, H, W)."""
        try:
            import pydensecrf.densecrf as dcrf
        except ImportError as error:
            raise ImportError(
                "backend pydensecrf needs that package (pip install pydensecrf2, with a compiler)"
            ) from error
        labels, height, width = unary.shape
        image = (
            image_rgb.round().clamp(0, 255).to(torch.uint8) if image_rgb.is_floating_point() else image_rgb
        )
        crf = dcrf.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(unary.float().flatten(1).cpu().numpy()))
        norm = {"none": dcrf.NO_NORMALIZATION, "before": dcrf.NORMALIZE_BEFORE, "after": dcrf.NORMALIZE_AFTER,
                "symmetric": dcrf.NORMALIZE_SYMMETRIC}[self.normalization]  # fmt: skip
        if self.gaussian_compat != 0:
            compat = np.float32(self.gaussian_compat) if not self._is_potts else self.gaussian_compat
            crf.addPairwiseGaussian(sxy=self.gaussian_sigma_xy, compat=compat, normalization=norm)
        if self.bilateral_compat != 0:
            compat = np.float32(self.bilateral_compat) if not self._is_potts else self.bilateral_compat
            crf.addPairwiseBilateral(
                sxy=self.bilateral_sigma_xy,
                srgb=self.bilateral_sigma_rgb,
                rgbim=np.array(image.permute(1, 2, 0).cpu().numpy(), order="C"),
                compat=compat,
                normalization=norm,
            )
        q = np.array(crf.inference(self.steps), dtype=np.float32)
        return torch.from_numpy(q).view(labels, height, width).to(unary.device)


def unary_from_probs(probs: Tensor, floor: float = PROBABILITY_FLOOR) -> Tensor:
    """``-log(clip(probs, floor, 1))``, any shape."""
    return probs.float().clamp(floor, 1).log_().neg_()


def unary_from_labels(
    label: Tensor, num_labels: int, confidence: float = 0.7, zero_unsure: bool = False
) -> Tensor:
    """Energies of hard labels that are right with probability ``confidence``; the other labels share the
    rest.

    Args:
        label: (B, H, W) or (H, W) integers 0..num_labels-1; with ``zero_unsure`` 1..num_labels, and 0 favours
            no label.
        confidence: in (0, 1); 0.7 in IRN and CDA.

    Returns:
        (B, num_labels, H, W) or (num_labels, H, W) float32.

    Raises:
        ValueError: a label out of range, or a single label, which leaves nothing to decide.
    """
    if num_labels < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"a CRF on labels needs at least 2 of them and a confidence in (0, 1), got {num_labels} and "
            f"{confidence}; an image without any class is background as it is"
        )
    first = 1 if zero_unsure else 0
    if label.numel() and not (int(label.min()) >= 0 and int(label.max()) < num_labels + first):
        raise ValueError(
            f"labels {int(label.min())}..{int(label.max())} are outside 0..{num_labels + first - 1}"
        )
    given, other = -math.log(confidence), -math.log((1 - confidence) / (num_labels - 1))
    classes = torch.arange(first, num_labels + first, device=label.device).view(-1, 1, 1)
    label = label.unsqueeze(-3)
    unary = torch.where(label == classes, given, other).float()
    return torch.where(label == 0, math.log(num_labels), unary).float() if zero_unsure else unary


def merge_confident_labels(foreground_run: Tensor, background_run: Tensor, ignore_index: int = 255) -> Tensor:
    """One label image from a run with a strict and one with a lax foreground threshold (IRN, CDA, PSA, SEAM,
    ToCo).

    Background of the strict run is ignored, unless the lax run agrees: then it is background.

    Args:
        foreground_run, background_run: integer class ids of the same shape, 0 background, from the strict
            (high threshold, small alpha) and the lax run.
    """
    merged = torch.where(foreground_run == 0, ignore_index, foreground_run)
    return torch.where((foreground_run == 0) & (background_run == 0), 0, merged)


# The C library serves large requests with fresh pages every time, and touching those takes longer than the
# filter.
BLOCK_BYTES = 12 * 2**20


class _Kernel(NamedTuple):
    """One pairwise kernel: its normalised lattice, and costs (L, L) between labels unless they are Potts."""

    lattice: PermutohedralLattice
    costs: Tensor | None

    def add_message_(self, total: Tensor, q: Tensor) -> None:
        """Add the message to every label to ``total``; both (B*N, C)."""
        for block in self.column_blocks(q):
            part = q[:, block].contiguous()
            message = self.lattice.slice(self.lattice.blur(self.lattice.splat(part)))
            if self.costs is None:
                total[:, block] += message
            else:
                total.addmm_(message, self.costs[block], alpha=-1)

    def column_blocks(self, q: Tensor) -> list[slice]:
        """Columns that are filtered together: on a CPU a tensor of the filter takes up to ``BLOCK_BYTES``.

        A kernel of one pixel has more lattice points than the image has pixels.
        """
        columns = q.shape[1]
        rows = max(len(q), self.lattice.num_points + 1)
        most = max(1, BLOCK_BYTES // (4 * rows)) if q.device.type == "cpu" else columns
        count = -(-columns // most)
        edges = [columns * k // count for k in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


@lru_cache(maxsize=2)
def _gaussian_lattice(
    size: tuple[int, int, int], sigma_xy: float, normalization: str, weight: float, device: torch.device
) -> PermutohedralLattice:
    """The smoothness kernel depends on the image size only, of which a data set has few.

    A kernel of one pixel takes 20 MB for each image of 375 x 500, 33 MB for one of 480 x 640.
    """
    batch, height, width = size
    features = spatial_features(height, width, sigma_xy, device)
    return _normalized(PermutohedralLattice(features.expand(batch, -1, -1)), normalization, weight)


def _normalized(lattice: PermutohedralLattice, normalization: str, weight: float) -> PermutohedralLattice:
    """Fold the normalisation by row sums, and a factor, into the matrices of a lattice."""
    ones = lattice.slice_weight.new_ones(lattice.batch * lattice.points_per_image)
    if normalization == "none":
        return lattice.weighted(ones, weight * ones)
    row_sum = lattice.filter(ones.view(lattice.batch, -1, 1)).flatten() + 1e-20
    norm = row_sum.rsqrt() if normalization == "symmetric" else row_sum.reciprocal()
    before = ones if normalization == "after" else norm
    after = ones if normalization == "before" else norm
    return lattice.weighted(before, weight * after)


def _potts_weight(compat: Compat) -> float:
    return compat if isinstance(compat, float) else 1.0


def _cost_matrix(
    compat: Compat, sizes: Sequence[int], labels: Sequence[int], device: torch.device
) -> Tensor | None:
    """Costs between ``labels``, the same block for each group of labels; None for a Potts weight."""
    if isinstance(compat, float):
        return None
    matrix = torch.tensor(compat, dtype=torch.float32, device=device)
    matrix = matrix.diag() if matrix.ndim == 1 else (matrix + matrix.T) / 2
    if any(size != len(matrix) for size in sizes):
        raise ValueError(
            f"label compatibilities of {len(matrix)} labels do not fit a unary of {list(sizes)} labels"
        )
    return torch.block_diag(*[matrix] * len(sizes))[labels][:, labels]


@dataclass
class _Columns:
    """Which labels are computed: one column for labels of equal energies, none for dropped ones.

    Labels with the same unary keep the same probability for ever, because Potts weights treat labels alike.

    Args:
        labels: label that each column stands for. groups: column range of each unary; probabilities add up to
            1 in each.
        column: column of each label, -1 if it was dropped. count: (C,) number of labels in a column.
    """

    labels: list[int]
    groups: list[slice]
    column: list[int]
    count: Tensor

    @classmethod
    def of(cls, unary: Tensor, sizes: Sequence[int], merge: bool, drop_below: float) -> _Columns:
        """Choose columns for (B, L, N) energies, where L is made of groups of ``sizes``."""
        total = unary.shape[1]
        keep = [True] * total
        if drop_below > 0:
            lowest = unary.amin((0, 2))
            # The best label of every group stays, so that something is left.
            best = torch.cat([(part == part.min()) for part in lowest.split(list(sizes))])
            keep = (best | (lowest <= -math.log(drop_below))).tolist()
        # Unequal labels differ in a few hundred pixels already, as a rule: hardly any pair is compared in
        # full.
        sample = unary[:, :, :: max(1, unary.shape[2] // 256)].transpose(0, 1).flatten(1).cpu().numpy()
        labels: list[int] = []
        count: list[int] = []
        column = [-1] * total
        groups: list[slice] = []
        start = 0
        for size in sizes:
            group_start = len(labels)
            alike: dict[bytes, list[int]] = {}  # columns by their sample
            for label in range(start, start + size):
                if not keep[label]:
                    continue
                candidates = alike.setdefault(sample[label].tobytes(), [])
                equal = (c for c in candidates if torch.equal(unary[:, label], unary[:, labels[c]]))
                column[label] = next(equal, -1) if merge else -1
                if column[label] < 0:
                    column[label] = len(labels)
                    candidates.append(len(labels))
                    labels.append(label)
                    count.append(0)
                count[column[label]] += 1
            groups.append(slice(group_start, len(labels)))
            start += size
        return cls(labels, groups, column, unary.new_tensor(count))

    def select(self, unary: Tensor) -> Tensor:
        """(B, L, N) -> (B*N, C) energies above that of the best label; every softmax stays as it is."""
        if len(self.labels) < unary.shape[1]:
            unary = unary[:, self.labels]
        for group in self.groups:
            unary[:, group] -= unary[:, group].amin(1, keepdim=True)
        return unary.transpose(1, 2).reshape(-1, len(self.labels))

    def sum(self, values: Tensor) -> Tensor:
        """Sum (n, C) over the labels of each group: (n, 1), or (n, C) with the group's sum in each column."""
        if values.device.type == "cpu":  # a product is much faster there than a sum over a few columns
            return values @ self._summation
        sums = [
            (values[:, g] * self.count[g]).sum(1, keepdim=True).expand(-1, g.stop - g.start)
            for g in self.groups
        ]
        return torch.cat(sums, dim=1)

    @property
    def _summation(self) -> Tensor:
        if len(self.groups) == 1:
            return self.count[:, None]
        return torch.block_diag(*[self.count[g, None].expand(-1, g.stop - g.start) for g in self.groups])

    def softmax_(self, logits: Tensor, bounded: bool) -> Tensor:
        """Softmax over the labels of each group, in place on (n, C); ``bounded``: exp neither overflows nor
        vanishes.

        torch.softmax takes up to ten times as long on a CPU for rows of fewer than 16 numbers.
        """
        if not bounded:
            for group in self.groups:
                logits[:, group] -= logits[:, group].amax(1, keepdim=True)
        logits.exp_()
        return logits.div_(self.sum(logits))

    def expand(self, q: Tensor) -> Tensor:
        """(B, N, C) -> (B, L, N), zero for dropped labels."""
        q = q.transpose(1, 2)
        if self.column == list(range(q.shape[1])):
            return q.contiguous()
        result = q.new_zeros(q.shape[0], len(self.column), q.shape[2])
        for label, column in enumerate(self.column):
            if column >= 0:
                result[:, label] = q[:, column]
        return result


def _as_tuple(compat: Any) -> Any:
    """Numbers as floats, arrays and lists as tuples."""
    if isinstance(compat, np.ndarray | Tensor):
        compat = compat.tolist()
    return tuple(_as_tuple(c) for c in compat) if isinstance(compat, Sequence) else float(compat)
