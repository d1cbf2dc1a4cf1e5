"""Measure parts of the project against each other and against alternatives: a table, and JSON.

    python bench/run.py train --config configs/seco/demo.yaml --out seco.json
    python bench/run.py crf --labels 21 --threads 2
    python bench/run.py energy --size 224 224 --batch 4 --image photo.jpg
    python bench/run.py walk --labels 3 --squaring

Seconds are medians of ``torch.utils.benchmark``; operations are those of torch that are no views. The share
is of the device's own rate in products of two 1024 x 1024 matrices, in the same run. Memory is a peak, on a
CPU less what the process had before. Originals take part where they can be imported: ``pydensecrf`` (pip
install pydensecrf2), rloss's ``bilateralfilter``.
"""

import json
import platform
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    """What is measured, and on what."""

    part: str = option(
        "crf",
        "what to measure",
        choices=("train", "crf", "energy", "walk", "data", "evaluate"),
        positional=True,
    )
    config: str = option("configs/seco/demo.yaml", "training whose step or samples are measured")
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
    out: Path | None = option(None, "JSON file for the numbers; default: none")


def run(options: Options) -> dict[str, float]:
    """Print a line for each way; returns their median seconds."""
    import torch
    from torch.utils.benchmark import Timer

    from bench.calls import PARTS

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)

    def median(call: Callable[[], Any]) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=options.threads)
        return timer.blocked_autorange(min_run_time=options.seconds).median

    start = peak_memory(options.device)
    matrix = torch.rand(1024, 1024, device=options.device)
    rate = 2 * 1024**3 / median(lambda: matrix @ matrix)
    heads = ("seconds", "images/s", "operations", "waits", "GFLOP", "share", "MiB", "ratio")
    print(f"{rate / 1e9:.0f} GFLOP/s in products of matrices\n{'':24}" + "".join(f"{h:>11}" for h in heads))
    found: dict[str, dict[str, float]] = {}
    for name, call in PARTS[options.part](options).items():
        row = found[name] = counted(call, options.device)
        seconds = row["seconds"] = median(call)
        row |= {"images/s": options.batch / seconds, "share": row["GFLOP"] * 1e9 / seconds / rate}
        row["MiB"] = peak_memory(options.device) - start
        row["ratio"] = seconds / next(iter(found.values()))["seconds"]
        print(f"{name:24}" + "".join(f"{row[h]:11.4g}" for h in heads), flush=True)
    if options.out:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        about |= {"options": {key: str(value) for key, value in vars(options).items()}}
        if options.device != "cpu":
            about["machine"] = torch.cuda.get_device_name(options.device)
        options.out.write_text(json.dumps({**about, "matrix_flops": rate, "measured": found}, indent=1))
    return {name: row["seconds"] for name, row in found.items()}


def counted(call: Callable[[], Any], device: str) -> dict[str, float]:
    """What one call does: operations, floating-point operations, and waits for a GPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    class Operations(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += not func.is_view
            return func(*args, **(kwargs or {}))

    # torch counts the attention of GPUs alone.
    aten, attention = torch.ops.aten, "_scaled_dot_product_flash_attention"
    for end in ("", "_backward"):
        on_cpu = getattr(aten, f"{attention}_for_cpu{end}")
        flop_registry.setdefault(on_cpu, flop_registry[getattr(aten, attention + end)])

    on_gpu = device != "cpu"
    call()  # what is made once is there
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits, FlopCounterMode(display=False) as flops:
        warnings.simplefilter("always")
        with Operations() as operations:
            call()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in waits if "synchroniz" in str(warning.message)]
    gflop = flops.get_total_flops() / 1e9
    return {"operations": operations.number, "GFLOP": gflop, "waits": len(waits)}


def peak_memory(device: str) -> float:
    """MiB of a GPU, or of this process, torch and all: Linux counts KiB."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    command_line(Options, run, __doc__)
