"""The benchmark of co-occurrence: trains, measures and continues; its table covers what is there."""

from pathlib import Path

import pytest

from bench import cooccurrence
from bench.cooccurrence import Options

TINY = ["data.crop_size=32", "train.steps=1", "train.batch_size=4", "optim.warmup_steps=1", "device=cpu"]
TINY += ["data.num_workers=0", "method.backbone.depth=3"]


def test_trainings_are_measured_once(tmp_path, monkeypatch):
    given = {"methods": ["cam"], "strengths": [0.8], "train": 12, "test": 6} | {
        "out": tmp_path,
        "overrides": TINY,
    }
    cooccurrence.run(Options(seeds=[0, 1], **given))
    table = (tmp_path / "table.txt").read_text()
    assert table.count("±") == 2 * 7  # seven numbers of CAM and auxiliary CAM over two seeds
    monkeypatch.setattr(cooccurrence, "train_one", None)
    cooccurrence.run(Options(seeds=[0, 1], **given))
    assert (tmp_path / "table.txt").read_text() == table


def test_pipelines_train_too(tmp_path):
    later = ("cam", "seeds", "affinity", "pseudo", "segment", "infer", "shuffled")
    overrides = [*TINY, "stages.cam_net.train.steps=1", *(f"stages.{stage}=null" for stage in later)]
    given = {"methods": ["psa"], "config": "{method}/demo.yaml", "train": 12, "test": 6, "out": tmp_path}
    cooccurrence.run(Options(strengths=[0.8], seeds=[0], overrides=overrides, **given))
    assert "psa" in (tmp_path / "table.txt").read_text()


def test_shards_share_all_trainings(tmp_path, monkeypatch):
    done: list[Path] = []
    monkeypatch.setattr(cooccurrence, "train_one", lambda options, folder, *_: done.append(folder.name))
    monkeypatch.setattr(cooccurrence, "checkpoints", lambda folder: [])
    for k in range(5):
        cooccurrence.run(Options(out=tmp_path, shard=f"{k}/5"))
    assert len(done) == len(set(done)) == 36


def test_intervals_are_of_the_images_and_slopes_of_the_strengths():
    weights = cooccurrence.resampled(5, 40)
    assert (weights[0] == 1).all() and (weights.sum(1) == 5).all() and len(weights.unique(dim=0)) > 20
    curve = [{"strength": strength, "leak": 3 + 20 * strength} for strength in (0.1, 0.5, 0.9)]
    assert cooccurrence.slope(curve, "leak") == pytest.approx(20)
