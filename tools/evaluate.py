"""Score a folder of label images, or of CAM files over a sweep of thresholds, against the ground truth of a
split.

    python tools/evaluate.py --labels out/ config=configs/toco/voc.yaml --split val
    python tools/evaluate.py --cam logs/my_run/cam --model_path logs/my_run/last.pth --split train

The data set comes from a config or out of a checkpoint; ``key=value`` changes it (data.root=...,
data.options.masks=...).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf

from datasets.base import Split
from engine.config.load import load_config, override_config
from engine.data import load_split
from engine.scores.base import ImagePrediction, predicted_cams
from engine.scores.evaluation import Evaluation, has_mask
from engine.scores.records import provenance, short_name
from tools.options import complete, data_overrides, parse
from utils.cam_files import cam_path, label_path, load_cam
from utils.cli import run_main
from utils.files import made_with, require_files
from utils.image import read_mask
from utils.logging import progress_bar
from utils.weights import load_checkpoint


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments: config=FILE and key=value changes of it",
    )
    p.add_argument("--labels", help="folder of label images <name>.png")
    p.add_argument("--cam", help="folder of CAM files <name>.npz (tools/infer_cam.py)")
    p.add_argument("--model_path", help="checkpoint whose config describes the data set; or give config=FILE")
    p.add_argument("--split", help="split or list file (.txt); default: data.val_set")
    p.add_argument("--data_root", help="folder of the data set; default: that of the config")
    p.add_argument(
        "--threshold",
        type=float,
        help="fixed background threshold of CAMs; default: method.background_threshold, else 0.5",
    )
    p.add_argument(
        "--ignored",
        default="error",
        choices=("error", "background", "skip"),
        help="255 in a prediction: an error, background, or pixels left out (default %(default)s)",
    )
    p.add_argument(
        "--protocol", help="protocol id of the score; default: that of the inference that made the folder"
    )
    p.add_argument("--out", help="folder of scores.json; default: the scored folder")
    return p


def run(cfg: Mapping[str, Any]) -> Path:
    """Score a folder; returns where ``scores.json`` lies.

    Args:
        cfg: the flags of the command line by name; those left out keep their defaults.
    """
    options = complete(parser(), cfg)
    if bool(options.labels) == bool(options.cam):
        raise ValueError(
            "say what to score: either --labels FOLDER (label images) or --cam FOLDER (CAM files)"
        )
    folder = Path(options.labels or options.cam).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = data_config(options)
    name = options.split or config.data.val_set
    if not name:
        raise ValueError("the config names no data.val_set: say with --split which images to score")
    split = load_split(config.data, name)
    if not any(has_mask(record) for record in split.records):
        raise ValueError(
            f"split '{split.name}' has no masks to score against; check data.root and data.options.masks"
        )
    out = Path(options.out).expanduser() if options.out else folder
    records = [record for record in split.records if has_mask(record)]
    path_of = label_path if options.labels else cam_path
    hint = "finish the inference (it goes on where it stopped), or score what is there with --split LIST.txt"
    require_files(
        (path_of(folder, record.name) for record in records),
        f"predictions of split '{split.name}'",
        hint,
    )
    origin = made_with(folder)
    protocol = options.protocol or _protocol(origin, "labels" if options.labels else "cam", split)
    settings = {"folder": str(folder.absolute()), "made_with": origin}
    # Of which run a folder is, a data set's config does not know; `made_with` has the checkpoint's hash.
    source = provenance(config if options.model_path else None, split)
    threshold = config.get("method", {}).get("background_threshold", 0.5)
    threshold = float(threshold if options.threshold is None else options.threshold)
    evaluation = Evaluation(split, config.eval.scores, threshold)
    for record in progress_bar(records, desc="score", unit="img", leave=False):
        path = path_of(folder, record.name)
        if options.cam:
            evaluation.add(record, predicted_cams(load_cam(path), threshold))
        else:
            prediction = ImagePrediction({"seg": torch.from_numpy(read_mask(path))})
            try:
                evaluation.add(record, prediction, options.ignored)
            except ValueError as error:
                advice = "; pseudo labels with ignored pixels need --ignored background or skip"
                raise ValueError(f"{path}: {error}{advice if options.ignored == 'error' else ''}") from error
    if options.labels:
        protocols, settings = {"seg": protocol}, {**settings, "ignored": options.ignored}
    else:
        protocols = {name: protocol.replace("cam/", f"{name}/", 1) for name in ("cam", "aux_cam")}
    evaluation.report(out, protocols, settings, source)
    return out


def _protocol(origin: Mapping[str, Any], kind: str, split: Split) -> str:
    """The id that inference gave the folder, with the scored split; ``labels/<split>`` for other folders."""
    if "protocol" not in origin:
        return f"{kind}/{short_name(split)}"
    kind, _, rest = origin["protocol"].split("/", 2)
    return f"{kind}/{short_name(split)}/{rest}"


def data_config(options: argparse.Namespace) -> Any:
    """The config of the data set: ``config=FILE`` on the command line, or that inside a checkpoint."""
    files = [item.removeprefix("config=") for item in options.overrides if item.startswith("config=")]
    options.overrides = [item for item in options.overrides if not item.startswith("config=")]
    if options.model_path and not files:
        state = load_checkpoint(Path(options.model_path))
        if "config" not in state:
            raise ValueError(
                f"{options.model_path} holds no config: give config=configs/datasets/voc.yaml or another one"
            )
        return override_config(OmegaConf.create(state["config"]), data_overrides(options))
    if not files:
        raise ValueError(
            "say which data set: config=FILE (configs/datasets/voc.yaml, ...) or --model_path CHECKPOINT"
        )
    return load_config(files[-1], data_overrides(options))


if __name__ == "__main__":
    run_main(lambda: run(parse(parser())))
