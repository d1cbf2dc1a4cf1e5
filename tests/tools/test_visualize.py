"""Pictures of what a checkpoint sees, and labels and CAMs over photos."""

import json

import numpy as np

from tests.stages import call
from tools import visualize
from utils.drawing import label_overlay
from utils.image import PALETTE


def test_page_shows_what_the_method_makes(checkpoint, tmp_path):
    page = call(visualize, {"model_path": checkpoint, "out": tmp_path, "device": "cpu", "count": 3})
    seen = json.loads((tmp_path / "seen" / "test.json").read_text())
    assert len(seen["samples"]) == 3 and page == tmp_path / "report.html"
    assert list(seen["samples"][0]["maps"]) == ["truth", "cam", "aux_cam", "pseudo_label", "seg"]
    assert "Tag errors" in page.read_text()


def test_without_a_scored_split_training_images_are_drawn(checkpoint, tmp_path):
    overrides = ["data.val_set=null", "data.options.masks=null"]
    options = {"model_path": checkpoint, "out": tmp_path, "device": "cpu", "count": 1, "overrides": overrides}
    call(visualize, options)
    assert "truth" not in json.loads((tmp_path / "seen" / "train.json").read_text())["samples"][0]["maps"]


def test_background_stays_photo_and_classes_take_their_colour():
    photo = np.full((2, 3, 3), 100, np.uint8)
    mask = np.array([[0, 1, 255], [0, 0, 2]], np.uint8)
    picture = label_overlay(photo, mask, opacity=1.0)
    assert (picture[mask == 0] == 100).all()
    assert (picture[0, 1] == PALETTE[1]).all() and (picture[1, 2] == PALETTE[2]).all()
    assert picture[0, 2].min() > 200
