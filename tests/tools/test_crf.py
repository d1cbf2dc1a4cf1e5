"""tools/crf.py: CAM and probability files to label images, with workers, restarts and clear errors."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from engine import crf_labels
from engine.scores.records import read_scores
from models.refiners.dense_crf import DenseCRF
from tests.checkpoints import checkpoint, demo_folder  # noqa: F401  (fixtures)
from tests.stages import call
from tools import crf, infer_seg
from utils.cam_files import CamFile, save_cam
from utils.image import read_mask
from utils.pool import WorkerPool


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


@pytest.mark.parametrize("recipe", ["toco", "irn", "psa", "seam"])
def test_cams_become_confident_labels(folder, recipe):
    path, disc = folder
    call(crf, options(path, recipe=recipe))
    label = read_mask(path / "out" / "a.png")
    assert set(np.unique(label)) <= {0, 5, 255}
    assert (label[15:25, 20:30] == 5).all()
    assert not (label[~disc] == 5).any()
    assert (read_mask(path / "out" / "c.png") == 0).all()


def test_probabilities_become_labels(folder):
    path, _ = folder
    (path / "cam" / "c.npz").unlink()
    probs = torch.rand(3, 20, 25, generator=torch.Generator().manual_seed(0))
    np.savez(path / "cam" / "a.npz", probs=probs.numpy())
    np.savez(path / "cam" / "b.npz", probs=probs.numpy(), class_ids=np.array([0, 7, 3]))
    call(crf, options(path, recipe="probs", preset="one_stage"))
    image = torch.from_numpy(np.array(Image.open(path / "images" / "a.png"))).permute(2, 0, 1)
    enlarged = torch.nn.functional.interpolate(probs[None], (40, 50), mode="bilinear")[0]
    expected = DenseCRF("one_stage").refine(image[None] / 255, enlarged[None])[0].argmax(0).numpy()
    assert np.array_equal(read_mask(path / "out" / "a.png"), expected)
    assert np.array_equal(read_mask(path / "out" / "b.png"), np.array([0, 7, 3])[expected])


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


def test_bad_input_is_one_clear_error(folder):
    path, _ = folder
    with pytest.raises(FileNotFoundError, match="no .npz files"):
        call(crf, options(path, input=path / "images"))
    (path / "images" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images"):
        call(crf, options(path, out=path / "out3"))
    assert not (path / "out3").exists()


def test_crf_beside_the_network_gives_the_same_labels(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("utils.pool.WorkerPool", partial(WorkerPool, threads=True))
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
    ("arrays", "message"),
    [
        ({"probs": np.full((3, 4, 5), 2.0)}, r"must be in"),
        ({"probs": np.ones((3, 4, 5), np.uint8)}, "must be floats"),
        ({"probs": np.full((1, 4, 5), 0.9)}, "background"),
        ({"class_ids": np.array([0, 255])}, "different integers"),
        ({"class_ids": np.array([0, 65536])}, "different integers"),
    ],
)
def test_wrong_probabilities_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **{"probs": np.full((2, 4, 5), 0.5)} | arrays)
    with pytest.raises(ValueError, match=rf"x\.npz.*{message}"):
        crf_labels.read_probs(tmp_path / "x.npz")
