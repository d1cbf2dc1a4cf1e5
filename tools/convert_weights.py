"""Turn a checkpoint of the authors' programs into one of ours, listing unmatched keys.

    python tools/convert_weights.py --model_path toco_vit_base.pth --out weights/toco_vit_base.pth

Inference tools read published checkpoints as they are; conversion is for going on from them: with
``method.target=methods.toco.ToCo`` the projection heads, which only training needs, are kept too.

The ImageNet weights of ResNet-38d exist as a file of MXNet, which need not be installed to convert it:

    python tools/convert_weights.py --model_path resnet38d.params --out weights/resnet38d.safetensors

Its name there is ``ilsvrc-cls_rna-a1_cls1000_ep-0001.params``. ``method.backbone.pretrained`` takes the
result, and the same weights in the ``.pth`` file that went around with the published methods too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    """Options of the tool."""

    model_path: Path = option(
        meaning="checkpoint of the authors' program (.pth, .safetensors), or MXNet's ResNet-38d (.params)",
        reads=True,
    )
    out: Path = option(meaning="file to write, .pth or .safetensors")
    overrides: list[str] = option([], "changes of the config that is stored with the weights")


def run(options: Options) -> Path:
    """Convert one file and return the path of the new one.

    Raises:
        ValueError: the file is of no known program, or ``--out`` or an override does not go with it.
        FileExistsError: ``--out`` exists.
    """
    from engine.config.load import to_plain
    from engine.inference import load_method
    from utils.weights import save_checkpoint

    out = options.out
    if out.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"--out {out} must end in .pth or .safetensors")
    if out.exists():
        raise FileExistsError(f"{out} exists; delete it or choose another --out")
    if options.model_path.suffix == ".params":
        if options.overrides:
            raise ValueError(f"weights of a backbone have no config to change with {options.overrides[0]}")
        return convert_resnet38d(options.model_path, out)
    loaded = load_method(options.model_path, "cpu", options.overrides)
    print(loaded.describe())
    state = loaded.method.state_dict()
    about = {
        "config": to_plain(loaded.cfg),
        "class_names": list(loaded.class_names),
        "step": loaded.step or 0,
    }
    save_checkpoint(out, {"model": state, **about})
    print(f"written  {out} ({len(state)} tensors)")
    return out


def convert_resnet38d(path: Path, out: Path) -> Path:
    """Write MXNet's ImageNet weights of ResNet-38d as pretrained weights of our backbone.

    Raises:
        ValueError: if the file holds another network, or ``out`` is no ``.safetensors`` file.
    """
    import torch

    from models.backbones import create_backbone, pretrained_weights
    from models.backbones.resnet38d import MXNET_CLASSIFIER, MXNET_NAMES
    from utils.mxnet_params import load_mxnet_params
    from utils.weights import rename_keys

    if out.suffix != ".safetensors":
        raise ValueError(f"pretrained weights are written as .safetensors, so --out cannot be {out}")
    arrays = load_mxnet_params(path)
    dropped = [name for name in arrays if name.startswith(MXNET_CLASSIFIER)]
    state = rename_keys({name: a for name, a in arrays.items() if name not in dropped}, MXNET_NAMES)
    with torch.device("meta"):  # only its names and shapes are of interest
        backbone = create_backbone("resnet38d", width=len(state.get("conv1a.weight", ())) or 64)
    state = pretrained_weights(backbone, state, source=f"weights in {path}")
    save_weights(state, out)
    print(f"model    {path} (MXNet, {len(arrays)} arrays)")
    for name in dropped:
        print(f"         not used: {name}")
    print(f"written  {out} ({len(state)} tensors)")
    return out


def save_weights(state: Mapping[str, Any], out: Path) -> None:
    """Write tensors by name to a ``.safetensors`` file."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, out)


if __name__ == "__main__":
    command_line(Options, run, __doc__)
