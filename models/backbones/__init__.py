"""Backbones by name, with their pretrained weights.

A backbone maps normalised images to ``Tokens`` on a grid (``ViT``), or to a list of maps with ``dims`` and
``strides`` (``CNNBackbone``). One of another project is a name too: its import path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from models.backbones.cnn import CNNBackbone
from models.backbones.resnet import resnet50, resnet101
from models.backbones.resnet38d import ResNet38d
from models.backbones.vgg16d import VGG16d
from models.backbones.vit import ViT, ViTDemo, ViTPyramid, vit_factory
from utils.build import build_part, import_target, suggest
from utils.image import denormalize
from utils.logging import LOGGER
from utils.weights import load_checkpoint, rename_keys

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    # vit_base and deit_base are one network; only the pretrained weights differ.
    "vit_base_patch16_224": vit_factory(768, 12, 12),
    "vit_base_patch16_384": vit_factory(768, 12, 12, 384),
    "vit_large_patch16_224": vit_factory(1024, 24, 16),
    "vit_large_patch16_384": vit_factory(1024, 24, 16, 384),
    "deit_base_patch16_224": vit_factory(768, 12, 12),
    "deit_base_patch16_384": vit_factory(768, 12, 12, 384),
    "deit_small_patch16_224": vit_factory(384, 12, 6),
    "deit_tiny_patch16_224": vit_factory(192, 12, 3),
    # The "small" of 2020, 8 wide layers and nn.LayerNorm's own epsilon; timm has dropped it.
    "vit_small_patch16_224": vit_factory(768, 8, 8, mlp_ratio=3.0, qkv_bias=False, norm_layer=nn.LayerNorm),
    "vit_demo": ViTDemo,
    "resnet38d": ResNet38d,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "vgg16d": VGG16d,
}

# Explicit tags: timm's default weights of a name change (vit_base_patch16_224 is the augreg2 run today), the
# papers' do not.
PRETRAINED_TAGS = {
    "vit_base_patch16_224": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "vit_base_patch16_384": "vit_base_patch16_384.orig_in21k_ft_in1k",
    "vit_large_patch16_224": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_large_patch16_384": "vit_large_patch16_384.augreg_in21k_ft_in1k",
    "deit_base_patch16_224": "deit_base_patch16_224.fb_in1k",
    "deit_base_patch16_384": "deit_base_patch16_384.fb_in1k",
    "deit_small_patch16_224": "deit_small_patch16_224.fb_in1k",
    "deit_tiny_patch16_224": "deit_tiny_patch16_224.fb_in1k",
    # torchvision's IMAGENET1K_V1, which the published methods start from (there as resnet50-19c8e357,
    # resnet101-5d3b4d8f).
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "vgg16d": "vgg16.tv_in1k",
}


def backbone_class(name: str) -> Callable[..., nn.Module]:
    """What makes the backbone of a name: a key of ``BACKBONES``, or an import path.

    Raises:
        KeyError, ImportError: for an unknown one.
    """
    if name not in BACKBONES and "." not in name:
        raise KeyError(f"there is no backbone '{name}'{suggest(name, BACKBONES)}")
    return BACKBONES[name] if name in BACKBONES else import_target(name)


def create_backbone(
    name: str,
    pretrained: str | Path | None = None,
    pyramid: bool | Mapping[str, Any] = False,
    **options: Any,
) -> nn.Module:
    """Build a backbone.

    Images come normalised with ImageNet's mean and deviation; a backbone with ``mean`` and ``std`` of its own
    (three numbers on 0..255 each) gets them normalised with those.

    Args:
        name: a key of ``BACKBONES``, or an import path.
        pretrained: None; ``timm`` (downloads the weights of the papers, by the tag in ``PRETRAINED_TAGS``);
            or a local ``.pth`` / ``.safetensors`` file: timm's parameter names for a ViT, the published ones
            for a CNN (``tools/convert_weights.py`` makes such a file for resnet38d), or a checkpoint of a
            method with the same backbone.
        pyramid: for a ViT: give the maps of ``ViTPyramid`` as a CNN does, instead of tokens; a mapping holds
            its arguments, ``layers`` and ``shallow_layer``.
        **options: arguments of the backbone, such as ``aux_layer`` or ``frozen``.

    Raises:
        KeyError: for an unknown name, or an option that this backbone does not have.
        FileNotFoundError: if the weights are not there and cannot be downloaded; says what to put where.
        ValueError: if the file holds another network, or for an option of a wrong kind.
    """
    others = ("pretrained", "pyramid")
    try:
        backbone = build_part(backbone_class(name), options, key="method.backbone", others=others)
    except TypeError as error:  # a value of a wrong kind, or an option that the variant decides itself
        raise ValueError(f"backbone '{name}' does not take {sorted(options)}: {error}") from error
    if pretrained is not None:
        if Path(pretrained).suffix == ".params":
            raise ValueError(f"{pretrained} is a file of MXNet; tools/convert_weights.py makes ours of it")
        state = timm_weights(name) if str(pretrained) == "timm" else load_checkpoint(pretrained)
        load_pretrained(backbone, state, source=f"{pretrained} weights of {name}")
    if pyramid is not False:
        if not isinstance(backbone, ViT):
            raise ValueError(f"'pyramid' is for ViTs; backbone '{name}' gives a list of maps as it is")
        options = {} if pyramid is True else dict(pyramid)
        backbone = build_part(ViTPyramid, options, backbone, key="method.backbone.pyramid")
    if getattr(backbone, "mean", None) is not None:
        backbone.register_forward_pre_hook(_renormalize)
    return backbone


def _renormalize(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *others = inputs
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    return (denormalize(image) - mean) / std, *others


def timm_weights(name: str) -> dict[str, Tensor]:
    """Weights of the model ``PRETRAINED_TAGS[name]``, from timm's cache or the network."""
    if name not in PRETRAINED_TAGS:
        raise ValueError(
            f"timm has no weights for '{name}' (it has them for {', '.join(PRETRAINED_TAGS)}); give "
            "pretrained a local file (tools/convert_weights.py makes one for resnet38d) or null"
        )
    tag = PRETRAINED_TAGS[name]
    try:
        return timm.create_model(tag, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm passes on whatever its download libraries raise
        raise FileNotFoundError(
            f"the pretrained weights '{tag}' could not be downloaded "
            f"({type(error).__name__}: {str(error)[:200]}). "
            f"Without a network, fetch https://huggingface.co/timm/{tag}/resolve/main/model.safetensors "
            "on another machine and set method.backbone.pretrained to the path of that file"
        ) from error


def load_pretrained(backbone: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load ImageNet weights by name; the classification head of the file is left out.

    Layers that no ImageNet file has (``new_layers`` of a CNN) keep their random values, which is logged.

    Raises:
        ValueError: if a parameter is missing, left over or of another shape.
    """
    backbone.load_state_dict(backbone.state_dict() | pretrained_weights(backbone, state, source))


def pretrained_weights(backbone: nn.Module, state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights of ``state`` under the names of the backbone, checked as ``load_pretrained`` says."""
    for entry in ("model", "state_dict"):  # DeiT's own files nest the weights
        if isinstance(state.get(entry), Mapping):
            state = state[entry]
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    # A checkpoint of this project holds a whole method.
    own = {re.sub(r"^backbone\.(vit\.)?", "", k): v for k, v in state.items() if k.startswith("backbone.")}
    cnn = isinstance(backbone, CNNBackbone)
    head = backbone.classifier if cnn else ("head.", "head_dist.", "pre_logits.")
    weights = {key: value.float() for key, value in (own or state).items() if not key.startswith(head)}
    target = backbone.state_dict()
    optional: set[str] = set()
    if cnn:
        weights = rename_keys(weights, backbone.file_names)
        # Nothing reads the counters of batch norms, and old files do not have them.
        optional = {key for key in target if key.endswith("num_batches_tracked")}
        if new := [key for key in target if key.startswith(backbone.new_layers) and key not in weights]:
            LOGGER.warning(f"the {source} have no {', '.join(new)}: these start from random values")
            optional |= set(new)
    problems = [f"{key} is missing" for key in target if key not in weights and key not in optional]
    problems += [f"{key} has no place" for key in weights if key not in target]
    problems += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in target.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the {source} do not fit: {'; '.join(problems[:5])}{more}")
    return weights
