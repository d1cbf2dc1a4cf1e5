import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset
from datasets.transforms import PlainView
from datasets.voc import voc_split
from utils.image import write_mask


@pytest.fixture
def split(tmp_path):
    records = []
    for k, tags in enumerate([(1,), (), (1, 2), (2,)]):
        image, mask = tmp_path / f"{k}.png", tmp_path / "masks" / f"{k}.png"
        Image.fromarray(np.full((6, 8 + k, 3), 10 * k, dtype=np.uint8)).save(image)
        write_mask(mask, np.full((6, 8 + k), 255 if k == 0 else k % 3))
        records.append(Record(str(k), image, mask, tags))
    return Split("train", ("background", "cat", "dog"), tuple(records))


def draw(sample):
    return {
        "image": torch.rand(3),
        **{key: sample[key] for key in ("name", "index", "sample_seed", "class_label")},
    }


def test_evaluation_samples_keep_their_size(split):
    sample = WeakSegDataset(split, with_mask=True)[2]
    assert sample["image"].shape == (3, 6, 10) and sample["image"].dtype == torch.uint8
    assert (sample["image"] == 20).all() and (sample["mask"] == 2).all()
    assert sample["class_label"].tolist() == [1, 1]
    assert (sample["name"], sample["index"], sample["sample_seed"]) == ("2", 2, 0)


def test_masks_are_read_only_when_asked_for(split, tmp_path):
    shutil.rmtree(tmp_path / "masks")
    assert "mask" not in WeakSegDataset(split)[0]
    with pytest.raises(FileNotFoundError, match=r"4 of 4 masks of split 'train' are missing, first .*0\.png"):
        WeakSegDataset(split, with_mask=True)


def test_mask_of_another_size_or_with_unknown_classes_is_named(split):
    data = WeakSegDataset(split, with_mask=True)
    write_mask(split.records[1].mask, np.zeros((6, 8)))
    with pytest.raises(ValueError, match=r"masks/1\.png is \(8, 6\) pixels, .*1\.png \(9, 6\)"):
        data[1]
    write_mask(split.records[1].mask, np.full((6, 9), 3))
    with pytest.raises(ValueError, match=r"masks/1\.png.*value 3"):
        data[1]


def test_training_needs_tags_and_scoring_needs_masks(split):
    bare = dataclasses.replace(split, records=(dataclasses.replace(split.records[0], tags=None, mask=None),))
    with pytest.raises(ValueError, match=r"1 of 1 images \(0\) of split 'train' have no tags"):
        WeakSegDataset(bare, draw)
    with pytest.raises(ValueError, match=r"no ground-truth mask: .*data\.val_set=null"):
        WeakSegDataset(bare, with_mask=True)
    assert "class_label" not in WeakSegDataset(bare)[0]
    assert not bare.has_tags and split.has_tags


def test_fingerprint_follows_content_not_place_or_order(split, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("copy")
    records = []
    for record in split.records:
        image = shutil.copy(record.image, elsewhere / record.image.name)
        mask = shutil.copy(record.mask, elsewhere / f"mask_{record.mask.name}")
        records.append(dataclasses.replace(record, image=image, mask=mask))
    copy = dataclasses.replace(split, records=tuple(reversed(records)))
    assert copy.fingerprint() == split.fingerprint()
    tagged = dataclasses.replace(records[0], tags=(2,))
    assert dataclasses.replace(split, records=(tagged, *records[1:])).fingerprint() != split.fingerprint()
    records[0].image.write_bytes(b"longer" * 1000)
    assert copy.fingerprint() != split.fingerprint()


def test_real_photos_load(voc20_mini):
    options = {"masks": "SegmentationClass", "tags": "image_labels.txt", "class_names": "class_names.txt"}
    split = voc_split(voc20_mini, "val", **options)
    assert len(split) == 293 and split.num_classes == 21
    data = WeakSegDataset(split, with_mask=True)
    for index in range(0, 293, 40):
        sample = data[index]
        classes = set(sample["mask"].unique().tolist()) - {0, 255}
        assert classes == set(split.records[index].tags)


def test_true_masks_may_be_learned_from(split):
    """The supervised upper bound: a mask moves with its image like any other label."""
    sample = WeakSegDataset(split, PlainView(16), with_mask=True, mask_key="pseudo_label")[2]
    inside = sample["pseudo_label"][sample["pseudo_label"] != 255]
    assert "mask" not in sample and len(inside) and (inside == 2).all()


def test_without_background_zero_does_not_count(split):
    records = tuple(dataclasses.replace(record, has_background=False) for record in split.records)
    whole = dataclasses.replace(split, records=records)
    assert (WeakSegDataset(whole, with_mask=True)[3]["mask"] == 255).all()
    assert (WeakSegDataset(whole, with_mask=True)[2]["mask"] == 2).all()
    assert whole.fingerprint() != split.fingerprint()
