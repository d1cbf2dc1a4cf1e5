"""Several processes in a test, forked from one that has read the libraries: that takes most of their time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def context() -> ForkServerContext:
    """Its processes start from a server without threads, so that they are safe where there is a GPU too."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["torch", "torchvision.transforms.v2", "timm"])
    return forkserver


def start(function: Callable, *arguments: Any) -> ForkServerProcess:
    """A process with as many threads as this one that calls ``function``, a name of a module."""
    process = context().Process(target=_call, args=(torch.get_num_threads(), function, *arguments))
    process.start()
    return process


def _call(threads: int, function: Callable, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    function(*arguments)


def in_a_group(folder: Path, function: Callable, *arguments: Any, size: int = 2) -> list[Any]:
    """Results of ``function(rank, *arguments)`` in each of ``size`` processes of one group (gloo), by rank.

    Args:
        folder: an empty one, where the processes find each other.
    """
    queue = context().SimpleQueue()
    group = [start(_join, rank, size, folder, queue, function, *arguments) for rank in range(size)]
    try:
        results = dict(_received(queue, group) for _ in group)
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0] * size
    finally:
        for process in group:
            process.kill()
    return [results[rank] for rank in range(size)]


def _join(rank: int, size: int, folder: Path, queue, function: Callable, *arguments: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    queue.put((rank, function(rank, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


def _received(queue, group: list[ForkServerProcess]) -> Any:
    """What the queue holds next; an error if nothing can come any more."""
    while queue.empty():
        for process in group:
            process.join(0.05)
            assert not process.exitcode, f"a process of the group ended with {process.exitcode}"
    return queue.get()
