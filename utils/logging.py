"""A run's records: lines for people (run.log), one JSON object per line (metrics.jsonl), and TensorBoard."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import accept_any_text, visible
from utils.distributed import is_main
from utils.files import write_atomic
from utils.mappings import leaves

LOGGER = logging.getLogger("tag2mask")
_first: dict[str, object] = {}  # warnings that were given


class _TqdmHandler(logging.Handler):
    """Writes a line above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _Lines(tqdm):
    """For files (nohup, Slurm): a line every half minute instead of a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if it is time for one; tqdm also asks after every line of the log."""
        if msg is None and time.time() - self.last_print_t >= self.mininterval:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, *_: Any, **__: Any) -> None:
        """There is no bar that a line of the log could hit."""


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar in a terminal; elsewhere plain lines, and none for what ends within half a minute."""
    if sys.stderr.isatty():
        return tqdm(*arguments, **{"dynamic_ncols": True, **options})
    pace = {"mininterval": 30.0, "maxinterval": 60.0, "delay": 30.0}
    shape = {"bar_format": "{desc}: {n_fmt}/{total_fmt} {unit}  {rate_fmt}  eta {remaining}"}
    return _Lines(*arguments, **{**pace, **shape, **options, "leave": False})


def setup_logging(work_dir: Path | None = None) -> logging.Logger:
    """Send log lines to the terminal and to ``work_dir/run.log``; main process only."""
    accept_any_text()
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main() else logging.ERROR)
    LOGGER.addFilter(_show_control_characters)
    LOGGER.addHandler(_TqdmHandler())
    if work_dir is not None and is_main():
        work_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(work_dir / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(file)
    return LOGGER


def _show_control_characters(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def warn_once(message: str, detail: str = "") -> None:
    """Log a warning with a detail, the first time that the warning is given, whatever the detail."""
    mine = object()
    if _first.setdefault(message, mine) is mine:  # of threads too, one is the first
        LOGGER.warning(f"warning  {message}{detail}")


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What `warn_once` says meanwhile, in a list instead of the log."""
    found: list[str] = []
    handler, propagates = logging.Handler(), LOGGER.propagate
    handler.emit = lambda record: found.append(record.getMessage().removeprefix("warning  "))  # type: ignore
    _first.clear()
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    try:
        yield found
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.propagate = propagates


class MetricsWriter:
    """Appends numbers to ``metrics.jsonl`` and to TensorBoard; the main process does it for all."""

    def __init__(self, work_dir: Path, start_step: int = 0) -> None:
        self._file = None
        self._tensorboard = None
        if not is_main():
            return
        # Steps that a killed run did after its last checkpoint come again: drop their old numbers.
        path = work_dir / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= start_step]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1, encoding="utf-8")
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

    def draw(self, step: int, pictures: Mapping[str, Any]) -> None:
        """Show pictures (H, W, 3) uint8 in TensorBoard."""
        if self._tensorboard is not None:
            for name, picture in pictures.items():
                self._tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Close both records."""
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
    return None if isinstance(value, float) and not math.isfinite(value) else value
