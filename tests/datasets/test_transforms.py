"""Views of a training image: whatever moves pixels moves image, labels and valid box together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset, collate, with_changes
from datasets.transforms import (
    PlainView,
    ResizedView,
    StageView,
    WeakStrongViews,
    flip_box,
    random_crop,
    resized_window,
)
from utils.image import denormalize

S = 48
VIEWS = {
    "plain": PlainView(S),
    "resized": ResizedView(S),
    "stage": StageView(S, scale_range=(0.8, 1.3)),
    "long_side": StageView(S, long_side=(30, 60)),
    "seco": WeakStrongViews(S, main_view="plain"),
    "toco": WeakStrongViews(S),
}
PADDED = ("plain", "seco", "stage", "long_side")  # with black, or after the normalisation
seeds = st.integers(0, 2**31)
sides = st.integers(1, 130)


def in_bytes(image):
    return image.float() if image.dtype == torch.uint8 else denormalize(image)


def sample(width, height):
    """Red rises to the right, green downwards, blue is 200; labels tell left from right, top from bottom."""
    x, y = np.meshgrid(np.linspace(20, 250, width), np.linspace(20, 250, height))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 200)], axis=-1).astype(np.uint8))
    columns, rows = torch.arange(width) * 2 // width, torch.arange(height) * 2 // height
    mask = columns[None] + 2 * rows[:, None]
    return {"image": image, "class_label": torch.ones(1), "mask": mask, "pseudo_label": mask.clone()}


@pytest.mark.parametrize("name", VIEWS)
@given(width=sides, height=sides, seed=seeds)
@settings(max_examples=25)
def test_image_labels_and_box_agree(name, width, height, seed):
    torch.manual_seed(seed)
    view = VIEWS[name](sample(width, height))
    for key in ("image", "global_view", "strong_view"):
        assert key not in view or view[key].shape == (3, S, S)
    y0, y1, x0, x1 = view["valid_box"].tolist()
    inside = torch.zeros(S, S, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    label = view["mask"]
    assert type(label) is torch.Tensor and label.dtype == torch.int64
    assert torch.equal(label, view["pseudo_label"])
    assert 0 <= y0 < y1 <= S and 0 <= x0 < x1 <= S
    if name != "toco":  # its views are mirrored without the box, as published
        assert (label[inside] < 4).all() and (label[~inside] == 255).all()
    if name in PADDED:
        assert inside.all() or not view["image"][:, ~inside].any()
        red, _, blue = in_bytes(view["image"])
        assert (blue[inside] - 200).abs().max() <= 1
        right = inside & (label % 2 == 1)
        if right.any() and (inside & ~right).any() and x1 - x0 > 6:
            assert red[right].mean() > red[inside & ~right].mean()


@pytest.mark.parametrize("size", [(97, 61), (33, 20), (130, 85)])
def test_window_equals_resize_then_crop(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 80, 3), dtype=np.uint8))
    window = (size[0] // 4, 3, size[0] - 2, size[1] // 2)
    whole = np.asarray(noise.resize(size, Image.Resampling.BILINEAR).crop(window)).astype(int)
    part = np.asarray(resized_window(noise, size, window)).astype(int)
    assert np.abs(whole - part).max() <= 1


@given(seed=seeds)
@settings(max_examples=25)
def test_rescaling_stays_in_its_range(seed):
    torch.manual_seed(seed)
    y0, y1, x0, x1 = random_crop(sample(40, 20), 200, (0.5, 2.0))["valid_box"].tolist()
    assert 20 <= x1 - x0 <= 80 and 10 <= y1 - y0 <= 40
    y0, y1, x0, x1 = StageView(200, long_side=(50, 60))(sample(44, 30))["valid_box"].tolist()
    assert 50 <= x1 - x0 <= 60 and abs((y1 - y0) - (x1 - x0) * 30 / 44) <= 0.5


def runs_right(view, box):
    """Whether the picture gets lighter towards the right inside the box; colour changes keep that."""
    y0, y1, x0, x1 = box.tolist()
    profile = view[:, y0:y1, x0:x1].float().mean(dim=(0, 1))
    half = profile.numel() // 2
    return bool(profile[-half:].mean() > profile[:half].mean())


def grey_ramp(width, height):
    values = np.broadcast_to(np.linspace(40, 220, width)[None, :, None], (height, width, 3))
    mask = (torch.arange(width) * 2 // width).expand(height, width).contiguous()
    return {"image": Image.fromarray(values.astype(np.uint8)), "class_label": torch.ones(1), "mask": mask}


@pytest.mark.parametrize("main_view", ["augmented", "plain"])
def test_consistent_flip_keeps_views_and_box_together(main_view):
    directions, moved = set(), 0
    for seed in range(30):
        views = []
        for consistent in (False, True):
            torch.manual_seed(seed)
            view = WeakStrongViews(S, main_view=main_view, consistent_flip=consistent)
            views.append(view(grey_ramp(30, 30)))
        independent, box = views[0]["valid_box"], views[1]["valid_box"]
        assert runs_right(views[1]["image"], box) == runs_right(views[1]["strong_view"], box)
        directions.add(runs_right(views[1]["image"], box))
        assert torch.equal(box, independent) or torch.equal(box, flip_box(independent, S))
        moved += not torch.equal(box, independent)
    assert directions == {True, False} and (5 < moved < 25 if main_view == "augmented" else not moved)


def test_published_flips_are_independent():
    pairs = set()
    for seed in range(60):
        torch.manual_seed(seed)
        views = WeakStrongViews(32, scale_range=(1.0, 1.0))(grey_ramp(32, 32))
        pairs.add(tuple(runs_right(views[name], views["valid_box"]) for name in ("image", "strong_view")))
    assert len(pairs) == 4


@pytest.mark.parametrize("view", [WeakStrongViews(40, scale_range=(1.0, 1.0)), ResizedView(40)])
def test_mask_follows_the_recoloured_image(view):
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = view(grey_ramp(40, 40))
        left, right = found["mask"][:, :10].float().mean(), found["mask"][:, -10:].float().mean()
        assert runs_right(found["image"], found["valid_box"]) == bool(right > left)
        seen.add(bool(right > left))
    assert seen == {True, False}


def test_resized_view_shows_its_share_of_the_area():
    """The ramp of a crop covers what the crop covers of the image."""
    view = ResizedView(64, (0.9, 1.0))
    for seed in range(20):
        torch.manual_seed(seed)
        red, green, _ = view(sample(300, 200))["image"].float()
        spans = [(x[..., -1] - x[..., 0]).abs().mean() / 230 for x in (red, green.T)]
        assert 0.85 <= spans[0] * spans[1] <= 1.02


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_function_of_image_and_seed(tmp_path, name):
    sample(60, 40)["image"].save(tmp_path / "a.png")
    split = Split("s", ("background", "x"), (Record("a", tmp_path / "a.png", None, (1,)),))
    data = WeakSegDataset(split, VIEWS[name])
    torch.manual_seed(1)
    first = with_changes(collate([data[0, 11]]))
    torch.manual_seed(2)
    again, other = (with_changes(collate([data[0, seed]])) for seed in (11, 12))
    both = with_changes(collate([data[0, 11], data[0, 12]]))
    drawn = torch.rand(2)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(2), drawn)  # the global generator is left as it was
    for key in ("image", "global_view", "strong_view", "valid_box"):
        if key in first:
            assert torch.equal(first[key], again[key])
            assert torch.equal(both[key], torch.cat([first[key], other[key]]))
    assert not torch.equal(first["image"], other["image"])
