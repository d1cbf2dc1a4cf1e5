"""Problems of data: the first one is raised, or all of them are collected."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from utils.cli import message_of

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def all_problems() -> Iterator[list[str]]:
    """Collect what `problem` is called with, in a list, instead of raising the first one."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    except (ValueError, OSError) as error:  # one after which there is no way to continue
        found.append(message_of(error))
    finally:
        _collected.reset(token)


def problem(error: Exception) -> None:
    """Raise an error; where all are collected, note it and return, and the caller leaves the entry out."""
    found = _collected.get()
    if found is None:
        raise error
    found.append(message_of(error))
