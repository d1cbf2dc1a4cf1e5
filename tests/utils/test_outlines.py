"""Outlines of masks over photos."""

import numpy as np
import pytest

from utils.outlines import SAFE_COLOURS, outlined_overlay, safe_colours


def test_classes_of_a_picture_have_colours_of_their_own():
    n = len(SAFE_COLOURS)
    assert safe_colours([1]) == {1: SAFE_COLOURS[0]} and safe_colours([n + 1]) == {n + 1: SAFE_COLOURS[0]}
    colours = safe_colours([1, 2, n + 1, 2 * n + 1])
    assert len(set(colours.values())) == 4 and colours[1] == SAFE_COLOURS[0]


def test_background_stays_photo_above_the_legend():
    photo = np.full((640, 500, 3), 100, np.uint8)
    mask = np.zeros((640, 500), np.uint8)
    mask[:200, :200] = 2
    picture = np.asarray(outlined_overlay(photo, mask, ("background", "cat", "dog")))
    assert picture.shape[1] == 500 and picture.shape[0] > 640
    assert (picture[210:640] == 100).all() and (picture[:190, :190] != 100).any(-1).all()
    assert (picture[-1] == 255).all()
    with pytest.raises(ValueError, match="pixels"):
        outlined_overlay(photo.transpose(1, 0, 2), mask, ("background", "cat", "dog"))
