import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset, collate
from datasets.transforms import PlainView, ResizedView, WeakStrongViews, flip_box, random_crop, resized_window
from utils.image import denormalize


def ramp(width, height):
    """Red rises to the right, green downwards, blue is 200; grey values from 20, so that padding differs."""
    x, y = np.meshgrid(np.linspace(20, 250, width), np.linspace(20, 250, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 200)], axis=-1).astype(np.uint8))


def sample(width, height, with_mask=True):
    values = {"image": ramp(width, height), "class_label": torch.ones(1)}
    if with_mask:
        # The mask tells left from right and top from bottom.
        x, y = torch.meshgrid(
            torch.arange(width) * 2 // width, torch.arange(height) * 2 // height, indexing="xy"
        )
        values["mask"] = (x + 2 * y).long()
    return values


@pytest.mark.parametrize("size", [(97, 61), (33, 20), (130, 85)])
def test_window_equals_resize_then_crop(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 80, 3), dtype=np.uint8))
    window = (size[0] // 4, 3, size[0] - 2, size[1] // 2)
    whole = np.asarray(noise.resize(size, Image.Resampling.BILINEAR).crop(window)).astype(int)
    part = np.asarray(resized_window(noise, size, window)).astype(int)
    assert np.abs(whole - part).max() <= 1


@pytest.mark.parametrize("size", [(100, 80), (20, 30), (3, 200), (300, 1), (48, 48)])
def test_crop_box_and_mask_agree(size):
    for seed in range(20):
        torch.manual_seed(seed)
        crop = random_crop(sample(*size), 48, (0.5, 2.0))
        y0, y1, x0, x1 = crop["valid_box"].tolist()
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        blue = torch.from_numpy(np.array(crop["image"]))[..., 2]
        assert y1 > y0 and x1 > x0 and crop["image"].size == (48, 48)
        assert (blue[inside] == 200).all() and not blue[~inside].any()
        assert (crop["mask"][inside] < 4).all() and (crop["mask"][~inside] == 255).all()


def test_padding_and_offset_reach_both_ends():
    boxes = []
    for seed in range(100):
        torch.manual_seed(seed)
        boxes.append(random_crop(sample(10, 10, False), 16, (1.0, 1.0))["valid_box"].tolist())
    assert {box[0] for box in boxes} == set(range(7)) == {box[2] for box in boxes}
    assert all(box[1] - box[0] == 10 == box[3] - box[2] for box in boxes)


def test_image_and_mask_are_mirrored_together():
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        crop = random_crop(sample(60, 60), 48, (1.0, 1.0))
        red = torch.from_numpy(np.array(crop["image"]))[..., 0].float()
        mirrored = bool(red[0, 0] > red[0, -1])
        seen.add(mirrored)
        right_half = crop["mask"] % 2 == 1
        assert red[right_half].mean() > red[~right_half].mean()
    assert seen == {True, False}


def test_rescaling_stays_in_its_range():
    for seed in range(50):
        torch.manual_seed(seed)
        y0, y1, x0, x1 = random_crop(sample(40, 20, False), 200, (0.5, 2.0))["valid_box"].tolist()
        assert 20 <= x1 - x0 <= 80 and 10 <= y1 - y0 <= 40


def test_plain_view_normalises_black_padding():
    torch.manual_seed(0)
    view = PlainView(32)(sample(8, 8))
    assert view["image"].shape == (3, 32, 32) and view["mask"].shape == (32, 32)
    y0, y1, x0, x1 = view["valid_box"].tolist()
    pixels = denormalize(view["image"])
    assert pixels[:, y0:y1, x0:x1].amin() > 15
    pixels[:, y0:y1, x0:x1] = 0
    assert pixels.abs().max() < 1e-3


@pytest.mark.parametrize("main_view", ["augmented", "plain"])
@pytest.mark.parametrize("size", [(70, 50), (5, 90), (1, 1)])
def test_views_have_the_shape_of_the_crop(main_view, size):
    torch.manual_seed(0)
    views = WeakStrongViews(32, main_view=main_view)(sample(*size))
    for name in ("image", "global_view", "strong_view"):
        assert views[name].shape == (3, 32, 32) and views[name].dtype == torch.float32
    assert views["valid_box"].shape == (4,) and views["valid_box"].dtype == torch.int64
    assert views["mask"].shape == (32, 32)


def test_plain_main_view_is_the_crop_itself():
    torch.manual_seed(5)
    expected = random_crop(sample(70, 50), 32, (0.5, 2.0))
    torch.manual_seed(5)
    views = WeakStrongViews(32, main_view="plain")(sample(70, 50))
    pixels = torch.from_numpy(np.array(expected["image"])).permute(2, 0, 1)
    torch.testing.assert_close(denormalize(views["image"]), pixels.float(), atol=1e-3, rtol=0)
    assert torch.equal(views["valid_box"], expected["valid_box"])


def runs_right(view, box):
    """Whether the picture gets lighter towards the right inside the box; colour changes keep that."""
    y0, y1, x0, x1 = box.tolist()
    profile = view[:, y0:y1, x0:x1].mean(dim=(0, 1))
    half = profile.numel() // 2
    return bool(profile[-half:].mean() > profile[:half].mean())


def grey_ramp(width, height):
    values = np.broadcast_to(np.linspace(40, 220, width)[None, :, None], (height, width, 3))
    return {"image": Image.fromarray(values.astype(np.uint8)), "class_label": torch.ones(1)}


@pytest.mark.parametrize("main_view", ["augmented", "plain"])
def test_consistent_flip_keeps_views_and_box_together(main_view):
    directions = set()
    for seed in range(30):
        torch.manual_seed(seed)
        views = WeakStrongViews(48, main_view=main_view, consistent_flip=True)(grey_ramp(30, 30))
        box = views["valid_box"]
        y0, y1, x0, x1 = box.tolist()
        assert runs_right(views["image"], box) == runs_right(views["strong_view"], box)
        directions.add(runs_right(views["image"], box))
        if main_view == "plain":
            outside = denormalize(views["image"])
            outside[:, y0:y1, x0:x1] = 0
            assert outside.abs().max() < 1e-3
    assert directions == {True, False}


def test_flipped_main_view_moves_the_box_only_when_consistent():
    moved = 0
    for seed in range(30):
        boxes = []
        for consistent in (False, True):
            torch.manual_seed(seed)
            boxes.append(WeakStrongViews(48, consistent_flip=consistent)(grey_ramp(20, 20))["valid_box"])
        mirrored = torch.equal(boxes[1], flip_box(boxes[0], 48))
        assert mirrored or torch.equal(*boxes)
        moved += not torch.equal(*boxes)
    assert 5 < moved < 25


def test_published_flips_are_independent():
    pairs = set()
    for seed in range(60):
        torch.manual_seed(seed)
        views = WeakStrongViews(32, scale_range=(1.0, 1.0))(grey_ramp(32, 32))
        pairs.add(
            (
                runs_right(views["image"], views["valid_box"]),
                runs_right(views["strong_view"], views["valid_box"]),
            )
        )
    assert len(pairs) == 4


def test_mask_follows_the_augmented_image():
    for seed in range(20):
        torch.manual_seed(seed)
        source = grey_ramp(40, 40) | {"mask": (torch.arange(40) // 20).expand(40, 40).contiguous()}
        views = WeakStrongViews(40, scale_range=(1.0, 1.0))(source)
        left, right = views["mask"][:, :10].float().mean(), views["mask"][:, -10:].float().mean()
        assert runs_right(views["image"], views["valid_box"]) == bool(right > left)


def test_flipping_a_box_twice_restores_it():
    box = torch.tensor([[1, 5, 2, 30], [0, 32, 0, 32]])
    assert flip_box(box, 32).tolist() == [[1, 5, 2, 30], [0, 32, 0, 32]]
    assert flip_box(torch.tensor([0, 4, 0, 10]), 32).tolist() == [0, 4, 22, 32]


def test_a_view_is_a_function_of_image_and_seed(tmp_path):
    ramp(60, 40).save(tmp_path / "a.png")
    split = Split("s", ("background", "x"), (Record("a", tmp_path / "a.png", None, (1,)),))
    data = WeakSegDataset(split, WeakStrongViews(32))
    torch.manual_seed(1)
    first = collate([data[0, 11]])
    torch.manual_seed(2)
    again, other = collate([data[0, 11]]), collate([data[0, 12]])
    for name in ("image", "global_view", "strong_view", "valid_box"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("size", [(70, 50), (5, 90), (1, 1), (300, 20)])
def test_resized_view_fills_the_crop(size):
    for seed in range(5):
        torch.manual_seed(seed)
        view = ResizedView(32, (0.9, 1.0))(sample(*size))
        assert view["image"].shape == (3, 32, 32) and view["image"].dtype == torch.float32
        assert view["valid_box"].tolist() == [0, 32, 0, 32]
        assert view["mask"].shape == (32, 32) and view["mask"].dtype == torch.int64
        assert type(view["mask"]) is torch.Tensor and set(view["mask"].unique().tolist()) <= {0, 1, 2, 3}
    assert "mask" not in ResizedView(32)(sample(*size, with_mask=False))


def test_resized_view_moves_mask_and_image_together():
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        source = grey_ramp(60, 40) | {"mask": (torch.arange(60) // 30).expand(40, 60).contiguous()}
        view = ResizedView(48)(source)
        seen.add(runs_right(view["image"], view["valid_box"]))
        right = view["mask"][:, -10:].float().mean() > view["mask"][:, :10].float().mean()
        assert runs_right(view["image"], view["valid_box"]) == bool(right)
    assert seen == {True, False}


def test_resized_view_shows_its_share_of_the_area():
    """The ramp of a crop covers what the crop covers of the image."""
    for seed in range(20):
        torch.manual_seed(seed)
        view = ResizedView(64, (0.9, 1.0))
        view.colour = lambda image: image
        red, green = denormalize(view(sample(300, 200))["image"])[:2]
        spans = [(x[..., -1] - x[..., 0]).abs().mean() / 230 for x in (red, green.T)]
        assert 0.85 <= spans[0] * spans[1] <= 1.02


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="share of the image's area"):
        ResizedView(32, (0.5, 2.0))
    with pytest.raises(ValueError, match="two rising"):
        PlainView(32, (2.0, 0.5))
