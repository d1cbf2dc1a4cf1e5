"""Run the stages of a multi-stage method in order; what is finished and unchanged is not done again.

    bash run_train.sh scripts/train_voc.py 1 29501 0 my_run config=configs/irn/voc.yaml

A stage writes to ``<work_dir>/<name>``. ``stage.json`` in it says what the stage was made from: its settings,
the data, and the outputs of earlier stages that it reads (docs/pipelines.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from engine.config.load import (
    OVERRIDE,
    ROOT,
    TRAINING,
    Stage,
    find_config,
    load_config,
    load_stages,
    override_config,
    project_path,
)
from engine.config.options import fill
from engine.data import load_split
from engine.inference import is_photo
from engine.pipeline.pictures import draw_stage
from engine.scores.records import read_scores
from engine.scores.tables import text_table
from engine.train import FREE_TO_CHANGE, check_training
from utils.build import suggest
from utils.distributed import all_reduce_sum, barrier, init_process_group, is_main
from utils.files import FILES, alone_in, differences, read_json, write_atomic, write_json
from utils.logging import LOGGER, setup_logging
from utils.weights import file_digest

# Options that change where and how a stage computes, not what.
FREE_OPTIONS = ("device", "num_workers", "processes", "crf_workers", "overrides")
STAMP = "stage.json"
OUTPUTS = (*FILES, ".json")  # of stages that do not train
# Options that name files or folders; those from elsewhere must be there before the first stage.
INPUTS = (
    *("data.label_dir", "data.context_decoupling.bank", "method.backbone.pretrained"),
    *("model_path", "cam", "labels", "images", "input"),
)


@dataclass(frozen=True)
class Plan:
    """A stage that passed all checks.

    Args:
        options: what ``module.run`` gets.
        overrides: those ``key=value`` among them that decide what a tool makes.
        images: the split that a tool works on, and the ``data`` section that describes it; None for photos,
            and where only a checkpoint from elsewhere knows.
    """

    stage: Stage
    module: ModuleType
    folder: Path
    options: dict[str, Any]
    overrides: tuple[str, ...] = ()
    images: tuple[str, Mapping[str, Any]] | None = None

    def filled(self) -> Any:
        """The options as the stage's dataclass; a mapping for a stage without one."""
        cls = getattr(self.module, "Options", None)
        return fill(cls, self.options) if cls else dict(self.options)

    @property
    def trains(self) -> bool:
        return self.stage.run == TRAINING

    @property
    def shares_work(self) -> bool:
        """Whether every process does a part; other tools run in the main process alone."""
        return getattr(getattr(self.module, "Options", None), "shares_work", False)


def run(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run what is not finished of a pipeline; returns its folder.

    Args:
        config: a config with ``stages``.
        overrides: ``key=value`` of the command line.

    Raises:
        ImportError, KeyError, ValueError: a stage names a module, an option or a stage that does not exist.
            All stages are checked before the first one runs.
        FileNotFoundError: something that a stage reads is missing.
    """
    config = find_config(config)
    cfg = load_config(config, overrides)
    work_dir = project_path(cfg.work_dir)
    with _inside(ROOT), contextlib.ExitStack() as held:
        device = init_process_group(cfg.device)
        split = load_split(cfg.data, cfg.data.train_set)
        given = _tool_overrides(config, overrides)
        plans = make_plans(cfg, load_stages(config, overrides), given, split.num_classes)
        check_inputs(plans, cfg.work_dir)
        setup_logging(work_dir)
        held.enter_context(alone_in(work_dir))
        if is_main():
            OmegaConf.save(cfg, work_dir / "pipeline.yaml")
        LOGGER.info(f"pipeline {work_dir}: {', '.join(plan.stage.name for plan in plans)}")
        data = split.fingerprint()
        runs: dict[str, str] = {}  # stage -> id of the run that made its output
        rows: list[list[str]] = []
        redraw = False
        for number, plan in enumerate(plans, start=1):
            title = f"stage {number}/{len(plans)} {plan.stage.name} ({plan.stage.run})"
            settings = _settings(plan, runs, cfg.work_dir, data)
            finished, taken_back = _prepare(plan, settings, title) if is_main() else (False, False)
            finished, redraw = _agreed(finished, device), redraw or taken_back
            if not finished:
                started = time.monotonic()
                if plan.trains:  # its config was compared here, where a path counts as what it holds
                    plan.module.run(OmegaConf.create(plan.options), config_checked=True)
                elif plan.shares_work or is_main():
                    with _told(title):
                        plan.module.run(plan.filled())
                setup_logging(work_dir)  # a training logs to its own folder
            if is_main() and (redraw or not finished):
                folders = {p.stage.name: p.folder for p in plans[:number]}
                shown = load_split(plan.images[1], plan.images[0]) if plan.images else split
                draw_stage(folders, shown, work_dir / "pictures", device)
                if not finished:
                    _finish(plan, settings)
                    LOGGER.info(f"{title}: done in {(time.monotonic() - started) / 60:.1f} minutes")
            _wait_for(plan.folder)
            runs[plan.stage.name] = _stamp(plan.folder)["run"]
            rows += _score_rows(plan, "unchanged" if finished else "done")
        table = text_table(["Stage", "state", "protocol", "mIoU %"], rows)
        if is_main():
            write_atomic(work_dir / "table.txt", (table + "\n").encode())
        LOGGER.info(f"\n{table}\n\npictures of every stage: {work_dir / 'pictures'}")
    return work_dir


# -- what a stage is given


def make_plans(
    cfg: DictConfig, stages: Sequence[Stage], overrides: Mapping[str, list[str]], num_classes: int
) -> list[Plan]:
    """Check all stages and complete their options.

    Args:
        overrides: for tools that read a checkpoint's config, for those that need a config, and for inference
            with a checkpoint from elsewhere.
        num_classes: of the data set, with background.
    """
    plans: list[Plan] = []
    for stage in stages:
        module, folder = _module(stage), project_path(cfg.work_dir) / stage.name
        if hasattr(module, "Options"):
            plan = _tool_plan(cfg, stage, module, folder, plans, overrides, num_classes)
        elif stage.run == TRAINING:
            if str(stage.options["train"]["resume"]) != "auto":
                raise ValueError(
                    f"stage '{stage.name}': train.resume is {stage.options['train']['resume']}, but a "
                    f"pipeline decides itself what goes on; to train a stage afresh, delete {folder}"
                )
            with _named(stage):
                check_training(stage.options, num_classes)
            plan = Plan(stage, module, folder, stage.options)
        else:
            plan = Plan(stage, module, folder, {**stage.options, "out": str(folder)})
        _check_reads(stage, cfg.work_dir, [plan.stage.name for plan in plans])
        plans.append(plan)
    return plans


def _tool_plan(
    cfg: DictConfig,
    stage: Stage,
    module: ModuleType,
    folder: Path,
    before: Sequence[Plan],
    overrides: Mapping[str, list[str]],
    num_classes: int,
) -> Plan:
    """A stage with a command line: its options are flags, completed by what the pipeline knows."""
    options, known = dict(stage.options), {field.name for field in dataclasses.fields(module.Options)}
    free = {"out": str(folder), "device": cfg.device, "num_workers": cfg.data.num_workers}
    options |= {key: value for key, value in free.items() if key in known and key not in options}
    with _named(stage):
        checked = fill(module.Options, options)
    if options.get("out", str(folder)) != str(folder):
        raise ValueError(f"stage '{stage.name}' always writes to {folder}: leave out 'out'")
    model_path, own = getattr(checked, "model_path", None), _own_overrides(stage)
    trained = _training_of(model_path, before)
    if trained and own and not any(item.startswith("config=") for item in own):
        with _named(stage):
            check_training(override_config(OmegaConf.create(trained.options), own), num_classes)
    if stage.run.startswith("tools.infer_seg"):
        own = [*(_infer_overrides(trained) if trained else overrides["infer"]), *own]
    options["overrides"] = [*overrides["checkpoint" if model_path else "config"], *own]
    images = None
    if trained or not model_path:
        data = trained.options["data"] if trained else cfg.data
        images = _images(vars(checked), own, data, is_inference="infer" in known)
        if images is None and "infer" in known and not options.get("infer"):
            raise ValueError(
                f"stage '{stage.name}' works on data.val_set, which is null: name images with "
                f"stages.{stage.name}.infer=SPLIT, or leave the stage out with stages.{stage.name}=null"
            )
    return Plan(stage, module, folder, options, tuple(own), images)


@contextlib.contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Errors inside begin with the name of the stage."""
    try:
        yield
    except (ImportError, KeyError, ValueError) as error:
        kind = next(kind for kind in (ImportError, KeyError, ValueError) if isinstance(error, kind))
        text = str(error.args[0]) if kind is KeyError and error.args else str(error)
        raise kind(f"stage '{stage.name}': {text}") from error


@contextlib.contextmanager
def _told(title: str) -> Iterator[None]:
    """Ctrl-C inside says what becomes of the stage; a training says it itself."""
    try:
        yield
    except KeyboardInterrupt:
        LOGGER.info(f"{title}: stopped; the same command goes on from here")
        raise


def _training_of(model_path: str | None, plans: Sequence[Plan]) -> Plan | None:
    """The stage that trains a checkpoint; None if it comes from elsewhere."""
    folder = project_path(model_path).parent if model_path else None
    return next((plan for plan in plans if plan.trains and plan.folder == folder), None)


def _own_overrides(stage: Stage) -> list[str]:
    """What the stage itself says to its tool.

    Raises:
        ValueError: it is no list of ``key=value``.
    """
    own = stage.options.get("overrides", [])
    if not isinstance(own, list) or not all(isinstance(item, str) and OVERRIDE.match(item) for item in own):
        raise ValueError(f"stage '{stage.name}': overrides is a list of key=value, not {own}")
    return own


def _infer_overrides(trained: Plan) -> list[str]:
    """The ``infer`` section that a training has now: its checkpoint may hold that of an earlier run."""
    return [f"infer.{key}={json.dumps(value)}" for key, value in trained.options["infer"].items()]


def _images(
    options: Mapping[str, Any], own: Sequence[str], data: Mapping[str, Any], is_inference: bool
) -> tuple[str, Mapping[str, Any]] | None:
    """The split that ``infer`` or ``split`` names, by default the one that inference scores, and its data."""
    files = [item.removeprefix("config=") for item in own if item.startswith("config=")]
    section = load_config(files[-1]) if files else OmegaConf.create({"data": data})
    changes = [item for item in own if item.startswith("data.")]
    root = [f"data.root={options['data_root']}"] if options.get("data_root") else []
    data = override_config(section, [*root, *changes]).data
    name = options.get("infer") or options.get("split") or (data.val_set if is_inference else None)
    return (name, data) if name and not is_photo(name) else None


def _module(stage: Stage) -> ModuleType:
    """The module of a stage.

    Raises:
        ImportError: there is none, or it has no ``run``.
    """
    known = [TRAINING, *(f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("[a-z]*.py")))]
    try:
        module = importlib.import_module(stage.run)
    except ModuleNotFoundError as error:
        if error.name is None or not stage.run.startswith(error.name):
            raise
        raise ImportError(
            f"stage '{stage.name}': there is no module '{stage.run}'{suggest(stage.run, known)}"
        ) from error
    if not callable(getattr(module, "run", None)):
        raise ImportError(f"stage '{stage.name}': module '{stage.run}' has no function run(options)")
    return module


def _check_reads(stage: Stage, work_dir: str, before: Sequence[str]) -> None:
    """Stages whose folders the options name must come earlier."""
    for key, value in _leaves(stage.options):
        if not isinstance(value, str) or key == "work_dir":
            continue
        read = _inside_run(work_dir).match(value)
        if read and read[1] not in before:
            raise ValueError(
                f"stage '{stage.name}': {key} is {value}, which no stage before it writes"
                f"{suggest(read[1], before)}"
            )


def _inside_run(work_dir: str) -> re.Pattern[str]:
    """Matches paths in the run folder, relative or not; the first group is the stage."""
    places = {work_dir, str(project_path(work_dir))}
    return re.compile(f"(?:{'|'.join(map(re.escape, places))})/(\\w+)")


def check_inputs(plans: Sequence[Plan], work_dir: str) -> None:
    """What comes from elsewhere must be there before the first stage: splits, folders, weights.

    Raises:
        FileNotFoundError, ValueError: something is missing.
    """
    inside, seen = _inside_run(work_dir), set()
    for plan in plans:
        if not (plan.trains or hasattr(plan.module, "Options")):
            continue  # a stage of one's own: nobody knows what its options mean
        for key, value in _leaves(plan.options):
            if key not in INPUTS or not value or value == "timm" or inside.match(str(value)):
                continue
            if not project_path(value).exists():
                raise FileNotFoundError(
                    f"stage '{plan.stage.name}': {key} is {value}, where there is nothing"
                )
        splits = [plan.images] if plan.images else []
        if plan.trains:
            data = plan.options["data"]
            splits = [(name, data) for name in (data["train_set"], data["val_set"]) if name]
        for name, section in splits:
            known = json.dumps([name, section["source"], section["root"], str(section["options"])])
            if work_dir not in name and known not in seen:
                with _named(plan.stage):
                    load_split(section, name)
                seen.add(known)


def _tool_overrides(config: str | Path, overrides: Sequence[str]) -> dict[str, list[str]]:
    """``key=value`` arguments that tools take: where the data are, which config tells it, how to infer."""
    data, infer = ([item for item in overrides if item.startswith(f"{key}.")] for key in ("data", "infer"))
    return {"checkpoint": data, "config": [f"config={config}", *data], "infer": infer}


# -- what is finished


def _settings(plan: Plan, runs: Mapping[str, str], work_dir: str, data: str) -> dict[str, Any]:
    """What decides the output of a stage, as plain values: paths are replaced by what they hold.

    Args:
        runs: stage -> id of the run that made its output.
        work_dir: as it stands in the options.
        data: fingerprint of the training images.
    """
    inside = _inside_run(work_dir)

    def held(value: str) -> str:
        # Without the place of the run folder: one that was moved is the same run.
        read = inside.match(value)
        return f"{value[read.start(1) :]} of run {runs[read[1]]}" if read else _content(value)

    plain: dict[str, Any] = {"run": plan.stage.run, "data": data}
    if plan.images is not None:
        name, section = plan.images
        plain["images"] = load_split(section, name).fingerprint()
    for item in plan.overrides:
        key, _, value = item.partition("=")
        plain[f"overrides.{key}"] = held(value)
    for key, value in _leaves(plan.options):
        free = FREE_TO_CHANGE if plan.trains else FREE_OPTIONS
        if key == "out" or (key.startswith(free) and key != "method.backbone.pretrained"):
            continue
        plain[key] = held(value) if isinstance(value, str) else value
    return json.loads(json.dumps(plain))


def _content(value: str) -> str:
    """The value or, if it is a path, what is there: a file's hash, a folder's list of all files."""
    path = Path(value).expanduser()
    if not ("/" in value or path.suffix) or not path.exists():
        return value
    return f"folder {_listing(path)}" if path.is_dir() else f"file {file_digest(path)}"


def _outputs(plan: Plan) -> str:
    """What a stage has made so far: its checkpoint, or the list of its files."""
    if not plan.trains:
        return _listing(plan.folder, OUTPUTS)
    last = plan.folder / "last.pth"
    return file_digest(last) if last.is_file() else ""


def _listing(folder: Path, suffixes: Sequence[str] = ()) -> str:
    """Digest of names and sizes of the files in a folder, of all kinds or of some.

    Without the records of runs and scores, and without hidden files, which a killed process may leave.
    """
    files = sorted(
        f"{path.relative_to(folder)} {path.stat().st_size}"
        for path in folder.rglob("*")
        if (path.suffix in suffixes if suffixes else path.is_file())
        and path.name not in (STAMP, "scores.json")
        and not path.name.startswith(".")
    )
    return _digest(files)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _stamp(folder: Path) -> dict[str, Any]:
    """What ``stage.json`` says; empty without one."""
    path = folder / STAMP
    return read_json(path) if path.is_file() else {}


def _prepare(plan: Plan, settings: dict[str, Any], title: str) -> tuple[bool, bool]:
    """Make the stage's folder ready; whether its output is there, and whether it was taken back.

    What other settings made is moved away, what these settings made earlier is taken back, and what was
    interrupted stays.
    """
    why, earlier, before = "", None, None
    if _stamp(plan.folder).get("settings") != settings:
        why = _move_away(plan, settings)
        if earlier := _made_earlier(plan, settings):
            earlier.rename(plan.folder)
            LOGGER.info(f"{title}: taken back from {earlier}{why}")
    stamp = _stamp(plan.folder)
    if stamp and stamp["run"] and stamp["outputs"] == _outputs(plan):
        # A training does not repeat a validation; a tool that lost its scores counts once more.
        if plan.trains or set(stamp.get("protocols", ())) <= set(_protocols(plan.folder)):
            LOGGER.info(f"{title}: unchanged")
            return True, earlier is not None
        before = {key: stamp[key] for key in ("run", "outputs")}
    LOGGER.info(f"{title}: goes on" if stamp else f"{title}: begins{why}")
    _write_stamp(plan, settings, before=before)
    return False, earlier is not None


def _move_away(plan: Plan, settings: Mapping[str, Any]) -> str:
    """Empty the stage's folder of what other settings made; says where that is and why, for the log."""
    folder, stamp = plan.folder, _stamp(plan.folder)
    if not folder.is_dir():
        return ""
    if not any(folder.iterdir()):
        folder.rmdir()
        return ""
    changed = differences(stamp["settings"], settings) if stamp else ["it is not of this pipeline"]
    replaced = folder.parent / "replaced"
    replaced.mkdir(exist_ok=True)
    places = (replaced / f"{plan.stage.name}_{k}" for k in range(1, 10**6))
    place = next(place for place in places if not place.exists())
    folder.rename(place)
    return f"; old output moved to {place} ({'; '.join(changed[:3])}{'; ...' if len(changed) > 3 else ''})"


def _made_earlier(plan: Plan, settings: Mapping[str, Any]) -> Path | None:
    """What these settings made before others were tried: a whole output, or else one to go on with."""
    half = None
    for place in (plan.folder.parent / "replaced").glob(f"{plan.stage.name}_*"):
        if not re.fullmatch(re.escape(plan.stage.name) + r"_\d+", place.name):
            continue
        stamp = _stamp(place)
        if stamp.get("settings") != settings:
            continue
        if stamp["run"] is None:
            half = place
        elif stamp["outputs"] == _outputs(dataclasses.replace(plan, folder=place)):
            return place
    return half


def _write_stamp(plan: Plan, settings: dict[str, Any], **state: Any) -> None:
    stamp = {"format": "tag2mask-stage/1", "run": None, "outputs": None, "settings": settings, **state}
    write_json(plan.folder / STAMP, stamp)


def _finish(plan: Plan, settings: dict[str, Any]) -> None:
    """Mark a stage as done; one that only lost its scores stays the run that later stages read."""
    outputs, before = _outputs(plan), _stamp(plan.folder).get("before") or {}
    same = before.get("run") and before["outputs"] == outputs
    _write_stamp(
        plan,
        settings,
        run=before["run"] if same else uuid.uuid4().hex[:12],
        outputs=outputs,
        protocols=_protocols(plan.folder),  # more may come, none may be lost
    )


def _protocols(folder: Path) -> list[str]:
    """What the stage was scored by."""
    return sorted({record["protocol"] for record in read_scores(folder)})


# -- several processes


def _agreed(value: bool, device: torch.device) -> bool:
    """What the main process says."""
    return bool(all_reduce_sum(torch.tensor(float(value and is_main()), device=device)))


def _wait_for(folder: Path) -> None:
    """Until the main process has finished a stage, however long: a barrier would give up after minutes."""
    while not _stamp(folder).get("run"):
        time.sleep(0.2)
    barrier()


# -- small things


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in mappings and lists."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if isinstance(value, (Mapping, list, tuple)) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _score_rows(plan: Plan, state: str) -> list[list[str]]:
    """A line for the last score of each protocol in a stage's folder."""
    latest = {record["protocol"]: record["score"]["miou"] for record in read_scores(plan.folder)}
    scores = [[protocol, "-" if miou is None else f"{100 * miou:.2f}"] for protocol, miou in latest.items()]
    return [[plan.stage.name, state, *score] for score in scores or [["-", "-"]]]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Relative paths in a config start at the project's root; those of tools where one is."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
