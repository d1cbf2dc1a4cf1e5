"""``scores.json``: every score of a folder with its protocol id, and where it comes from."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from datasets.base import Split
from engine.config.load import ROOT
from utils.distributed import world_size
from utils.files import read_json, write_json

SCORES_FORMAT = "tag2mask-scores/1"


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The score records of a folder, oldest first; empty without a file."""
    path = folder / "scores.json"
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != SCORES_FORMAT:
        raise ValueError(f"{path} is not a score file of this project ({SCORES_FORMAT}); move it away")
    return content["scores"]


def write_scores(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add score records to ``scores.json``.

    A record replaces that of a repeated run: of the same protocol, checkpoint or step, data and settings.
    """
    kept = read_scores(folder)
    for record in records:
        kept = [old for old in kept if _identity(old) != _identity(record)] + [dict(record)]
    write_json(folder / "scores.json", {"format": SCORES_FORMAT, "scores": kept})


def _identity(record: Mapping[str, Any]) -> str:
    provenance = record.get("provenance", {})
    # A training has no file to hash yet; its steps stand for its networks.
    keys = ("checkpoint_sha256", "step", "data_fingerprint", "split")
    parts = [record.get("protocol"), record.get("settings"), *(provenance.get(key) for key in keys)]
    return json.dumps(parts, sort_keys=True)


def protocol_id(
    kind: str,
    split: str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    refiner: str | None = None,
    tags: bool = False,
) -> str:
    """The id that a score is quoted with, for example ``seg/val/ms+flip`` (docs/evaluation.md).

    A CAM (kind ``cam`` or ``aux_cam``) is always made with scale 1 and mirror images.
    """
    if kind != "seg":
        scales, flip = sorted({1.0, *scales}), True
    views = "ms" if len(scales) > 1 else "ss" if scales[0] == 1 else f"ss({scales[0]:g})"
    steps = [views, *(["flip"] if flip else []), *(["tags"] if tags else []), *([refiner] if refiner else [])]
    return f"{kind}/{split}/{'+'.join(steps)}"


def short_name(split: Split) -> str:
    """The split's name in protocol ids and folder names; of a list file its stem."""
    return Path(split.name).stem if split.name.endswith(".txt") else split.name


def provenance(cfg: Mapping[str, Any] | None, split: Split) -> dict[str, Any]:
    """What a score rests on, as plain values: code version, seed, data, libraries and command."""
    cfg = cfg or {}
    return {
        "git_commit": git_commit(),
        "run_name": cfg.get("run_name"),
        "seed": cfg.get("seed"),
        "split": split.name,
        "images": len(split.records),
        "data_fingerprint": split.fingerprint(),
        "processes": world_size(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": np.__version__,
        },
        "command": shlex.join(sys.argv),
    }


@cache
def git_commit() -> str | None:
    """Commit of the project, ``+dirty`` if tracked files were changed; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
