"""What all entry points share: errors of the user end in one line, not in a traceback."""

import io
import os
import re
import sys
from collections.abc import Callable

USER_ERRORS = (ValueError, KeyError, OSError, ImportError, FloatingPointError)  # OSError: a full disk, too


def run_main(main: Callable[[], object]) -> None:
    """Call ``main``; bad input prints its message alone and exits."""
    accept_any_text()
    try:
        main()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        # A KeyError of one word is no message of ours, but a slip in somebody's code.
        is_slip = isinstance(error, KeyError) and " " not in str(error.args[0] if error.args else "")
        if os.environ.get("TRACEBACK") or is_slip:
            raise
        print(f"{type(error).__name__}: {visible(message_of(error))}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError) and error.name in ("omegaconf", "torch", "yaml"):
            print("(source .venv/bin/activate, or pip install -r requirements.txt)", file=sys.stderr)
        print("(TRACEBACK=1 in the environment shows where)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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
