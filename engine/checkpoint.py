"""The state of a training in its run folder: written, found again after a crash, and restored."""

import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch.optim import Optimizer

from engine.config.load import project_path, to_plain
from engine.config.schema import frozen_differences
from methods.base import Method
from methods.published import recognise
from utils.distributed import barrier
from utils.logging import LOGGER
from utils.weights import load_checkpoint, save_checkpoint

LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
WEIGHTS_ALONE = (
    "to begin with its weights alone: tools/export.py --model_path ... --out weights.safetensors, "
    "train.resume=weights.safetensors"
)


@dataclass
class Progress:
    """How far a training is; part of its checkpoints."""

    step: int = 0  # finished optimiser steps
    scored: int = 0  # the last of them after which the validation was finished
    scores: dict[str, float] = field(default_factory=dict)  # what that validation found, percent
    best: float | None = None  # the best of the scores `select`, percent
    select: str = "seg"
    # Sums and counts since the last log line, by name.
    losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its file and what the file holds."""

    path: Path
    state: dict[str, Any]


def save_state(
    path: Path,
    method: Method,
    optimizer: Optimizer,
    progress: Progress,
    header: Mapping[str, Any],
    device: torch.device,
    average: Method | None = None,
) -> None:
    """Write a checkpoint; ``last.pth`` becomes ``previous.pth`` first.

    Args:
        average: of the method's weights. What reads the checkpoint finds it as the ``model``; only a training
            that continues reads ``trained``, the method itself.

    Raises:
        FloatingPointError: a parameter is not finite; the files stay as they are.
    """
    broken = [name for name, p in method.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise FloatingPointError(
            f"step {progress.step}: '{broken[0]}' is not finite; {path.name} is kept as it was"
        )
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    state = {
        **header,
        **({} if average is None else {"trained": method.state_dict()}),
        "model": (average or method).state_dict(),
        "optimizer": optimizer.state_dict(),
        **asdict(progress),
        "rng": rng,
    }
    save_checkpoint(path, state, keep=path.with_name(PREVIOUS) if path.name == LAST else None)


def last_good(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder, None if it has none.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    errors = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
            # torch does not compare the checksums: flipped bits would be weights.
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    raise ValueError(f"{path} is damaged: a checksum is wrong")
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        if errors:
            LOGGER.warning(f"resume   {errors[0]}: {path} is used")
        return Checkpoint(path, state)
    if errors:
        raise ValueError(f"{'; '.join(errors)}; train.resume=never starts in a fresh folder")
    return None


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
        raise ValueError(f"{work_dir} holds a run that did not start from {start}; choose another run_name=")
    return own


def _check_config(cfg: DictConfig, own: Checkpoint) -> None:
    if changed := frozen_differences(own.state["config"], to_plain(cfg)):
        shown = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
        folder = own.path.parent
        raise ValueError(
            f"{folder} contains a run with another config ({shown}); choose another run_name=, or "
            f"train.resume=never for a fresh folder, or train.resume={folder / LAST} to continue anyway"
        )


def restore_state(
    checkpoint: Checkpoint,
    method: Method,
    optimizer: Optimizer,
    header: Mapping[str, Any],
    device: torch.device,
    select: str,
    average: Method | None = None,
) -> Progress:
    """Fill method, optimiser, random state, and the average of the method; returns how far the run was.

    A checkpoint without optimiser, or of a published program, gives its weights alone: training begins at
    step 0.

    Raises:
        ValueError: it is of another method, of other classes, or of no known program.
    """
    path, state = checkpoint
    is_whole, weights = "optimizer" in state, state.get("model", state)
    if not method.state_dict().keys() & weights.keys():
        report = recognise(state).load_into(method, state)
        LOGGER.info("\n         ".join([f"weights  from {path} of a published program", *report.lines()]))
        if average is not None:
            average.load_state_dict(method.state_dict())
        return Progress(select=select)
    if is_whole:
        _check_data(checkpoint, header)
    else:  # an exported file has no teacher backbone: it starts as the student's, as in a new training
        own = {key: key.removeprefix("teacher_") for key in method.state_dict()}
        weights = {key: weights[name] for key, name in own.items() if name in weights} | weights
    try:
        found = method.load_state_dict(state.get("trained", weights), strict=is_whole)
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another method: {error}; {WEIGHTS_ALONE}") from error
    if average is not None:
        average.load_state_dict(weights if is_whole else method.state_dict())
    if not is_whole:
        LOGGER.info(
            f"weights  from {path}; the optimiser starts afresh at step 0; not in the file: "
            f"{found.missing_keys or 'nothing'}; not used: {found.unexpected_keys or 'nothing'}"
        )
        return Progress(select=select)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    if progress.select != select:
        progress.select, progress.best = select, None  # the best one is of another score
    return progress


def _check_data(checkpoint: Checkpoint, header: Mapping[str, Any]) -> None:
    """A network knows classes by number: with other classes it would train on without an error."""
    path, state = checkpoint
    before, now = (list(h.get("class_names", ())) for h in (state, header))
    if before != now:
        changed = [f"{a} -> {b}" for a, b in zip_longest(before, now) if a != b]
        raise ValueError(
            f"{path} was trained on other classes ({', '.join(changed[:5])}): restore the tags or class "
            f"names, or begin a run of another name; {WEIGHTS_ALONE}"
        )
    old, new = (h.get("provenance", {}).get("data_fingerprint") for h in (state, header))
    if new and old != new:
        LOGGER.warning(f"data     other images, tags or masks than in {path} (fingerprint {old} -> {new})")
