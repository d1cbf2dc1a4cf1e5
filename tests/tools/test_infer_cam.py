"""CAM files, their scores over thresholds, and scoring of folders."""

import numpy as np
import pytest

from datasets.base import WeakSegDataset
from engine.data import load_split
from engine.inference import load_method
from engine.scores.records import read_scores
from engine.validation import validate
from tests.stages import call
from tools import evaluate, infer_cam
from utils.cam_files import cam_path, load_cam
from utils.image import read_mask, write_mask


@pytest.fixture(scope="module")
def cams(checkpoint, tmp_path_factory):
    """The output folder of a plain run on the 6 test images."""
    out = tmp_path_factory.mktemp("cam")
    options = {"model_path": str(checkpoint), "out": str(out), "dtype": "float32"}
    return call(infer_cam, {**options, "device": "cpu", "num_workers": 0})


@pytest.fixture(scope="module")
def split(checkpoint):
    return load_split(load_method(checkpoint, "cpu").cfg.data, "test")


def test_file_holds_the_cams_of_the_tags(cams, split):
    for record in split.records:
        stored = load_cam(cam_path(cams, record.name))
        assert tuple(stored.class_ids.tolist()) == record.tags
        assert stored.cam.shape == (len(record.tags), 48, 48) == stored.aux_cam.shape
        assert stored.size == (48, 48) and stored.cam.ge(0).all() and stored.cam.le(1).all()


def test_score_at_the_fixed_threshold_is_that_of_validation(cams, checkpoint, split):
    method = load_method(checkpoint, "cpu").method
    expected = validate(method, WeakSegDataset(split, with_mask=True), size=48, device="cpu", progress=False)
    found = {record["protocol"]: record["score"]["matrix"] for record in read_scores(cams)}
    for name in ("cam", "aux_cam"):
        assert found[f"{name}/test/ms+flip@0.50"] == expected.results["miou"][name].more["matrix"]


def test_evaluate_reads_the_same_scores_from_the_files(cams, checkpoint, tmp_path):
    call(evaluate, {"cam": str(cams), "model_path": str(checkpoint), "out": str(tmp_path), "threshold": 0.5})
    assert [(r["protocol"], r["score"]) for r in read_scores(tmp_path)] == [
        (r["protocol"], r["score"]) for r in read_scores(cams)
    ]


def test_labels_of_a_foreign_folder_are_scored(split, checkpoint, tmp_path, capsys):
    for record in split.records:
        write_mask(tmp_path / f"{record.name}.png", read_mask(record.mask))
    call(evaluate, {"labels": str(tmp_path), "model_path": str(checkpoint)})
    (record,) = read_scores(tmp_path)
    assert record["protocol"] == "labels/test" and record["score"]["miou"] == 1.0
    data = [f"data.root={split.records[0].image.parents[1]}", "config=configs/datasets/demo.yaml"]
    call(evaluate, {"labels": str(tmp_path), "out": str(tmp_path / "out"), "overrides": data})
    (record,) = read_scores(tmp_path / "out")
    assert record["score"]["miou"] == 1.0 and record["provenance"]["seed"] is None  # of an unknown run
    (tmp_path / f"{split.records[3].name}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 6 files .* first .*{split.records[3].name}\.png"):
        call(evaluate, {"labels": str(tmp_path), "model_path": str(checkpoint)})


def test_scores_over_a_part_of_the_masks_say_so(cams, checkpoint, split, tmp_path, capsys):
    """CAMs that are made and that are read again, and labels: a list of one's own may lack masks."""
    (tmp_path / "mine.txt").write_text("".join(f"{record.name}\n" for record in split.records))
    masks = tmp_path / "masks"
    for record in split.records[:4]:
        write_mask(masks / f"{record.name}.png", read_mask(record.mask))
    some = {"model_path": str(checkpoint), "overrides": [f"data.options.masks={masks}"]}
    listed, out = str(tmp_path / "mine.txt"), tmp_path / "out"
    call(infer_cam, {**some, "infer": listed, "out": str(out), "device": "cpu", "num_workers": 0})
    call(evaluate, {**some, "split": listed, "cam": str(cams), "out": str(tmp_path / "cam")})
    call(evaluate, {**some, "split": listed, "labels": str(masks), "out": str(tmp_path / "labels")})
    assert capsys.readouterr().out.count("only 4 of 6 images have a mask") == 3
    for folder in (out, tmp_path / "cam", tmp_path / "labels"):
        source = [record["provenance"] for record in read_scores(folder)]
        assert {(s["images"], s["scored_images"]) for s in source} == {(6, 4)}


def test_masks_that_ignore_every_object_give_no_score(cams, checkpoint, split, tmp_path, capsys):
    """Masks of 0 and 255: the score would be that of background, and high."""
    masks = tmp_path / "masks"
    for record in split.records:
        write_mask(masks / f"{record.name}.png", np.where(read_mask(record.mask) > 0, 255, 0))
    options = {"model_path": str(checkpoint), "out": str(tmp_path), "ignored": "background"}
    options["overrides"] = [f"data.options.masks={masks}"]
    for folder in ({"cam": str(cams)}, {"labels": str(masks)}):
        call(evaluate, options | folder)
        assert "nothing to score" in capsys.readouterr().out and not (tmp_path / "scores.json").exists()
    # Such masks are right where no image shows an object.
    (tmp_path / "tags.csv").write_text("".join(f"{record.name},\n" for record in split.records))
    options["overrides"] += [f"data.options.tags={tmp_path / 'tags.csv'}"]
    call(evaluate, options | {"labels": str(masks)})
    assert read_scores(tmp_path)[0]["score"]["miou_classes"] == 1


@pytest.mark.parametrize("ignored, miou", [("background", "below"), ("skip", "perfect")])
def test_ignored_pixels_are_refused_unless_asked_for(split, checkpoint, tmp_path, ignored, miou):
    for record in split.records:
        label = read_mask(record.mask)
        label[:, :24] = 255
        write_mask(tmp_path / f"{record.name}.png", label)
    options = {"labels": str(tmp_path), "model_path": str(checkpoint)}
    with pytest.raises(ValueError, match="--ignored background or skip"):
        call(evaluate, options)
    call(evaluate, {**options, "ignored": ignored})
    score = read_scores(tmp_path)[0]["score"]["miou"]
    assert score == 1.0 if miou == "perfect" else score < 1.0


def test_untagged_photos_get_the_classes_that_the_classifier_finds(checkpoint, demo_folder, tmp_path):
    photo = next((demo_folder / "JPEGImages").glob("*.jpg"))
    options = {"model_path": str(checkpoint), "infer": str(photo), "out": str(tmp_path)}
    out = call(infer_cam, {**options, "device": "cpu", "num_workers": 0})
    stored = load_cam(cam_path(out, photo.stem))
    assert stored.cam.shape[1:] == (48, 48) and not (out / "scores.json").exists()


def test_inference_sums_the_sweep_over_processes_and_the_scorer_does_not(
    cams, checkpoint, tmp_path, monkeypatch
):
    """A stage of a pipeline that does not share its images out runs in the main process alone."""

    def pixels(folder):
        return [record["score"]["pixels"] for record in read_scores(folder)]

    options = {"model_path": str(checkpoint), "device": "cpu", "num_workers": 0, "dtype": "float32"}
    monkeypatch.setattr("engine.scores.evaluation.all_reduce_sum", lambda counts: 2 * counts)
    call(evaluate, {"cam": str(cams), "model_path": str(checkpoint), "out": str(tmp_path / "scores")})
    call(infer_cam, {**options, "out": str(tmp_path / "cam")})
    assert pixels(tmp_path / "scores") == pixels(cams) == [n // 2 for n in pixels(tmp_path / "cam")]
