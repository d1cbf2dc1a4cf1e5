"""Options: each one is declared once, with type, default and meaning.

A tool's options are a dataclass. `command_line` fills it from flags, `fill` from a mapping of a YAML file;
both make the same checks::

    @dataclass(kw_only=True)
    class Options:
        cam: Path = option(meaning="folder of CAM files", reads=True)
        steps: int = option(10, "mean-field steps", least=1)
        out: Path = option(meaning="folder for the labels")
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field
from functools import reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from utils.build import suggest
from utils.cli import run_main

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")  # how key=value begins

T = TypeVar("T")


def option(
    default: Any = MISSING,
    meaning: str = "",
    *,
    free: bool | Sequence[str] = False,
    reads: bool | str | Sequence[str] = False,
    choices: Sequence[str] | None = None,
    least: float = 0,
    length: int | None = None,
    alias: str | None = None,
    alone: str | None = None,
    positional: bool = False,
) -> Any:
    """A field of an options dataclass.

    Args:
        default: without one the option is required.
        free: it changes where and how something is computed, not what; a resumed run may change it. Of a
            mapping: those of its keys.
        reads: it is a path that must exist, or the output of an earlier stage. Of a mapping: those of its
            keys. ``"images"``: it names images, by a split, a list file or a folder.
        choices: its values, where these are few words.
        least: smallest value of a number, or of each number of a list.
        length: how many values a list has.
        alias: second name of the flag.
        alone: value of the flag without a value.
        positional: the command line gives it without a flag.
    """
    metadata = {"meaning": meaning, "free": free, "reads": reads, "choices": choices, "least": least}
    metadata |= {"length": length, "alias": alias, "alone": alone, "positional": positional}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def walk(cls: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Dotted key, field and type of every option; a section comes before its options."""
    for field in dataclasses.fields(cls):
        kind = get_type_hints(cls)[field.name]
        yield f"{prefix}{field.name}", field, kind
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, f"{prefix}{field.name}.")


def marked(cls: Any, mark: str) -> dict[str, Any]:
    """Dotted key -> mark of the options that are ``free`` or that the tool ``reads``."""
    found: dict[str, Any] = {}
    for key, field, _ in walk(cls):
        value = field.metadata.get(mark, False)
        if isinstance(value, (list, tuple)):
            found |= {f"{key}.{name}": True for name in value}
        elif value:
            found[key] = value
    return found


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``keys``, or inside one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def is_text(kind: Any) -> bool:
    """Whether an option of this type takes nothing but a text, or a path, which stays as it is typed."""
    kinds = set(get_args(kind)) if isinstance(kind, UnionType) else {kind}
    return kinds != {NoneType} and kinds <= {str, Path, NoneType}


def fill(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Options from a mapping; null means the default.

    Args:
        where: what errors call the options, for example ``stage 'seeds'``.

    Raises:
        KeyError: for a key that is no option, with the closest one.
        ValueError: for a required option that is missing, or a value of the wrong kind.
    """
    where = f"{where}: " if where else ""
    kinds = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            hint = "; changes of the checkpoint's config are its overrides" if "overrides" in fields else ""
            raise KeyError(f"{where}'{key}' is not an option{suggest(key, fields)}{hint}")
        if value is not None:
            found[key] = convert(fields[key], kinds[key], value, f"{where}{key}")
    for name, field in fields.items():
        if name not in found and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}the option '{name}' is missing: {field.metadata['meaning']}")
    return cls(**found)


def convert(field: Field[Any], kind: Any, value: Any, where: str) -> Any:
    """A value as the option's type: a text becomes a path without ``~``, a whole number a float or a text.

    Raises:
        ValueError: it is of another kind, or outside of the option's limits.
    """
    limits = field.metadata
    if value is True and limits["alone"]:  # a flag without a value
        value = limits["alone"]
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    exact = [k for k in kinds if type(value) in (k, get_origin(k))]  # of `int | str`, 5 is the number
    for k in [*exact, *kinds]:
        try:
            result = _as(k, value)
        except TypeError:
            continue
        items = result if isinstance(result, list) else [result]
        words = [item for item in items if isinstance(item, str)]
        numbers = [item for item in items if isinstance(item, (int, float)) and not isinstance(item, bool)]
        if (
            (limits["choices"] and any(word not in limits["choices"] for word in words))
            or not all(number >= limits["least"] for number in numbers)
            or (isinstance(result, list) and len(items) != (limits["length"] or len(items)))
            or (items == [] and field.default_factory is not MISSING and field.default_factory())
        ):
            continue
        return result
    expected = " or ".join(_name(field, k) for k in kinds)
    hint = suggest(value, limits["choices"]) if isinstance(value, str) and limits["choices"] else ""
    raise ValueError(f"{where} expects {expected}, got {value!r}{hint}")


def _as(kind: Any, value: Any) -> Any:
    """The value as one type.

    Raises:
        TypeError: it is of another one.
    """
    if kind is Any:
        return value
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return dict(value)
    if get_origin(kind) is list and isinstance(value, (list, tuple)):
        return [_as(get_args(kind)[0], item) for item in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, int, NoneType) and type(value) is kind:
        return value
    if kind is float and is_number:
        return float(value)
    if kind is str and (isinstance(value, (str, Path)) or is_number):
        return str(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    raise TypeError


def _name(field: Field[Any], kind: Any) -> str:
    """A type in words, with the option's limits."""
    if kind is str and field.metadata["choices"]:
        return " or ".join(field.metadata["choices"])
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    least, count = field.metadata["least"], field.metadata["length"]
    limit = f" from {least:g}" if item in (int, float) else ""
    if item is not kind:
        names = {int: "whole numbers", float: "numbers"}
        return f"a list of {f'{count} ' if count else ''}{names.get(item, 'texts')}{limit}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return names.get(kind, "null" if kind is NoneType else "a mapping") + limit


def parse(cls: type[T], doc: str | None, arguments: Sequence[str] | None = None) -> T:
    """Options from flags and ``key=value`` items in any order; the latter become ``overrides``."""
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    flags, overrides = _separate(cls, arguments)
    shown = []
    for name, field in fields.items():
        if name == "overrides":
            doc = f"{doc}\nFurther arguments: key=value, {field.metadata['meaning']}"
            continue
        copy = dataclasses.field(default=field.default, default_factory=field.default_factory)
        shown.append((name, _flag(field, get_type_hints(cls)[name]), copy))
    given: Any = tyro.cli(
        dataclasses.make_dataclass(cls.__name__, shown, kw_only=True),
        description=doc,
        args=flags,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    values = {name: getattr(given, name) for name, *_ in shown}
    return fill(cls, values | ({"overrides": overrides} if overrides else {}))


def command_line(cls: type[T], run: Callable[[T], object], doc: str | None) -> None:
    """Run a tool with the options of the command line."""
    run_main(lambda: run(parse(cls, doc)))


def _flag(field: Field[Any], kind: Any) -> Any:
    """What the library knows of an option."""
    import tyro

    words, kinds = field.metadata["choices"], get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = tuple(k for k in kinds if get_origin(k) is not dict)  # a mapping is typed as a text
    shown = [k for k in kinds if k is not NoneType]
    metavar = (
        "TRUE|FALSE"
        if shown == [bool]
        else "|".join("|".join(words) if words and k is str else k.__name__.upper() for k in shown)
    )
    is_empty = field.default is None or (field.default_factory is not MISSING and not field.default_factory())
    about = tyro.conf.arg(
        help=field.metadata["meaning"],
        metavar=metavar if len(kinds) > 1 else None,  # null is not typed
        aliases=(f"--{field.metadata['alias']}",) if field.metadata["alias"] else None,
        help_behavior_hint="" if is_empty else None,
    )
    kinds = tuple(Literal[tuple(words)] if words and k is str else k for k in kinds)
    flag = Annotated[reduce(or_, kinds), about]
    return tyro.conf.Positional[flag] if field.metadata["positional"] else flag


def _separate(cls: Any, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and ``key=value`` items. What follows a flag with one value is this value."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    named = {alias: name for name, field in fields.items() if (alias := field.metadata["alias"])}
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for item, following in zip(arguments, [*arguments[1:], "--"]):
        if not takes_value and "overrides" in fields and OVERRIDE.match(item):
            overrides.append(item)
            continue
        flags.append(item)
        name = item.removeprefix("--").replace("-", "_")
        if takes_value or not item.startswith("--"):
            takes_value = False
            continue
        kind = get_type_hints(cls).get(named.get(name, name))
        if (
            get_type_hints(cls).get(name.removeprefix("no_")) == bool | None
        ):  # true and false in place of a default
            flags[-1:] = [f"--{name.removeprefix('no_')}", str(not name.startswith("no_"))]
        elif kind is not None and (alone := fields[named.get(name, name)].metadata["alone"]):
            takes_value = not (following.startswith("--") or OVERRIDE.match(following))
            flags += [] if takes_value else [alone]
        else:
            takes_value = kind not in (None, bool) and get_origin(kind) is not list
    return flags, overrides
