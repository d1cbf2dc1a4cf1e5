"""ResNet-50 and -101 (He et al., CVPR 2016) at stride 16, undilated: torchvision's, read at every stage.

Parameter names are torchvision's, so its weights and those of IRN, 1-stage-wseg and WS-FCN fit.
"""

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
            classifier trains ``layer3`` and ``layer4``, its boundary network nothing (``all``).
        train_affine: whether scale and shift of the batch norms are trained (IRN's classifier alone).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        frozen: Sequence[str] | str = ("conv1", "bn1"),
        train_affine: bool = False,
    ) -> None:
        super().__init__(resnet.Bottleneck, list(blocks))
        del self.avgpool, self.fc
        first = self.layer4[0]  # ImageNet's network ends at stride 32
        first.conv2.stride = first.downsample[0].stride = (1, 1)
        self.dims = (64, 256, 512, 1024, 2048)
        self.strides = (4, 4, 8, 16, 16)
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
