"""Tiles cover an image, and what is local is the same tile by tile as at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import conv2d

from datasets.base import Record, Split, WeakSegDataset
from datasets.tiles import in_tiles, tile_split, tiles
from utils.image import write_mask


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(0, 3), st.integers(0, 2**31 - 1)
)
def test_a_local_network_gives_the_same_in_tiles(height, width, side, radius, seed):
    side += 2 * radius
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, height, width, generator=generator, dtype=torch.float64)
    kernel = torch.randn(3, 2, 2 * radius + 1, 2 * radius + 1, generator=generator, dtype=torch.float64)

    def network(part):
        return conv2d(part[None], kernel, padding=radius)[0]

    torch.testing.assert_close(in_tiles(network, image, side, 2 * radius), network(image))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 60), st.data())
def test_parts_of_tiles_cover_every_pixel_once(height, width, side, data):
    overlap = data.draw(st.integers(0, side - 1))
    count = np.zeros((height, width), int)
    for window, part in tiles((height, width), side, overlap):
        assert window[2] - window[0] == min(side, height) and window[3] - window[1] == min(side, width)
        count[part[0] : part[2], part[1] : part[3]] += 1
        for start, end, first, last, length in zip(window, window[2:], part, part[2:], (height, width)):
            assert start <= first <= last <= end
            assert start == 0 or first - start >= overlap // 2
            assert end == length or end - last >= overlap // 2
    assert (count == 1).all()


@pytest.fixture
def split(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:20, :20]).save(tmp_path / "b.png")
    mask = np.zeros((50, 70), np.uint8)
    mask[:10, :10], mask[40:, 60:] = 1, 2
    write_mask(tmp_path / "a_mask.png", mask)
    records = (
        Record("a", tmp_path / "a.png", tmp_path / "a_mask.png", (1, 2)),
        Record("b", tmp_path / "b.png", None, (1,)),
    )
    return Split("train", ("background", "x", "y"), records), pixels, mask


def test_tiles_are_parts_of_their_image(split):
    whole, pixels, mask = split
    cut = tile_split(whole, side=32, overlap=8)
    assert {record.name.partition("__")[0] for record in cut.records} == {"a", "b"}
    assert cut.records[-1] == whole.records[1] and {record.tags for record in cut.records[:-1]} == {(1, 2)}
    cut = tile_split(Split("s", whole.class_names, whole.records[:1]), 32, 8)
    tiled = WeakSegDataset(cut, with_mask=True)
    for index, record in enumerate(tiled.split.records):
        top, left, bottom, right = record.window
        sample = tiled[index]
        assert (sample["image"].permute(1, 2, 0).numpy() == pixels[top:bottom, left:right]).all()
        assert (sample["mask"].numpy() == mask[top:bottom, left:right]).all()


def test_tags_of_tiles_may_come_from_masks(split):
    whole = Split("s", split[0].class_names, split[0].records[:1])
    tags = {record.name: record.tags for record in tile_split(whole, 32, 8, tags="mask").records}
    assert tags["a__0_0"] == (1,) and tags["a__18_38"] == (2,) and tags["a__0_24"] == ()
