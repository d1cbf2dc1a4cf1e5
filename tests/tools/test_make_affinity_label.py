"""tools/make_affinity_label.py: CAM files to confident labels, or to pairs of scores."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.refiners.dense_crf import DenseCRF
from tests.stages import call
from tests.tools.test_crf import folder  # noqa: F401  (fixture)
from tools import crf, infer_cam, make_affinity_label
from utils.cam_files import load_cam, load_scores
from utils.files import read_json, write_json
from utils.image import read_mask


def options(path, **changes):
    folders = {"cam": path / "cam", "images": path / "images", "out": path / "labels"}
    return {**folders, "processes": 0, "device": "cpu", **changes}


def test_irn_labels_are_those_of_the_crf_recipe(folder):  # noqa: F811
    path, disc = folder
    out = call(make_affinity_label, options(path, foreground_threshold=0.5, background_threshold=0.02))
    call(crf, {"input": path / "cam", "images": path / "images", "out": path / "crf", "recipe": "irn",
             "values": [0.5, 0.02], "processes": 0})  # fmt: skip
    for name in "abc":
        assert (out / f"{name}.png").read_bytes() == (path / "crf" / f"{name}.png").read_bytes()
    label = read_mask(out / "a.png")
    assert (label[15:25, 20:30] == 5).all() and not (label[~disc] == 5).any()
    assert not read_mask(out / "c.png").any()


@pytest.mark.parametrize("mode, alphas", [("psa", (4, 32)), ("seam", (4, 24))])
def test_scores_are_the_crf_of_both_exponents(folder, mode, alphas):  # noqa: F811
    path, _ = folder
    out = call(make_affinity_label, options(path, mode=mode))
    cams = load_cam(path / "cam" / "a.npz")
    image = torch.from_numpy(np.array(Image.open(path / "images" / "a.png"))).permute(2, 0, 1)
    cam = torch.nn.functional.interpolate(cams.cam[None], cams.size, mode="bilinear")[0]
    stored = load_scores(out / "a.npz")
    assert torch.equal(stored.class_ids, cams.class_ids)
    for scores, alpha in zip(stored.scores, alphas, strict=True):
        volume = torch.cat([(1 - cam.amax(0, keepdim=True)) ** alpha, cam])
        expected = DenseCRF("psa").refine(image[None] / 255, volume[None])[0]
        torch.testing.assert_close(scores, expected, rtol=0, atol=5e-4)  # float16
    much, little = stored.scores.sum(0)[0], stored.scores[:, 0]
    assert (little[0] >= little[1] - 1e-3).all() and much.isfinite().all()
    nothing = load_scores(out / "c.npz")
    assert not len(nothing.class_ids) and torch.equal(nothing.scores, torch.ones(2, 1, 40, 50))


def test_images_come_from_the_data_set_too(checkpoint, tmp_path):
    quiet = {"model_path": str(checkpoint), "device": "cpu"}
    cam = call(infer_cam, {**quiet, "out": str(tmp_path / "cam"), "num_workers": 0})
    labels = {**quiet, "cam": cam, "split": "test", "processes": 0}
    out = call(make_affinity_label, {**labels, "out": tmp_path / "labels"})
    files = sorted(path.name for path in out.glob("*.png"))
    assert files == sorted(f"{path.stem}.png" for path in cam.glob("*.npz"))
    assert all(read_mask(out / name).shape == (48, 48) for name in files)
    settings = read_json(out / "settings.json")
    assert settings["cam"] == read_json(cam / "settings.json") and settings["split"] == "test"
    write_json(cam / "settings.json", {**settings["cam"], "checkpoint_sha256": "another"})
    with pytest.raises(ValueError, match="other settings .*cam.checkpoint_sha256: .* -> another"):
        call(make_affinity_label, {**labels, "out": tmp_path / "labels"})
    with pytest.raises(ValueError, match="other settings .*split: test -> train"):
        fewer = tmp_path / "train.txt"
        fewer.write_text("\n".join(path.stem for path in cam.glob("*.npz")))
        call(make_affinity_label, {**labels, "out": tmp_path / "labels", "split": str(fewer)})
    next(cam.glob("*.npz")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 files"):
        call(make_affinity_label, {**labels, "out": tmp_path / "other"})
