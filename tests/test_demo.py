"""The demo runs from nothing to a table and a page of pictures, and a second time within seconds."""

import json
import sys
from functools import partial

import pytest

from scripts import demo
from utils.pool import WorkerPool


@pytest.fixture
def arguments(tmp_path):
    return [
        f"out={tmp_path / 'out'}", f"data.root={tmp_path / 'data'}",
        "data.generate.train=8", "data.generate.test=4",
        "data.generate.image_size=48", "data.crop_size=48", "data.num_workers=0", "eval.size=48",
        "train.steps=2", "train.batch_size=4", "train.checkpoint_every=1", "method.backbone.width=32",
        "method.backbone.depth=4", "method.backbone.heads=2",
    ]  # fmt: skip


def test_demo_ends_with_a_table_and_a_page_and_repeats_nothing(arguments, monkeypatch, capsys):
    monkeypatch.setattr("utils.pool.core_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    shown = capsys.readouterr().out
    out = demo.Path(arguments[0].removeprefix("out="))
    records = json.loads((out / "scores.json").read_text())
    assert [record["method"] for record in records] == ["plain classifier", "ToCo", "SeCo"]
    table = (out / "table.txt").read_text()
    assert table.strip() in shown
    for record in records:
        assert 0 <= record["test"]["cam"] <= 100 and record["test_shuffled"]["images"] == 4
        assert f"{record['test']['cam']:.1f}" in table
    cam, toco, _ = (record["test_shuffled"] for record in records)
    assert "cam/test_shuffled/ss+flip@0.30" in cam["protocols"] and "seg" not in cam
    assert "seg/test_shuffled/ss" in toco["protocols"] and toco["seg"] >= 0
    page = (out / "report.html").read_text()
    assert table.splitlines()[0] in page and all(split in page for split in demo.SPLITS)
    assert all((out / name / "report.html").is_file() for name in ("cam", "toco", "seco"))

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth")}
    monkeypatch.setattr("engine.validation.validate", None)  # nothing is scored again
    demo.main()
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth")} != {}


def test_methods_train_side_by_side(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("utils.pool.core_count", lambda: 4)
    monkeypatch.setattr("utils.pool.WorkerPool", partial(WorkerPool, threads=True))
    monkeypatch.setattr(demo, "_named_run", lambda name, out, overrides: asked.append((name, *overrides)))
    demo.train_side_by_side(demo.CONFIGS, tmp_path, ["seed=1"])
    assert sorted(asked) == sorted((name, "train.threads=1", "seed=1") for name in demo.CONFIGS)


def test_other_scenes_lie_beside_the_runs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("tools.make_demo_data.run", lambda options: asked.append(options) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["demo.py", f"out={tmp_path}", "data.generate.train=8"])
    with pytest.raises(SystemExit):
        demo.main()
    assert asked[0].out == tmp_path / "data" and asked[0].overrides == ["train=8"]
