"""Run folders are read, grouped and listed."""

import json
import math
from dataclasses import replace

import yaml
from filelock import FileLock

from engine.runs import find_runs, grouped, interval, load_run
from tools import runs as runs_tool


def test_seeds_are_a_group_with_the_interval_of_student(make_run):
    folders = [make_run("a0", 0), make_run("a1", 1), make_run("b0", 0, lr=0.2)]
    groups = grouped([load_run(folder) for folder in folders])
    assert sorted(len(runs) for runs in groups.values()) == [1, 2] and len(groups) == 2
    moved = folders[0].parent / "elsewhere" / "a0"
    moved.mkdir(parents=True)
    (moved / "config.yaml").write_text((folders[2] / "config.yaml").read_text().replace("0.2", "0.3"))
    assert sum(map(len, grouped(find_runs([folders[0].parent])).values())) == 4
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and math.isclose(half, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert interval([5.0]) == (5.0, None)


def test_state_of_a_run(make_run):
    folder = make_run("one")
    assert load_run(folder).state == "finished"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["steps"] = 20
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(folder).state == "died at 8"
    with FileLock(folder / ".lock"):
        assert load_run(folder).state == "running"


def test_table_of_runs(make_run, capsys):
    folder = make_run("one")
    options = runs_tool.Options(folders=[folder.parent])
    (row,) = runs_tool.run(options)
    assert (row["step"], row["best_step"]) == (8, 4) and set(row["scores"]["seg/val/ss"]) == {"last", "best"}
    assert f"{row['scores']['seg/val/ss']['last']:.2f}" in capsys.readouterr().out
    runs_tool.run(replace(options, csv=True))
    assert capsys.readouterr().out.count("seg/val/ss") == 1
    runs_tool.run(replace(options, json=True))
    assert json.loads(capsys.readouterr().out) == [row]
    assert [run.name for run in find_runs([folder.parent])] == ["one"]
