"""What the command lines of the inference and evaluation tools share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.load import OVERRIDE
from utils.build import suggest
from utils.cli import count


def checkpoint_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every tool takes that runs a checkpoint over images."""
    p = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments: key=value changes of the checkpoint's config",
    )
    p.add_argument(
        "--model_path",
        required=True,
        help="checkpoint (.pth, .safetensors), also of a published program (docs/evaluation.md)",
    )
    p.add_argument(
        "--infer",
        "--infer_set",
        dest="infer",
        help="split, list file (.txt), photo, or folder of photos; default: data.val_set",
    )
    p.add_argument("--data_root", help="folder of the data set; default: that of the checkpoint's config")
    return p


def output_flags(p: argparse.ArgumentParser) -> None:
    """Add what every tool takes that writes a file for each image of a split."""
    p.add_argument(
        "--out",
        help="output folder; default: beside the checkpoint, named after checkpoint, images and protocol",
    )
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "auto"),
        help="of the network (default %(default)s)",
    )
    p.add_argument(
        "--num_workers", type=count, default=2, help="processes that decode images (default %(default)s)"
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Flags and ``key=value`` overrides in any order, as a mapping; the latter under ``overrides``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [item for item in arguments if OVERRIDE.match(item)]
    flags = [item for item in arguments if not OVERRIDE.match(item)]
    return {**vars(parser.parse_args(flags)), "overrides": overrides}


def complete(
    parser: argparse.ArgumentParser, cfg: Mapping[str, Any], tool: str | None = None
) -> argparse.Namespace:
    """The options of a stage: those given, the parser's defaults for the rest.

    Args:
        tool: what errors call the tool; None: the program that runs.

    Raises:
        KeyError: an option that the tool does not have, with the closest one.
        ValueError: a required option is left out, or has a value that its flag does not take.
    """
    parser.prog = tool or parser.prog
    actions = [action for action in parser._actions if action.dest != "help"]
    options = {action.dest: action.default for action in actions} | {"overrides": []}
    for key, value in cfg.items():
        if key not in options:
            keys = "; keys of the checkpoint's config are its overrides: [method.key=value]"
            hint = suggest(key, options) + (keys if "model_path" in options else "")
            raise KeyError(f"'{key}' is not an option of {parser.prog}{hint}")
        options[key] = value
    for action in actions:
        value = options[action.dest]
        if action.required and value is None:
            raise ValueError(f"{parser.prog} needs {'/'.join(action.option_strings)}")
        if action.dest in cfg:
            options[action.dest] = action.default if value is None else _checked(parser, action, value)
    return argparse.Namespace(**options)


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """A value of a stage as the flag would have it.

    Raises:
        ValueError: the flag takes no such value.
    """
    flag = "/".join(action.option_strings)
    if action.nargs == "?" and value is True:  # the flag alone
        return action.const
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{parser.prog} {flag} is true or false, not {value!r}")
        return value
    many = isinstance(value, (list, tuple))
    if many != (action.nargs in ("+", "*") or isinstance(action.nargs, int)):
        raise ValueError(f"{parser.prog} {flag} takes {'one value' if many else 'a list'}, not {value!r}")
    if many and not value and action.nargs == "+":
        raise ValueError(f"{parser.prog} {flag} is an empty list: leave it out, or give a value")
    found = []
    for item in value if many else [value]:
        try:
            if isinstance(item, bool) or not isinstance(item, (str, int, float, Path)):
                raise TypeError("it is no text and no number")
            found.append(action.type(str(item)) if callable(action.type) else str(item))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{parser.prog} {flag} cannot be {item!r}: {error}") from error
        if action.choices is not None and found[-1] not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"{parser.prog} {flag} cannot be {item!r}; known: {known}")
    return found if many else found[0]


def data_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides of the command line, ``--data_root`` (relative to the working directory) among them."""
    root = [f"data.root={Path(options.data_root).expanduser().absolute()}"] if options.data_root else []
    return [*root, *options.overrides]
