"""Fixtures of the engine's tests."""

import numpy as np
import pytest
from PIL import Image

from datasets.base import Record, Split
from tests.checkpoints import checkpoint, demo_folder, published_toco  # noqa: F401
from utils.image import write_mask


@pytest.fixture
def split(tmp_path):
    """Five noisy photos of different sizes with masks; the last one has no object."""
    rng = np.random.default_rng(0)
    records = []
    for i, size in enumerate([(20, 30), (33, 21), (16, 16), (40, 25), (24, 24)]):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = rng.integers(0, 4, size, dtype=np.uint8)
        mask[:2] = 255
        if i == 4:
            mask[mask != 255] = 0
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        write_mask(tmp_path / "masks" / f"{i}.png", mask)
        tags = tuple(int(k) for k in np.unique(mask) if 0 < k < 255)[: 1 + i % 3]
        records.append(Record(str(i), tmp_path / f"{i}.png", tmp_path / "masks" / f"{i}.png", tags))
    return Split("val", ("background", "cat", "dog", "boat"), tuple(records))
