"""tools/benchmark.py: every method answers, in a process of its own; no time is asserted."""

import json

import pytest

from tools import benchmark


@pytest.mark.parametrize(
    ("command", "extra"),
    [("crf", ["--presets", "toco", "--steps", "1"]), ("energy", []), ("walk", ["--squaring"])],
)
def test_every_method_is_measured(command, extra, tmp_path, capsys):
    out = tmp_path / "times.json"
    small = ["--labels", "3", "--size", "24", "32", "--rounds", "1", "--repeats", "1", "--out", str(out)]
    benchmark.main([command, *small, *extra])
    rows = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert rows and all(row["method"] in shown for row in rows)
