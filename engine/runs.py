"""Run folders as tools read them: config, numbers, scores, what was seen, and which runs are repetitions.

Whatever a folder lacks is left out, so that folders of tools and of older versions are read too.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from engine.config.options import is_below, marked
from engine.config.schema import Config
from engine.scores.records import read_scores
from utils.files import read_json
from utils.mappings import leaves

INFO = "run.json"  # what a training writes at its start: command, code, data, class names


@dataclass
class Run:
    """A folder of a training, or of a tool that drew images."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    scores: list[dict[str, Any]] = field(default_factory=list)  # of every scores.json in the folder
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split, see engine/seen.py

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.name

    @property
    def method(self) -> str:
        """Class of the method."""
        return self.config.get("method", {}).get("target", "").rpartition(".")[2] or "-"

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.config.get("data", {}).get("name", "-")

    @property
    def steps(self) -> int:
        """How many steps it is meant to have."""
        return self.config.get("train", {}).get("steps", 0)

    @property
    def step(self) -> int:
        """The last step with a line of numbers."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def state(self) -> str:
        """finished, running, or where it stopped."""
        if not self.config:
            return "-"
        if self.step >= self.steps:
            return "finished"
        return "running" if _is_locked(self.folder / ".lock") else f"died at {self.step}"

    @property
    def validations(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scores in percent, ascending."""
        return [(line["step"], line["val"]) for line in self.lines if "val" in line]

    @cached_property
    def best_step(self) -> int | None:
        """The step of ``best.pth``."""
        select = self.config.get("eval", {}).get("select")
        scored = [(val[select], -step) for step, val in self.validations if val.get(select) is not None]
        return -max(scored)[1] if scored else None

    def last(self, key: str) -> Any:
        """The last number of a key of ``metrics.jsonl``; None without one."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def results(self) -> dict[str, dict[str, Any]]:
        """The last score record of every protocol, and ``best``: that of the step of ``best.pth``."""
        found: dict[str, dict[str, Any]] = {}
        for record in self.scores:
            known = found.setdefault(record["protocol"], {})
            known["last"] = record
            if record.get("provenance", {}).get("step") == self.best_step:
                known["best"] = record
        return found

    @cached_property
    def group(self) -> str:
        """The same for runs that differ in the seed, or in what decides no result."""
        free = [*marked(Config, "free"), "seed"]
        kept = {key: value for key, value in leaves(self.config) if not is_below(key, free)}
        identity = [kept or str(self.folder), self.info.get("data_fingerprint")]
        return json.dumps(identity, sort_keys=True, default=str)


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it holds nothing of a run.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    seen = [read_json(path) for path in sorted(folder.glob("seen/*.json"))]
    scores = [folder / "scores.json", *sorted(folder.glob("*/scores.json"))]
    run = Run(
        folder,
        yaml.safe_load(config.read_text("utf-8")) if config.is_file() else {},
        read_json(folder / INFO) if (folder / INFO).is_file() else {},
        list(_lines(metrics)) if metrics.is_file() else [],
        [record for path in scores for record in read_scores(path.parent)],
        {content["split"]: content for content in seen},
    )
    if not (run.config or run.scores or run.seen):
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml, scores.json or seen/")
    return run


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All trainings in some folders, at any depth, by name."""
    configs = {path for folder in folders for path in folder.rglob("config.yaml")}
    return [load_run(path.parent) for path in sorted(configs)]


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of one config together, by a title that tells the groups apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    titles = [_title(members) for members in groups.values()]
    for place in (lambda run: run.name, lambda run: run.folder):  # as short as they differ
        many = {title for title in titles if titles.count(title) > 1}
        shown = [f"{_title(members)} ({place(members[0])})" for members in groups.values()]
        titles = [new if title in many else title for title, new in zip(titles, shown)]
    return dict(zip(titles, groups.values(), strict=True))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95 % interval (Student's t); None for a single value."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, None
    from scipy.stats import t

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def interval_text(values: Sequence[float]) -> str:
    """``41.23 ± 0.85``."""
    mean, half = interval(values)
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def percent(record: Mapping[str, Any] | None) -> float | None:
    """The mIoU of a score record."""
    value = None if record is None else record["score"].get("miou")
    return None if value is None else 100 * value


def _title(runs: Sequence[Run]) -> str:
    run = runs[0]
    return f"{run.method} on {run.data}" if run.config else run.name


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except (Timeout, OSError):
        return True
