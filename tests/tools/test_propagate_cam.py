"""tools/propagate_cam.py: CAM files and a checkpoint of an affinity network to scored pseudo labels."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from engine.config.load import load_config, to_plain
from engine.data import load_split
from engine.inference import load_method
from engine.method import build_method
from engine.scores.records import read_scores
from tests.stages import call
from tools import infer_cam, propagate_cam
from utils.cam_files import CamFile, cam_path, label_path, load_cam, save_cam
from utils.image import normalize, read_image, read_mask
from utils.weights import save_checkpoint

BACKBONE = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48, "pyramid": True}
METHODS = {
    "irn": {"target": "methods.irnet.IRNet", "input_size": 48, "exp_times": 3},
    "psa": {"target": "methods.affinitynet.AffinityNet", "exp_times": 3},
}


def make_checkpoint(method, demo_folder, path):
    """An untrained network on the demo data."""
    cfg = load_config("configs/datasets/demo.yaml", [f"data.root={demo_folder}", "run_name=test"])
    cfg.method = {**method, "backbone": BACKBONE}
    names = list(load_split(cfg.data, "test").class_names)
    torch.manual_seed(0)
    state = build_method(cfg, len(names)).state_dict()
    save_checkpoint(path, {"model": state, "config": to_plain(cfg), "class_names": names, "step": 3})
    return path


@pytest.fixture(scope="module", params=METHODS)
def affinity_checkpoint(request, demo_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "last.pth"
    return make_checkpoint(METHODS[request.param], demo_folder, path)


@pytest.fixture
def cams(demo_folder, tmp_path):
    """CAM files of the test images, blurred masks; the first has no class, every second one strided maps."""
    split = load_split(load_config("configs/datasets/demo.yaml", [f"data.root={demo_folder}"]).data, "test")
    for i, record in enumerate(split.records):
        ids = torch.tensor(record.tags if i else (), dtype=torch.int64)
        mask = torch.from_numpy(read_mask(record.mask))
        cam = torch.stack([mask == k for k in ids]).float() if len(ids) else torch.zeros(0, *mask.shape)
        strided = interpolate(cam[None], (12, 12), mode="area")[0].sqrt() if len(ids) and i % 2 else None
        cam = interpolate(cam[None], (12, 12), mode="area")[0] if len(ids) else cam
        save_cam(cam_path(tmp_path / "cam", record.name), CamFile(ids, cam, None, tuple(mask.shape), strided))
    return tmp_path / "cam", split


def options(checkpoint, folder, **changes):
    quiet = {"device": "cpu", "num_workers": 0, "infer": "test"}
    return {"model_path": checkpoint, "cam": folder, "out": folder.parent / "out", **quiet, **changes}


def test_labels_are_the_strongest_walked_scores(affinity_checkpoint, cams):
    folder, split = cams
    out = call(propagate_cam, options(affinity_checkpoint, folder))
    method = load_method(affinity_checkpoint, "cpu").method
    for i, record in enumerate(split.records):
        label, stored = read_mask(label_path(out, record.name)), load_cam(cam_path(folder, record.name))
        if i == 0:
            assert not label.any()  # no class
            continue
        image = torch.from_numpy(np.array(read_image(record.image))).permute(2, 0, 1)
        strided = method.walk_stride == 4 and stored.strided is not None
        with torch.no_grad():
            scores = method.propagate(normalize(image)[None], stored.strided if strided else stored.cam)
        expected = torch.tensor([0, *stored.class_ids])[scores.argmax(0)]
        assert np.array_equal(label, expected.numpy())
        assert set(np.unique(label)) <= {0, *record.tags}
    (score,) = read_scores(out)
    assert score["protocol"] == "pseudo/test/walk" and score["score"]["miou"] > 0.3


def test_a_second_run_takes_over_what_is_there_and_scores_the_same(affinity_checkpoint, cams):
    folder, split = cams
    out = call(propagate_cam, options(affinity_checkpoint, folder))
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    kept = label_path(out, split.records[1].name)
    stamp = kept.stat().st_mtime_ns
    label_path(out, split.records[2].name).unlink()
    first = read_scores(out)
    call(propagate_cam, options(affinity_checkpoint, folder))
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    assert kept.stat().st_mtime_ns == stamp and read_scores(out) == first
    with pytest.raises(ValueError, match="other settings"):
        call(propagate_cam, options(affinity_checkpoint, folder, overrides=["method.beta=3"]))


def test_crf_after_the_walk_is_part_of_the_protocol(affinity_checkpoint, cams):
    folder, _ = cams
    out = call(propagate_cam, options(affinity_checkpoint, folder, crf_steps=1))
    assert read_scores(out)[0]["protocol"].startswith("pseudo/test/walk+crf(psa")


def test_cam_files_of_the_pooled_classifier_hold_what_the_walk_starts_from(demo_folder, tmp_path):
    method = {"target": "methods.cam.PooledCAMNetwork", "cam_size": "stride16", "cam_scales": [1.0, 0.5]}
    path = make_checkpoint(method, demo_folder, tmp_path / "last.pth")
    quiet = {"device": "cpu", "num_workers": 0, "infer": "test", "dtype": "float32"}
    folder = call(infer_cam, {"model_path": path, "out": tmp_path / "cam", "size": "native", **quiet})
    network = load_method(path, "cpu").method
    split = load_split(load_config("configs/datasets/demo.yaml", [f"data.root={demo_folder}"]).data, "test")
    for record in split.records:
        image = torch.from_numpy(np.array(read_image(record.image))).permute(2, 0, 1)
        expected = network.predict(normalize(image)[None], (1.0, 0.5))
        stored, present = load_cam(cam_path(folder, record.name)), [tag - 1 for tag in record.tags]
        assert stored.strided.shape == (len(present), 12, 12)
        torch.testing.assert_close(stored.strided, expected.strided_cam[0, present])
        torch.testing.assert_close(stored.cam, expected.cam[0, present])
