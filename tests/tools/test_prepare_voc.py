import gzip

import numpy as np
import pytest
import scipy.io
from PIL import Image

from datasets.voc import CLASS_NAMES, voc_split
from datasets.voc_masks import trainaug_names
from tests.stages import call
from tools import prepare_voc
from tools.prepare_voc import EXPECTED
from utils.image import read_mask, write_mask

TAGS = {"t1": ["cat"], "t2": ["dog", "person"], "v1": ["person"], "s1": ["aeroplane"], "s2": ["bird", "cat"]}


def annotation(words):
    objects = "".join(
        f"<object><name>{w}</name><difficult>{int(w == 'bird')}</difficult></object>" for w in words
    )
    return f"<annotation>{objects}</annotation>"


def mask_of(name, border):
    mask = np.full((4, 5), CLASS_NAMES.index(TAGS[name][0]), np.uint8)
    mask[0] = 255 if border else 0
    return mask


def is_own(path):
    """Whether a mask is VOC's."""
    return 255 in read_mask(path)


@pytest.fixture
def voc(tmp_path):
    """Train t1, t2 and val v1 with VOC's masks, which have a border of 255; SBD labels t2, v1, s1, s2."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, words in TAGS.items():
        Image.new("RGB", (5, 4)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(words))
    for split, names in {"train": ["t1", "t2"], "val": ["v1"]}.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write_mask(root / "SegmentationClass" / f"{name}.png", mask_of(name, border=True))
    cls = tmp_path / "benchmark_RELEASE" / "dataset" / "cls"
    cls.mkdir(parents=True)
    for name in ("t2", "v1", "s1", "s2"):
        scipy.io.savemat(
            cls / f"{name}.mat", {"GTcls": {"Segmentation": mask_of(name, border=False), "Boundaries": 0}}
        )
    return root


def prepare(root, **options):
    return call(
        prepare_voc, {"root": root, "sbd": root.parent / "benchmark_RELEASE", "any_counts": True} | options
    )


def test_sbd_release_gives_masks_list_and_tags(voc, capsys):
    assert prepare(voc) == {"train": 2, "val": 1, "trainaug": 4}
    masks = voc / "SegmentationClassAug"
    own = {path.stem: is_own(path) for path in masks.glob("*.png")}
    assert own == {"t1": True, "t2": True, "v1": True, "s1": False, "s2": False}
    assert np.array_equal(read_mask(masks / "s2.png"), mask_of("s2", border=False))
    with Image.open(masks / "s1.png") as image:
        assert image.mode == "P" and image.size == (5, 4)

    split = voc_split(voc, "trainaug")
    assert {r.name: [CLASS_NAMES[k] for k in r.tags] for r in split.records} == {
        n: TAGS[n] for n in ("t1", "t2", "s1", "s2")
    }
    assert all(record.mask.is_file() for record in voc_split(voc, "val").records)
    assert "EXPECTED 10582" in capsys.readouterr().out


def test_running_again_keeps_finished_masks_but_those_of_voc_are_its_own(voc):
    """Archives in circulation hold SBD's masks of VOC's images too."""
    prepare(voc)
    folder = voc / "SegmentationClassAug"
    write_mask(folder / "s1.png", np.full((4, 5), 7))
    write_mask(folder / "v1.png", mask_of("v1", border=False))
    (folder / "s2.png").unlink()
    prepare(voc)
    assert read_mask(folder / "s1.png").max() == 7 and (folder / "s2.png").is_file()
    assert is_own(folder / "v1.png")


def test_a_folder_of_augmented_masks_is_enough(voc):
    with pytest.raises(FileNotFoundError, match="SegmentationClassAug is missing"):
        prepare(voc, sbd=None)
    for name in TAGS:
        write_mask(voc / "SegmentationClassAug" / f"{name}.png", mask_of(name, border=False))
    assert prepare(voc, sbd=None)["trainaug"] == 4
    own = {path.stem for path in (voc / "SegmentationClassAug").glob("*.png") if is_own(path)}
    assert own == {"t1", "t2", "v1"}  # masks of SBD for VOC's own images are replaced


def test_image_without_annotation_takes_the_tags_of_its_mask(voc, caplog):
    (voc / "Annotations" / "s1.xml").unlink()
    prepare(voc)
    assert "s1,aeroplane\n" in (voc / "tags.csv").read_text()
    assert "1 of 5 images (s1) have no XML annotation" in caplog.text


def test_part_of_voc_is_an_error_unless_accepted(voc):
    with pytest.raises(ValueError, match=r"train 2 instead of 1464, .* trainaug 4 instead of 10582"):
        prepare(voc, any_counts=False)


@pytest.fixture
def voc_lists(voc20_mini):
    """Lists and tags that the field shares."""
    return voc20_mini.parent / "voc_lists"


def test_rules_reproduce_the_lists_of_the_field(voc_lists):
    lists = {split: (voc_lists / f"{split}.txt").read_text().split() for split in ("train", "val", "test")}
    trainaug = gzip.decompress((voc_lists / "train_aug.txt.gz").read_bytes()).decode().split()
    with np.load(voc_lists / "cls_labels.npz", allow_pickle=False) as table:
        augmented = set(table["names"].tolist())
    assert trainaug_names(augmented, lists["train"], lists["val"]) == trainaug
    counts = {split: len(names) for split, names in lists.items()} | {"trainaug": len(trainaug)}
    assert counts == EXPECTED
