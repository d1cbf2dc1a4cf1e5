"""The benchmark of co-occurrence: trains, measures and continues; its table covers what is there."""

from pathlib import Path

import pytest
import torch

from bench import cooccurrence
from bench.cooccurrence import Options
from datasets.demo.contexts import CONTEXTS
from datasets.demo.objects import OBJECTS

TINY = ["data.crop_size=32", "train.steps=1", "train.batch_size=4", "optim.warmup_steps=1", "device=cpu"]
TINY += ["data.num_workers=0", "method.backbone.depth=3"]


def test_trainings_are_measured_once(tmp_path, monkeypatch):
    given = {"methods": ["cam"], "strengths": [0.8], "train": 12, "test": 6} | {
        "out": tmp_path,
        "overrides": TINY,
    }
    cooccurrence.run(Options(seeds=[0, 1], **given))
    table = (tmp_path / "table.txt").read_text()
    assert table.count("±") == 2 * 6  # of CAM and auxiliary CAM over two seeds; two numbers need more images
    head, *means = (tmp_path / "table.csv").read_text().splitlines()
    assert head.startswith("method,output,strength,seeds,mIoU,mIoU ±") and len(means) == 2
    assert len((tmp_path / "trainings.csv").read_text().splitlines()) == 1 + 2 * 2
    with monkeypatch.context() as patch:
        patch.setattr(cooccurrence, "train", None)
        cooccurrence.run(Options(seeds=[0, 1], **given))
        given["overrides"] = [*TINY, "optim.lr=0.1"]
        with pytest.raises(ValueError, match="another config"):
            cooccurrence.run(Options(seeds=[0, 1], **given))
    assert (tmp_path / "table.txt").read_text() == table


def test_curves_are_of_one_training_over_its_strengths():
    rows = [{"strength": x, "gap": 10 * x, "leak": x} for x in (0.8, 0.5)]
    gap, _ = cooccurrence.strength_charts({("cam", "cam", 0): rows})
    assert gap.title == "cam, cam: gap %" and gap.lines == [(0, "seed 0", [(0.5, 5.0), (0.8, 8.0)])]


def test_variants_are_compared_with_the_plain_classifier_that_is_most_like_them():
    trained = {"cam", "cam+long", "seco+long"}
    of = {"seco": "cam", "seco+lil": "cam", "seco+long": "cam+long", "seco+long-no-ptc": "cam+long"}
    of |= {"cam": "", "cam+long": "cam", "cam+long-cda": "cam+long", "seco+longer": "cam"}
    assert {method: cooccurrence.base_of(method, trained) for method in of} == of


def test_pipelines_train_too(tmp_path):
    later = ("cam", "seeds", "affinity", "pseudo", "segment", "infer", "shuffled")
    overrides = [*TINY, "stages.cam_net.train.steps=1", *(f"stages.{stage}=null" for stage in later)]
    given = {"methods": ["psa"], "config": "{method}/demo.yaml", "train": 12, "test": 6, "out": tmp_path}
    cooccurrence.run(Options(strengths=[0.8], seeds=[0], overrides=overrides, **given))
    assert "psa" in (tmp_path / "table.txt").read_text()


def test_shards_share_all_trainings(tmp_path, monkeypatch):
    done: list[Path] = []
    monkeypatch.setattr(cooccurrence, "draw_scenes", lambda *_: None)
    monkeypatch.setattr(cooccurrence, "train", lambda *_: None)
    monkeypatch.setattr(cooccurrence, "checkpoints", lambda folder: done.append(folder.name) or [])
    for k in range(5):
        cooccurrence.run(Options(out=tmp_path, shard=f"{k}/5"))
    assert len(done) == len(set(done)) == 36


WRONG = [({"shard": "2/2"}, "shard"), ({"shard": "1"}, "shard"), ({"name": "a/b"}, "name")]


@pytest.mark.parametrize(("given", "word"), [*WRONG, ({"methods": ["nosuch"]}, "nosuch")])
def test_wrong_requests_leave_nothing(tmp_path, given, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        cooccurrence.run(Options(out=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_leaks_are_compared_at_one_recall():
    counts = {"cam/hits": torch.tensor([[40, 9], [30, 9], [10, 0]]), "objects": torch.tensor([[100, 9]])}
    ground = torch.zeros(3, 2, len(CONTEXTS), 2, dtype=torch.int64)
    ground[..., 1] = 100
    ground[:, 0, CONTEXTS.index(OBJECTS["boat"].home), 0] = torch.tensor([80, 60, 20])
    counts["cam/grounds"] = ground
    given = "cam", ("background", "boat", "crab"), torch.tensor([True, False])
    assert float(cooccurrence.leak_at_recall(counts, *given)) == pytest.approx(0.4)  # halfway from 10 to 30 %
    counts["cam/hits"] = counts["cam/hits"].clamp(max=15)
    assert cooccurrence.leak_at_recall(counts, *given).isnan().all()


def test_intervals_are_of_the_images_and_slopes_of_the_strengths():
    weights = cooccurrence.resampled(5, 40)
    assert (weights[0] == 1).all() and (weights.sum(1) == 5).all() and len(weights.unique(dim=0)) > 20
    curve = [{"strength": strength, "leak": 3 + 20 * strength} for strength in (0.1, 0.5, 0.9)]
    assert cooccurrence.slope(curve, "leak") == pytest.approx(20)
