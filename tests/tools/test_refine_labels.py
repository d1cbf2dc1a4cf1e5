"""tools/refine_labels.py: label and CAM folders through any refiner, scored, as a stage too."""

import numpy as np
import pytest
import torch

from engine.config.load import load_config
from engine.config.options import parse
from engine.data import load_split
from engine.pipeline.runner import run as run_pipeline
from engine.scores.records import read_scores
from tests.stages import call
from tools import refine_labels
from utils.cam_files import CamFile, cam_path, label_path, load_cam, save_cam
from utils.image import read_mask, write_mask


@pytest.fixture
def split(demo_folder):
    return load_split(load_config("configs/datasets/demo.yaml", [f"data.root={demo_folder}"]).data, "test")


def options(demo_folder, tmp_path, **changes):
    overrides = ["config=configs/datasets/demo.yaml", f"data.root={demo_folder}"]
    quiet = {"device": "cpu", "num_workers": 0, "split": "test", "overrides": overrides}
    return {**quiet, "input": tmp_path / "in", "out": tmp_path / "out", **changes}


@pytest.fixture
def labels(split, tmp_path):
    """Truth with a fifth of its 4 x 4 blocks set to class 1, 2 or 255, and its exact masks, in ``masks``."""
    generator = np.random.default_rng(0)
    for record in split.records:
        truth = read_mask(record.mask)
        drawn = generator.choice([1, 2, 255], (12, 12)) * (generator.random((12, 12)) < 0.2)
        drawn = np.kron(drawn, np.ones((4, 4), int))
        write_mask(label_path(tmp_path / "in", record.name), np.where(drawn > 0, drawn, truth))
        write_mask(label_path(tmp_path / "masks", record.name), truth + 1)
    return tmp_path


def test_a_vote_on_exact_masks_is_scored_and_continued(demo_folder, labels, split):
    chosen = options(demo_folder, labels, refiner="mask_vote", masks=labels / "masks", tags=True)
    call(refine_labels, chosen)
    record = read_scores(labels / "out")[0]
    assert record["protocol"] == "pseudo/test/tags+mask_vote(masks)" and record["score"]["miou"] > 0.95
    first = label_path(labels / "out", split.records[0].name)
    before = first.stat().st_mtime_ns
    call(refine_labels, chosen)
    assert first.stat().st_mtime_ns == before and len(read_scores(labels / "out")) == 1
    with pytest.raises(ValueError, match="tags"):
        call(refine_labels, {**chosen, "tags": False})


@pytest.mark.parametrize("refiner", ["par", {"name": "dense_crf", "preset": "irn", "steps": 1}])
def test_any_refiner_takes_labels_and_tags_rule_classes_out(demo_folder, labels, split, refiner):
    call(refine_labels, options(demo_folder, labels, refiner=refiner, tags=True))
    for record in split.records:
        found = set(np.unique(read_mask(label_path(labels / "out", record.name))))
        assert found <= {0, *record.tags, 255}


def test_cams_become_labels_or_cams(demo_folder, tmp_path, split):
    for i, record in enumerate(split.records):
        mask, ids = torch.from_numpy(read_mask(record.mask)), torch.tensor(record.tags if i else ())
        cam = torch.stack([mask == k for k in ids]).float() * 0.8 if len(ids) else torch.zeros(0, *mask.shape)
        save_cam(cam_path(tmp_path / "in", record.name), CamFile(ids.long(), cam, None, tuple(mask.shape)))
    call(refine_labels, options(demo_folder, tmp_path, refiner="pamr"))
    assert read_scores(tmp_path / "out")[0]["score"]["miou"] > 0.5  # one image has no CAM
    call(refine_labels, options(demo_folder, tmp_path, refiner="par", write="cam", out=tmp_path / "cam"))
    assert any(r["protocol"].startswith("cam/test/par@") for r in read_scores(tmp_path / "cam"))
    for record in split.records[1:]:
        cam = load_cam(cam_path(tmp_path / "cam", record.name)).cam
        assert len(cam) == len(record.tags) and cam.min() >= 0 and cam.max() <= 1
    with pytest.raises(ValueError, match="background"):
        call(
            refine_labels,
            options(demo_folder, tmp_path, refiner="dense_crf", write="cam", out=tmp_path / "x"),
        )


def test_loose_photos_and_a_mapping_on_the_command_line(demo_folder, labels):
    (labels / "photos").mkdir()
    for path in sorted((demo_folder / "JPEGImages").glob("test_0*"))[:2]:
        (labels / "photos" / path.name).write_bytes(path.read_bytes())
    arguments = ["--input", labels / "in", "--images", labels / "photos", "--out", labels / "out"]
    given = [*map(str, arguments), "--num_workers", "0", "--refiner", "{name: par, iterations: 2}"]
    refine_labels.run(parse(refine_labels.Options, "", given))
    assert len(list((labels / "out").glob("*.png"))) == 2


def test_as_a_stage(demo_folder, labels):
    config = labels / "pipeline.yaml"
    config.write_text(
        "base: datasets/demo.yaml\nstages:\n"
        f"  - {{name: voted, run: tools.refine_labels, input: {labels / 'in'}, split: test, num_workers: 0,\n"
        f"     refiner: mask_vote, masks: {labels / 'masks'}}}\n"
    )
    run_pipeline(config, [f"data.root={demo_folder}", f"work_dir={labels / 'run'}", "device=cpu"])
    assert len(list((labels / "run" / "voted").glob("*.png"))) == 6
