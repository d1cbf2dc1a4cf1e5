"""Processes in tests: groups of them, and what a launcher would start."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import queue as standard_queue
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.distributed import barrier, shutdown

TIMEOUT = 300  # seconds, of anything that may hang


def start(function: Callable, *arguments: Any) -> BaseProcess:
    """A process with the threads and environment of this one that calls ``function`` (importable by name)."""
    return _start(torch.get_num_threads(), dict(os.environ), function, *arguments)


def in_a_group(function: Callable, *arguments: Any, size: int = 2) -> list[Any]:
    """Results of ``function(rank, *arguments)`` in ``size`` processes, by rank.

    They find what torchrun would tell them, and one thread each; the function joins the group itself
    (``init_process_group``). torchrun's processes take seconds to import the libraries, one by one.

    Raises:
        AssertionError: a process failed, or ended without a result.
    """
    results = _context().Queue()
    group: list[BaseProcess] = []
    shared = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    try:
        for rank in range(size):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            group.append(_start(1, {**os.environ, **own}, _answer, rank, results, function, *arguments))
        answers = dict(_received(results, group) for _ in group)
        for process in group:
            process.join(TIMEOUT)
        assert [process.exitcode for process in group] == [0] * size
    finally:
        for process in group:
            process.kill()
    return [answers[rank] for rank in range(size)]


def free_port() -> str:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _context() -> BaseContext:
    """Forked from a server that has imported the libraries, and is safe where there is a GPU too."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "timm", "engine.train"])
    try:
        multiprocessing.forkserver.ensure_running()
    except OSError:  # no place for its socket: a long TMPDIR, a file system without sockets
        return multiprocessing.get_context("spawn")
    return context


def _start(threads: int, environment: Mapping[str, str], function: Callable, *arguments: Any) -> BaseProcess:
    process = _context().Process(target=_call, args=(threads, environment, function, *arguments))
    process.start()
    return process


def _call(threads: int, environment: Mapping[str, str], function: Callable, *arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    function(*arguments)


def _answer(rank: int, results, function: Callable, *arguments: Any) -> None:
    results.put((rank, function(rank, *arguments)))
    barrier()
    shutdown()


def _received(results, group: list[BaseProcess]) -> tuple[int, Any]:
    for _ in range(TIMEOUT):
        ended = [process.exitcode for process in group]  # before a look at what they sent
        try:
            return results.get(timeout=1)
        except standard_queue.Empty:
            assert not any(ended) and None in ended, f"a process ended without a result: exit codes {ended}"
    raise AssertionError(f"no result within {TIMEOUT} s")


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
    # A script on standard input asks what it lacks: nothing.
    stand_in.write_text('#!/bin/sh\n[ "$1" = - ] || printf "%s\\n" "${CUDA_VISIBLE_DEVICES-all}" "$@"\n')
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
