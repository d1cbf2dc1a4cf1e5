"""Small networks on top of a backbone: segmentation decoders and the projection head of contrastive terms.

Decoders map (B, D, h, w) to (B, K, h, w): D backbone width, K classes with background.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from utils.build import build_part, suggest


class Linear(nn.Conv2d):
    """One class score per feature vector."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)


class LargeFOV(nn.Module):
    """DeepLab's large field of view decoder: two dilated 3x3 convolutions, then 1x1 (ToCo, MCC)."""

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 512, dilation: int = 5) -> None:
        super().__init__()
        options = dict(kernel_size=3, padding=dilation, dilation=dilation, bias=False)
        self.conv6 = nn.Conv2d(in_channels, hidden, **options)
        self.conv7 = nn.Conv2d(hidden, hidden, **options)
        self.conv8 = nn.Conv2d(hidden, num_classes, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv8(F.relu(self.conv7(F.relu(self.conv6(features)))))


class ASPP(nn.Module):
    """DeepLab v2's atrous spatial pyramid: the sum of parallel dilated convolutions (SeCo)."""

    def __init__(
        self, in_channels: int, num_classes: int, dilations: tuple[int, ...] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=d, dilation=d) for d in dilations
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Tensor) -> Tensor:
        first, *others = (branch(features) for branch in self.branches)
        return sum(others, first)


class ProjectionHead(nn.Module):
    """Perceptron on class tokens, L2-normalised, then a weight-normalised linear map (DINO's head).

    (N, in_dim) -> (N, out_dim), not normalised, or with ``out_dim=None`` (SeCo) without the linear map,
    (N, bottleneck_dim) of unit length.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, out_dim: int | None = 1024
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = None
        if out_dim is not None:
            self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
            # The rows keep unit length: only their directions are trained.
            scale = self.last_layer.parametrizations.weight.original0
            nn.init.ones_(scale)
            scale.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        features = F.normalize(self.mlp(tokens), dim=-1)
        return features if self.last_layer is None else self.last_layer(features)


POOLINGS = ("mean", "max")
DECODERS = {"linear": Linear, "large_fov": LargeFOV, "aspp": ASPP}


def create_decoder(
    name: str,
    in_channels: int,
    num_classes: int,
    options: Mapping[str, Any] | None = None,
    key: str = "method.decoder_options",
) -> nn.Module:
    """A segmentation decoder by name; ``options`` of its class are at ``key`` in the config."""
    if name not in DECODERS:
        raise ValueError(f"unknown decoder '{name}'{suggest(name, DECODERS)}")
    return build_part(DECODERS[name], options, in_channels, num_classes, key=key)


def pooled_logits(features: Tensor, classifier: nn.Conv2d, pooling: str = "max") -> Tensor:
    """Logits (B, C) of images: the strongest response (max) or mean of each feature, then the classifier."""
    # amax, for the gradient of adaptive_max_pool2d is not deterministic on a GPU.
    pool = {"max": features.amax, "mean": features.mean}[pooling]
    return classifier(pool((2, 3), keepdim=True)).flatten(1)
