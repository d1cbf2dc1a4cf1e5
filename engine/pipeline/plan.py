"""The stages of a pipeline, checked and complete before the first one runs."""

import dataclasses
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from datasets.base import Split
from engine.checks import check_training
from engine.config.load import load_config, load_stages, override_config, project_path, to_plain
from engine.config.options import fill, is_below, marked
from engine.config.schema import Config
from engine.config.stages import TRAINING, Stage
from engine.data import load_split
from engine.inference import is_photo
from engine.train import run as train
from utils.build import import_target, suggest
from utils.cli import message_of
from utils.mappings import leaves


@dataclass(frozen=True)
class Plan:
    """A stage that passed all checks.

    Args:
        module: import path of what it runs.
        run: is called with the options; those of a training are a config.
        shares_work: every process runs it and does its part; otherwise the main one alone.
        inputs: files and folders that it reads, by dotted key.
        settings: everything else that decides the result, by dotted key.
        images: what a training learns from, or a tool works on; None where only the tool knows.
    """

    name: str
    module: str
    run: Callable[[Any], object]
    options: Any
    folder: Path
    shares_work: bool
    inputs: dict[str, Path]
    settings: dict[str, Any]
    images: Split | None

    @property
    def checkpoint(self) -> Path | None:
        """What a training makes; None for a tool."""
        return self.folder / "last.pth" if self.module == TRAINING else None


def make_plans(config: str | Path, overrides: Sequence[str] = ()) -> list[Plan]:
    """Check all stages of a pipeline and complete their options.

    Raises:
        KeyError, ValueError: a stage names what does not exist, or an option has a wrong value.
    """
    planner = _Planner(config, overrides)
    for stage in load_stages(config, overrides):
        try:
            plan = planner.training(stage) if stage.run == TRAINING else planner.tool(stage)
            planner.check_inputs(plan)
        except (ImportError, KeyError, ValueError, FileNotFoundError) as error:
            raise ValueError(f"stage '{stage.name}': {message_of(error)}") from error
        planner.plans.append(plan)
    return planner.plans


class _Planner:
    """Makes one plan after the other."""

    def __init__(self, config: str | Path, overrides: Sequence[str]) -> None:
        self.cfg = load_config(config, overrides)
        self.work_dir = project_path(self.cfg.work_dir)
        self.given = [f"config={config}", *overrides]
        self.plans: list[Plan] = []
        self.splits: dict[str, tuple[Split, str]] = {}

    def training(self, stage: Stage) -> Plan:
        cfg, folder = OmegaConf.create(stage.options), self.work_dir / stage.name
        if cfg.train.resume != "auto":
            raise ValueError(f"a pipeline resumes by itself; to train afresh, delete {folder}")
        images, fingerprint = self.load(cfg.data, cfg.data.train_set)
        if cfg.data.val_set:
            self.load(cfg.data, cfg.data.val_set)
        check_training(cfg, images.num_classes)
        values = dict(leaves(stage.options))
        read = [key for key in marked(Config, "reads") if values.get(key) not in (None, "timm")]
        inputs = {key: project_path(values[key]) for key in read}
        settings = _decisive(Config, values, inputs) | {"run": stage.run, "data": fingerprint}
        return Plan(stage.name, stage.run, train, cfg, folder, True, inputs, settings, images)

    def tool(self, stage: Stage) -> Plan:
        """A stage with ``Options``, completed by what the pipeline knows."""
        kind, run = (import_target(f"{stage.run}.{name}") for name in ("Options", "run"))
        folder = self.work_dir / stage.name
        options, inputs = self.filled(stage, kind, folder)
        trained = next((plan for plan in self.plans if plan.checkpoint in inputs.values()), None)
        own = list(getattr(options, "overrides", ()))
        changes = [*self.inference(kind, trained), *own]  # of the config that the tool reads
        cfg = override_config(trained.options if trained else self.cfg, changes)
        if trained and trained.images and own:
            check_training(cfg, trained.images.num_classes)
        has_checkpoint = "model_path" in inputs
        if hasattr(options, "overrides"):
            passed = ("data.",) if has_checkpoint else ("config=", "data.")
            options.overrides = [*(item for item in self.given if item.startswith(passed)), *changes]
        images, fingerprint = None, None
        if trained or not has_checkpoint:  # otherwise the checkpoint alone knows its data set
            images, fingerprint = self.images(stage, options, cfg, trained)
        settings = _decisive(kind, dict(leaves(dataclasses.asdict(options))), {"out", *inputs})
        settings |= {"run": stage.run, "data": fingerprint}
        # Changes of the data count by the images.
        settings["overrides"] = [item for item in changes if not item.startswith("data.")]
        shares_work = getattr(kind, "shares_work", False)
        return Plan(stage.name, stage.run, run, options, folder, shares_work, inputs, settings, images)

    def filled(self, stage: Stage, kind: Any, folder: Path) -> tuple[Any, dict[str, Path]]:
        """The ``Options`` of a stage, and the paths among them that it reads."""
        if "out" in stage.options:
            raise ValueError(f"a stage always writes to {folder}: leave out 'out'")
        known = {"out": folder, "device": self.cfg.device, "num_workers": self.cfg.data.num_workers}
        names = {field.name for field in dataclasses.fields(kind)}
        for key, value in leaves(stage.options):
            if "overrides" in names and key.startswith(("method.", "data.")):
                change = f"stages.{stage.name}.overrides=[{key}={value}]"
                raise KeyError(f"'{key}' is a key of the config: write {change}")
        values = {key: value for key, value in known.items() if key in names} | stage.options
        paths = [key for key, what in marked(kind, "reads").items() if what != "images" and values.get(key)]
        inputs = {key: project_path(values[key]) for key in paths}
        return fill(kind, values | inputs), inputs

    def inference(self, kind: Any, trained: Plan | None) -> list[str]:
        """The ``infer`` section of now for a tool that reads it: a checkpoint may hold an earlier one."""
        if "infer" not in getattr(kind, "sections", ()):
            return []
        if trained is None:
            return [item for item in self.given if item.startswith("infer.")]
        section = to_plain(trained.options)["infer"].items()
        return [f"infer.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in section]

    def images(
        self, stage: Stage, options: Any, cfg: DictConfig, trained: Plan | None
    ) -> tuple[Split | None, str | None]:
        """The split that a tool works on and its fingerprint; None for photos."""
        reads = marked(type(options), "reads")
        names = [getattr(options, key) for key, what in reads.items() if what == "images"]
        if trained and None in names:
            raise ValueError(f"it has no images: set stages.{stage.name}.infer, or stages.{stage.name}=null")
        splits = [self.load(cfg.data, name) for name in names if name and not is_photo(name)]
        return splits[0] if splits else (None, None)

    def load(self, data: Mapping[str, Any], name: str) -> tuple[Split, str]:
        """A split and its fingerprint; each is listed once."""
        key = str([name, *(data[part] for part in ("source", "root", "options"))])
        if key not in self.splits:
            split = load_split(data, name)
            self.splits[key] = split, split.fingerprint()
        return self.splits[key]

    def check_inputs(self, plan: Plan) -> None:
        """What an earlier stage makes is read after it; what comes from elsewhere exists."""
        before = [plan.name for plan in self.plans]
        for key, path in plan.inputs.items():
            if not path.is_relative_to(self.work_dir):
                _check_exists(key, path)
            elif (stage := path.relative_to(self.work_dir).parts[0]) not in before:
                raise ValueError(f"{key} is {path}, which no stage before it writes{suggest(stage, before)}")


def _check_exists(key: str, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{key} is {path}, which does not exist")


def _decisive(kind: Any, values: Mapping[str, Any], but: Container[str]) -> dict[str, Any]:
    """The options that are not free, as plain values."""
    free = marked(kind, "free")
    settings = {key: value for key, value in values.items() if key not in but and not is_below(key, free)}
    return json.loads(json.dumps(settings, default=str))
