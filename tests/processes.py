"""Processes in tests: groups of them, and what a launcher would start."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.distributed import barrier, init_process_group, shutdown
from utils.worker import worker_context


def start(function: Callable, *arguments: Any) -> BaseProcess:
    """A process with as many threads as this one that calls ``function``, a name of a module."""
    process = worker_context().Process(target=_call, args=(torch.get_num_threads(), function, *arguments))
    process.start()
    return process


def _call(threads: int, function: Callable, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    function(*arguments)


def in_a_group(function: Callable, *arguments: Any, size: int = 2) -> list[Any]:
    """Results of ``function(rank, *arguments)`` in each of ``size`` processes of one group (gloo), by rank.

    They are what torchrun would start, within a second instead of one after another import of the libraries.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = worker_context().SimpleQueue()
    group = [start(_join, rank, size, port, queue, function, *arguments) for rank in range(size)]
    try:
        results = dict(_received(queue, group) for _ in group)
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0] * size
    finally:
        for process in group:
            process.kill()
    return [results[rank] for rank in range(size)]


def _join(rank: int, size: int, port: int, queue, function: Callable, *arguments: Any) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    init_process_group("cpu")
    queue.put((rank, function(rank, *arguments)))
    barrier()
    shutdown()


def _received(queue, group: list[BaseProcess]) -> Any:
    """What the queue holds next; an error if nothing can come any more."""
    while queue.empty():
        for process in group:
            process.join(0.05)
            assert not process.exitcode, f"a process of the group ended with {process.exitcode}"
    return queue.get()


class Launch(NamedTuple):
    """What a launcher gives to torchrun (flags, script, its arguments), and the GPUs that can be seen."""

    flags: dict[str, str]
    script: str
    arguments: list[str]
    gpus: str | None


def launch(
    command: list[str], folder: Path, **options: Any
) -> tuple[subprocess.CompletedProcess, Launch | None]:
    """Run a launcher (``bash run_*.sh ...``) with a stand-in for Python that only tells what it was given.

    Args:
        folder: for the stand-in.
        **options: of ``subprocess.run``.

    Returns:
        The finished launcher, and what it would have started; None if nothing.
    """
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "${CUDA_VISIBLE_DEVICES-all}" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**options.pop("env", os.environ), "PYTHON": str(stand_in)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        return done, None
    gpus, launcher, *words = done.stdout.splitlines()
    assert launcher.endswith("scripts/torchrun.py")
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[:first])
    return done, Launch(flags, words[first], words[first + 1 :], None if gpus == "all" else gpus)
