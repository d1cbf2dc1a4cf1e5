"""IRN: Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations (Ahn et al., 2019).

Its second network, and the random walk that stops at boundaries (CVPR 2019). Classifier: methods/cam.py.

B images, (H, W) pixels, (h, w) pixels at stride 4, P directions and N sources of pixel pairs, n classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import StageView
from losses.affinity import pair_affinity_loss, pair_displacement_loss, pair_label
from methods.base import Batch, Losses, Method, Metrics, Transform, parameter_group, resize_like
from models.backbones import GivesMaps, create_backbone, require
from models.refiners.random_walk import propagate_to_edge
from ops.pairs import PathPairs
from utils.distributed import all_reduce_mean
from utils.image import strided_size
from utils.precision import full_precision


class IRNet(Method):
    """Boundaries and displacements at stride 4, from all maps of a frozen backbone.

    It is trained on label images (``data.label_dir``) and not scored by itself, so ``data.val_set`` is null.

    Args:
        num_classes: with background; the network itself knows no classes.
        backbone: arguments of ``create_backbone``; any with maps, published is ``resnet50``. Not trained.
        loss_weights: of ``bg_pos, fg_pos, neg, dp_fg, dp_bg``; those of the paper by default.
        radius: of the pixel pairs in training, in pixels at stride 4.
        walk_radius, beta, exp_times: of the random walk, see ``propagate_to_edge``.
        background_threshold: score of background against walked CAMs whose maximum is 1.
        input_size: images are padded to at least this square for inference, the crop size of the paper,
            because the group norms see the padding too.
    """

    needs_background = True

    labels = "label images of tools/make_affinity_label.py --mode irn"
    walk_stride = 4
    losses = ("bg_pos", "fg_pos", "neg", "dp_fg", "dp_bg")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        radius: int = 10,
        walk_radius: int = 5,
        beta: float = 10,
        exp_times: int = 8,
        background_threshold: float = 0.25,
        input_size: int = 512,
    ) -> None:
        weights = {"bg_pos": 0.25, "fg_pos": 0.25, "neg": 0.5, "dp_fg": 0.5, "dp_bg": 0.5}
        super().__init__(num_classes, loss_weights or weights, background_threshold)
        self.pairs = PathPairs(radius)
        self.walk = {"radius": walk_radius, "beta": beta, "exp_times": exp_times}
        self.input_size = input_size
        self.backbone = create_backbone(**backbone).requires_grad_(False)
        require(self, GivesMaps)
        if self.backbone.strides[self.backbone.shallow] != 4:
            raise ValueError(f"IRNet needs a map at stride 4; this backbone has {self.backbone.strides}")

        dims = self.backbone.dims
        # Names count from 1, like those of the authors' layers.
        self.edge_layers = nn.ModuleDict({str(i): adapter(dim, 32, 4) for i, dim in enumerate(dims, 1)})
        self.edge_output = nn.Conv2d(32 * len(dims), 1, 1)
        # Maps at stride 4 get 64, 128 channels, the deeper ones 256 each.
        n = self.shallow_maps = self.backbone.shallow + 1
        widths = [64 << i for i in range(n)] + [256] * (len(dims) - n)
        groups = [8 << i for i in range(n)] + [16] * (len(dims) - n)
        layers = enumerate(zip(dims, widths, groups), 1)
        self.displacement_layers = nn.ModuleDict({str(i): adapter(*layer) for i, layer in layers})
        self.displacement_fusion = adapter(sum(widths[n:]), 256, 16)
        self.displacement_output = nn.Sequential(
            *adapter(sum(widths[:n]) + 256, 256, 16), nn.ReLU(), nn.Conv2d(256, 2, 1, bias=False)
        )
        self.register_buffer("mean_displacement", torch.zeros(2))

    def train(self, mode: bool = True) -> IRNet:
        """Training mode for everything but the backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        edge_logits, displacement = self.network(batch["image"])  # (B, 1, h, w), (B, 2, h, w)
        # The mean offset has no meaning. The authors measure it after training; a running mean needs no pass.
        with torch.no_grad():
            mean = all_reduce_mean(displacement.float().mean((0, 2, 3)))
            self.mean_displacement.lerp_(mean, max(0.01, 1 / (step + 1)))

        size = edge_logits.shape[-2:]
        label = batch["pseudo_label"][:, None].float()
        label = F.interpolate(label, size=size, mode="nearest-exact")[:, 0].long()
        pair = pair_label(label, self.pairs)  # (B, P, N)
        with full_precision(edge_logits):
            affinity = 1 - self.pairs.path_max(edge_logits.float().sigmoid()[:, 0])  # (B, P, N)
        return {
            **pair_affinity_loss(affinity, pair),
            **pair_displacement_loss(displacement, pair, self.pairs),
        }, {}

    def network(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary logits (B, 1, h, w) and displacements (B, 2, h, w) in pixels at stride 4, down and right.

        In eval mode the mean displacement is subtracted.
        """
        with torch.no_grad():
            maps = self.backbone(image)
        size = maps[self.backbone.shallow].shape[-2:]
        edges = [enlarge(layer(x), size).relu() for layer, x in zip(self.edge_layers.values(), maps)]
        edge_logits = self.edge_output(torch.cat(edges, 1))

        n = self.shallow_maps
        layers = list(self.displacement_layers.values())
        shallow = [layer(x).relu() for layer, x in zip(layers[:n], maps[:n])]
        middle = maps[n].shape[-2:]
        deep = [enlarge(layer(x), middle).relu() for layer, x in zip(layers[n:], maps[n:])]
        fused = enlarge(self.displacement_fusion(torch.cat(deep, 1)), size).relu()
        displacement = self.displacement_output(torch.cat([*shallow, fused], 1))
        if not self.training:
            displacement = displacement - self.mean_displacement[:, None, None]
        return edge_logits, displacement

    @torch.no_grad()
    def boundaries(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary probability (h, w) and displacements (2, h, w) of one image (1, 3, H, W).

        The former from image and mirrored image, the latter from the image alone.
        """
        height, width = image.shape[-2:]
        padded = [max(self.input_size, side + -side % 16) for side in (height, width)]
        both = F.pad(torch.cat([image, image.flip(-1)]), (0, padded[1] - width, 0, padded[0] - height))
        rows, columns = strided_size((height, width), 4)
        edge_logits, displacement = (x.float()[..., :rows, :columns] for x in self.network(both))
        upright, mirrored = edge_logits[:, 0]
        return ((upright + mirrored.flip(-1)) / 2).sigmoid(), displacement[0]

    @torch.no_grad()
    def propagate(self, image: Tensor, cam: Tensor) -> Tensor:
        edge, _ = self.boundaries(image)
        cam = resize_like(cam[None], edge)[0]
        walked = propagate_to_edge(cam, edge, **self.walk)
        return walked_scores(walked, (image.shape[-2], image.shape[-1]), self.background_threshold)

    def parameter_groups(self) -> list[dict[str, Any]]:
        displacement = self.displacement_layers, self.displacement_fusion, self.displacement_output
        return [
            parameter_group("edge", self.edge_layers, self.edge_output),
            parameter_group("displacement", *displacement, lr_scale=10.0),
        ]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return StageView(crop_size, scale_range)


def adapter(dim_in: int, dim_out: int, groups: int) -> nn.Sequential:
    """1x1 convolution and group norm; the rectification follows the enlargement."""
    return nn.Sequential(nn.Conv2d(dim_in, dim_out, 1, bias=False), nn.GroupNorm(groups, dim_out))


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, D, ., .) at a whole multiple of their size, bilinear, cut to ``size``.

    A map of a CNN covers up to one stride more than the image, so its enlargement is cut, not squeezed.
    """
    factor = max(math.ceil(target / side) for target, side in zip(size, maps.shape[-2:]))
    if factor > 1:
        maps = F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
    return maps[..., : size[0], : size[1]]


def walked_scores(walked: Tensor, size: tuple[int, int], background_threshold: float) -> Tensor:
    """Background and walked CAMs (n, h, w) at image size, (1 + n, H, W); the largest of all CAMs is 1."""
    enlarged = F.interpolate(walked[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    enlarged = enlarged[:, : size[0], : size[1]]
    # Where no class scores anywhere, all is background instead of not a number.
    scores = enlarged / enlarged.max().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([torch.full_like(scores[:1], background_threshold), scores])
