"""PSA: Learning Pixel-level Semantic Affinity with Image-level Supervision (Ahn & Kwak, CVPR 2018).

Its affinity network, which SEAM trains with other numbers; its classifier is in methods/cam.py.

B images, P present classes, (H, W) pixels, (h, w) the grid of the affinities at stride 8, D its features; R
directions and N sources of pixel pairs (ops/pairs.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datasets.base import Sample
from datasets.transforms import colour_jitter, crop, crop_box, flip_box, random_draw, to_tensor
from losses.affinity import pair_affinity_loss, pair_label
from methods.base import Batch, Losses, Method, Metrics, Transform, groups_by_origin, resize_like
from models.backbones import GivesMaps, create_backbone, require
from models.refiners.random_walk import random_walk
from ops.cam import background_score
from ops.labels import merge_readings
from ops.pairs import PixelPairs, fitting_radius, seam_radius
from utils.build import check_choice
from utils.image import resize, strided_size
from utils.precision import full_precision

RADIUS_RULES = {"psa": fitting_radius, "seam": seam_radius}


class AffinityNet(Method):
    """Features whose distance says which neighbouring pixels belong together; CAMs spread by a random walk.

    It is trained on score files (``data.label_dir``) and not scored by itself, so ``data.val_set`` is null.

    Args:
        backbone: arguments of ``create_backbone``; any with maps, published is ``resnet38d``. Its last maps
            are used, as many as there are ``branch_dims``.
        loss_weights: of ``bg_pos, fg_pos, neg``; those of the paper by default.
        branch_dims: channels that each map is reduced to, from shallow to deep.
        radius: of the pixel pairs, in positions of the grid.
        small_grids: ``psa`` keeps the radius wherever it fits; ``seam`` shrinks it to less than half a side.
        stride: pixels per position of the grid. Maps of other strides are resized to it.
        alpha: exponent of the background score of walked CAMs; 16 in PSA, 6 in SEAM.
        beta: exponent of the affinities in the random walk.
        exp_times: squarings of the transition matrix, so 2 ** exp_times steps; 8 in PSA, 6 in SEAM.
    """

    needs_background = True

    labels = "label scores of tools/make_affinity_label.py"
    walk_stride = 1
    losses = ("bg_pos", "fg_pos", "neg")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        branch_dims: Sequence[int] = (64, 128, 256),
        radius: int = 5,
        small_grids: Literal["psa", "seam"] = "psa",
        stride: int = 8,
        alpha: float = 16.0,
        beta: float = 8.0,
        exp_times: int = 8,
    ) -> None:
        super().__init__(num_classes, loss_weights or {"bg_pos": 0.25, "fg_pos": 0.25, "neg": 0.5})
        check_choice("method.small_grids", small_grids, RADIUS_RULES)
        self.radius, self.small_grids, self.stride = radius, small_grids, stride
        self.alpha, self.beta, self.exp_times = alpha, beta, exp_times
        self.backbone = create_backbone(**backbone)
        require(self, GivesMaps)
        dims = self.backbone.dims[-len(branch_dims) :]
        widths = branch_dims[-len(dims) :]
        self.branches = nn.ModuleList(
            nn.Conv2d(dim, w, 1, bias=False) for dim, w in zip(dims, widths, strict=True)
        )
        self.embed = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        for branch in self.branches:
            nn.init.kaiming_normal_(branch.weight)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def features(self, image: Tensor) -> Tensor:
        """(B, D, h, w) of normalised images (B, 3, H, W); h, w are H, W over the stride, rounded up."""
        size = strided_size(image.shape[-2:], self.stride)
        maps = self.backbone(image)[-len(self.branches) :]
        branches = zip(self.branches, maps, strict=True)
        parts = [resize(F.elu(branch(m)).float(), size) for branch, m in branches]
        return F.elu(self.embed(torch.cat(parts, 1)))

    def pairs(self, size: Sequence[int]) -> PixelPairs:
        """The pixel pairs of an (h, w) grid."""
        return PixelPairs(RADIUS_RULES[self.small_grids](self.radius, (size[0], size[1])))

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        features = self.features(batch["image"])  # (B, D, h, w)
        pairs = self.pairs(features.shape[-2:])
        affinity = pair_affinity(features, pairs)  # (B, R, N) in (0, 1]
        return pair_affinity_loss(affinity, pair_label(batch["pseudo_label"], pairs)), {}

    @torch.no_grad()
    def propagate(self, image: Tensor, cam: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        walked = self.walk(image, resize_like(cam[None], image)[0])
        enlarged = F.interpolate(walked[None], scale_factor=self.stride, mode="bilinear", align_corners=False)
        return enlarged[0, :, :height, :width]

    @torch.no_grad()
    def walk(self, image: Tensor, cam: Tensor) -> Tensor:
        """Walked scores (1 + P, h, w) from an image (1, 3, H, W) and CAMs (P, H, W) in [0, 1]."""
        scores = torch.cat([background_score(cam, self.alpha)[None], cam])
        height, width = image.shape[-2:]
        # Padding is neither background nor object: it dilutes the scores along two borders.
        padding = (0, -width % self.stride, 0, -height % self.stride)
        features = self.features(F.pad(image, padding))
        pairs = self.pairs(features.shape[-2:])
        affinity = pair_affinity(features, pairs)[0]
        scores = F.avg_pool2d(F.pad(scores, padding), self.stride)
        return random_walk(scores, affinity, pairs, self.beta, steps=2**self.exp_times)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return groups_by_origin(self)

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        """Not rescaled, as published."""
        return AffinityView(crop_size, self.stride)


def pair_affinity(features: Tensor, pairs: PixelPairs) -> Tensor:
    """(B, R, N) in (0, 1] of features (B, D, h, w): exp of minus their mean absolute difference."""

    def distance(destination: Tensor, source: Tensor) -> Tensor:
        return (destination - source).abs().mean(1, keepdim=True).flatten(2)

    with full_precision(features):
        features = features.float()
        source = pairs.view(features, (0, 0))
        distances = [source.new_zeros(len(source), 0, source[0, 0].numel())]  # a single position has no pair
        for dy, dx in pairs.directions.tolist():
            # One direction at a time, computed again in the backward pass: all differences of a published
            # batch at once take more than a gigabyte.
            view = pairs.view(features, (dy, dx))
            distances.append(
                checkpoint(distance, view, source, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.exp(-torch.cat(distances, 1))


class AffinityView:
    """A randomly cropped and mirrored image with changed colours, and its labels at the stride of the grid.

    Not rescaled, and padded with black before the normalisation, as published. ``label_scores`` of a sample
    (``utils.cam_files.save_scores``) become ``pseudo_label`` (S / stride, S / stride) int64: 0 background, p
    the p-th present class, 255 ignored. S is the crop size in pixels, a multiple of the stride.
    """

    def __init__(self, crop_size: int, stride: int) -> None:
        if crop_size < 1 or crop_size % stride:
            raise ValueError(f"crop_size must be a positive multiple of the stride {stride}, got {crop_size}")
        self.crop_size, self.stride = crop_size, stride
        self.jitter = colour_jitter()

    def __call__(self, sample: Sample) -> Sample:
        sample = dict(sample)
        arrays = sample.pop("label_scores", {})
        if "scores" not in arrays:
            raise ValueError(f"image '{sample['name']}' has no label scores (tools/make_affinity_label.py)")
        scores = torch.as_tensor(arrays["scores"]).float()
        image_rgb = self.jitter(to_tensor(sample["image"]))
        size = image_rgb.shape[-2], image_rgb.shape[-1]
        if size != tuple(scores.shape[-2:]):
            raise ValueError(f"scores of '{sample['name']}' are {tuple(scores.shape[-2:])}, its image {size}")
        box = crop_box(size, self.crop_size)
        image_rgb, scores = (crop(x, self.crop_size, box, fill=0) for x in (image_rgb, scores))
        valid_box = box.valid_box
        if random_draw(2):
            image_rgb, scores = image_rgb.flip(-1), scores.flip(-1)
            valid_box = flip_box(valid_box, self.crop_size)
        pseudo_label = merge_readings(F.avg_pool2d(scores, self.stride))
        return sample | {"image": image_rgb, "valid_box": valid_box, "pseudo_label": pseudo_label}
