"""A run's records: lines for people (run.log), one JSON object per line (metrics.jsonl), and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import is_main
from utils.files import leaves, write_atomic

LOGGER = logging.getLogger("tag2mask")


class _TqdmHandler(logging.Handler):
    """Writes a line above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar that, where it is written to a file (nohup, Slurm), appears every half minute only."""
    pace = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}
    return tqdm(*arguments, **{"dynamic_ncols": True, **pace, **options})


def setup_logging(work_dir: Path | None = None) -> logging.Logger:
    """Send log lines to the terminal and, if ``work_dir`` is given, to ``work_dir/run.log``; main process
    only.
    """
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main() else logging.ERROR)
    terminal = _TqdmHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(terminal)
    if work_dir is not None and is_main():
        work_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(work_dir / "run.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(file)
    return LOGGER


class MetricsWriter:
    """Appends numbers to ``metrics.jsonl`` and to TensorBoard; does nothing on other processes than the main
    one.
    """

    def __init__(self, work_dir: Path, start_step: int = 0) -> None:
        self._file = None
        self._tensorboard = None
        if not is_main():
            return
        # Numbers of steps that a killed run did after its last checkpoint come again: drop the old ones.
        path = work_dir / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOGGER.info("TensorBoard is not installed: numbers go to metrics.jsonl only")
        else:
            self._tensorboard = SummaryWriter(str(work_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record values at a step; nested mappings become ``a/b`` in TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **_finite_or_none(values)}) + "\n")
        if self._tensorboard is not None:
            for key, value in leaves(values):
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(key.replace(".", "/"), value, step)

    def close(self) -> None:
        """Flush and close both records."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by the kill


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
