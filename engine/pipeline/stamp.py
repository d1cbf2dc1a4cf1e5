"""What the output of a stage was made from: ``stage.json`` in its folder.

settings   options, images and inputs that decide the output
outputs    digest of what was written; null while the stage runs
run        id of the run that finished; later stages name it among their settings, so they run again when
           this one did
"""

import hashlib
import itertools
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.seen import SEEN
from utils.files import FILES, read_json, write_json
from utils.logging import LOGGER
from utils.mappings import differences
from utils.weights import file_digest

STAMP = "stage.json"
OUTPUTS = (*FILES, ".json")  # of stages that do not train


def read_stamp(folder: Path) -> dict[str, Any]:
    """What ``stage.json`` says; empty without one."""
    path = folder / STAMP
    return read_json(path) if path.is_file() else {}


def run_of(folder: Path) -> str | None:
    """Id of the run that finished a stage; None before."""
    return read_stamp(folder).get("run")


def prepare(folder: Path, settings: Mapping[str, Any], title: str) -> bool:
    """Whether the output of a stage is there; otherwise its folder is now ready for it.

    What an interrupted run with the same settings left is kept. The output of other settings is renamed.
    """
    moved = "" if read_stamp(folder).get("settings") == settings else _move_aside(folder, settings)
    stamp = read_stamp(folder)
    if stamp.get("run") and stamp["outputs"] == _outputs(folder):
        LOGGER.info(f"{title}: unchanged")
        return True
    LOGGER.info(f"{title}: {'continues' if stamp else 'begins'}{moved}")
    _write(folder, settings)
    return False


def finish(folder: Path) -> None:
    """Mark a stage as done."""
    stamp = read_stamp(folder)
    _write(folder, stamp["settings"], run=uuid.uuid4().hex[:12], outputs=_outputs(folder))


def content(path: Path) -> str:
    """What a path from elsewhere holds, wherever it is: a file's hash, or the list of a folder's files."""
    return f"folder {_listing(path)}" if path.is_dir() else f"file {file_digest(path)}"


def _move_aside(folder: Path, settings: Mapping[str, Any]) -> str:
    """Rename a folder that something else made; says to what, and what differs."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return ""
    stamp = read_stamp(folder)
    changed = differences(stamp["settings"], settings) if stamp else ["not of this pipeline"]
    places = (folder.with_name(f"{folder.name}_old_{n}") for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    folder.rename(place)
    return f"; old output moved to {place} ({'; '.join(changed[:3])}{'; ...' if len(changed) > 3 else ''})"


def _write(folder: Path, settings: Mapping[str, Any], **done: Any) -> None:
    write_json(folder / STAMP, {"run": None, "outputs": None, "settings": settings, **done})


def _outputs(folder: Path) -> str:
    """Digest of what a stage made: its checkpoint, or the list of its files."""
    last = folder / "last.pth"
    return file_digest(last) if last.is_file() else _listing(folder, OUTPUTS)


def _listing(folder: Path, suffixes: Sequence[str] = ()) -> str:
    """Digest of names and sizes of the files in a folder, of all kinds or of some.

    Without the records of runs and scores, and without hidden files, which a killed process may leave.
    """
    files = sorted(
        f"{path.relative_to(folder)} {path.stat().st_size}"
        for path in folder.rglob("*")
        if (path.suffix in suffixes if suffixes else path.is_file())
        and path.name not in (STAMP, "scores.json")
        and path.parent.name != SEEN
        and not path.name.startswith(".")
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
