"""bench/run.py: every part is measured, and what is compared is the same; no time is asserted."""

import json

import pytest
import torch
from torch.testing import assert_close

from bench.calls import dense_walk
from bench.run import Options, run
from models.refiners.random_walk import propagate_to_edge


@pytest.mark.parametrize("part", ["crf", "energy", "walk", "data", "evaluate"])
def test_every_part_is_measured(part, capsys, tmp_path):
    small = {"labels": 3, "size": [24, 32], "steps": 1, "exp_times": 2, "seconds": 0.01}
    medians = run(Options(part=part, out=tmp_path / "numbers.json", **small))
    shown, kept = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())
    assert kept["measured"].keys() == medians.keys() and kept["matrix_flops"] > 0
    assert all(name in shown and median > 0 for name, median in medians.items())


def test_a_step_is_measured_with_what_it_computes(tmp_path):
    step = {"part": "train", "config": "configs/cam/demo.yaml", "labels": 3, "size": [96, 96]}
    run(Options(**step, batch=2, seconds=0.01, out=tmp_path / "numbers.json"))
    rows = json.loads((tmp_path / "numbers.json").read_text())["measured"]
    assert rows["forward, backward"]["GFLOP"] > rows["forward"]["GFLOP"] > 0
    assert rows["step"]["operations"] > rows["forward"]["operations"] > 50 and 0 < rows["step"]["share"] < 1


@pytest.mark.parametrize("squaring", [False, True])
def test_walks_that_are_compared_are_the_same_walk(squaring):
    cam, edge = torch.rand(2, 25, 23), torch.rand(25, 23) ** 2
    walked = propagate_to_edge(cam, edge, exp_times=4)
    assert walked.std() > 0.05
    assert_close(dense_walk(cam, edge, 4, squaring), walked, rtol=1e-4, atol=1e-5)
