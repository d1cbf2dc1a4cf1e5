"""Hierarchical networks of timm as lists of maps: Swin, ConvNeXt, PVT, ResNets and other CNNs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from models.backbones.cnn import CNNBackbone
from models.backbones.timm_net import own_normalisation, strides_of, timm_net
from models.blocks import freeze_layers


class TimmMaps(CNNBackbone):
    """Maps of all stages of stride 4 and more, as timm's ``features_only`` gives them.

    An image that does not fill its deepest positions is padded with zeros, so a map at stride s has
    ``ceil(n / s)`` rows or columns.

    Args:
        name: of the model in timm, with or without tag.
        frozen: layers that are not trained, or ``all``.
        train_affine: whether scale and shift of batch norms are trained. Their statistics never move.
        drop_path_rate: stochastic depth of the last block; it grows linearly from the first.
        options: further arguments of timm's class, such as ``output_stride`` of most CNNs.
    """

    def __init__(
        self,
        name: str,
        frozen: Sequence[str] | str = (),
        train_affine: bool = True,
        drop_path_rate: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.whole = partial(timm_net, name, options, drop_path_rate=drop_path_rate)
        self.net = self.whole()
        self.indices = [i for i, stride in enumerate(strides_of(self.net)) if stride >= 4]
        chosen = [self.net.feature_info[i] for i in self.indices]
        self.dims = tuple(info["num_chs"] for info in chosen)
        self.strides = tuple(info["reduction"] for info in chosen)
        self.net.prune_intermediate_layers(self.indices)
        self.mean, self.std = own_normalisation(self.net)
        self.freeze("all" if frozen == "all" else (), train_affine)
        freeze_layers(self.net, frozen)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps from shallow to deep of images (B, 3, H, W), normalised with ``mean`` and ``std``."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.strides[-1], 0, -height % self.strides[-1]))
        maps = self.net.forward_intermediates(image, indices=self.indices, intermediates_only=True)
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.strides, strict=True)]
