"""Turn a checkpoint of the authors' ToCo, MCC or SeCo program into one of ours, listing unmatched keys.

    python tools/convert_weights.py --model_path toco_vit_base.pth --out weights/toco_vit_base.pth

Inference tools read published checkpoints as they are; conversion is for going on from them: with
``method.target=methods.toco.ToCo`` the projection heads, which only training needs, are kept too. An
``--out`` that ends in ``.safetensors`` gets the weights alone, under our names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

from engine.inference import load_method
from tools.options import complete, parse
from utils.checkpoint import save_checkpoint
from utils.cli import run_main
from utils.config import to_plain


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments: key=value changes of the config that is stored with the weights",
    )
    p.add_argument(
        "--model_path", required=True, help="checkpoint of the authors' program (.pth, .safetensors)"
    )
    p.add_argument(
        "--out", required=True, help="file to write: .pth (a checkpoint) or .safetensors (weights alone)"
    )
    return p


def run(cfg: Mapping[str, Any]) -> Path:
    """Convert one file and return the path of the new one.

    Raises:
        ValueError: the file is of no known program, or ``--out`` has another suffix.
        FileExistsError: ``--out`` exists.
    """
    options = complete(parser(), cfg)
    out = Path(options.out)
    if out.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"--out {out} ends neither in .pth nor in .safetensors")
    if out.exists():
        raise FileExistsError(f"{out} exists; delete it or choose another --out")
    loaded = load_method(options.model_path, "cpu", options.overrides)
    print(loaded.describe())
    state = loaded.method.state_dict()
    if out.suffix == ".pth":
        config = to_plain(loaded.cfg)
        save_checkpoint(
            out,
            {
                "model": state,
                "config": config,
                "class_names": list(loaded.class_names),
                "step": loaded.step or 0,
            },
        )
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, out)
    print(f"written  {out} ({len(state)} tensors)")
    return out


if __name__ == "__main__":
    run_main(lambda: run(parse(parser())))
