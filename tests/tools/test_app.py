"""The page for the browser, without one."""

import numpy as np
import pytest

from tools import app

gradio = pytest.importorskip("gradio")


def test_page_guesses_tags_and_shows_masks(checkpoint):
    page = app.build(checkpoint, "cpu")
    guess, segment = (function.fn for function in page.fns.values())
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert set(guess(photo)) <= set(["boat", "sheep", "car", "crab", "penguin", "mushroom"])
    for crf in (False, True):
        picture, areas, cams, about = segment(photo, ["sheep", "crab"], crf)
        assert picture.width >= 480 and sum(areas.values()) == pytest.approx(1)
        assert [name for _, name in cams] == ["sheep", "crab"] and "cam/" in about
    with pytest.raises(gradio.Error):
        segment(None, [], False)
