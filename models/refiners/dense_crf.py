"""Fully connected CRF with Gaussian edge potentials: mean-field inference on the permutohedral lattice.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NeurIPS
2011), with the numbers of the compiled ``pydensecrf``: Potts compatibility, symmetric normalisation.

B images, L labels, H W pixels, N = H*W.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from models.refiners.base import Refiner
from models.refiners.crf_columns import Columns
from models.refiners.presets import PRESETS
from ops.lattice import PermutohedralLattice, bilateral_features, spatial_features
from utils.build import check_number, suggest

PROBABILITY_FLOOR = 1e-5  # of the published unary: probabilities are clipped to it before the logarithm
# On a CPU, tensors of the filter take up to this: fresh pages for larger ones take longer than the filter.
BLOCK_BYTES = 12 * 2**20
# On a GPU, the lattices and tables of one part of a batch take up to this.
PART_BYTES = 4 * 2**30


@dataclass(frozen=True)
class DenseCRF(Refiner):
    """Sharpen probabilities along the colour edges of an image: ``DenseCRF("toco").refine(image, probs)``.

    The energy has the unary ``-log(probs)``, a smoothness kernel on positions and an appearance kernel on
    positions and colours; equal labels of similar pixels are favoured.

    Args:
        preset: a published program (keys of ``PRESETS``), which gives every parameter that is None.
        gaussian_sigma_xy: pixels. gaussian_compat: weight of the smoothness kernel; 0 leaves the kernel out.
        bilateral_sigma_xy: pixels. bilateral_sigma_rgb: grey levels of 0..255. bilateral_compat: weight of
            the appearance kernel.
        steps: mean-field iterations, all pixels in parallel; 0 returns the normalised input.
    """

    maps_compete = True

    preset: str = "toco"
    gaussian_sigma_xy: float | None = None
    gaussian_compat: float | None = None
    bilateral_sigma_xy: float | None = None
    bilateral_sigma_rgb: float | None = None
    bilateral_compat: float | None = None
    steps: int = 10

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"unknown DenseCRF preset '{self.preset}'{suggest(self.preset, PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            least = 0 if name.endswith("compat") else 1e-3
            check_number(f"DenseCRF's {name}", getattr(self, name), least, math.inf)
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"DenseCRF's steps must be a whole number >= 0, got {self.steps!r}")

    @property
    def protocol(self) -> str:
        """What was run, for protocol ids: ``crf(toco)``; every deviation from the preset is named."""
        usual = {"preset": self.preset, "steps": 10, **PRESETS[self.preset]}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changes = [f"{name}={value:g}" for name, value in values.items() if value != usual[name]]
        return f"crf({','.join([self.preset, *changes])})"

    def refine(self, image_rgb: Tensor, scores: Tensor) -> Tensor:
        """Probabilities (B, L, H, W) that add up to 1 over labels, without gradient.

        Args:
            image_rgb: (B, 3, H, W) in [0, 1]; colours are rounded to 256 levels as in the published programs.
            scores: (B, L, H, W) probabilities in [0, 1]; they need not add up to 1 over labels.
        """
        return self.refine_energies(image_rgb, [energy_of_probs(scores)])[0]

    def refine_all(self, image_rgb: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
        return self.refine_energies(image_rgb, [energy_of_probs(x) for x in scores])

    @torch.no_grad()
    def refine_energies(self, image_rgb: Tensor, energies: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities from independent negative log-probabilities, each (B, L_i, H, W), of the same images.

        Recipes that run the CRF twice (ToCo, IRN, PSA) share the set-up of the filter.
        """
        if not image_rgb.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {image_rgb.dtype}")
        batch, _, height, width = image_rgb.shape
        for x in energies:
            if x.ndim != 4 or x.numel() == 0 or (len(x), *x.shape[2:]) != (batch, height, width):
                raise ValueError(f"energies {tuple(x.shape)} do not fit images {tuple(image_rgb.shape)}")
        image_bytes = height * width * (1000 + 32 * sum(x.shape[1] for x in energies))
        # One image at a time is fastest on a CPU: its tables stay in the cache.
        part = 1 if image_rgb.device.type == "cpu" else max(1, PART_BYTES // image_bytes)
        parts = zip(image_rgb.split(part), *(x.split(part) for x in energies), strict=True)
        with torch.autocast(image_rgb.device.type, enabled=False):
            results = [self._mean_field(images, unaries) for images, *unaries in parts]
        return [torch.cat(q) for q in zip(*results, strict=True)]

    def _mean_field(self, image_rgb: Tensor, energies: Sequence[Tensor]) -> list[Tensor]:
        batch, _, height, width = image_rgb.shape
        sizes = [x.shape[1] for x in energies]
        energy = torch.cat([x.float() for x in energies], dim=1).flatten(2)  # (B, L, N)
        # A single +inf rules its label out; a pixel without any finite energy has no distribution.
        if not all(torch.isfinite(x.amin(1)).all() for x in energy.split(sizes, dim=1)):
            raise ValueError("probabilities or unary energies contain NaN, -inf, or a pixel with +inf alone")
        columns = Columns.of(energy, sizes)
        unary = columns.select(energy)  # (B*N, C)
        kernels = self._kernels(image_rgb)

        q = columns.softmax_(-unary, bounded=True)
        logits = torch.empty_like(q)
        bounded = True
        for step in range(self.steps):
            logits.zero_()
            for kernel in kernels:
                _add_messages_(logits, kernel, q)
            if step == 0:
                # Messages are not negative, and their sum over labels does not depend on q.
                bounded = bool(columns.sum(logits).amax() < 80)  # exp(88) is the end of float32
            logits, q = q, columns.softmax_(logits.sub_(unary), bounded)
        result = columns.expand(q.view(batch, -1, q.shape[1]))  # (B, L, N)
        return [x.unflatten(2, (height, width)) for x in result.split(sizes, dim=1)]

    def _kernels(self, image_rgb: Tensor) -> list[PermutohedralLattice]:
        """The pairwise kernels, normalised and weighted; those of weight 0 are left out."""
        kernels = []
        if self.gaussian_compat:
            size = len(image_rgb), image_rgb.shape[2], image_rgb.shape[3]
            kernels.append(
                _gaussian_kernel(size, self.gaussian_sigma_xy, self.gaussian_compat, image_rgb.device)
            )
        if self.bilateral_compat:
            levels = (255 * image_rgb.float()).round()
            features = bilateral_features(levels, self.bilateral_sigma_xy, self.bilateral_sigma_rgb)
            kernels.append(_normalized(PermutohedralLattice(features), self.bilateral_compat))
        return kernels


def energy_of_probs(probs: Tensor) -> Tensor:
    """``-log(clip(probs, 1e-5, 1))``, any shape."""
    return probs.float().clamp(PROBABILITY_FLOOR, 1).log_().neg_()


def energy_of_labels(label: Tensor, num_labels: int, confidence: float = 0.7) -> Tensor:
    """Energies (..., num_labels, H, W) of labels (..., H, W) that are right with probability ``confidence``.

    Other labels share the rest.
    """
    if num_labels < 2:
        raise ValueError(f"a CRF on labels needs at least 2 of them, got {num_labels}")
    if label.numel() and not (int(label.min()) >= 0 and int(label.max()) < num_labels):
        raise ValueError(f"labels {int(label.min())}..{int(label.max())} are outside 0..{num_labels - 1}")
    given, other = -math.log(confidence), -math.log((1 - confidence) / (num_labels - 1))
    classes = torch.arange(num_labels, device=label.device).view(-1, 1, 1)
    return torch.where(label.unsqueeze(-3) == classes, given, other).float()


def _add_messages_(total: Tensor, kernel: PermutohedralLattice, q: Tensor) -> None:
    """Add the message of a kernel to every label to ``total``; both (B*N, C)."""
    count = q.shape[1]
    blocks = 1
    if q.device.type == "cpu":
        rows = max(len(q), kernel.num_points + 1)  # a kernel of one pixel has more points than the image
        blocks = -(-count // max(1, BLOCK_BYTES // (4 * rows)))
    edges = [count * k // blocks for k in range(blocks + 1)]
    for start, stop in itertools.pairwise(edges):
        part = q[:, start:stop].contiguous()
        total[:, start:stop] += kernel.slice(kernel.blur(kernel.splat(part)))


@lru_cache(maxsize=2)
def _gaussian_kernel(
    size: tuple[int, int, int], sigma_xy: float, weight: float, device: torch.device
) -> PermutohedralLattice:
    """The smoothness kernel depends on the image size only, of which a data set has few; 20 MB per photo."""
    batch, height, width = size
    features = spatial_features(height, width, sigma_xy, device)
    return _normalized(PermutohedralLattice(features.expand(batch, -1, -1)), weight)


def _normalized(lattice: PermutohedralLattice, weight: float) -> PermutohedralLattice:
    """Fold the symmetric normalisation by row sums, and a weight, into the matrices of a lattice."""
    ones = lattice.slice_weight.new_ones(lattice.batch, lattice.points_per_image, 1)
    norm = (lattice.filter(ones).flatten() + 1e-20).rsqrt()
    return lattice.weighted(norm, weight * norm)
