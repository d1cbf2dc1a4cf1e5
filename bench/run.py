"""Measure parts of the project against each other and against the compiled originals.

    python bench/run.py --part crf --labels 21 --threads 2
    python bench/run.py --part energy --size 224 224 --batch 4 --image photo.jpg
    python bench/run.py --part walk --labels 3 --squaring

The numbers are medians of ``torch.utils.benchmark``. The originals take part where they can be imported:
``pydensecrf`` (pip install pydensecrf2) for crf, rloss's ``bilateralfilter`` for energy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    """What is measured, and on what."""

    part: str = option("crf", "what to measure", choices=("crf", "energy", "walk"))
    labels: int = option(21, "labels of the maps, classes of the walk", least=1)
    size: list[int] = option([375, 500], "height and width, pixels", length=2, least=1)
    batch: int = option(1, "images in a call", least=1)
    image: Path | None = option(None, "photo to measure on; default: a generated one", reads=True)
    preset: str = option("toco", "parameters of the CRF")
    steps: int = option(10, "mean-field steps of the CRF")
    exp_times: int = option(8, "2 ** exp_times steps of the walk")
    squaring: bool = option(False, "also the authors' walk, which squares the dense matrix: minutes on a CPU")
    threads: int = option(1, "CPU threads", least=1)
    seconds: float = option(5.0, "time for each measurement")
    device: str = option("cpu", "cpu or cuda")


def run(options: Options) -> dict[str, float]:
    """Print a line for each way; returns their median seconds."""
    import torch
    from torch.utils.benchmark import Timer

    from bench.calls import PARTS

    torch.manual_seed(0)
    calls = PARTS[options.part](options)
    medians = {}
    for name, call in calls.items():
        timer = Timer("call()", globals={"call": call}, num_threads=options.threads)
        medians[name] = timer.blocked_autorange(min_run_time=options.seconds).median
        ratio = medians[name] / next(iter(medians.values()))
        print(f"{name:20} {medians[name]:9.3f} s   {ratio:6.2f}", flush=True)
    return medians


if __name__ == "__main__":
    command_line(Options, run, __doc__)
