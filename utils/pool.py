"""Worker processes: how many there may be, and a pool of them with a bounded queue and results in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch


class WorkerPool:
    """Call functions in other processes and hand their results to callbacks, in the order of submission.

    At most ``in_flight`` calls wait or run, so memory does not grow with the length of the job; ``submit``
    waits for a place. Callbacks run in the caller's thread, inside ``submit`` and at the end. An error of a
    call is raised there, too.

    Args:
        workers: processes of one thread each; 0 calls at once, in this process.
        in_flight: calls that may wait or run; None: two for each worker.
        threads: threads of this process instead of processes, for work that waits for files or a GPU.
    """

    def __init__(self, workers: int, in_flight: int | None = None, threads: bool = False) -> None:
        self._pending: deque[tuple[Future[Any], Callable[[Any], object] | None]] = deque()
        self._in_flight = in_flight or 2 * workers
        self._executor: Executor | None = None
        if workers and threads:
            self._executor = ThreadPoolExecutor(workers)
        elif workers:
            # Forked children would inherit locked mutexes of torch's thread pools.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, context, initializer=start_worker)

    def submit(
        self, work: Callable[..., Any], *arguments: Any, then: Callable[[Any], object] | None = None
    ) -> None:
        """Call ``work(*arguments)`` in a worker (all must be picklable) and later ``then(result)`` here."""
        if self._executor is None:
            result = work(*arguments)
            if then is not None:
                then(result)
            return
        while self._pending and (len(self._pending) >= self._in_flight or self._pending[0][0].done()):
            self._finish_first()
        self._pending.append((self._executor.submit(work, *arguments), then))

    def drain(self) -> None:
        """Wait for all calls and run their callbacks."""
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        future, then = self._pending.popleft()
        result = future.result()
        if then is not None:
            then(result)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)  # a training saves what it has


def core_count() -> int:
    """Number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def start_worker() -> None:
    """Initializer of process pools: one thread, and an end with the parent.

    A killed parent cannot stop its workers, which would wait for calls for ever.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
