"""What a checkpoint sees in some images, as a page: truth, CAMs, pseudo label, prediction, errors; for SeCo
also the local crops that it decomposes an image into, with their category tags.

    python tools/visualize.py --model_path logs/my_run/last.pth --infer val --count 12
    python tools/visualize.py --model_path logs/my_run/last.pth --names 2007_000033 --labels crf:crf

What is not there (masks, a decoder, tags) is left out. CAMs are those of the image's tags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import CheckpointOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(CheckpointOptions):
    """Options of the tool."""

    names: str | None = option(
        None, "images to show, separated by commas; default: --count of them, evenly spread over the split"
    )
    count: int = option(12, "number of images")
    size: int | None = option(None, "side of the square that the network sees; default: eval.size", least=1)
    labels: list[str] = option([], "label images to compare with, also several: TITLE:FOLDER")
    out: Path | None = option(None, "output folder; default: pictures/ beside the checkpoint")


def run(options: Options) -> Path:
    """Write ``report.html`` to a folder; returns its path."""
    import torch

    from datasets.base import WeakSegDataset
    from engine.outputs import load_inputs
    from engine.report import REPORT, write_report
    from engine.seen import draw, encoded, write_seen
    from methods.base import Predicts
    from utils.cam_files import label_path
    from utils.image import read_mask
    from utils.logging import progress_bar

    device, loaded, split = load_inputs(options)
    if not isinstance(loaded.method, Predicts):
        raise ValueError(f"{type(loaded.method).__name__} predicts nothing to draw")
    dataset, folders, samples = WeakSegDataset(split), _label_folders(options.labels), []
    size, step = options.size or loaded.cfg.eval.size, loaded.step or 0
    chosen = _chosen(split, options.names, options.count)
    for index in progress_bar(chosen, desc="draw", unit="img", leave=False):
        sample = draw(loaded.method, dataset, index, step=step, size=size, device=device)
        for title, folder in folders.items():
            path = label_path(folder, sample["name"])
            if path.is_file():
                sample["maps"][title] = encoded(torch.from_numpy(read_mask(path)))
        samples.append(sample)
    out = options.out or loaded.path.parent / "pictures"
    write_seen(out, split, {"step": step, "threshold": loaded.method.background_threshold}, samples)
    page = write_report([out], out / REPORT, str(loaded.path))
    print(page)
    return page


def _chosen(split: Any, names: str | None, count: int) -> list[int]:
    from engine.seen import spread

    if names is None:
        return sorted(spread(len(split), count))
    index_of = {record.name: i for i, record in enumerate(split.records)}
    unknown = [name for name in names.split(",") if name not in index_of]
    if unknown:
        raise ValueError(f"split '{split.name}' has no image '{unknown[0]}'")
    return [index_of[name] for name in names.split(",")]


def _label_folders(items: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for item in items:
        title, colon, folder = item.partition(":")
        if not colon or not Path(folder).is_dir():
            raise ValueError(f"--labels {item} is not TITLE:FOLDER with a folder that exists")
        folders[title] = Path(folder)
    return folders


if __name__ == "__main__":
    command_line(Options, run, __doc__)
