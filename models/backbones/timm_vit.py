"""Plain ViTs of timm (DINOv2 and v3, CLIP, EVA-02, DeiT III, SigLIP, MAE, ...), by timm's own forward.

B images, D width, (H, W) pixels, (h, w) tokens, P patch size, p prefix tokens (class and registers).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones.timm_net import own_normalisation, renormalize, strides_of, timm_net
from models.backbones.vit import PlainViT, checked_layer, whole_patches
from models.blocks import freeze_layers


class TimmViT(PlainViT):
    """Tokens of a timm model whose blocks all have the same grid, for images of any size.

    ``patch_tokens`` and ``cls_token`` are those of timm's ``forward_features``. Images come normalised with
    ``mean`` and ``std``.

    Args:
        name: of the model in timm, with or without tag.
        aux_layer: block whose output is ``aux_tokens``, as an index into the list of block outputs.
        freeze_pos_embed: no gradient for an absolute position embedding.
        frozen: parts that are not trained, such as ``[patch_embed, blocks.0]``, or ``all``.
        img_size: side of the image whose token grid the position embedding has; None: as timm has it.
        drop_path_rate: stochastic depth of the last block; it grows linearly from the first.
        options: further arguments of timm's class.
    """

    def __init__(
        self,
        name: str,
        aux_layer: int = -3,
        freeze_pos_embed: bool = True,
        frozen: Sequence[str] | str = (),
        img_size: int | None = None,
        drop_path_rate: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.whole = partial(timm_net, name, options, img_size=img_size, drop_path_rate=drop_path_rate)
        self.net = self.whole()
        self.depth = len(strides_of(self.net))
        self.aux_layer = checked_layer(aux_layer, self.depth)
        # Without what pools and classifies, which nothing reads; XCiT makes its class token there.
        self.net.prune_intermediate_layers(
            [self.depth - 1], prune_head=not hasattr(self.net, "cls_attn_blocks")
        )
        self.embed_dim, self.patch_size = self.net.num_features, strides_of(self.net)[0]
        self.mean, self.std = own_normalisation(self.net)
        for key in ("pos_embed", "pos_embed_win"):
            if getattr(self.net, key, None) is not None:
                getattr(self.net, key).requires_grad_(not freeze_pos_embed)
        freeze_layers(self.net, frozen)

    def intermediates(self, image: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        return self.net.forward_intermediates(image, indices=list(layers))


class TimmAbsoluteViT(TimmViT):
    """A ``TimmViT`` with a class token and absolute positions.

    It has the parts of a ``ViT``, through which MCC walks, because it hides tokens.

    Args:
        antialias: whether position embeddings are resized with antialiasing, as timm does, or plainly, as the
            published single-stage methods do.
        **options: of ``TimmViT``.
    """

    def __init__(self, name: str, antialias: bool = True, **options: Any) -> None:
        super().__init__(name, **options)
        self.num_prefix_tokens = self.net.num_prefix_tokens
        if not antialias:
            if type(self.net)._pos_embed is not VisionTransformer._pos_embed or self.net.pos_embed is None:
                raise ValueError(f"antialias=false is not for {name}, whose positions are of another kind")
            self.net._pos_embed = partial(_plain_positions, self.net)

    @property
    def blocks(self) -> nn.Sequential:
        return self.net.blocks

    @property
    def norm(self) -> nn.Module:
        return self.net.norm

    def embed(self, image: Tensor) -> Tensor:
        """The token sequence that enters the first block, (B, p + hw, D), class token first."""
        image = whole_patches(renormalize(self, image), self.patch_size)
        return self.net.norm_pre(self.net._pos_embed(self.net.patch_embed(image)))


def _plain_positions(net: VisionTransformer, patches: Tensor) -> Tensor:
    """What timm's ``_pos_embed`` does with patches (B, h, w, D), by plain bicubic interpolation."""
    positions = resample_abs_pos_embed(
        net.pos_embed,
        new_size=list(patches.shape[1:3]),
        old_size=list(net.patch_embed.grid_size),
        num_prefix_tokens=0 if net.no_embed_class else net.num_prefix_tokens,
        antialias=False,
    )
    x = patches.flatten(1, 2)
    prefix = [
        token.expand(x.shape[0], -1, -1) for token in (net.cls_token, net.reg_token) if token is not None
    ]
    if net.no_embed_class:
        return net.pos_drop(torch.cat([*prefix, x + positions], 1))
    return net.pos_drop(torch.cat([*prefix, x], 1) + positions)
