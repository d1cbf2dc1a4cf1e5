"""ResNet-38d: "Wider or Deeper" (Wu, Shen & van den Hengel, 2016), dilated to stride 8.

The backbone of PSA, SEAM, 1-stage-wseg and WS-FCN, under the parameter names of their published files.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.cnn import CNNBackbone

# stage -> (blocks, stride of the first); widths follow in ``ResNet38d``.
_BASIC_STAGES = {2: (3, 2), 3: (3, 2), 4: (6, 2), 5: (3, 1)}

# Names of the ImageNet weights as MXNet wrote them (ilsvrc-cls_rna-a1_cls1000_ep-0001.params) -> ours.
_NORM_ENTRIES = {
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"
}  # fmt: skip
MXNET_NAMES: tuple[tuple[str, str], ...] = (
    (r"^arg:conv1a_weight$", "conv1a.weight"),
    (r"^arg:res(\d)a_(branch\w+)_weight$", r"b\1.conv_\2.weight"),
    (r"^arg:res(\d)b(\d+)_(branch\w+)_weight$", r"b\1_\2.conv_\3.weight"),
    *(
        rule
        for theirs, ours in _NORM_ENTRIES.items()
        for rule in (
            (rf"^(?:arg|aux):bn7_{theirs}$", f"bn7.{ours}"),
            (rf"^(?:arg|aux):bn(\d)a_(branch\w+?)_{theirs}$", rf"b\1.bn_\2.{ours}"),
            (rf"^(?:arg|aux):bn(\d)b(\d+)_(branch\w+?)_{theirs}$", rf"b\1_\2.bn_\3.{ours}"),
        )
    ),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU.

    ``forward`` returns the sum of shortcut and branch, and the pre-activation ``relu(bn(x))`` of its input.
    """

    def __init__(
        self, dim_in: int, dim_mid: int, dim_out: int, stride: int, dilations: tuple[int, int]
    ) -> None:
        super().__init__()
        first, second = (dict(padding=d, dilation=d, bias=False) for d in dilations)
        self.bn_branch2a = nn.BatchNorm2d(dim_in)
        self.conv_branch2a = nn.Conv2d(dim_in, dim_mid, 3, stride, **first)
        self.bn_branch2b1 = nn.BatchNorm2d(dim_mid)
        self.conv_branch2b1 = nn.Conv2d(dim_mid, dim_out, 3, **second)
        self.conv_branch1 = None
        if dim_in != dim_out or stride != 1:
            self.conv_branch1 = nn.Conv2d(dim_in, dim_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.relu(self.bn_branch2a(x), inplace=True)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(F.relu(self.bn_branch2b1(branch), inplace=True))
        return shortcut + branch, activated


class BottleneckBlock(nn.Module):
    """1x1, dilated 3x3, 1x1 convolutions with channel-wise dropout; returns what ``BasicBlock`` does."""

    def __init__(self, dim_in: int, dim_out: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(dim_in)
        self.conv_branch2a = nn.Conv2d(dim_in, dim_out // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(dim_out // 4)
        dilated = dict(padding=dilation, dilation=dilation, bias=False)
        self.conv_branch2b1 = nn.Conv2d(dim_out // 4, dim_out // 2, 3, **dilated)
        self.bn_branch2b2 = nn.BatchNorm2d(dim_out // 2)
        self.conv_branch2b2 = nn.Conv2d(dim_out // 2, dim_out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(dim_in, dim_out, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.relu(self.bn_branch2a(x), inplace=True)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.dropout(F.relu(self.bn_branch2b1(branch), inplace=True)))
        branch = self.conv_branch2b2(self.dropout(F.relu(self.bn_branch2b2(branch), inplace=True)))
        return self.conv_branch1(activated) + branch, activated


class ResNet38d(CNNBackbone):
    """Pre-activation network; maps ``conv3`` (stride 4), ``conv4``, ``conv5``, ``conv6`` (stride 8).

    ``conv3`` is the raw output of its last block; the others are the inputs of ``b5`` and ``b6`` and the
    output of ``b7``, each behind batch norm and ReLU.

    Args:
        frozen: layers that are not trained, or ``all``; the default is that of the published methods.
        train_affine: whether scale and shift of the batch norms are trained; in the published methods not.
        dropout: channel dropout of ``b6`` and ``b7``.
        width: channels of the first convolution; all others are multiples of it.
    """

    file_names = MXNET_NAMES
    classifier = ("linear1000.", "fc.", "fc8.", "arg:linear1000_")

    def __init__(
        self,
        frozen: Sequence[str] | str = ("conv1a", "b2", "b2_1", "b2_2"),
        train_affine: bool = False,
        dropout: tuple[float, float] = (0.3, 0.5),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        dim = width
        for stage, (blocks, stride) in _BASIC_STAGES.items():
            mid = width * 2 ** min(stage - 1, 3)
            out = width * 2 ** (stage - 1)
            for k in range(blocks):
                # Only the last basic stage is dilated, and the first convolution of its first block is not.
                dilation = 2 if stage == 5 else 1
                step, dilations = (1, (dilation, dilation)) if k else (stride, (1, dilation))
                block = BasicBlock(dim, mid, out, step, dilations)
                self.add_module(f"b{stage}_{k}" if k else f"b{stage}", block)
                dim = out
        self.b6 = BottleneckBlock(dim, 2 * dim, dilation=4, dropout=dropout[0])
        self.b7 = BottleneckBlock(2 * dim, 4 * dim, dilation=4, dropout=dropout[1])
        self.bn7 = nn.BatchNorm2d(4 * dim)
        self.dims = (dim // 4, dim // 2, dim, 4 * dim)
        self.strides = (4, 8, 8, 8)
        self.freeze(frozen, train_affine)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[conv3, conv4, conv5, conv6]`` of normalised images (B, 3, H, W)."""
        x = self.conv1a(image)
        conv3 = x = self.stage(self.stage(x, 2), 3)
        x = self.stage(x, 4)
        x, conv4 = self.b5(x)
        x, _ = self.b5_1(x)
        x, _ = self.b5_2(x)
        x, conv5 = self.b6(x)
        x, _ = self.b7(x)
        return [conv3, conv4, conv5, F.relu(self.bn7(x), inplace=True)]

    def stage(self, x: Tensor, stage: int) -> Tensor:
        """The output of all blocks of a basic stage."""
        for k in range(_BASIC_STAGES[stage][0]):
            x, _ = self.get_submodule(f"b{stage}_{k}" if k else f"b{stage}")(x)
        return x
