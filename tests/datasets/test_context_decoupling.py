"""Objects of a bank get into images as the published program puts them there, and nothing else changes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset
from datasets.context_decoupling import (
    ContextDecoupledDataset,
    MinedObject,
    ObjectBank,
    Paste,
    SampleDraw,
    extract_object,
    save_object,
    turned_labels,
    write_index,
)
from datasets.transforms import PlainView, crop, crop_box, resize_long_side
from datasets.voc import CLASS_NAMES
from tests.recorded import recorded
from utils.image import normalize, write_mask

RECORDED = {
    "data_aug_rotation": Paste(paste_mask="reference"),
    "data_aug": Paste(rotate=False, rescale=True, paste_mask="reference"),
    "data_aug_rotation_blur": Paste(blend=True, paste_mask="reference"),
}


class Replay:
    """Recorded draws in their order; other bounds than the recorded ones are an error."""

    def __init__(self, draws):
        self.draws = list(draws)

    def integer(self, low, high):
        name, bounds, value = self.draws.pop(0)
        assert (name, bounds) == ("randint", [low, high])
        return value

    def real(self):
        return self.draws.pop(0)[2]


def ellipse(height, width):
    y, x = np.ogrid[:height, :width]
    return ((y - (height - 1) / 2) / (height / 2)) ** 2 + ((x - (width - 1) / 2) / (width / 2)) ** 2 <= 1


def pixels(case, key):
    return case.input(key).numpy()


@recorded("ms_cda_paste")
def test_paste_equals_the_published_program(case):
    for name in case.starting("seg"):
        number = name.removeprefix("seg")
        labels, background = case[name].numpy(), pixels(case, f"bg{number}")
        item = MinedObject(int(labels.max()), pixels(case, f"fg{number}"), labels > 0)
        for variant, paste in RECORDED.items():
            draw = Replay(case.meta["draws"][f"{variant}_{number}"])
            pasted, _ = paste(background, item, draw)
            assert not draw.draws
            assert differing(pasted, case[f"{variant}_{number}"]) <= 0.005
        degrees = case.meta["draws"][f"data_aug_rotation_{number}"][0][2]
        (colours, mask), _ = turned_labels(item, degrees)
        assert differing(np.asarray(mask)[..., None], case[f"rotated_seg_{number}"][..., None]) <= 0.005
        assert differing(np.asarray(colours)[::3, ::3], case[f"rotated_fg_{number}_sub"]) <= 0.005


def differing(found, expected):
    """The share of pixels (H, W, C) that differ."""
    return (found != expected.numpy()).any(-1).mean()


@recorded("ms_cda_extract")
def test_objects_are_cut_out_as_by_the_published_program(case):
    accepted = {}
    for key in case.starting("mask_"):
        name = key.removeprefix("mask_")
        item = extract_object(pixels(case, f"img_{name}"), case[key].numpy())
        if item is not None:
            accepted[name] = item.class_id - 1
            case.same(f"seg_{name}", item.mask * np.uint8(item.class_id))
            case.same(f"img_shape_{name}", item.image_rgb.shape)
            case.compare(f"img_mean_{name}", item.image_rgb.mean(), rtol=1e-6)
            case.same(f"img_corner_{name}", item.image_rgb[:2, :2])
    assert accepted == case.meta["accepted_class"]


def test_ignored_pixels_are_no_object_and_neither_is_a_whole_image():
    image_rgb, label = np.zeros((10, 10, 3), np.uint8), np.zeros((10, 10), np.uint8)
    label[:5], label[5:8] = 3, 255
    item = extract_object(image_rgb, label)
    assert item.class_id == 3 and item.mask.shape == (5, 10)
    for value in (0, 7, 255):
        assert extract_object(image_rgb, np.full_like(label, value)) is None


def published_item(case, tmp_path, image_label):
    """The data set of the recorded item: one image, and the bank under the names of the recorded files."""
    tmp_path.mkdir()
    files = {draws["file"]: draws["class"] for draws in case.meta["draws"].values()}
    objects = {}
    for key in case.meta["inputs"]:
        if key == "bg":
            continue
        _, k, j = key.split("_")
        colours = pixels(case, key)
        # The recorded file names spell class and number: 2008_00<class><number>.
        name = f"2008_00{int(k):02d}{int(j):02d}"
        save_object(tmp_path / "bank", name, MinedObject(int(k) + 1, colours, ellipse(*colours.shape[:2])))
        objects.setdefault(int(k) + 1, []).append(name)
    assert all(file.removesuffix(".npy") in objects[k + 1] for file, k in files.items())
    write_index(tmp_path / "bank", CLASS_NAMES, objects)
    Image.fromarray(pixels(case, "bg")).save(tmp_path / "image.png")
    record = Record("2007_000032", tmp_path / "image.png", None, image_label)
    split = Split("train", CLASS_NAMES, (record,))
    return WeakSegDataset(split, transform=lambda sample: sample), ObjectBank(tmp_path / "bank", CLASS_NAMES)


def cropped(image, long_side, flip, offsets, size):
    """The published view of the classifier with draws as recorded."""
    resized = resize_long_side(image, long_side)
    pixels = normalize(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    replayed = iter(offsets)
    box = crop_box((resized.height, resized.width), size, draw=lambda n: next(replayed))
    return crop(pixels.flip(-1) if flip else pixels, size, box, fill=0.0)


@recorded("ms_cda_dataset")
def test_item_of_the_data_set_equals_the_published_one(case, tmp_path):
    for number, draws in case.meta["draws"].items():
        label = case[f"label_{number}"]
        tags = tuple((label.nonzero()[:, 0] + 1).tolist())
        dataset, bank = published_item(case, tmp_path / number, tags)
        decoupled = ContextDecoupledDataset(dataset, bank, Paste(paste_mask="reference"))
        sample = dataset.read((0, 0))
        absent = [k for k in range(1, len(CLASS_NAMES)) if k not in tags]
        names = bank.names[draws["class"] + 1]
        chosen = [
            ["randint", [0, len(absent) - 1], absent.index(draws["class"] + 1)],
            ["randint", [0, len(names) - 1], names.index(draws["file"].removesuffix(".npy"))],
        ]
        replay = Replay([*chosen, *draws["python"]])
        pasted = decoupled.decoupled(sample, replay)
        values = [value for _, _, value in replay.draws]
        side = case[f"img_{number}"].shape[-1] * 4
        for name, image, start in (("img", sample["image"], 0), ("aug_img", pasted["image"], 1)):
            offsets = values[4 + 2 * start : 6 + 2 * start]
            crop = cropped(image, values[start], values[2 + start], offsets, side)
            off = (crop[:, ::4, ::4] - case[f"{name}_{number}"]).abs().amax(0) > 1e-5
            assert off.float().mean() <= 0.005
        assert torch.equal(sample["class_label"], label)
        assert torch.equal(pasted["class_label"], case[f"aug_label_{number}"])


@pytest.fixture
def world(tmp_path):
    """Three images (no tag, one tag, both tags) with label images, and a bank with objects of one class."""
    records = []
    for k, tags in enumerate([(), (1,), (1, 2)]):
        Image.fromarray(np.full((30, 40, 3), 40 * k, np.uint8)).save(tmp_path / f"{k}.png")
        write_mask(tmp_path / "labels" / f"{k}.png", np.zeros((30, 40)))
        records.append(Record(str(k), tmp_path / f"{k}.png", None, tags))
    names = ("background", "cat", "dog")
    red = np.zeros((12, 9, 3), np.uint8)
    red[..., 0] = 255
    save_object(tmp_path / "bank", "x", MinedObject(2, red, ellipse(12, 9)))
    write_index(tmp_path / "bank", names, {2: ["x"]})
    dataset = WeakSegDataset(
        Split("train", names, tuple(records)), PlainView(32), label_dir=tmp_path / "labels"
    )
    return dataset, ObjectBank(tmp_path / "bank", names)


def test_mask_and_label_follow_the_pasted_object(world):
    decoupled = ContextDecoupledDataset(*world, Paste(blend=False))
    sample = decoupled.dataset.read((1, 5))
    pasted = decoupled.decoupled(sample, SampleDraw(5))
    red = np.asarray(pasted["image"])[..., 0] > 150
    assert red.any() and np.array_equal(red, pasted["pseudo_label"].numpy() == 2)
    assert pasted["class_label"].tolist() == [1, 1] and sample["class_label"].tolist() == [1, 0]
    assert (np.asarray(sample["image"]) == 40).all() and not sample["pseudo_label"].any()


def test_only_absent_classes_with_objects_are_pasted(world, tmp_path):
    dataset, bank = world
    decoupled = ContextDecoupledDataset(dataset, bank, Paste())
    for seed in range(20):
        label = decoupled.decoupled(dataset.read((0, seed)), SampleDraw(seed))["class_label"]
        assert label.tolist() == [0, 1]
    write_index(tmp_path / "none", ("background", "cat", "dog"), {})
    empty = ObjectBank(tmp_path / "none", ("background", "cat", "dog"))
    for index, objects in ((2, bank), (1, empty)):
        sample = dataset.read((index, 5))
        pasted = ContextDecoupledDataset(dataset, objects, Paste()).decoupled(sample, SampleDraw(5))
        assert pasted["image"] is sample["image"] and pasted["class_label"] is sample["class_label"]


def test_draws_belong_to_the_sample(world):
    decoupled = ContextDecoupledDataset(*world, Paste())
    torch.manual_seed(0)
    first = decoupled[1, 7]
    torch.manual_seed(1)
    second, other = decoupled[1, 7], decoupled[1, 8]
    for a, b in zip(first, second):
        assert torch.equal(a["image"], b["image"]) and a["sample_seed"] == b["sample_seed"]
    assert not torch.equal(first[1]["image"], other[1]["image"])
    assert first[0]["sample_seed"] == 7 != first[1]["sample_seed"]
    plain = decoupled.dataset[1, 7]
    assert torch.equal(first[0]["image"], plain["image"])


@pytest.mark.parametrize("class_id", [1, 20])
def test_turned_objects_keep_their_area_and_colours(class_id):
    """The published program adds 13 % to the mask of class 20 (specification 6.8)."""
    mask = ellipse(40, 30)
    colours = np.where(mask[..., None], np.uint8(200), np.uint8(0)).repeat(3, axis=2)
    for seed in range(10):
        image_rgb = np.full((200, 200, 3), 90, np.uint8)
        pasted, covered = Paste()(image_rgb, MinedObject(class_id, colours, mask), SampleDraw(seed))
        assert covered.sum() == pytest.approx(mask.sum(), rel=0.03)
        assert (pasted[covered] >= 198).all() and (pasted[~covered] == 90).all()


def test_missing_or_foreign_bank_is_a_clear_error(world, tmp_path):
    bank = world[1]
    with pytest.raises(FileNotFoundError, match="object bank"):
        ObjectBank(tmp_path / "nowhere", ("background", "cat", "dog"))
    with pytest.raises(ValueError, match="other classes"):
        ObjectBank(bank.folder, ("background", "cat", "cow"))
    (bank.folder / "2" / "x.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 objects"):
        ObjectBank(bank.folder, ("background", "cat", "dog"))


def test_label_folder_takes_the_place_of_ground_truth(world, tmp_path):
    dataset = world[0]
    write_mask(tmp_path / "labels" / "1.png", np.full((30, 40), 2))
    assert (dataset.read((1, 0))["pseudo_label"] == 2).all()
    assert set(dataset[1, 0]["pseudo_label"].unique().tolist()) <= {2, 255}
    (tmp_path / "labels" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 labels"):
        WeakSegDataset(dataset.split, PlainView(32), label_dir=tmp_path / "labels")
    write_mask(tmp_path / "labels" / "1.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"labels/1\.png is \(5, 5\) pixels"):
        dataset.read((1, 0))


def test_score_files_reach_the_transform(world, tmp_path):
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", low=np.full((2, 3), k))
    split = dataclasses.replace(world[0].split)
    dataset = WeakSegDataset(split, lambda sample: sample["label_scores"], label_dir=tmp_path)
    assert (dataset[2, 0]["low"] == 2).all()
    with pytest.raises(ValueError, match="label scores"):
        ContextDecoupledDataset(dataset, world[1], Paste())[1, 0]
    (tmp_path / "1.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"1\.npz .*damaged"):
        dataset[1, 0]
