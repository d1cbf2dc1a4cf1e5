"""What a checkpoint sees in some images, as a page: truth, CAMs, pseudo label, prediction, errors.

    python tools/visualize.py --model_path logs/my_run/last.pth --infer val --count 12

What is not there (masks, a decoder, tags) is left out. CAMs are those of the image's tags.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.common import CheckpointOptions
from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options(CheckpointOptions):
    count: int = option(12, "number of images, evenly spread")
    out: Path | None = option(None, "output folder; default: pictures/ beside the checkpoint")


def run(options: Options) -> Path:
    """Write ``report.html`` to a folder; returns its path."""
    from datasets.base import WeakSegDataset
    from engine.outputs import load_inputs
    from engine.report import REPORT, write_report
    from engine.seen import draw, spread, write_seen
    from methods.base import Predicts
    from utils.logging import progress_bar

    device, loaded, split = load_inputs(options)
    method = loaded.method
    if not isinstance(method, Predicts):
        raise ValueError(f"{type(method).__name__} predicts nothing to draw")
    dataset, size, step = WeakSegDataset(split), loaded.cfg.eval.size, loaded.step or 0
    chosen = progress_bar(sorted(spread(len(split), options.count)), desc="draw", unit="img", leave=False)
    samples = [draw(method, dataset, index, step=step, size=size, device=device) for index in chosen]
    out = options.out or loaded.path.parent / "pictures"
    write_seen(out, split, {"step": step, "threshold": method.background_threshold}, samples)
    page = write_report([out], out / REPORT, str(loaded.path))
    print(page)
    return page


if __name__ == "__main__":
    command_line(Options, run, __doc__)
