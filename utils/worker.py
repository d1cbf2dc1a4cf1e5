"""Worker processes: how many there may be, and what each does first."""

import multiprocessing
import os
import threading

import torch


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
