"""Requests to stop: Ctrl-C, SIGTERM (a cluster's end of the time), and the end of the launcher."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from utils.logging import LOGGER

LAUNCHER = "TAG2MASK_LAUNCHER"  # environment variable: process id of scripts/torchrun.py


class Stopping:
    """Inside of its context a signal is noted instead of ending the process.

    A second Ctrl-C ends the process at once. SIGTERM may come twice: from a job and from its launcher.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._at_once = False

    @property
    def requested(self) -> bool:
        """Whether this process should stop: for a signal, or because nobody could stop it any more."""
        orphaned = os.environ.get(LAUNCHER) not in (None, str(os.getppid()))
        return self._signal is not None or orphaned

    @property
    def exit_code(self) -> int:
        """What a shell gives for a process that the signal ended."""
        return 128 + (self._signal or signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal inside of this context ends the process: nothing would be lost."""
        if self._signal is not None:
            raise SystemExit(self.exit_code)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Stopping:
        self._handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self._signal = self._signal is None, self._signal or number
        if self._at_once:
            LOGGER.info("stopped; the same command continues")
            raise SystemExit(self.exit_code)
        if first:
            LOGGER.info("stopping after this step ...")
