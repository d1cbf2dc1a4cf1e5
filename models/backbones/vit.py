"""ViT / DeiT encoders that return class, patch and auxiliary tokens.

The layers are timm's. Its forward lacks the output of an inner block and interpolates positions otherwise.
B images, D width, (H, W) pixels, (h, w) tokens, P patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones.timm_net import renormalize
from models.blocks import freeze_layers
from utils.build import check_choice
from utils.image import resize


class Tokens(NamedTuple):
    """Encoder output."""

    cls_token: Tensor  # (B, D) after the last layer norm
    patch_tokens: Tensor  # (B, D, h, w) after the last layer norm
    aux_tokens: Tensor  # (B, D, h, w) residual stream after the auxiliary block, not normalised

    def images(self, start: int, stop: int | None = None) -> Tokens:
        """The tokens of images ``start:stop`` of the batch."""
        return Tokens(*(t[start:stop] for t in self))


class PlainViT(nn.Module):
    """Base of vision transformers whose blocks all have the same grid, for images of any size.

    What does not fill a patch at the right and bottom is dropped, and a side shorter than a patch is
    stretched to one. Without a class token ``cls_token`` is the mean of the patch tokens.
    """

    embed_dim: int
    patch_size: int
    depth: int
    aux_layer: int  # block whose output is ``aux_tokens``

    def intermediates(self, image: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, p + hw, D) behind the last norm, and maps (B, D, h, w) of blocks in ascending order."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tokens:
        """Encode normalised images (B, 3, H, W)."""
        final, (aux,) = self.intermediates(whole_patches(image, self.patch_size), [self.aux_layer])
        size = aux.shape[-2], aux.shape[-1]
        prefix = final.shape[1] - size[0] * size[1]
        patches = to_map(final[:, prefix:], size)
        cls_token = final[:, 0] if prefix else final.mean(1)
        return Tokens(cls_token, patches, patches if self.aux_layer == self.depth - 1 else aux)


class ViT(PlainViT, VisionTransformer):
    """Pre-norm vision transformer with a class token.

    Args:
        aux_layer: block whose output is ``aux_tokens``, as an index into the list of block outputs.
        freeze_pos_embed: no gradient for the position embedding (the published single-stage methods).
        frozen: parts that are not trained, such as ``[patch_embed, blocks.0]``, or ``all``. Dropout, where
            asked for, stays.
        **options: arguments of timm's ``VisionTransformer``.
    """

    def __init__(
        self,
        aux_layer: int = -3,
        freeze_pos_embed: bool = True,
        frozen: Sequence[str] | str = (),
        **options: Any,
    ) -> None:
        # The 1000-way head of the ImageNet models is of no use here.
        super().__init__(num_classes=0, global_pool="token", **options)
        self.depth = len(self.blocks)
        self.aux_layer = checked_layer(aux_layer, self.depth)
        self.patch_size = self.patch_embed.patch_size[0]
        self.pos_embed.requires_grad_(not freeze_pos_embed)
        freeze_layers(self, frozen)

    def forward(self, image: Tensor) -> Tokens:
        size = max(image.shape[-2] // self.patch_size, 1), max(image.shape[-1] // self.patch_size, 1)
        x = self.with_positions(self.patch_embed.proj(whole_patches(image, self.patch_size)))
        aux = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            aux = x if i == self.aux_layer else aux
        x = self.norm(x)
        aux = x if self.aux_layer == self.depth - 1 else aux
        # Maps are made behind all blocks: gradients add up in the order, and to the bits, of recorded runs.
        return Tokens(x[:, 0], to_map(x[:, 1:], size), to_map(aux[:, 1:], size))

    def intermediates(self, image: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        return self.through_blocks(self.patch_embed.proj(image), layers)

    def through_blocks(self, patches: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """``intermediates`` of embedded patches (B, D, h, w)."""
        x, maps = self.with_positions(patches), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                maps.append(to_map(x[:, 1:], (patches.shape[-2], patches.shape[-1])))
        return self.norm(x), maps

    def embed(self, image: Tensor) -> Tensor:
        """The token sequence that enters the first block, (B, 1 + hw, D), class token first."""
        image = whole_patches(renormalize(self, image), self.patch_size)
        return self.with_positions(self.patch_embed.proj(image))

    def with_positions(self, patches: Tensor) -> Tensor:
        """Class token and embedded patches (B, D, h, w) with their positions, (B, 1 + hw, D)."""
        size = patches.shape[-2], patches.shape[-1]
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], 1)
        return x + resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, size)


def checked_layer(layer: int, depth: int) -> int:
    """The index of one of ``depth`` blocks, counted from the first one."""
    if not -depth <= layer < depth:
        raise ValueError(f"aux_layer {layer} is outside of the {depth} blocks of this ViT")
    return layer % depth


def whole_patches(image: Tensor, patch_size: int) -> Tensor:
    """Images cut to whole patches at the right and bottom; a side below one patch is stretched to one."""
    height, width = image.shape[-2:]
    if min(height, width) < patch_size:  # a thumbnail, or a small photo at half its size
        larger = max(height, patch_size), max(width, patch_size)
        image = F.interpolate(image, size=larger, mode="bilinear", align_corners=False)
    height, width = (side // patch_size * patch_size for side in image.shape[-2:])
    return image[..., :height, :width]


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, hw, D) patch tokens in row-major order as a (B, D, h, w) map."""
    return tokens.transpose(1, 2).unflatten(2, size)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Position embedding (1, 1 + S*S, D) for another token grid; the class entry stays.

    Plain bicubic interpolation to a target size. timm resizes with antialiasing, another kernel even when
    enlarging.
    """
    if not torch.compiler.is_exporting() and tuple(grid) == tuple(size):  # an exported grid has any size
        return pos_embed
    patches = to_map(pos_embed[:, 1:], tuple(grid))
    patches = F.interpolate(patches, size=size, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)


class ConvStem(nn.Module):
    """Patch embedding by stride-2 convolutions, for small ViTs that are trained from scratch.

    Early convolutions make small transformers train with few steps (Xiao et al., NeurIPS 2021). Group norm,
    because batch statistics would tie the images of a batch together.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **unused: Any
    ) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        if 2**stages != patch_size:
            raise ValueError(f"a convolutional stem needs a patch of a power of two, got {patch_size}")
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        channels = in_chans
        for i in reversed(range(stages)):
            width = max(embed_dim >> i, 16)
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(4, width),
                nn.GELU(),
            ]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1, bias=bias))


class ViTPyramid(nn.Module):
    """A ViT behind the interface of the CNN backbones: maps from shallow to deep instead of tokens.

    Of no paper. The shallow map has stride 4: features of the convolutional stem, or, without one, the
    tokens at a quarter of the depth, enlarged bilinearly. The others keep the stride of the patches. Images
    are padded with zeros to whole patches: a map at stride s has ``ceil(n / s)`` rows or columns.

    Args:
        layers: blocks whose residual streams are the maps between shallow and deep; by default those at half
            and three quarters of the depth. The deep map is the output behind the last norm.
    """

    shallow = 0

    def __init__(self, vit: PlainViT, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        # Blocks of very small ViTs may coincide; then there are fewer maps.
        self.shallow_layer, half, three_quarters = (max(vit.depth * k // 4 - 1, 0) for k in (1, 2, 3))
        self.layers = tuple(sorted({half, three_quarters} if layers is None else set(layers)))
        for layer in self.layers:
            if not 0 <= layer < vit.depth:
                raise ValueError(f"layer {layer} of the pyramid is outside of {vit.depth} blocks")
        self.vit = vit
        stem = getattr(vit, "patch_embed", None)
        self.stem_gives_shallow = isinstance(stem, ConvStem) and vit.patch_size >= 4
        shallow_dim = stem.proj[3].out_channels if self.stem_gives_shallow else vit.embed_dim
        self.dims = (shallow_dim, *(vit.embed_dim for _ in self.layers), vit.embed_dim)
        self.strides = (4, *(vit.patch_size for _ in self.layers), vit.patch_size)
        self.mean, self.std = getattr(vit, "mean", None), getattr(vit, "std", None)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[shallow, *layers, deep]`` of normalised images (B, 3, H, W)."""
        vit, patch = self.vit, self.vit.patch_size
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % patch, 0, -height % patch))
        size = image.shape[-2] // patch, image.shape[-1] // patch
        if self.stem_gives_shallow:
            stem = vit.patch_embed.proj
            shallow = stem[:6](image)  # two convolutions of stride 2, each with norm and activation
            final, maps = vit.through_blocks(stem[6:](shallow), self.layers)
        else:
            layers = sorted({self.shallow_layer, *self.layers})
            final, found = vit.intermediates(image, layers)
            by_layer = dict(zip(layers, found, strict=True))
            maps = [by_layer[i] for i in self.layers]
            larger = size[0] * patch // 4, size[1] * patch // 4
            shallow = resize(by_layer[self.shallow_layer], larger)
        shallow = shallow[..., : -(-height // 4), : -(-width // 4)]  # without the padding
        return [shallow, *maps, to_map(final[:, final.shape[1] - size[0] * size[1] :], size)]


LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


def vit_factory(
    width: int, depth: int, heads: int, image_size: int = 224, **fixed: Any
) -> Callable[..., ViT]:
    """A constructor of one ViT variant; its keyword arguments override the variant's."""
    base = dict(embed_dim=width, depth=depth, num_heads=heads, img_size=image_size, patch_size=16)
    return partial(ViT, **(base | dict(mlp_ratio=4.0, qkv_bias=True, norm_layer=LAYER_NORM) | fixed))


class ViTDemo(ViT):
    """A small ViT that learns from scratch within minutes on a CPU.

    Its position embedding is trained: without pretraining it is random noise at first.

    Args:
        width, depth, heads: channels of a token, number of blocks, attention heads of each.
        patch_size: side of a patch in pixels.
        image_size: the size whose token grid the position embedding has; any other size is interpolated.
        stem: ``conv`` (strided convolutions) or ``patch`` (one linear map per patch).
        **options: of ``ViT``.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        patch_size: int = 8,
        image_size: int = 96,
        stem: str = "conv",
        **options: Any,
    ) -> None:
        check_choice("stem", stem, ("conv", "patch"))
        if stem == "conv":
            options["embed_layer"] = ConvStem
        options = {"norm_layer": LAYER_NORM, "freeze_pos_embed": False} | options
        size = {"embed_dim": width, "depth": depth, "num_heads": heads}
        super().__init__(img_size=image_size, patch_size=patch_size, **size, **options)
