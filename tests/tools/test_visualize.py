"""Sheets of pictures."""

import numpy as np
import pytest
from PIL import Image

from datasets.base import WeakSegDataset
from engine.data import load_split
from engine.inference import load_method
from engine.panels import panels_of, see
from tests.stages import call
from tools import visualize
from utils.drawing import SheetRow, cam_overlay, label_overlay, sheet
from utils.image import PALETTE


def test_sheet_per_so_many_images(checkpoint, tmp_path):
    options = {"model_path": checkpoint, "out": tmp_path, "device": "cpu"}
    out = call(visualize, {**options, "count": 5, "rows": 3})
    names = sorted(p.name for p in out.iterdir())
    assert names == ["last_test_01.png", "last_test_02.png"]
    first, second = (Image.open(out / name) for name in names)
    # Six columns: image, truth, CAM, auxiliary CAM, pseudo label, prediction.
    assert first.width == second.width > 6 * 200 and first.height > second.height > 2 * 200
    for wrong in ({"names": "nobody"}, {"labels": ["nobody:/no/such"]}):
        with pytest.raises(ValueError, match="nobody"):
            call(visualize, options | wrong)


def test_columns_are_those_of_the_method(checkpoint):
    loaded = load_method(checkpoint, "cpu")
    split = load_split(loaded.cfg.data, "test")
    image_rgb = WeakSegDataset(split)[0]["image"]
    panels, _ = panels_of(loaded, split.records[0], image_rgb, see(loaded, split.records[0], image_rgb, 48))
    assert set(panels) == {"image", "truth", "CAM", "auxiliary CAM", "pseudo label", "prediction"}


def test_background_stays_photo_and_classes_take_their_colour():
    photo = np.full((2, 3, 3), 100, np.uint8)
    mask = np.array([[0, 1, 255], [0, 0, 2]], np.uint8)
    picture = label_overlay(photo, mask, opacity=1.0)
    assert (picture[mask == 0] == 100).all()
    assert (picture[0, 1] == PALETTE[1]).all() and (picture[1, 2] == PALETTE[2]).all()
    assert picture[0, 2].min() > 200


def test_stronger_activation_is_nearer_to_the_colour():
    photo, cam = np.full((1, 3, 3), 100, np.uint8), np.array([[[0.0, 0.5, 1.0]]])
    distance = np.abs(cam_overlay(photo, cam, [1]).astype(int) - PALETTE[1]).sum(-1)[0]
    assert distance[0] > distance[1] > distance[2]
    assert cam_overlay(photo, np.zeros((0, 1, 3)), []).shape == photo.shape


def test_missing_panel_leaves_its_place_empty():
    panel = np.zeros((10, 10, 3), np.uint8)
    row = SheetRow("a", [panel, None], [1])
    picture = np.asarray(sheet([row], ["x", "y"], ["background", "cat"], width=50))
    assert picture[40, 20].sum() == 0 and picture[40, 85].sum() == 3 * 255
