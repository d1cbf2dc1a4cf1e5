"""Try backbones by name with random weights, and write the table of docs/backbones.md.

python bench/backbones.py --out docs/backbones.md
python bench/backbones.py --names vit_small_patch14_dinov2 swin_tiny_patch4_window7_224
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

NAMES = [
    "vit_tiny_patch16_224.augreg_in21k",
    "deit_tiny_patch16_224",
    "timm/deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "convnext_atto",
    "convnextv2_atto",
    "pvt_v2_b0",
    "timm/resnet18",
    "regnety_002",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "mambaout_femto",
    "fastvit_t8",
    "eva02_tiny_patch14_224",
    "xcit_nano_12_p8_224",
    "vit_pe_core_tiny_patch16_384",
    "deit3_small_patch16_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "flexivit_small",
    "vit_base_patch32_clip_224.openai",
    "swin_tiny_patch4_window7_224",
    "hrnet_w18_small",
    "vitamin_small_224",
    "hieradet_small",
    "cait_xxs24_224",
    "beit_base_patch16_224",
    "coatnet_nano_rw_224",
    "volo_d1_224",
]

TEXT = """# Backbones

`method.backbone.name` is a name of this project, any model of timm by its name (with or without the tag of
its weights; `timm/NAME` where both have one), or the import path of a class.
`method.backbone.pretrained=timm` downloads the weights of the tag; a local file may have timm's names or
the authors'. Plain ViTs give tokens, which SeCo, ToCo, MCC and `CAMNetwork` need. All others give maps,
which the CNN methods need and a ViT gives with `method.backbone.pyramid=true`. The segmentor takes both.
Images reach a network with its own mean and deviation.

| option of `method.backbone` | |
|---|---|
| `frozen` | `all`, or names of parts that are not trained: `[patch_embed, blocks.0]` |
| `drop_path_rate` | stochastic depth |
| `grad_checkpointing` | `true`: less memory, a third more time, the same numbers |
| `img_size` | side whose token grid the position embedding has; any other size is interpolated |
| `antialias` | `false`: positions are resized as the published single-stage programs do, not as timm does |
| `options` | further arguments of timm's class |

`optim.layer_decay=0.75` lets earlier layers learn more slowly. `train.ema=0.999` keeps a moving average of
the weights: scores and checkpoints are of the average. Crops that are no multiple of the patch are rounded
down.

`python bench/backbones.py --out docs/backbones.md` writes this file. Columns: two training steps (SeCo on
tokens, the segmentor on maps) on an image of {train} px, and inference at scales 1 and 0.5, with random
weights; milliseconds of one image on {threads} CPU threads of a machine that was not idle, at {sizes} px.
`= timm` is the largest difference between the tokens and timm's own `forward_features`. Licences are those
that timm names for the weights. DINOv3 (dinov3-license) and SAM 3, whose masks can refine labels, have
licences of their own: read them before you publish weights or labels.

| name | gives | patch or strides | prefix | crop | = timm | forward | training | inference | licence |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(kw_only=True)
class Options:
    """Which backbones, and where the table goes."""

    names: list[str] = option(NAMES, "names of backbones")
    sizes: list[int] = option([224, 448], "sides of the images, pixels", least=1)
    threads: int = option(1, "CPU threads", least=1)
    out: Path | None = option(None, "Markdown file; default: none, the rows are only printed")


def run(options: Options) -> list[str]:
    """Print and return a row for each backbone; what fails is in its row."""
    import torch

    from bench.try_backbone import row

    torch.set_num_threads(options.threads)
    rows = []
    for name in options.names:
        try:
            rows.append(row(name, options.sizes))
        except (ImportError, KeyError, ValueError) as error:
            rows.append(f"| {name} | refused: {str(error).partition('. ')[0]} |" + 8 * " |")
        print(rows[-1], flush=True)
        if options.out:
            sizes = " and ".join(map(str, options.sizes))
            text = TEXT.format(train=options.sizes[0], sizes=sizes, threads=options.threads)
            options.out.write_text(text + "\n".join(rows) + "\n")
    return rows


if __name__ == "__main__":
    command_line(Options, run, __doc__)
