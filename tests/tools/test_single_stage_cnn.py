"""1-stage-wseg and WS-FCN go through the same training, inference and pictures as every other method."""

import numpy as np
import pytest
import torch

from datasets.base import WeakSegDataset
from engine.config.load import load_config
from engine.data import load_split
from engine.inference import load_method
from engine.scores.records import read_scores
from engine.train import run as train
from engine.validation import validate
from tests.checkpoints import demo_folder  # noqa: F401
from tests.stages import call
from tools import infer_cam, infer_seg
from utils.cam_files import load_cam
from utils.image import normalize, read_image, read_mask

SMALL = [
    "data.num_workers=0", "data.crop_size=48", "eval.size=48", "train.steps=3", "train.batch_size=4",
    "method.backbone.width=32", "method.backbone.depth=4", "method.backbone.heads=2", "method.width=16",
    "method.loss_weights.mask=[[0,0.0],[1,1.0]]", "method.class_threshold=0.3", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module", params=["one_stage", "ws_fcn"])
def run_folder(request, demo_folder, tmp_path_factory):  # noqa: F811
    """A run of three steps, the last two with the mask loss, and a validation."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = [f"data.root={demo_folder}", f"work_dir={folder}", *SMALL]
    return train(load_config(f"configs/{request.param}/demo.yaml", overrides))


def infer(run_folder, out, infer_keys=(), **options):
    cfg = {"model_path": str(run_folder / "last.pth"), "out": str(out), "device": "cpu", "num_workers": 0}
    overrides = [f"infer.{key}={value}" for key, value in dict(infer_keys).items()]
    return call(infer_seg, cfg | options | {"overrides": [*overrides, *options.get("overrides", ())]})


def test_inference_gives_the_score_of_the_validation(run_folder, tmp_path):
    loaded = load_method(run_folder / "last.pth", "cpu")
    dataset = WeakSegDataset(load_split(loaded.cfg.data, "test"), with_mask=True)
    found = validate(loaded.method, dataset, size=48, device="cpu", progress=False)
    expected = found.results["miou"]["seg"].mean
    out = infer(run_folder, tmp_path / "out", {"size": 48, "scales": [1.0], "flip": "false"})
    assert read_scores(out)[0]["score"]["miou"] == pytest.approx(expected, abs=2e-3)


def test_true_tags_restrict_the_labels_and_name_the_protocol(run_folder, tmp_path):
    keys = {"tags": "true", "scales": [1.0, 0.5]}
    out = infer(run_folder, tmp_path / "out", keys, crf="ws_fcn", crf_workers=0)
    assert read_scores(out)[0]["protocol"] == "seg/test/ms+flip+tags+crf(ws_fcn)"
    for record in load_split(load_method(run_folder / "last.pth", "cpu").cfg.data, "test").records:
        assert set(np.unique(read_mask(out / f"{record.name}.png")).tolist()) <= {0, *record.tags}


def test_canvas_is_part_of_the_settings_and_holds_any_image(run_folder, tmp_path):
    out = infer(run_folder, tmp_path / "canvas", overrides=["infer.pad_to=[60,72]"])
    assert read_scores(out)[0]["settings"]["pad_to"] == [60, 72]
    # An image of 48 pixels is shrunk to 20, whose double fits, and its label enlarged.
    small = ["infer.pad_to=40", "infer.scales=[1.0,2.0]"]
    out = infer(run_folder, tmp_path / "small", overrides=small)
    assert all(read_mask(file).shape == (48, 48) for file in out.glob("*.png"))


def test_untagged_images_get_the_classes_that_inference_keeps(run_folder, demo_folder, tmp_path):  # noqa: F811
    """Those of confidence above ``class_threshold``, not above one half."""
    loaded = load_method(run_folder / "last.pth", "cpu")
    photo = min((demo_folder / "JPEGImages").glob("*.jpg"))
    image = normalize(torch.from_numpy(np.array(read_image(photo))).permute(2, 0, 1))[None]
    confidence = loaded.method.predict(image, ()).class_logits[0].sigmoid()
    threshold = confidence.sort().values[1:3].mean().item()  # above two classes, below the others
    cfg = {"model_path": str(run_folder / "last.pth"), "device": "cpu", "num_workers": 0, "size": "native"}
    overrides = [f"method.class_threshold={threshold}"]
    out = call(infer_cam, cfg | {"infer": str(photo), "out": str(tmp_path), "overrides": overrides})
    found = load_cam(out / f"{photo.stem}.npz").class_ids
    assert found.tolist() == (confidence > threshold).nonzero()[:, 0].add(1).tolist() and len(found)


def test_crf_without_a_name_is_that_of_the_paper(run_folder, tmp_path):
    keys = {"scales": [1.0], "flip": "false"}
    out = infer(run_folder, tmp_path / "out", keys, crf="config", crf_workers=0)
    assert read_scores(out)[0]["protocol"] == f"seg/test/ss+crf({run_folder.name.rstrip('0123456789')})"
