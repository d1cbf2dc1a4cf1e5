"""bench/run.py: every method answers, in a process of its own; no time is asserted."""

import argparse
import json

import pytest
import torch
from torch.testing import assert_close

from bench import run as benchmark


@pytest.mark.parametrize(
    ("command", "extra"),
    [("crf", ["--presets", "toco", "--steps", "1"]), ("energy", []), ("walk", [])],
)
def test_every_method_is_measured(command, extra, tmp_path, capsys):
    out = tmp_path / "times.json"
    small = ["--labels", "3", "--size", "24", "32", "--rounds", "1", "--repeats", "1", "--out", str(out)]
    benchmark.main([command, *small, *extra])
    rows = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert rows and all(row["method"] in shown for row in rows)


def test_walks_that_are_compared_are_the_same_walk(tmp_path):
    options = argparse.Namespace(size=[100, 90], labels=[2], exp_times=4)
    (case,) = benchmark.prepare_walk(options, tmp_path)
    task = {"file": case["file"], "threads": torch.get_num_threads(), "device": "cpu", "exp_times": 4}
    walked = benchmark._walk(task)()
    assert walked.shape == (2, 25, 23) and walked.std() > 0.1
    for squaring in (False, True):
        assert_close(benchmark._walk_dense(task, squaring)(), walked, rtol=1e-4, atol=1e-5)
