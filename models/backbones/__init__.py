"""Backbones by name: those of the papers, any model of timm, and any class by its import path.

A backbone maps normalised images to ``Tokens`` on a grid (``GivesTokens``) or to a list of maps
(``GivesMaps``); a method says with ``require`` which of them it reads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones.clip import OpenClip
from models.backbones.resnet import resnet50, resnet101
from models.backbones.resnet38d import ResNet38d
from models.backbones.timm_maps import TimmMaps
from models.backbones.timm_net import near_names, renormalize, strides_of, timm_name, timm_net
from models.backbones.timm_vit import TimmAbsoluteViT, TimmViT
from models.backbones.vgg16d import VGG16d
from models.backbones.vit import PlainViT, ViTDemo, ViTPyramid, vit_factory
from models.backbones.weights import load_pretrained, pretrained_weights, timm_weights
from models.blocks import checkpoint_layers
from utils.build import build_part, import_class
from utils.logging import LOGGER
from utils.weights import load_checkpoint

__all__ = ["BACKBONES", "create_backbone", "load_pretrained", "pretrained_weights", "require"]

# Width, depth, heads, side of the training images, and the tag of the papers' weights. Explicit, for timm's
# default weights of a name change. vit_base and deit_base are one network; only the weights differ.
_VITS: dict[str, tuple[int, int, int, int, str]] = {
    "vit_base_patch16_224": (768, 12, 12, 224, "orig_in21k_ft_in1k"),
    "vit_base_patch16_384": (768, 12, 12, 384, "orig_in21k_ft_in1k"),
    "vit_large_patch16_224": (1024, 24, 16, 224, "augreg_in21k_ft_in1k"),
    "vit_large_patch16_384": (1024, 24, 16, 384, "augreg_in21k_ft_in1k"),
    "deit_base_patch16_224": (768, 12, 12, 224, "fb_in1k"),
    "deit_base_patch16_384": (768, 12, 12, 384, "fb_in1k"),
    "deit_small_patch16_224": (384, 12, 6, 224, "fb_in1k"),
    "deit_tiny_patch16_224": (192, 12, 3, 224, "fb_in1k"),
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: vit_factory(*sizes) for name, (*sizes, _) in _VITS.items()},
    # The "small" of 2020, 8 wide layers and nn.LayerNorm's own epsilon; timm has dropped it.
    "vit_small_patch16_224": vit_factory(768, 8, 8, mlp_ratio=3.0, qkv_bias=False, norm_layer=nn.LayerNorm),
    "vit_demo": ViTDemo,
    "resnet38d": ResNet38d,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "vgg16d": VGG16d,
    "open_clip": OpenClip,
}
PRETRAINED_TAGS = {
    **{name: f"{name}.{tag}" for name, (*_, tag) in _VITS.items()},
    # torchvision's IMAGENET1K_V1, which the published methods start from (there as resnet50-19c8e357,
    # resnet101-5d3b4d8f).
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "vgg16d": "vgg16.tv_in1k",
}


@runtime_checkable
class GivesTokens(Protocol):
    """Its output is ``Tokens``: that of a ViT, such as vit_base_patch16_224 or vit_small_patch14_dinov2."""

    embed_dim: int
    patch_size: int


@runtime_checkable
class GivesMaps(Protocol):
    """Its output is a list of maps: that of resnet50, a Swin, or a ViT with method.backbone.pyramid=true."""

    dims: tuple[int, ...]  # channels, from shallow to deep
    strides: tuple[int, ...]  # pixels per position


@runtime_checkable
class HidesTokens(Protocol):
    """Tokens can be left out: of a ViT with a class token and absolute positions, such as deit3 or dinov2."""

    num_prefix_tokens: int
    blocks: nn.Module
    norm: nn.Module

    def embed(self, image: Tensor) -> Tensor: ...


def require(method: nn.Module, kind: type) -> None:
    """Raise a ValueError unless ``method.backbone`` is what the method needs, one of the protocols above."""
    if not isinstance(method.backbone, kind):
        gives = "maps" if isinstance(method.backbone, GivesMaps) else "tokens"
        raise ValueError(
            f"{type(method).__name__} needs another backbone than {type(method.backbone).__name__}, which "
            f"gives {gives}. {' '.join((kind.__doc__ or '').split())}"
        )


def whole_crop(method: nn.Module, size: int, key: str) -> int:
    """The side of a crop in whole patches of ``method.backbone``; a change of ``key`` is logged."""
    patch = getattr(getattr(method, "backbone", None), "patch_size", 1)
    whole = max(size // patch, 1) * patch
    if whole != size:
        LOGGER.info(f"note     {key}={size} is no multiple of the patch of {patch} pixels: {whole} is used")
    return whole


def layer_scales(backbone: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Learning rate factors of trained parameters: ``decay`` to the power of how many layers come after."""
    from timm.optim import param_groups_layer_decay

    layered = (m for m in backbone.modules() if hasattr(m, "group_matcher") and not hasattr(m, "net"))
    inner = next(layered, backbone)
    groups = param_groups_layer_decay(inner, layer_decay=decay)
    return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


def backbone_class(name: str) -> Callable[..., nn.Module]:
    """What makes the backbone of a name: a key of ``BACKBONES``, a model of timm, or an import path."""
    if name in BACKBONES:
        return BACKBONES[name]
    if (known := timm_name(name)) is not None:
        return partial(timm_class(known), known)
    if "." in name and not timm.is_model(name.removeprefix("timm/")):
        return import_class(name, nn.Module)
    near = near_names(name, BACKBONES)
    names = ", ".join(f"'{n}'" for n in near) or "a model of timm with weights, or one of " + ", ".join(
        BACKBONES
    )
    raise KeyError(f"unknown backbone '{name}': did you mean {names}?")


@cache
def timm_class(name: str) -> Callable[..., nn.Module]:
    """The class for a model of timm, by a trial without memory (``meta``) on an image of no usual size."""
    with torch.device("meta"), torch.no_grad():
        net = timm_net(name)
        strides = strides_of(net)
        if len(set(strides)) > 1 or not hasattr(net, "num_prefix_tokens"):
            made: Any = TimmMaps
        elif isinstance(net, VisionTransformer) and net.has_class_token:
            made = TimmAbsoluteViT
        else:
            made = TimmViT
        height, width = 5 * max(strides), 6 * max(strides)
        try:
            net = made(name).eval()
            out = net(torch.empty(1, 3, height, width))
            if made is TimmMaps:
                expected = [(dim, -(-height // s), -(-width // s)) for dim, s in zip(net.dims, net.strides)]
                assert [tuple(m.shape[1:]) for m in out] == expected, "its maps are not where timm says"
        except Exception as error:  # of whatever kind timm's networks raise
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            raise ValueError(
                f"timm's {name} is no backbone for images of any size (docs/backbones.md): {reason}"
            ) from error
    return made


def create_backbone(
    name: str,
    pretrained: str | Path | None = None,
    pyramid: bool | Mapping[str, Any] = False,
    grad_checkpointing: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a backbone.

    Images come normalised with ImageNet's mean and deviation; a backbone with ``mean`` and ``std`` of its own
    (three numbers on 0..255 each) gets them normalised with those.

    Args:
        name: a key of ``BACKBONES``; a model of timm (``vit_small_patch14_dinov2``, with or without the tag
            of its weights; ``timm/...`` where a key of ``BACKBONES`` has the same name); or an import path.
        pretrained: None; ``timm`` (downloads the weights of the papers, by the tag in ``PRETRAINED_TAGS``, or
            timm's of the name); or a local ``.pth`` / ``.safetensors`` file with timm's, the authors' or, for
            a CNN, the published names, MXNet's ``.params`` of ResNet-38d, or a checkpoint of a method.
        pyramid: for a ViT: maps as a CNN has instead of tokens; a mapping holds arguments of ``ViTPyramid``.
        grad_checkpointing: compute blocks again in the backward pass instead of keeping what they computed.
        mean, std: three numbers each on 0..255 in place of those of the weights, such as tools/check_data.py
            measures on a data set.
        **options: arguments of the backbone, such as ``aux_layer`` or ``frozen``.

    Raises:
        KeyError: for an unknown name, or an option that this backbone does not have.
        FileNotFoundError: if the weights are not there and cannot be downloaded.
        ValueError: if the file holds another network, or for an option of a wrong kind.
    """
    others = ("name", "pretrained", "pyramid", "grad_checkpointing", "mean", "std")
    try:
        backbone = build_part(backbone_class(name), options, key="method.backbone", others=others)
    except (TypeError, AssertionError) as error:  # a wrong value, or an option that the variant decides
        raise ValueError(f"backbone '{name}' does not take {sorted(options)}: {error}") from error
    if pretrained is not None:
        tag = PRETRAINED_TAGS.get(name) or timm_name(name)
        state = timm_weights(name, tag) if str(pretrained) == "timm" else load_checkpoint(pretrained)
        load_pretrained(backbone, state, source=f"{pretrained} weights of {name}")
    if grad_checkpointing:
        _recompute(backbone, name)
    if pyramid is not False:
        if not isinstance(backbone, PlainViT):
            raise ValueError(f"'pyramid' is for ViTs; backbone '{name}' already gives a list of maps")
        options = {} if pyramid is True else dict(pyramid)
        backbone = build_part(ViTPyramid, options, backbone, key="method.backbone.pyramid")
    if mean is not None or std is not None:
        if not (mean and std and len(mean) == len(std) == 3 and min(std) > 0):
            raise ValueError(
                f"method.backbone.mean={mean} and std={std} must be for three channels, on 0..255"
            )
        backbone.mean, backbone.std = tuple(mean), tuple(std)
    if getattr(backbone, "mean", None) is not None:
        backbone.register_forward_pre_hook(lambda module, inputs: renormalize(module, *inputs))
    return backbone


def _recompute(backbone: nn.Module, name: str) -> None:
    """Switch gradient checkpointing on."""
    if hasattr(backbone, "net"):
        try:
            backbone.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"timm's {name} has no gradient checkpointing") from error
        return
    # The blocks of a ViT, the stages of a CNN.
    layers = getattr(backbone, "blocks", None) or [m for m in backbone.children() if len(list(m.children()))]
    if not len(layers):
        raise ValueError(f"backbone '{name}' does not support grad_checkpointing")
    checkpoint_layers(layers)
