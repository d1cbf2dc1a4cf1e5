"""Freed memory is used again instead of being faulted in anew."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

COUNT_FAULTS = """
import resource, torch
from utils.memory import keep_freed_memory

def faults():
    for step in range(20):
        if step == 14:  # by then enough has come from the system
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


def test_freed_blocks_are_used_again() -> None:
    command = [sys.executable, "-c", COUNT_FAULTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    usual, kept, faults = done.stdout.split()
    if kept != "True":
        pytest.skip("the C library has no such settings")
    assert int(faults) < int(usual) / 20, f"{faults} page faults for six tensors of 64 MiB, {usual} without"
