"""A training continues with the same numbers after kills at any moment, also inside of checkpoint writing.

Ten kills; ``bash run_tests.sh --all tests/faults`` makes a hundred.
"""

import os
import random
import signal
import threading
from dataclasses import replace

import torch

from tests.engine.test_trainer import OPTIONS, assert_same, batches, last_good, trainer
from tests.processes import TIMEOUT, start

SECONDS = 0.3  # until a kill: some ten steps with their checkpoints


def train(folder, steps, seed=None):
    """To the last step, or to the kill that the seed draws."""
    torch.set_num_threads(1)

    def doomed(first):
        if seed is not None:
            seconds = random.Random(seed).uniform(0, SECONDS)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        yield from batches(first)

    run = trainer(folder, doomed, options=replace(OPTIONS, steps=steps, log_every=4, checkpoint_every=1))
    if (found := last_good(folder)) is not None:
        run.restore(found)
    run.fit()


def test_weights_and_records_are_those_of_an_uninterrupted_run(tmp_path, at_length):
    for seed in range(100 if at_length else 10):
        process = start(train, tmp_path / "parts", 10**6, seed)
        process.join(TIMEOUT)
        assert process.exitcode == -signal.SIGKILL
    steps = last_good(tmp_path / "parts").state["step"] + 5
    for folder in ("parts", "whole"):
        train(tmp_path / folder, max(steps, 20))
    assert_same(tmp_path / "parts", tmp_path / "whole")
