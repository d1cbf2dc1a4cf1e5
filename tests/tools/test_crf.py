"""tools/crf.py: CAM files to label images or scores, with workers, restarts and clear errors."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pool import WorkerPool
from engine.scores.records import read_scores
from models.refiners.dense_crf import DenseCRF
from tests.checkpoints import checkpoint, demo_folder  # noqa: F401  (fixtures)
from tests.stages import call
from tools import crf, infer_cam, infer_seg
from utils.cam_files import CamFile, load_cam, load_scores, save_cam
from utils.files import read_json, write_json
from utils.image import read_mask


@pytest.fixture
def folder(tmp_path):
    """Three images of a bright disc, and CAMs at half their size; the last image has no class."""
    (tmp_path / "images").mkdir()
    y, x = np.mgrid[:40, :50]
    radius = np.hypot(y - 20, x - 25)
    disc = radius < 12
    cam = torch.from_numpy(0.95 / (1 + np.exp((radius - 12) / 1.5))).float()[::2, ::2]
    for i, name in enumerate(["a", "b", "c"]):
        image = np.where(disc[..., None], (220, 60, 60), (20, 90, 40)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        ids = torch.tensor([5, 9] if i < 2 else [], dtype=torch.int64)
        file = CamFile(ids, torch.stack([cam, cam * 0.2])[: len(ids)], None, (40, 50))
        save_cam(tmp_path / "cam" / f"{name}.npz", file)
    return tmp_path, disc


def options(path, **changes):
    folders = {"input": path / "cam", "images": path / "images", "out": path / "out"}
    return {**folders, "recipe": "irn", "processes": 0, **changes}


@pytest.mark.parametrize("recipe", ["toco", "irn"])
def test_cams_become_confident_labels(folder, recipe):
    path, disc = folder
    call(crf, options(path, recipe=recipe))
    label = read_mask(path / "out" / "a.png")
    assert set(np.unique(label)) <= {0, 5, 255}
    assert (label[15:25, 20:30] == 5).all()
    assert not (label[~disc] == 5).any()
    assert (read_mask(path / "out" / "c.png") == 0).all()


def test_one_value_ignores_nothing(folder):
    path, disc = folder
    call(crf, options(path, values=[0.5]))
    assert np.array_equal(read_mask(path / "out" / "a.png") == 5, disc)


@pytest.mark.parametrize("recipe, alphas", [("psa", (4, 32)), ("seam", (4, 24))])
def test_scores_are_the_crf_of_both_exponents(folder, recipe, alphas):
    path, _ = folder
    out = call(crf, options(path, recipe=recipe))
    cams = load_cam(path / "cam" / "a.npz")
    image = torch.from_numpy(np.array(Image.open(path / "images" / "a.png"))).permute(2, 0, 1)
    cam = torch.nn.functional.interpolate(cams.cam[None], cams.size, mode="bilinear")[0]
    stored = load_scores(out / "a.npz")
    assert torch.equal(stored.class_ids, cams.class_ids)
    for scores, alpha in zip(stored.scores, alphas, strict=True):
        volume = torch.cat([(1 - cam.amax(0, keepdim=True)) ** alpha, cam])
        expected = DenseCRF("psa").refine(image[None] / 255, volume[None])[0]
        torch.testing.assert_close(scores, expected, rtol=0, atol=5e-4)  # float16
    nothing = load_scores(out / "c.npz")
    assert not len(nothing.class_ids) and torch.equal(nothing.scores, torch.ones(2, 1, 40, 50))


def test_images_come_from_the_data_set_too(checkpoint, tmp_path):  # noqa: F811
    quiet = {"model_path": str(checkpoint), "device": "cpu"}
    cam = call(infer_cam, {**quiet, "out": str(tmp_path / "cam"), "num_workers": 0})
    labels = {**quiet, "input": cam, "recipe": "irn", "split": "test", "processes": 0}
    out = call(crf, {**labels, "out": tmp_path / "labels"})
    files = sorted(path.name for path in out.glob("*.png"))
    assert files == sorted(f"{path.stem}.png" for path in cam.glob("*.npz"))
    settings = read_json(out / "settings.json")
    assert settings["input"] == read_json(cam / "settings.json") and settings["split"] == "test"
    write_json(cam / "settings.json", {**settings["input"], "checkpoint_sha256": "another"})
    with pytest.raises(ValueError, match="input.checkpoint_sha256: .* -> another"):
        call(crf, {**labels, "out": tmp_path / "labels"})
    next(cam.glob("*.npz")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 CAM files"):
        call(crf, {**labels, "out": tmp_path / "other"})


def test_worker_processes_write_the_same_files_and_finished_ones_stay(folder):
    path, _ = folder
    call(crf, options(path))
    expected = {file.name: file.read_bytes() for file in (path / "out").glob("*.png")}
    kept = (path / "out" / "a.png").stat().st_mtime_ns
    (path / "out" / "b.png").unlink()
    (path / "out" / "c.png").unlink()
    call(crf, options(path, processes=1))
    assert {file.name: file.read_bytes() for file in (path / "out").glob("*.png")} == expected
    assert (path / "out" / "a.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("replaced", ["images/a.png", "cam/a.npz"])
def test_what_was_replaced_is_done_again_whatever_its_date(folder, replaced):
    path, _ = folder
    call(crf, options(path))
    written = {file: file.read_bytes() for file in (path / "out").glob("*.png")}
    (path / replaced).write_bytes((path / replaced.replace("a.", "c.")).read_bytes())
    date = 3e9 if replaced == "images/a.png" else 1.6e9
    for file in ("images/a.png", "cam/a.npz"):
        os.utime(path / file, (date, date))
    (path / "out/a.png").write_bytes(b"old")
    call(crf, options(path))
    assert (path / "out/a.png").read_bytes() != b"old"
    assert (path / "out/b.png").read_bytes() == written[path / "out/b.png"]


def test_other_settings_do_not_mix_with_finished_files(folder):
    path, _ = folder
    call(crf, options(path))
    with pytest.raises(ValueError, match="steps=3"):
        call(crf, options(path, steps=3))


def test_bad_input_is_one_clear_error(folder):
    path, _ = folder
    with pytest.raises(FileNotFoundError, match="no .npz files"):
        call(crf, options(path, input=path / "images"))
    with pytest.raises(ValueError, match="name the data set"):
        call(crf, options(path, images=None))
    (path / "images" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images are missing"):
        call(crf, options(path, out=path / "out3"))
    assert not (path / "out3").exists()


def test_crf_beside_the_network_gives_the_same_labels(checkpoint, tmp_path):  # noqa: F811
    for workers in (0, 1):
        cfg = {"model_path": checkpoint, "out": tmp_path / str(workers), "device": "cpu", "num_workers": 0}
        call(infer_seg, {**cfg, "crf": "toco", "crf_workers": workers})
    files = sorted((tmp_path / "0").glob("*.png"))
    assert files and all(file.read_bytes() == (tmp_path / "1" / file.name).read_bytes() for file in files)
    first, second = (read_scores(tmp_path / folder)[0]["score"] for folder in "01")
    assert first == second


def square(x):
    if x == 7:
        raise ValueError("seven")
    return x * x


@pytest.mark.parametrize("workers", [0, 2])
def test_pool_returns_results_in_order_and_raises_errors_of_workers(workers):
    results = []
    with WorkerPool(workers, in_flight=3, threads=True) as pool:
        for x in range(6):
            pool.submit(square, x, then=results.append)
            assert len(results) >= x + 1 - 3
    assert results == [0, 1, 4, 9, 16, 25]
    with pytest.raises(ValueError, match="seven"), WorkerPool(workers, threads=True) as pool:
        pool.submit(square, 7)


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("toco", [0.25, 0.7]),
        ("psa", [-3.0, 5.0]),
        ("seam", [4.0]),
        ("clip_es", [0.9, 0.8]),
        ("irn", [float("nan"), 0.2]),
    ],
)
def test_wrong_values_of_a_recipe_are_refused(tmp_path, recipe, values):
    with pytest.raises(ValueError, match="values"):
        call(crf, options(tmp_path, recipe=recipe, values=values))


@pytest.mark.parametrize(("device", "message"), [("cuda", "0 found"), ("gpu", "must be auto")])
def test_a_device_that_is_not_there_is_refused(folder, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        call(crf, options(folder[0], device=device))
    assert not (folder[0] / "out").exists()
