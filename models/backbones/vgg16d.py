"""VGG-16 (Simonyan & Zisserman, ICLR 2015) as a dense network: 3x3 pooling, dilated conv5, convolutional fc6.

The backbone of PSA's and 1-stage-wseg's VGG variants, under the parameter names of their files.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.cnn import CNNBackbone

# stage -> (channels, convolutions)
_STAGES = {1: (64, 2), 2: (128, 2), 3: (256, 3), 4: (512, 3), 5: (512, 3)}
# torchvision and timm count layers: convolutions and pools of VGG-16 in one list.
_LAYER_NUMBERS = {
    "conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
    "conv4_1": 17, "conv4_2": 19, "conv4_3": 21, "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
}  # fmt: skip


class VGG16d(CNNBackbone):
    """Maps ``conv3`` (stride 4), ``conv4`` and ``conv5`` (before pooling) and ``fc7`` (stride 8), all
    rectified.

    Args:
        frozen: layers that are not trained, or ``all``. The default is that of 1-stage-wseg and WS-FCN; PSA
            freezes ``conv2_1`` and ``conv2_2`` too.
        conv4_stride: of ``conv4_1``: 1 (1-stage-wseg, PSA), or 2 for stride 16 in the end (WS-FCN).
        dropout: channel dropout behind ``fc6``.
    """

    file_names = tuple((rf"^features\.{number}\.", f"{name}.") for name, number in _LAYER_NUMBERS.items())
    # ImageNet files end in 7x7 and 4096-wide layers; the 3x3, 1024-wide ones are cut out of a file that no
    # library distributes.
    classifier = ("classifier.", "pre_logits.", "head.", "fc8.")
    new_layers = ("fc6.", "fc7.")

    def __init__(
        self,
        frozen: Sequence[str] | str = ("conv1_1", "conv1_2"),
        conv4_stride: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        dim = 3
        for stage, (width, count) in _STAGES.items():
            dilation = 2 if stage == 5 else 1
            for k in range(1, count + 1):
                stride = conv4_stride if (stage, k) == (4, 1) else 1
                conv = nn.Conv2d(dim, width, 3, stride, padding=dilation, dilation=dilation)
                self.add_module(f"conv{stage}_{k}", conv)
                dim = width
        self.fc6 = nn.Conv2d(dim, 1024, 3, padding=1)
        self.dropout = nn.Dropout2d(dropout)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        self.dims = (256, 512, 512, 1024)
        self.strides = (4, *3 * (8 * conv4_stride,))
        self.freeze(frozen, train_affine=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[conv3, conv4, conv5, fc7]`` of normalised images (B, 3, H, W)."""
        x = image
        maps = []
        for stage, (_, count) in _STAGES.items():
            for k in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{k}")(x), inplace=True)
            if stage >= 3:
                maps.append(x)
            if stage <= 4:
                x = F.max_pool2d(x, 3, stride=2 if stage <= 3 else 1, padding=1)
        x = self.dropout(F.relu(self.fc6(x), inplace=True))
        return [*maps, F.relu(self.fc7(x), inplace=True)]
