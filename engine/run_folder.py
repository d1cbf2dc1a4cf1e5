"""The folder of a run: which one it is, and where a training in it begins."""

from pathlib import Path

from omegaconf import DictConfig

from engine.checkpoint import LAST, Checkpoint, last_good
from engine.config.load import project_path, to_plain
from engine.config.schema import frozen_differences
from utils.distributed import barrier
from utils.weights import load_checkpoint


def run_folder(cfg: DictConfig) -> Path:
    """The folder ``work_dir``, made where it is missing; with ``train.resume=never`` one without a run."""
    work_dir = project_path(cfg.work_dir)
    if cfg.train.resume == "never" and (work_dir / "run.log").exists():
        # Every process looks before any of them writes, so that all choose the same folder.
        free = next(n for n in range(2, 10**6) if not Path(f"{work_dir}_{n}").exists())
        work_dir = Path(f"{work_dir}_{free}")
    barrier()
    work_dir.mkdir(parents=True, exist_ok=True)
    return work_dir


def foreign_start(cfg: DictConfig) -> Path | None:
    """The checkpoint that ``train.resume`` names."""
    resume = str(cfg.train.resume)
    return None if resume in ("auto", "never") else project_path(resume)


def find_start(cfg: DictConfig, work_dir: Path) -> Checkpoint | None:
    """The checkpoint that a training continues, by ``train.resume``; None: it begins at step 0.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, or it cannot be read.
        ValueError: the folder holds a run of another config, or one that did not begin from that checkpoint.
    """
    if cfg.train.resume == "never":
        return None
    start, own = foreign_start(cfg), last_good(work_dir)
    if start is None:
        if own is not None:
            _check_config(cfg, own)
        return own
    if own is None or start == work_dir / LAST:
        return own or Checkpoint(start, load_checkpoint(start))
    # A killed run that began from PATH continues with its own progress. Any other run is left alone.
    if own.state.get("resumed_from") != str(start):
        raise ValueError(
            f"{work_dir} contains a run that did not start from {start}; choose another run_name="
        )
    return own


def _check_config(cfg: DictConfig, own: Checkpoint) -> None:
    if changed := frozen_differences(own.state["config"], to_plain(cfg)):
        shown = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
        folder = own.path.parent
        raise ValueError(
            f"{folder} contains a run with another config ({shown}); choose another run_name=, or "
            f"train.resume=never for a fresh folder, or train.resume={folder / LAST} to continue anyway"
        )
