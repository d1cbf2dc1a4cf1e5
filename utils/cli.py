"""What all entry points share: errors of the user end in one line, not in a traceback; values of flags."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Literal

USER_ERRORS = (
    ValueError,
    KeyError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ImportError,
    FloatingPointError,
    PermissionError,
)


def run_main(main: Callable[[], object]) -> None:
    """Call ``main`` and exit; bad input prints its message alone (``TRACEBACK=1`` shows where it was
    raised).
    """
    accept_any_text()
    try:
        main()
    except USER_ERRORS as error:
        # A KeyError of one word is no message of ours, but a slip in somebody's code.
        is_slip = isinstance(error, KeyError) and " " not in str(error.args[0] if error.args else "")
        if os.environ.get("TRACEBACK") or is_slip:
            raise
        print(f"{type(error).__name__}: {visible(message_of(error))}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError) and error.name in ("omegaconf", "torch", "yaml"):
            print(
                "(packages: source .venv/bin/activate, or pip install -r requirements.txt)", file=sys.stderr
            )
        print("(TRACEBACK=1 in the environment shows where)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def accept_any_text() -> None:
    """Let a terminal that cannot show a letter (ASCII locale) show its code instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """Text whose control characters, as a stranger's file name may hold, are shown and not obeyed."""
    return re.sub(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def message_of(error: BaseException) -> str:
    """What an error says, without the traceback that a loader's worker puts before it."""
    # str(KeyError) is the repr of its message: line breaks and quotes would be escaped.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if message.startswith("Caught ") and "Original Traceback" in message:
        message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
    return message


# -- values of flags


def image_size(value: str) -> int | Literal["native"]:
    """``native`` or a number of pixels, for flags."""
    if value == "native":
        return "native"
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"'{value}' is neither native nor a number of pixels")
    return int(value)


def positive(value: str) -> int:
    """A whole number from 1, for flags."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"'{value}' is no whole number from 1")
    return int(value)


def count(value: str) -> int:
    """A whole number from 0, for flags."""
    if not value.isdigit():
        raise argparse.ArgumentTypeError(f"'{value}' is no whole number from 0")
    return int(value)


def scale(value: str) -> float:
    """A factor above 0, for flags."""
    if not 0 < float(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"'{value}' is no factor above 0")
    return float(value)
