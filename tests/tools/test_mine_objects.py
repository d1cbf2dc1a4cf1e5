"""Objects are cut out of a folder of pseudo labels into a bank that the augmentation reads."""

import numpy as np
import pytest

from datasets.context_decoupling import ObjectBank
from engine.config.load import load_config
from engine.data import load_split
from tests.stages import call
from tools import mine_objects
from utils.cam_files import label_path
from utils.image import read_image, write_mask


@pytest.fixture
def labels(demo_folder, tmp_path):
    """Label images of the four training images of the demo set; the options to mine them."""
    config = [f"config={'configs/datasets/demo.yaml'}", f"data.root={demo_folder}"]
    split = load_split(load_config("configs/datasets/demo.yaml", config[1:]).data, "train")
    folder = tmp_path / "labels"
    whole = np.zeros((48, 48), np.uint8)
    box, two, small = whole.copy(), whole.copy(), whole.copy()
    box[4:30, 10:40] = 2
    two[4:30, 10:40], two[40:] = 2, 5
    small[:3, :3] = 4
    for record, label in zip(split.records, (box, two, small, whole)):
        write_mask(label_path(folder, record.name), label)
    options = {"labels": str(folder), "out": str(tmp_path / "bank"), "overrides": config}
    return split, folder, options


def test_one_class_of_fair_size_is_an_object(labels, capsys):
    split, _, options = labels
    out = call(mine_objects, options)
    bank = ObjectBank(out, split.class_names)
    name = split.records[0].name
    assert bank.names == {2: [name]} and len(bank) == 1
    item = bank.load(2, name)
    photo = np.asarray(read_image(split.records[0].image))
    assert np.array_equal(item.image_rgb, photo[4:30, 10:40]) and item.mask.all()
    assert "no objects of 5 classes" in capsys.readouterr().out


def test_interrupted_bank_has_no_index_and_goes_on(labels, monkeypatch):
    split, folder, options = labels
    broken = label_path(folder, split.records[1].name)
    content = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read mask"):
        call(mine_objects, {**options, "num_workers": 0})
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        ObjectBank(options["out"], split.class_names)
    broken.write_bytes(content)
    monkeypatch.setattr("datasets.context_decoupling.save_object", None)  # what is there is not written again
    assert len(ObjectBank(call(mine_objects, options), split.class_names)) == 1


def test_labels_without_any_object_make_an_empty_bank(labels):
    split, folder, options = labels
    for path in folder.iterdir():
        write_mask(path, np.zeros((48, 48)))
    assert len(ObjectBank(call(mine_objects, options), split.class_names)) == 0
