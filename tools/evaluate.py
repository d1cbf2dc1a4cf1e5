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

from datasets.base import Record, Split
from engine.config.load import load_config, override_config
from engine.data import load_split
from engine.evaluator import confusion_table, pair_table, provenance, score_record, score_table, text_table
from engine.outputs import short_name
from engine.scores.confusion import ConfusionMatrix, ThresholdSweep
from engine.scores.report import count_pixels, has_mask, report, report_labels, scored_images
from ops.cam import strongest_class
from tools.options import complete, data_overrides, parse
from utils.cam_files import CamFile, cam_path, label_path, load_cam
from utils.cli import run_main
from utils.distributed import is_main
from utils.files import made_with, require_files
from utils.image import read_mask
from utils.logging import progress_bar
from utils.weights import load_checkpoint

THRESHOLDS = tuple(i / 100 for i in range(60))  # the scan of the multi-stage papers
SHOWN = 5  # every so many of them stand in the printed table


class CamSweep:
    """Scores of CAMs over background thresholds: 0.00, 0.01 ... 0.59, and at the fixed one.

    Args:
        threshold: the fixed one; the others tell what the maps hold, this one what a user gets.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device | str,
        threshold: float,
        thresholds: tuple[float, ...] = THRESHOLDS,
    ) -> None:
        self.split, self.device, self.threshold = split, device, threshold
        self.thresholds = thresholds
        self.sweeps = {
            name: ThresholdSweep(split.num_classes, (*thresholds, threshold), device)
            for name in ("cam", "aux_cam")
        }

    def add(self, record: Record, cams: CamFile) -> None:
        """Count one image; records without mask are passed over."""
        if not has_mask(record):
            return
        assert record.mask is not None
        truth = torch.from_numpy(read_mask(record.mask))
        if tuple(truth.shape) != cams.size:
            raise ValueError(
                f"mask {record.mask} is {tuple(truth.shape)}, the CAMs of '{record.name}' {cams.size} "
                "(rows, columns)"
            )
        class_ids = cams.class_ids.to(self.device)
        for name, cam in (("cam", cams.cam), ("aux_cam", cams.aux_cam)):
            if cam is None:
                continue
            score, label = strongest_class(cam.to(self.device), class_ids, cams.size)
            self.sweeps[name].update(truth, label, score)

    def reduce(self) -> CamSweep:
        """Sum over all processes; a collective call of those that share the images out. Returns itself."""
        for sweep in self.sweeps.values():
            sweep.reduce()
        return self

    def report(
        self, folder: Path, protocol: str, settings: Mapping[str, Any], source: Mapping[str, Any]
    ) -> None:
        """Print sweep and tables (at the fixed threshold), write ``scores.json``; main process only."""
        if not is_main():
            return
        scores = {name: sweep.scores() for name, sweep in self.sweeps.items() if sweep.matrix.counts.any()}
        scored = scored_images(self.split, self.sweeps["cam"].matrix)
        if not scored:
            return
        names, source = self.split.class_names, {**source, "scored_images": scored}
        rows = [
            [f"{t:.2f}", *(f"{100 * tried[t].miou:.2f}" for tried in scores.values())]
            for t in self.thresholds[::SHOWN]
        ]
        print(text_table(["Threshold", *(f"{name} mIoU" for name in scores)], rows))
        fixed = {name: tried[self.threshold] for name, tried in scores.items()}
        print(score_table(fixed, names))
        print(confusion_table(fixed, names))
        print(pair_table(next(iter(fixed.values())), names))
        records = []
        for name, tried in scores.items():
            best = max(self.thresholds, key=lambda t: tried[t].miou)
            own = protocol.replace("cam/", f"{name}/", 1)
            curve = {f"{t:.2f}": tried[t].miou for t in self.thresholds}
            records += [
                score_record(
                    f"{own}@{self.threshold:.2f}",
                    tried[self.threshold],
                    names,
                    settings,
                    source,
                    threshold=self.threshold,
                ),
                # The best threshold is chosen on the scored images themselves: an upper bound, not a result.
                score_record(
                    f"{own}@best",
                    tried[best],
                    names,
                    settings,
                    source,
                    threshold=best,
                    miou_by_threshold=curve,
                ),
            ]
        report(folder, records)


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
    if options.labels:
        _score_labels(folder, out, split, records, protocol, {**settings, "ignored": options.ignored}, source)
    else:
        method_threshold = config.get("method", {}).get("background_threshold", 0.5)
        sweep = CamSweep(
            split, "cpu", float(method_threshold if options.threshold is None else options.threshold)
        )
        for record in progress_bar(records, desc="score", unit="img", leave=False):
            sweep.add(record, load_cam(cam_path(folder, record.name)))
        sweep.report(out, protocol, settings, source)
    return out


def _protocol(origin: Mapping[str, Any], kind: str, split: Split) -> str:
    """The id that inference gave the folder, with the scored split; ``labels/<split>`` for other folders."""
    if "protocol" not in origin:
        return f"{kind}/{short_name(split)}"
    kind, _, rest = origin["protocol"].split("/", 2)
    return f"{kind}/{short_name(split)}/{rest}"


def _score_labels(
    folder: Path,
    out: Path,
    split: Split,
    records: list[Record],
    protocol: str,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    matrix = ConfusionMatrix(split.num_classes)
    for record in progress_bar(records, desc="score", unit="img", leave=False):
        count_pixels(matrix, record, read_mask(label_path(folder, record.name)), settings["ignored"])
    try:
        matrix.scores()
    except ValueError as error:
        advice = "; pseudo labels with ignored pixels need --ignored background or skip"
        raise ValueError(f"{folder}: {error}{advice if settings['ignored'] == 'error' else ''}") from error
    report_labels(out, matrix, split, protocol, settings, source)


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
