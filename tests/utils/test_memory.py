"""Freed memory is used again instead of being faulted in anew."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

COUNT_FAULTS = """
import resource, sys, torch
from utils.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for step in range(20):
    if step == 10:  # by then enough has come from the system
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    kept, faults = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return kept == "True", int(faults)


def test_freed_blocks_are_used_again() -> None:
    kept, faults = page_faults("keep")
    if not kept:
        pytest.skip("the C library has no such settings")
    _, usual = page_faults("leave")
    assert faults < usual / 20, f"{faults} page faults for ten tensors of 64 MiB, {usual} without"
