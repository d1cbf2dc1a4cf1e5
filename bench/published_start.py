"""The first weights of the authors' ToCo program, as a file for ``train.resume`` (docs/results.md).

    python bench/published_start.py --out start.safetensors

The program seeds one generator and draws encoder, both projection heads, decoder and classifiers in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

if TYPE_CHECKING:
    from methods.toco import ToCo
    from models.backbones.vit import ViT


@dataclass(kw_only=True)
class Options:
    out: Path = option(meaning="file to write, .safetensors")
    config: str = option("bench/configs/toco/mini.yaml", "of a ToCo run")
    overrides: list[str] = option([], "changes of the config, for example seed=1")


def run(options: Options) -> Path:
    """Write all weights that the config's ToCo has before its first step; returns the file."""
    from safetensors.torch import save_file

    from engine.config.load import load_config
    from engine.data import load_split
    from engine.method import build_method
    from utils.seed import seed_everything

    cfg = load_config(options.config, options.overrides)
    num_classes = load_split(cfg.data, cfg.data.train_set).num_classes
    seed_everything(cfg.seed, cfg.train.deterministic)
    method = build_method(cfg, num_classes)
    draw_published_start(method, cfg.method.get("head"))
    save_file({key: value.contiguous() for key, value in method.state_dict().items()}, options.out)
    return options.out


def draw_published_start(method: ToCo, head: Mapping[str, Any] | None = None) -> None:
    """Draw the new layers of a ToCo as the authors' program draws them from torch's seed.

    Args:
        head: widths of its projection head, ``method.head`` of the config.
    """
    import torch

    from models.heads import LargeFOV, ProjectionHead

    if not isinstance(method.decoder, LargeFOV):
        raise ValueError("the authors' start is of their decoder: method.decoder must be large_fov")
    width = method.backbone.embed_dim
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators too.
        torch.default_generator.manual_seed(torch.initial_seed())
        left = draws_of_encoder(method.backbone)
        while left:  # in parts, for a ViT-L draws half a billion
            left -= torch.rand(min(left, 1 << 24)).numel()
        # The teacher's head is drawn, then overwritten.
        drawn, _ = (ProjectionHead(width, **(head or {})) for _ in range(2))
        convolutions = method.decoder.conv6, method.decoder.conv7, method.decoder.conv8
        for layer in (*convolutions, method.classifier, method.aux_classifier):
            layer.reset_parameters()
    for own in (method.proj_head, method.teacher_head):
        own.load_state_dict(drawn.state_dict())


def draws_of_encoder(backbone: ViT) -> int:
    """How many numbers the authors' encoder draws before its pretrained weights replace them: every layer as
    PyTorch makes it, the matrices once more, and the 1000-way head that nobody uses.
    """
    from torch import nn

    linear = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    linear.append(nn.Linear(backbone.embed_dim, 1000, device="meta"))
    matrices = sum(layer.weight.numel() for layer in linear)
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    rest = (*backbone.patch_embed.parameters(), backbone.pos_embed, backbone.cls_token)
    return 2 * matrices + biases + sum(parameter.numel() for parameter in rest)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
