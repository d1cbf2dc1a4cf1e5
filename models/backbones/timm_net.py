"""timm's models by name: which there are, what they give, and how they take images of any size.

A name is timm's (``vit_small_patch14_dinov2``), with a tag of its weights (``.lvd142m``) or without one. In
front of a name that this project has itself, ``timm/`` asks for timm's network.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from utils.build import keyword_names
from utils.image import denormalize


def timm_name(name: str) -> str | None:
    """The name in timm, ``architecture`` or ``architecture.tag``; None if timm has no such model."""
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        return None
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # there is no such tag
        return None
    return name


def near_names(name: str, ours: Iterable[str] = ()) -> list[str]:
    """Up to four names that look like ``name``: of ``ours``, and of models that timm has weights for."""
    name = name.removeprefix("timm/")
    tagged = timm.list_models(pretrained=True)
    plain = dict.fromkeys(tag.partition(".")[0] for tag in tagged)
    # A wrong tag of a known architecture: its own tags, however little they look like it.
    tags = [tag for tag in tagged if tag.partition(".")[0] == name.partition(".")[0] and "." in name]
    # Names end with patch and image size, which a typing error leaves out.
    starts: dict[str, str] = {}
    for known in (*ours, *plain):
        starts.setdefault(known[: len(name)], known)
    return tags[:4] or [starts[start] for start in get_close_matches(name, starts, n=4, cutoff=0.6)]


def timm_net(name: str, options: Mapping[str, Any] | None = None, **arguments: Any) -> nn.Module:
    """The whole network of timm, without classifier and with random weights.

    Args:
        name: as ``timm_name`` gives it.
        options: further arguments of timm's class.
        **arguments: the same, left out where None.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    return timm.create_model(name, num_classes=0, **any_size(name), **given, **(options or {}))


@cache
def any_size(name: str) -> dict[str, bool]:
    """The arguments with which a model takes images of other sizes than it was trained on."""
    with torch.device("meta"):
        accepted = keyword_names(type(timm.create_model(name, num_classes=0))) or ()
    choices = {"dynamic_img_size": True, "strict_img_size": False}
    return next(({key: value} for key, value in choices.items() if key in accepted), {})


def strides_of(net: nn.Module) -> list[int]:
    """Pixels per position of each of the maps that ``forward_intermediates`` can give."""
    return [info["reduction"] for info in net.feature_info]


def own_normalisation(net: nn.Module) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation on 0..255 that the weights expect; None: ImageNet's, which all images come with."""
    cfg = net.pretrained_cfg
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if (mean, std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return None, None
    return tuple(255 * m for m in mean), tuple(255 * s for s in std)


def renormalize(backbone: nn.Module, image: Tensor) -> Tensor:
    """Images with ImageNet's normalisation, with that of the backbone (``mean`` and ``std`` on 0..255)."""
    if getattr(backbone, "mean", None) is None:
        return image
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    return (denormalize(image) - mean) / std
