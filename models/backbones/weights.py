"""Pretrained weights of backbones, from files in circulation or from timm."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.backbones.cnn import CNNBackbone
from models.backbones.timm_net import near_names
from models.backbones.vit import ViT, resize_pos_embed
from utils.build import keyword_names
from utils.logging import LOGGER
from utils.weights import rename_keys

# Where checkpoints keep the weights that are meant for use, the best first: averages, DINO's teacher, ...
ENTRIES = ("state_dict_ema", "model_ema", "teacher", "model", "state_dict", "module", "student")
# In front of names: of wrappers, of DINO, and of the methods of this project.
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)*(backbone\.)?(vit\.)?(net\.)?")
HEADS = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "attn_pool.")


def timm_weights(name: str, tag: str | None) -> dict[str, Tensor]:
    """Weights of the timm model ``tag`` (None: there is none), from timm's cache or the network."""
    cfg = timm.models.get_pretrained_cfg(tag) if tag else None
    if tag is None or cfg is None or not cfg.has_weights:
        near = near_names(tag or name)
        raise ValueError(
            f"timm has no weights for '{name}'; it has them for {', '.join(near) or 'no similar name'}. Give "
            "pretrained a local file (for resnet38d the authors' .params) or null"
        )
    try:
        return timm.create_model(tag, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm passes on whatever its download libraries raise
        file = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
        raise FileNotFoundError(
            f"the pretrained weights '{tag}' could not be downloaded ({type(error).__name__}: "
            f"{str(error)[:200]}). Without a network, fetch https://huggingface.co/timm/{file}/resolve/main/"
            "model.safetensors on another machine and set method.backbone.pretrained to that file"
        ) from error


def load_pretrained(backbone: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load ImageNet weights by name; the classification head of the file is left out.

    Layers that no ImageNet file has (``new_layers`` of a CNN) keep their random values, which is logged.

    Raises:
        ValueError: if a parameter is missing, left over or of another shape.
    """
    inner = getattr(backbone, "net", backbone)
    inner.load_state_dict(inner.state_dict() | pretrained_weights(backbone, state, source))


def pretrained_weights(backbone: nn.Module, state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights of ``state`` under the names of the backbone, checked as ``load_pretrained`` says."""
    state, target = plain_names(state, source), getattr(backbone, "net", backbone).state_dict()
    if "dist_token" in state and "dist_token" not in target:
        name = "deit_tiny_distilled_patch16_224"
        raise ValueError(f"the {source} are of a distilled DeiT, a backbone of its own, such as {name}")
    weights, unused = _for_timm(backbone, state, source) if hasattr(backbone, "whole") else (state, HEADS)
    # Nothing reads the counters of batch norms, and old files do not have them.
    optional = {key for key in target if key.endswith("num_batches_tracked")}
    if isinstance(backbone, CNNBackbone):
        unused = (*unused, *backbone.classifier)
        weights = rename_keys(weights, backbone.file_names)
        if new := [key for key in target if key.startswith(backbone.new_layers) and key not in weights]:
            LOGGER.warning(f"the {source} have no {', '.join(new)}: these start from random values")
            optional |= set(new)
    weights = {k: v.float() for k, v in weights.items() if k in target or not k.startswith(tuple(unused))}
    if isinstance(backbone, ViT) and "pos_embed" in weights:
        side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
        if weights["pos_embed"].shape[1] == 1 + side * side:
            grid = backbone.patch_embed.grid_size
            weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], (side, side), grid)
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


def plain_names(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights of a checkpoint, without what programs put around them or before their names."""
    while entry := next((name for name in ENTRIES if isinstance(state.get(name), Mapping)), None):
        state = state[entry]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"the {source} have no weights, only {', '.join(map(str, list(state)[:8]))}")
    # A checkpoint of a method, or of DINO, holds more than the backbone.
    own = {key: value for key, value in tensors.items() if "backbone." in PREFIXES.match(key)[0]}
    return {PREFIXES.sub("", key): value for key, value in (own or tensors).items()}


def _for_timm(
    backbone: Any, state: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights as timm names them, on the grids of the network, and the names of what it does not keep.

    timm's own filters know the files of the authors: DINOv2, EVA, Swin, ConvNeXt, CLIP, ...
    """
    with torch.device("meta"):
        whole = backbone.whole()
    module = sys.modules[type(whole).__module__]
    change = getattr(module, "checkpoint_filter_fn", None)
    if change is not None:
        # The authors of DeiT III call a scale gamma_1, as timm does in other families.
        deit3 = "adapt_layer_scale" in (keyword_names(change) or ()) and any("gamma_1" in k for k in state)
        try:
            state = change(state, whole, **({"adapt_layer_scale": True} if deit3 else {}))
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            name = whole.pretrained_cfg.get("architecture", "this network")
            first = str(error).partition("\n")[0]
            raise ValueError(f"the {source} belong to another network than {name}: {first}") from error
    classifier = whole.pretrained_cfg.get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else classifier
    pooling = set(whole.state_dict()) - set(backbone.net.state_dict())
    return state, (*HEADS, *(f"{name}." for name in classifier), *pooling)
