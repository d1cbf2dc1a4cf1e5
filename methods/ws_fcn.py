"""WS-FCN: Coupling Global Context and Local Contents for WSSS (Wang et al., TNNLS 2023).

1-stage-wseg with another decoder. Letters of methods/one_stage.py; F, S channels of the deep and shallow map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.one_stage import OneStage
from models.blocks import FixedStatisticsNorm, ImagePooling, conv_norm_relu, kaiming
from utils.device import constant
from utils.precision import full_precision


class WSFCN(OneStage):
    """Flexible context aggregation (FCA), alignment, and semantically consistent feature fusion (SF2)."""

    crf_preset = "ws_fcn"
    LR_SCALES: Mapping[str, float] = OneStage.LR_SCALES | {"new_weight": 20.0, "new_bias": 40.0}

    def __init__(
        self,
        *args: Any,
        background: tuple[str, float] = ("score", 0.25),
        crf_background_power: float | None = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, background=background, crf_background_power=crf_background_power, **options)

    def build_decoder(self, shallow: int, deep: int, width: int, dilations: tuple[int, ...]) -> None:
        self.context = ContextAggregation(deep, width, dilations)
        self.alignment = FlowAlignment(shallow, width)
        self.fusion = ConsistentFusion(shallow, width)

    def branches(self, shallow: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        return self.fusion(shallow, self.alignment(shallow, self.context(deep)))


class GlobalConvolution(nn.Module):
    """A k x k dilated convolution out of columns and rows, (B, F, h, w) -> (B, D, h, w): no norm, no ReLU."""

    def __init__(self, dim_in: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        reach = dilation * (kernel // 2)
        column = dict(kernel_size=(kernel, 1), padding=(reach, 0), dilation=dilation, bias=False)
        row = dict(kernel_size=(1, kernel), padding=(0, reach), dilation=dilation, bias=False)
        self.column_row = nn.Sequential(nn.Conv2d(dim_in, width, **column), nn.Conv2d(width, width, **row))
        self.row_column = nn.Sequential(nn.Conv2d(dim_in, width, **row), nn.Conv2d(width, width, **column))

    def forward(self, features: Tensor) -> Tensor:
        return self.column_row(features) + self.row_column(features)


class ChannelAttention(nn.Module):
    """Weights (B, D, 1, 1) in [0, 1] from the mean and the maximum of every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.ReLU(), nn.Conv2d(width, width, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        mean, top = features.mean((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(mean) + self.mlp(top))


class ContextAggregation(nn.Module):
    """Flexible context aggregation (FCA), (B, F, h, w) -> (B, D, h, w).

    Global convolutions of growing size, which share one channel attention, and the image's mean; weighted
    place by place. No ReLU at the end, and norm statistics that stay 0 and 1, as published.
    """

    def __init__(self, dim_in: int, width: int, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            GlobalConvolution(dim_in, width, 2 * i + 1, dilation)  # 1 x 1, 3 x 3, 5 x 5, ...
            for i, dilation in enumerate((1, *dilations))
        )
        self.channel_attention = ChannelAttention(width)
        self.pooling = ImagePooling(dim_in, width)
        self.merge = nn.Sequential(
            nn.Conv2d((len(dilations) + 2) * width, width, 1, bias=False), FixedStatisticsNorm(width)
        )
        self.spatial_attention = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(0.5)
        kaiming(self)

    def forward(self, features: Tensor) -> Tensor:
        parts = [branch(features) for branch in self.branches]
        parts = [self.channel_attention(part) * part for part in parts]
        merged = self.merge(torch.cat([*parts, self.pooling(features)], 1))
        summary = torch.cat([merged.mean(1, keepdim=True), merged.amax(1, keepdim=True)], 1)
        return self.dropout(torch.sigmoid(self.spatial_attention(summary)) * merged + merged)


class FlowAlignment(nn.Module):
    """Deep features (B, D, h', w') at the places of shallow ones (B, S, h, w), shifted by a learned flow."""

    def __init__(self, dim_shallow: int, width: int) -> None:
        super().__init__()
        self.deep = nn.Conv2d(width, width // 2, 1, bias=False)
        self.shallow = nn.Conv2d(dim_shallow, width // 2, 1, bias=False)
        self.flow = nn.Conv2d(2 * (width // 2), 2, 3, padding=1, bias=False)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        flow = self.flow_field(shallow, deep)
        with full_precision(flow):  # whole pixels are lost in half-precision coordinates
            flow = flow.float().permute(0, 2, 3, 1)  # (B, h, w, 2)
            height, width = flow.shape[1:3]
            if torch.compiler.is_compiling():  # the sizes of an exported graph vary, linspace would fix them
                size = torch.stack([flow.new_full((), side) for side in (width, height)])
                x, y = (
                    2 * torch.arange(n, device=flow.device) / (side - 1).clamp(min=1) - 1
                    for n, side in zip((width, height), size)
                )
            else:
                y, x = (torch.linspace(-1, 1, n, device=flow.device) for n in (height, width))
                size = constant((width, height), flow.device)
            place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) + flow / size
            if torch.are_deterministic_algorithms_enabled():  # grid_sample's gradient has no such form
                return sample_corners(deep.float(), place).to(deep.dtype)
            return F.grid_sample(deep.float(), place, align_corners=True).to(deep.dtype)

    def flow_field(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Offsets (B, 2, h, w), horizontal first; 1 is half a place, for coordinates go from -1 to 1."""
        size = shallow.shape[-2:]
        deep = F.interpolate(self.deep(deep), size=size, mode="bilinear", align_corners=False)
        return self.flow(torch.cat([deep, self.shallow(shallow)], 1))


def sample_corners(maps: Tensor, place: Tensor) -> Tensor:
    """``F.grid_sample(maps, place, align_corners=True)`` by indices, whose gradient can be deterministic.

    (B, D, h', w') float32 maps and (B, h, w, 2) places -> (B, D, h, w). Slower, and takes more memory.
    """
    b, _, height, width = maps.shape
    x, y = ((place[..., i] + 1) / 2 * (n - 1) for i, n in enumerate((width, height)))  # (B, h, w)
    left, top = x.detach().floor(), y.detach().floor()
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (B h' w', D)
    first = torch.arange(b, device=maps.device)[:, None, None] * (height * width)
    sampled = maps.new_zeros(())
    for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = first + row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            sampled = sampled + rows[index] * (share_x * share_y * inside)[..., None]
    return sampled.permute(0, 3, 1, 2)


class ConsistentFusion(nn.Module):
    """(B, S, h, w), (B, D, h, w) -> deep and shallow branch, each (B, D, h, w), which meet in a product."""

    def __init__(self, dim_shallow: int, width: int) -> None:
        super().__init__()
        self.shallow, self.deep = (
            nn.ModuleList(conv_norm_relu(w, width, 3, bias=True) for w in (dim, width, width, width))
            for dim in (dim_shallow, width)
        )
        kaiming(self)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.bias)

    def forward(self, shallow: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        shallow1, deep1 = self.shallow[0](shallow), self.deep[0](deep)
        fused = self.shallow[1](shallow1) * self.deep[1](deep1)
        deep = self.deep[3](self.deep[2](fused) + deep1)
        return deep, self.shallow[3](self.shallow[2](fused) + shallow1)
