"""Plain files, written whole or not at all, and folders that say what made them (``settings.json``)."""

import csv
import io
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from utils.distributed import is_main
from utils.mappings import differences
from utils.problems import problem

SETTINGS = "settings.json"
FILES = (".png", ".npz", ".npy")  # of labels, CAMs and scores


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is complete, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_csv(path: Path, lines: Iterable[Iterable[Any]]) -> None:
    """Write lines of cells, atomically; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a ValueError that names it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run again") from error


@contextmanager
def alone_in(folder: Path, wait: float = 10.0) -> Iterator[None]:
    """Keep other runs out of a folder that this one writes to; the main process does it for all.

    The lock ends with the process and its children, however they end.

    Args:
        wait: seconds; loader workers of a killed run end within five.
    """
    if not is_main():
        yield
        return
    holder = folder / ".lock.holder"
    try:
        with FileLock(folder / ".lock", timeout=wait):
            write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
    except Timeout as error:
        by = holder.read_text() if holder.is_file() else "another process"
        message = f"{folder} is in use by {by}: wait until it ends, stop it, or choose another run_name="
        if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
            message += f"; Slurm started this command SLURM_NTASKS={tasks} times: use one task for each node"
        raise ValueError(message) from error


def require_files(paths: Iterable[Path], what: str, advice: str) -> None:
    """Raise one FileNotFoundError that counts what is missing, names the first, and says what to do."""
    paths = list(paths)
    # One listing of each folder instead of thousands of look-ups, which are slow on network disks.
    folders = {path.parent for path in paths if path.parent.is_dir()}
    there = {Path(entry.path) for folder in folders for entry in os.scandir(folder) if entry.is_file()}
    missing = [path for path in paths if path not in there]
    if missing:
        lacking = f"{len(missing)} of {len(paths)} {what} are missing, first {missing[0]}"
        problem(FileNotFoundError(f"{lacking}; {advice}"))


def keep_date(result: Path, *sources: Path) -> None:
    """Give a finished file the date of what it was made from, the latest of several."""
    date = max(source.stat().st_mtime_ns for source in sources)
    os.utime(result, ns=(date, date))


def has_date(result: Path, *sources: Path) -> bool:
    """Whether `keep_date` was called for these very sources.

    A source of another date, even an older one, says no. So does one that took the place of a source of the
    same date: its change time is later.
    """
    if not result.is_file():
        return False
    made, given = result.stat(), [source.stat() for source in sources]
    is_latest = made.st_mtime_ns == max(source.st_mtime_ns for source in given)
    return is_latest and made.st_ctime_ns >= max(source.st_ctime_ns for source in given)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Mark ``folder`` as made with ``settings``, or check that it was.

    Raises:
        ValueError: the folder was made with something else (names every difference), or holds foreign images.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
    if not path.is_file():
        kinds = (*FILES, ".jpg", ".jpeg")  # among photos, results would be photos of the next run
        foreign = next((file for file in folder.rglob("*.*") if file.suffix.lower() in kinds), None)
        if foreign is not None:
            raise ValueError(
                f"{folder} holds {foreign.name} of another origin (no settings.json): choose another --out"
            )
        write_json(path, settings)
        return
    if changed := differences(read_json(path), settings):
        raise ValueError(f"{folder} has results of other settings ({'; '.join(changed)}): change --out")


def made_with(folder: Path) -> dict[str, Any]:
    """The settings that `claim_folder` wrote into a folder; empty for a folder of something else."""
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}


def origin_of(folder: Path) -> dict[str, Any]:
    """How the files of a folder were made, for the settings of a tool; of foreign files, where they are."""
    return made_with(folder) or {"folder": str(folder.absolute())}
