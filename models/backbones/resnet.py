"""ResNet-50 and -101 (He et al., CVPR 2016): torchvision's network, read at every stage.

Parameter names are torchvision's, so its weights and those of IRN, 1-stage-wseg and WS-FCN fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torchvision.models import resnet

from models.backbones.cnn import CNNBackbone


class ResNet(CNNBackbone, resnet.ResNet):
    """Maps ``stem``, ``layer1``, ``layer2``, ``layer3`` and ``layer4``.

    Args:
        blocks: bottleneck blocks per stage.
        frozen: layers that are not trained, or ``all``. The default is that of 1-stage-wseg and WS-FCN; IRN's
            classifier trains ``layer3`` and ``layer4`` (``[conv1, bn1, layer1, layer2]``), its boundary
            network nothing (``all``).
        train_affine: whether scale and shift of the batch norms are trained (IRN's classifier), or stay as
            loaded (all others).
        output_stride: 32, 16 or 8; what ImageNet's network halves beyond it keeps its size.
        dilated: replace the strides left out by dilation (DeepLab); the weakly supervised methods do not.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        frozen: Sequence[str] | str = ("conv1", "bn1"),
        train_affine: bool = False,
        output_stride: int = 16,
        dilated: bool = False,
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride of a ResNet is 8, 16 or 32, not {output_stride}")
        undone = {"layer3": output_stride < 16, "layer4": output_stride < 32}
        super().__init__(
            resnet.Bottleneck,
            list(blocks),
            replace_stride_with_dilation=[False, *(dilated and flag for flag in undone.values())],
        )
        del self.avgpool, self.fc
        if not dilated:
            for name in (name for name, flag in undone.items() if flag):
                first = self.get_submodule(name)[0]
                first.conv2.stride = first.downsample[0].stride = (1, 1)
        self.dims = (64, 256, 512, 1024, 2048)
        self.strides = (4, 4, 8, min(output_stride, 16), output_stride)
        self.freeze(frozen, train_affine)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[stem, layer1, layer2, layer3, layer4]`` of normalised images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        maps = [x]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


resnet50 = partial(ResNet, (3, 4, 6, 3))
resnet101 = partial(ResNet, (3, 4, 23, 3))
