"""Configs: YAML files with bases, ``key=value`` overrides, and refusal of keys that nobody reads.

A config file is a difference from its bases::

    base: [toco/voc.yaml, datasets/coco.yaml]     # later entries win, then this file, then the command line

``configs/default.yaml`` lists every key of the engine; only the open mappings (``method``, ``data.options``,
...) take further keys, and those must be arguments of the class or function they configure.

A config with ``stages`` is a pipeline. Its stages are a list; where a file builds on another one, or on the
command line, ``stages: {<name>: {...}}`` changes or adds single ones (docs/pipelines.md).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.build import import_target, keyword_names, suggest
from utils.files import leaves

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

# Mappings whose keys belong to a class or function: where its import path stands, and which arguments the
# engine gives.
OPEN = {
    "method": "method.target",
    "data.options": "data.source",
    "data.generate": "data.generate.target",
    "infer.refiner": "infer.refiner.target",
}
GIVEN = {"num_classes", "root", "split"}

# Lists of numbers and how many they hold; None: any number.
LISTS = {"data.scale_range": 2, "optim.betas": 2, "infer.scales": None}
# Numbers of which there is at least one; no other number of the engine is negative.
COUNTS = {"train.steps", "train.batch_size", "train.accumulate", "train.log_every", "train.eval_every"} | {
    "train.checkpoint_every",
    "data.crop_size",
    "eval.size",
}

# Whole numbers from 1 that may be null.
OPTIONAL_COUNTS = ("train.keep_every", "train.threads", "optim.decay_steps")
# Values of which there are few, where nothing but an inference, perhaps days later, would ask for them.
CHOICES = {
    "infer.resample": ("bilinear", "bicubic"),
    "infer.merge_flips": ("sum", "mean", "max"),
    "infer.merge_scales": ("sum", "mean", "max"),
}

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")  # how key=value begins
TRAINING = "engine.train"  # the stage whose options are a config
STAGE_KEYS = ("name", "run", "config", "like")


def project_path(path: str | Path) -> Path:
    """A path from a config: absolute, or relative to the project's root whatever the working directory."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else (ROOT / path).resolve()


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file of a config name: as given, in the folder ``beside`` it, below the project's root, or below
    ``configs/``.

    Raises:
        FileNotFoundError: if there is none; lists the configs that exist.
    """
    near = () if beside is None else (beside / name,)
    for candidate in (Path(name), *near, ROOT / name, CONFIGS / name):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(f"there is no config '{name}'{suggest(str(name), known)}")


def config_chain(path: Path, _inside: tuple[Path, ...] = ()) -> list[Path]:
    """The files that make up a config, bases before what builds on them."""
    if path in _inside:
        raise ValueError(f"configs are bases of each other: {' -> '.join(p.name for p in (*_inside, path))}")
    bases = _read(path).get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    chain = [
        file for base in bases for file in config_chain(find_config(base, path.parent), (*_inside, path))
    ]
    return list(dict.fromkeys([*chain, path]))


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge a config file with its bases, the engine's defaults and ``key=value`` overrides.

    Raises:
        FileNotFoundError: if the file or one of its bases does not exist.
        KeyError: for a key that nothing reads, with the closest one that exists.
        ValueError: for an override that is not ``key=value``, or YAML that does not parse.
    """
    return _load_layers(name, overrides)[0]


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, ready to run.

    Args:
        name: of the stage and of its folder in the pipeline's ``work_dir``.
        run: import path of a module with ``run(options)``.
        options: what that function gets; of ``engine.train`` a whole config.
    """

    name: str
    run: str
    options: dict[str, Any]


def load_stages(name: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a pipeline with everything that concerns them merged.

    A training stage gets, later ones win: its ``config``, the sections (``data``, ``train``, ...) of the
    pipeline's files, its own keys, ``key=value`` of the command line, ``stages.<name>.key=value``. Other
    stages get their own keys and ``stages.<name>.key=value``. ``like: <stage>`` takes over the keys of
    another one first.

    Raises:
        As `load_config`; ValueError for a config without stages, and for a stage without ``run``.
    """
    cfg, layers, stages, changes, stage_changes = _load_layers(name, overrides)
    if not stages:
        raise ValueError(f"{_label(find_config(name))} has no stages: it is a single training")
    own = _resolved(cfg, _with_likes(stages))
    last_word = _resolved(cfg, _with_likes(stages, stage_changes))
    together = _container(_merge({}, *(values for _, values in layers)))
    shared = (_label(find_config(name)), _without(together, ("run_name", "work_dir")))
    everywhere = _without(changes, ("run_name", "work_dir"))
    loaded = []
    for stage, values in own.items():
        where = f"stage '{stage}' of {_label(find_config(name))}"
        options, changed = (_without(v, STAGE_KEYS) for v in (values, last_word[stage]))
        what = {**values, **last_word[stage]}  # run, config
        if not what.get("run"):
            raise ValueError(f"{where} does not say what to run, for example run: tools.infer_cam")
        if what["run"] == TRAINING:
            if not what.get("config"):
                raise ValueError(f"{where} does not name its config, for example config: cam/voc.yaml")
            files = [(_label(f), _values_of(f)) for f in config_chain(find_config(what["config"]))]
            final = _container(_merge(everywhere, changed))
            composed = _compose([*files, shared], [(where, options), ("the command line", final)])
            composed.run_name = f"{cfg.run_name}_{stage}"
            composed.work_dir = f"{cfg.work_dir}/{stage}"
            OmegaConf.resolve(composed)
            _check_values(composed, where)
            loaded.append(Stage(stage, TRAINING, to_plain(composed)))
        else:
            loaded.append(Stage(stage, str(what["run"]), _container(_merge(options, changed))))
    return loaded


Layer = tuple[str, Mapping[str, Any]]
StageValues = dict[str, dict[str, Any]]


def _load_layers(
    name: str | Path, overrides: Sequence[str]
) -> tuple[DictConfig, list[Layer], StageValues, dict[str, Any], StageValues]:
    """The merged config, and its parts: values of the files, stages of the files, the command line's both."""
    path = find_config(name)
    layers: list[Layer] = []
    stages: StageValues = {}
    for file in config_chain(path):
        values = _values_of(file)
        stages = _merge_stages(stages, values.pop("stages", None), _label(file))
        layers.append((_label(file), values))
    changes = _container(_parse_overrides(overrides))
    stage_changes = changes.pop("stages", {})
    if not isinstance(stage_changes, dict):
        raise ValueError(f"the command line: stages are a matter of config files, not {stage_changes}")
    for stage, change in list(stage_changes.items()):
        if stage not in stages:
            raise KeyError(f"the command line: there is no stage '{stage}'{suggest(stage, stages)}")
        if change is None:  # as in a file: without it
            del stages[stage], stage_changes[stage]
        elif not isinstance(change, dict) or {"name", "like"} & set(change):
            raise ValueError(
                f"the command line: stages.{stage} is null, or stages.{stage}.<key>=value of a key; "
                "name and like belong in the config file"
            )
    merged = _compose(layers, [("the command line", changes)])
    if stages:
        merged.stages = [{"name": k, **v} for k, v in _with_likes(stages, stage_changes, merge=True).items()]
        if OmegaConf.is_missing(merged.method, "target"):  # each of its trainings has a method of its own
            del merged.method["target"]
    if merged.run_name is None:
        is_ours = path.parent.parent.name == "configs"  # configs/<method>/<data>.yaml
        merged.run_name = f"{path.parent.name}_{path.stem}" if is_ours else path.stem
    # Stages name folders below it, which tools open as they are.
    home = str(_container(merged)["work_dir"])
    if home.startswith("~"):
        merged.work_dir = str(Path(home).expanduser())
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{_label(path)}: {error}") from error
    _check_values(merged, _label(path), changed=[key for key, _ in leaves(changes)])
    return merged, layers, stages, changes, stage_changes


def _compose(layers: Sequence[Layer], changes: Sequence[Layer]) -> DictConfig:
    """Defaults, then files, then changes, in which a key that builds on nothing is refused: it would be saved
    and never read.
    """
    merged = _merge(_defaults())
    for label, values in layers:
        merged.merge_with(values)
        _check_keys(values, merged, label)
    for label, values in changes:
        before, merged = merged, _merge(merged, values)
        _check_keys(values, merged, label, existing=before)
    return merged


def _merge_stages(stages: StageValues, values: Any, label: str) -> StageValues:
    """A list replaces the stages; a mapping changes and adds stages by name, and removes those it sets to
    null.
    """
    if values is None:
        return stages
    if isinstance(values, list):
        named: StageValues = {}
        for stage in values:
            name = stage.get("name") if isinstance(stage, dict) else None
            if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name in named:
                raise ValueError(
                    f"{label}: every stage needs a name of its own (letters, digits, _): {stage}"
                )
            named[name] = _without(stage, ("name",))
        return named
    if not isinstance(values, dict):
        raise ValueError(f"{label}: stages is a list, or a mapping of names to changes")
    stages = dict(stages)
    for name, change in values.items():
        if change is None:
            stages.pop(name, None)
            continue
        if name not in stages and not {"run", "like"} & set(change):
            raise KeyError(f"{label}: there is no stage '{name}'{suggest(name, stages)}")
        stages[name] = _container(_merge(stages.get(name, {}), change))
    return stages


def _with_likes(stages: StageValues, changes: StageValues | None = None, merge: bool = False) -> StageValues:
    """Stages with the keys of those that they are like; ``changes`` reach the likes of a stage as well, but
    for the keys that a like sets itself.

    Args:
        changes: instead of what the files say (``merge=False``), or on top of it.
    """
    found: StageValues = {}
    for name, values in stages.items():
        other = values.get("like")
        if other is not None and other not in found:
            raise KeyError(
                f"stage '{name}' is like '{other}', which is no stage before it{suggest(other, found)}"
            )
        inherited, own = found[other] if other is not None else {}, _without(values, ("like",))
        parts = [inherited, own] if changes is None or merge else [_unless_set(inherited, own)]
        if changes is not None:
            parts.append(changes.get(name, {}))
        found[name] = _container(_merge({}, *parts))
    return found


def _resolved(cfg: DictConfig, stages: StageValues) -> StageValues:
    """Stages with ``${...}`` replaced by values of the pipeline's config."""
    whole = _merge(cfg, {"stages": None})
    whole.stages = stages
    try:
        OmegaConf.resolve(whole)
    except OmegaConfBaseException as error:
        raise ValueError(f"stages: {error}") from error
    return _container(whole.stages)


def override_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``key=value`` to a config that is complete already; a key it does not have is a typing error."""
    known = [key for key, _ in leaves(to_plain(cfg))]
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals:
            raise ValueError(f"'{item}' is not key=value, for example data.root=/data/VOC2012")
        # Arguments of classes and functions are checked where they are called.
        if (
            key not in known
            and not key.startswith(tuple(f"{prefix}." for prefix in OPEN))
            and not any(k.startswith(key + ".") for k in known)
        ):
            raise KeyError(f"'{key}' is not a key of the checkpoint's config{suggest(key, known)}")
    merged = OmegaConf.merge(cfg, _parse_overrides(overrides))
    assert isinstance(merged, DictConfig)
    return merged


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, for checkpoints and files."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def documented_keys(name: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """``(dotted key, value, meaning)`` of every key of a config.

    The meaning is the comment behind the key in the YAML files; for arguments of classes and functions that
    no file sets, it is their docstring's, and the value is the default.
    """
    path = find_config(name)
    cfg = load_config(path, overrides)
    meanings: dict[str, str] = {}
    for file in [CONFIGS / "default.yaml", *config_chain(path)]:
        meanings |= _comments(file)
    # The parts come last: which class a part is of may be a default of the method.
    for prefix, target in chain(_targets(cfg), _parts(cfg)):
        names = keyword_names(target)
        for key, (default, text) in _argument_docs(target).items():
            if key in GIVEN or (names is not None and key not in names):
                continue
            meanings.setdefault(f"{prefix}.{key}", text)
            if key not in (OmegaConf.select(cfg, prefix) or {}) and default is not _REQUIRED:
                OmegaConf.update(cfg, f"{prefix}.{key}", default, force_add=True)
    rows = []
    for key, value in leaves(OmegaConf.to_container(cfg)):
        if key == "stages" and value:
            value = [stage["name"] for stage in value]
        if key == "method":  # empty: the stages of a pipeline have methods of their own
            continue
        parent = key
        while parent and not meanings.get(parent):
            parent = parent.rpartition(".")[0]
        rows.append((key, value, meanings.get(parent, "")))
    return rows


def describe(name: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every key of a config with its value and its meaning (the text that ``--help`` prints)."""
    rows = documented_keys(name, overrides)
    lines = [f"  {f'{key} = {_typed(value)}':<56}  {meaning}" for key, value, meaning in rows]
    for stage in load_config(name, overrides).stages or []:
        lines += [
            f"  stages.{stage.name}.{key} = {_typed(value)}" for key, value in leaves(stage) if key != "name"
        ]
    return f"{_label(find_config(name))}: every key, its value and its meaning\n" + "\n".join(lines)


def _typed(value: Any) -> Any:
    """A value as the command line takes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), value)


def _defaults() -> Mapping[str, Any]:
    return _read(CONFIGS / "default.yaml")


def _merge(*parts: Any) -> DictConfig:
    merged = OmegaConf.merge(*parts)
    assert isinstance(merged, DictConfig)
    return merged


def _container(cfg: DictConfig) -> dict[str, Any]:
    """Plain dicts and lists, with ``${...}`` as it stands."""
    return OmegaConf.to_container(cfg)  # type: ignore[return-value]


def _read(path: Path) -> Mapping[str, Any]:
    """What a file holds; it is parsed again only after a change, for many configs share their bases."""
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@cache
def _parsed(path: Path, mtime_ns: int, size: int) -> Mapping[str, Any]:
    try:  # by OmegaConf, which reads 1e-4 as a number, as people mean it; plain YAML calls it a text
        values = OmegaConf.create(path.read_text("utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{_label(path)} is not valid YAML: {error}") from error
    if not isinstance(values, DictConfig) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{_label(path)} is not a mapping of keys to values")
    plain = _container(values)
    if dotted := _dotted(plain):
        *sections, last = dotted.split(".")
        nested = "".join(f"{section}: {{" for section in sections) + f"{last}: ...{'}' * len(sections)}"
        raise ValueError(
            f"{_label(path)}: '{dotted}' is the form of the command line and would not be read; "
            f"in a file it is nested: {nested}"
        )
    return plain


def _dotted(values: Any) -> str | None:
    """The first key with a dot in it, at any depth."""
    if isinstance(values, list):
        return next((found for item in values if (found := _dotted(item))), None)
    if not isinstance(values, dict):
        return None
    own = (key for key in values if isinstance(key, str) and "." in key)
    return next(own, None) or next((found for item in values.values() if (found := _dotted(item))), None)


def _without(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _unless_set(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without what ``own`` sets, key by key inside mappings that both have."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            kept[key] = _unless_set(value, own[key])
        elif key not in own:
            kept[key] = value
    return kept


def _values_of(path: Path) -> dict[str, Any]:
    """What a file says itself."""
    return _without(_read(path), ("base",))


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ValueError(f"'{item}' is not key=value, for example train.steps=100 (all keys: --help)")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the overrides {list(overrides)}: {error}") from error


def _targets(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Open mappings of the config with the class or function that reads each."""
    for prefix, where in OPEN.items():
        path = OmegaConf.select(cfg, where)
        if path:
            yield prefix, import_target(path)


def _parts(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Mappings among the method's arguments with the classes and functions that read each."""
    path = OmegaConf.select(cfg, "method.target")
    if path and hasattr(method := import_target(path), "parts"):
        names = keyword_names(method) or set()
        for argument, part in method.parts(_container(cfg)["method"]):
            if argument in names:
                yield f"method.{argument}", part


def _check_keys(
    values: Mapping[str, Any] | DictConfig,
    merged: DictConfig,
    source: str,
    existing: DictConfig | None = None,
) -> None:
    """Refuse keys of ``values`` that are neither in default.yaml nor arguments of an open mapping's
    target.
    """
    default = dict.fromkeys(key for key, _ in leaves(_defaults()))
    known_here = default | (dict(leaves(OmegaConf.to_container(existing, resolve=False))) if existing else {})
    arguments = (
        {prefix: keyword_names(target) for prefix, target in _targets(merged)} if existing is not None else {}
    )
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=False)  # type: ignore[assignment]
    for key, _ in leaves(values):
        prefix = next((p for p in OPEN if key == p or key.startswith(p + ".")), None)
        if prefix is None:
            if key not in default and not any(known.startswith(key + ".") for known in default):
                raise KeyError(f"{source}: '{key}' is not a key{suggest(key, known_here)}")
        elif key != prefix and arguments.get(prefix) is not None:
            first = key.removeprefix(prefix + ".").split(".")[0]
            allowed = arguments[prefix] | {"target"}  # type: ignore[operator]
            if first not in allowed:
                names = [f"{prefix}.{name}" for name in allowed - GIVEN]
                raise KeyError(
                    f"{source}: '{prefix}.{first}' is not a key{suggest(f'{prefix}.{first}', names)}"
                )


def _check_values(cfg: DictConfig, source: str, changed: Iterable[str] = ()) -> None:
    """Refuse a value of the engine's that is no number, no list of numbers, or no true or false, where the
    default is one, and a word that is none of the known ones.

    Args:
        source: what errors name, but for the keys in ``changed``, which come from the command line.
    """
    for key, kind in _wrong_values(cfg):
        where = "the command line" if key in changed else source
        raise ValueError(f"{where}: {key} is {kind}, not {OmegaConf.select(cfg, key)!r}")


def _wrong_values(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys with a wrong value, and what it should be."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    for key, words in CHOICES.items():
        if OmegaConf.select(cfg, key) not in words:
            yield key, " or ".join(words)
    for key in OPTIONAL_COUNTS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not is_count(value):
            yield key, "a whole number from 1, or null"
    if not isinstance(cfg.train.resume, str):  # YAML takes no, off and false for a boolean
        yield "train.resume", "auto, never or a checkpoint's path"
    if not isinstance(cfg.work_dir, str):
        yield "work_dir", "a folder"
    if cfg.run_name is not None and ".." in Path(str(cfg.run_name)).parts:
        yield "run_name", "a name below logs/ (work_dir is any folder)"
    if cfg.infer.size != "native" and not is_count(cfg.infer.size):
        yield "infer.size", "native or a whole number from 1"
    for key, default in leaves(_defaults()):
        value = OmegaConf.select(cfg, key)
        if not isinstance(default, (bool, int, float)) and key not in LISTS:
            continue
        if key in LISTS:
            length = LISTS[key]
            kind = "a list of numbers" if length is None else f"a list of {length} numbers"
            fits = isinstance(value, ListConfig) and len(value) == (length or len(value)) > 0
            fits = fits and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
        elif isinstance(default, bool):
            kind, fits = "true or false", isinstance(value, bool)
        else:
            least = 1 if key in COUNTS else 0
            kind = f"a {'whole ' if isinstance(default, int) else ''}number from {least}"
            allowed = int if isinstance(default, int) else (int, float)
            fits = isinstance(value, allowed) and not isinstance(value, bool) and value >= least
        if not fits:
            yield key, kind


def _comments(path: Path) -> dict[str, str]:
    """The comment behind each key of a YAML file, by dotted key."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in path.read_text("utf-8").splitlines():
        match = re.match(r"^(\s*)([A-Za-z_]\w*):(?:\s(.*?))??(?:\s+#\s(.*))?$", line)
        if not match:
            continue
        indent, key, _, comment = match.groups()
        while stack and stack[-1][0] >= len(indent):
            stack.pop()
        stack.append((len(indent), key))
        if comment:
            found[".".join(name for _, name in stack)] = comment.strip()
    return found


_REQUIRED = object()


def _argument_docs(target: Any) -> dict[str, tuple[Any, str]]:
    """Default and docstring text of the arguments of a class (over its bases) or function."""
    found: dict[str, tuple[Any, str]] = {}
    target = target.func if isinstance(target, partial) else target
    for part in (
        [c for c in target.__mro__ if c.__module__.startswith(("methods", "models"))]
        if inspect.isclass(target)
        else [target]
    ):
        parameters = inspect.signature(part).parameters.values()
        text = "\n".join(
            filter(None, [inspect.getdoc(part), inspect.getdoc(getattr(part, "__init__", None))])
        )
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            # "name: meaning", or "name, other: meaning" of several together.
            entry = rf"^\s*(?:\w+, )*{parameter.name}(?:, \w+)*:\s(.*(?:\n\s{{8,}}.*)*)"
            match = re.search(entry, text, flags=re.MULTILINE)
            default = _REQUIRED if parameter.default is parameter.empty else parameter.default
            plain = default is _REQUIRED or isinstance(
                default, (int, float, str, bool, list, tuple, dict, type(None))
            )
            meaning = " ".join(match.group(1).split()) if match else ""
            # The class itself comes before its bases: its default counts, and their text where it has none.
            if parameter.name in found:
                default, known = found[parameter.name]
                found[parameter.name] = (default, known or meaning)
                continue
            found[parameter.name] = (
                list(default) if isinstance(default, tuple) else default if plain else _REQUIRED,
                meaning,
            )
    return found
