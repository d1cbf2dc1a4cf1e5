"""The authors' parameter names for our parameters, and checkpoints filled with formula weights."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from tests.formula import Formula

_NAMES = (
    (r"^backbone\.", "encoder."),
    (r"^teacher_backbone\.", "encoder_k."),
    (r"^queue_tags$", "queue_label_flag"),
    (r"^teacher_head\.", "proj_head_t."),
    (r"^decoder\.branches\.", "decoder.c"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


def author_name(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def author_state(
    method: nn.Module, formula: Formula, made: dict[tuple[str, tuple[int, ...]], Tensor] | None = None
) -> dict[str, Tensor]:
    """Formula weights under the authors' names, with the prefix of distributed training.

    Args:
        made: weights by name and shape, to be used again and added to: those of a ViT-B take seconds.
    """
    made = {} if made is None else made
    state = {}
    for key, value in method.state_dict().items():
        name = author_name(key)
        place = formula.prefix + name, value.shape
        if place not in made:
            made[place] = formula.weight(name, value.shape)
        state[f"module.{name}"] = made[place]
    return state


def masked_tokens(backbone: nn.Module, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens (B, D) and patch tokens (B, hw, D) where no token attends to masked patches, as in MCC.

    Args:
        mask: (B, h, w) or (B, hw) bool, True where a patch is no key; it still attends to the others.
    """
    is_key = F.pad(~mask.flatten(1), (1, 0), value=True)[:, None, None, :]
    x = backbone.embed(image)
    for block in backbone.blocks:
        x = block(x, attn_mask=is_key)
    x = backbone.norm(x)
    return x[:, 0], x[:, 1:]
