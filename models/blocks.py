"""Parts that decoders of several CNN methods are made of.

B images, F and D channels before and after, (h, w) places of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class FixedStatisticsNorm(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics and never moves them; its affine map trains."""

    def train(self, mode: bool = True) -> FixedStatisticsNorm:
        super().train(False)
        return self


def conv_norm_relu(
    dim_in: int,
    dim_out: int,
    kernel: int,
    dilation: int = 1,
    bias: bool = False,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU."""
    conv = nn.Conv2d(dim_in, dim_out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias)
    return nn.Sequential(conv, norm(dim_out), nn.ReLU(inplace=True))


def kaiming(module: nn.Module) -> None:
    """Kaiming-normal weights for every convolution of a module; biases stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)


class ImagePooling(nn.Sequential):
    """(B, F, h, w) -> (B, D, h, w): the mean over the image, projected and spread over the map again."""

    def __init__(self, dim_in: int, width: int) -> None:
        block = conv_norm_relu(dim_in, width, 1, norm=FixedStatisticsNorm)
        super().__init__(nn.AdaptiveAvgPool2d(1), *block)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).expand(-1, -1, *features.shape[-2:])


def freeze_layers(network: nn.Module, frozen: Sequence[str] | str) -> None:
    """Take the gradient from layers: names of submodules, or ``all``."""
    if frozen == "all":
        network.requires_grad_(False)
        return
    for name in [frozen] if isinstance(frozen, str) else frozen:
        if not name or name not in dict(network.named_modules()):
            known = ", ".join(name for name, _ in network.named_children())
            raise ValueError(f"'{name}' in 'frozen' is not a layer; known: {known}; or 'all'")
        network.get_submodule(name).requires_grad_(False)


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Have layers keep their input alone, and compute what is inside of them again in the backward pass."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
