"""``scores.json``: every score of a folder with its protocol id and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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

    A record replaces an earlier one of the same protocol on the same checkpoint (of a training, the same
    step), data and settings (a repeated run); a record of anything else is kept beside it.
    """
    kept = read_scores(folder)
    for record in records:
        kept = [old for old in kept if _identity(old) != _identity(record)] + [dict(record)]
    write_json(folder / "scores.json", {"format": SCORES_FORMAT, "scores": kept})


def _identity(record: Mapping[str, Any]) -> str:
    provenance = record.get("provenance", {})
    parts = [record.get("protocol"), record.get("settings")]
    # A training has no file to hash yet. Its steps stand for its networks, in the form that records of
    # earlier versions hold in the place of the hash.
    parts.append(provenance.get("checkpoint_sha256") or f"step {provenance.get('step')}")
    parts += [provenance.get(key) for key in ("data_fingerprint", "split")]
    return json.dumps(parts, sort_keys=True)
