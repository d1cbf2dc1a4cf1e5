"""bench/run.py: every part is measured, and what is compared is the same; no time is asserted."""

import pytest
import torch
from torch.testing import assert_close

from bench.calls import dense_walk
from bench.run import Options, run
from models.refiners.random_walk import propagate_to_edge


@pytest.mark.parametrize("part", ["crf", "energy", "walk"])
def test_every_part_is_measured(part, capsys):
    medians = run(Options(part=part, labels=3, size=[24, 32], steps=1, exp_times=2, seconds=0.01))
    shown = capsys.readouterr().out
    assert len(medians) >= 1 and all(name in shown and median > 0 for name, median in medians.items())


@pytest.mark.parametrize("squaring", [False, True])
def test_walks_that_are_compared_are_the_same_walk(squaring):
    cam, edge = torch.rand(2, 25, 23), torch.rand(25, 23) ** 2
    walked = propagate_to_edge(cam, edge, exp_times=4)
    assert walked.std() > 0.05
    assert_close(dense_walk(cam, edge, 4, squaring), walked, rtol=1e-4, atol=1e-5)
