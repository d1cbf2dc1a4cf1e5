import inspect
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.custom import custom_split
from datasets.pictures import picture_files
from datasets.voc import tags_from_xml, voc_split
from engine.config.load import load_config
from utils.build import import_target
from utils.image import write_mask


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def voc(tmp_path):
    for name in "abcd":
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
    for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
        text(tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{n}\n" for n in names))
    text(tmp_path / "tags.csv", "name,tags\na,dog;cat\nb,person;\nc,\n")
    return tmp_path


def test_voc_records(voc):
    split = voc_split(voc, "train")
    assert split.class_names[12] == "dog" and split.num_classes == 21
    assert [record.tags for record in split.records] == [(8, 12), (15,)]
    assert split.records[0].mask == voc / "SegmentationClassAug" / "a.png"
    assert voc_split(voc, "val").records[0].tags == ()


def test_voc_test_and_own_lists_have_no_truth_unless_it_is_there(voc):
    record = voc_split(voc, "test").records[0]
    assert record.mask is None and record.tags is None
    write_mask(voc / "SegmentationClassAug" / "d.png", np.zeros((3, 4)))
    (voc / "tags.csv").write_text("d,cat\n")
    record = voc_split(voc, "test").records[0]
    assert record.mask is not None and record.tags == (8,)

    text(voc / "mine.txt", "a\nd\n")
    split = voc_split(voc, str(voc / "mine.txt"))
    assert split.name == "mine" and [record.tags for record in split.records] == [None, (8,)]
    (voc / "tags.csv").unlink()
    assert not voc_split(voc, str(voc / "mine.txt")).has_tags


def test_voc_says_what_is_missing(voc):
    with pytest.raises(FileNotFoundError, match="lists there: test, train, val"):
        voc_split(voc, "trainaug")
    (voc / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*b\.jpg"):
        voc_split(voc, "train")
    (voc / "tags.csv").write_text("a,cat\n")
    with pytest.raises(ValueError, match=r"1 of 1 images \(c\) of split 'val' have no line"):
        voc_split(voc, "val")
    (voc / "tags.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"tags\.csv is missing: make it with"):
        voc_split(voc, "val")
    assert voc_split(voc, "val", tags=None).records[0].tags is None


def test_tags_from_xml(tmp_path):
    text(
        tmp_path / "a.xml",
        "<annotation><object><name>person</name><difficult>0</difficult><part><name>head</name></part></object>"
        "<object><name>cat</name><difficult>1</difficult></object><object><name>person</name></object></annotation>",
    )
    assert tags_from_xml(tmp_path, ["a"]) == {"a": ["cat", "person"]}
    text(tmp_path / "b.xml", "<annotation><object><name>head</name></object></annotation>")
    with pytest.raises(ValueError, match=r"b\.xml.*unknown class 'head'"):
        tags_from_xml(tmp_path, ["b"])


@pytest.fixture
def own(tmp_path):
    for name in ("a.jpg", "b.PNG", "deep/c.webp", "my dog.bmp"):
        picture(tmp_path / "images" / name)
    text(tmp_path / "tags.csv", "name,tags\na.jpg,zebra;cat\nb,\nc,cat;\nmy dog.bmp,zebra;\n")
    return tmp_path


def test_custom_folder(own):
    split = custom_split(own, "all")
    assert split.class_names == ("background", "cat", "zebra")
    assert {r.name: r.tags for r in split.records} == {"a": (1, 2), "b": (), "deep/c": (1,), "my dog": (2,)}
    assert all(record.mask is None for record in split.records)
    assert custom_split(own, "all", masks="masks").records[2].mask == own / "masks" / "deep" / "c.png"


def test_custom_classes_come_from_tags_a_header_or_a_given_order(own):
    text(own / "tags.csv", "a,cat\nb,\nc,\nmy dog,\n")
    assert custom_split(own, "all").class_names == ("background", "cat")
    assert custom_split(own, "all", class_names=["zebra", "cat"]).records[0].tags == (2,)
    text(own / "tags.csv", "image,zebra,cat,bird\na.jpg,1,1,0\nb,0,0,0\nc,0,1,0\nmy dog.bmp,1,0,0\n")
    split = custom_split(own, "all")
    assert split.class_names == ("background", "bird", "cat", "zebra")
    assert [record.tags for record in split.records] == [(2, 3), (), (2,), (3,)]


def test_custom_splits_are_disjoint_complete_and_stable(tmp_path):
    for k in range(40):
        picture(tmp_path / "images" / f"{k}.png")
    text(tmp_path / "tags.json", "{" + ", ".join(f'"{k}": ["cat"]' for k in range(40)) + "}")
    names = {
        s: {r.name for r in custom_split(tmp_path, s, tags="tags.json", val_fraction=0.3).records}
        for s in ("train", "val", "all")
    }
    assert not names["train"] & names["val"] and names["train"] | names["val"] == names["all"]
    assert 4 <= len(names["val"]) <= 20
    (tmp_path / "images" / "0.png").unlink()
    fewer = custom_split(tmp_path, "val", tags=None, class_names=["cat"], val_fraction=0.3)
    assert {r.name for r in fewer.records} == names["val"] - {"0"}


def test_images_of_a_group_are_in_one_split(tmp_path):
    for k in range(60):
        picture(tmp_path / "images" / f"{k // 6}_{k}.png")
    options = {"tags": None, "class_names": ["cat"], "val_fraction": 0.4, "group": "[^_]+"}
    train, val = (
        {r.name.partition("_")[0] for r in custom_split(tmp_path, split, **options).records}
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_custom_lists(own):
    text(own / "lists" / "train.txt", "my dog.bmp\ndeep/c\n")
    assert [r.name for r in custom_split(own, "train", lists="lists").records] == ["my dog", "deep/c"]
    text(own / "lists" / "val.txt", "a\nnone\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images \(none\) named in .*val\.txt are missing"):
        custom_split(own, "val", lists="lists")
    text(own / "infer.txt", "b\n")
    assert custom_split(own, str(own / "infer.txt"), masks="masks").records[0].mask is None


def test_custom_images_without_tags(own):
    text(own / "tags.csv", "a,zebra;cat\nc,cat;\nmy dog,zebra;\n")
    with pytest.raises(ValueError, match=r"1 of 4 images \(b\)"):
        custom_split(own, "all")
    assert custom_split(own, "all", untagged="no_object").records[1].tags == ()
    assert custom_split(own, "all", untagged="unknown").records[1].tags is None
    assert len(custom_split(own, "all", untagged="leave_out")) == 3


@pytest.mark.parametrize(
    ("tags", "error", "term"),
    [
        ("a,cat\nb,\nc,\nmy dog,\nlost,cat\n", FileNotFoundError, r"1 of 5 images \(lost\)"),
        ("c,cat\ndeep/c,cat\n", ValueError, "'deep/c' appears twice"),
        ("a,cat\nb,Background\nc,\nmy dog,\n", ValueError, "line 2, column 2"),
        ("a,\n", ValueError, "has a tag"),
    ],
)
def test_custom_tags_that_do_not_fit_are_named(own, tags, error, term):
    text(own / "tags.csv", tags)
    with pytest.raises(error, match=term):
        custom_split(own, "all")


def test_a_list_never_means_another_photo_of_the_same_name(own, voc):
    picture(own / "elsewhere" / "a.jpg")
    for word in (str(own / "elsewhere" / "a.jpg"), "/elsewhere/a.jpg", "elsewhere/a.jpg"):
        text(own / "mine.txt", f"{word}\n")
        for split in (custom_split, voc_split):
            with pytest.raises((ValueError, FileNotFoundError), match="mine|elsewhere"):
                split(own, str(own / "mine.txt"))
    text(voc / "mine.txt", f"/JPEGImages/a.jpg\n{voc}/JPEGImages/b.jpg\n")
    assert [record.name for record in voc_split(voc, str(voc / "mine.txt")).records] == ["a", "b"]


def test_pictures_of_a_folder_are_used_or_counted_and_named(tmp_path, caplog):
    used = ["a.jpg", "b.jfif", "c.JPE", "d.avif", "deep/e.webp", "linked/f.png"]
    picture_bytes = io.BytesIO()
    Image.new("RGB", (4, 3)).save(picture_bytes, "JPEG")
    for name in (*used[:-1], "../store/f.png", ".ipynb_checkpoints/a-checkpoint.jpg", "g.heic", "notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes.getvalue())
    (tmp_path / "images/linked").symlink_to(tmp_path / "store")
    (tmp_path / "images/deep/loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = [path.relative_to(tmp_path / "images").as_posix() for path in picture_files(tmp_path / "images")]
    assert sorted(found) == sorted(used)
    assert "skipped 3 of 9 pictures" in caplog.text
    for name in (".ipynb_checkpoints", "g.heic", "gone.jpg"):
        assert name in caplog.text
    assert len(picture_files(tmp_path / "images", subfolders=False)) == 4
    assert "skipped 5 of 9 pictures" in caplog.text


def test_accents_of_file_names_have_one_spelling(tmp_path):
    """Apple writes an accent as a character of its own; tags, lists and masks may or may not."""
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    picture(tmp_path / "images" / f"{decomposed}.png")
    text(tmp_path / "tags.csv", f"{composed}.png,cat;\n")
    record = custom_split(tmp_path, "all", masks="masks").records[0]
    assert (record.name, record.tags) == (composed, (1,))
    assert record.mask == tmp_path / "masks" / f"{decomposed}.png"


def test_data_configs_set_the_same_options_and_their_sources_take_them():
    """A config that builds on one data set's file and then on another's keeps keys of the first."""
    for name in ("voc", "coco", "custom"):
        data = load_config(f"datasets/{name}.yaml").data
        assert set(data.options) == {"lists", "images", "masks", "tags", "class_names"}
        assert set(data.options) <= set(inspect.signature(import_target(data.source)).parameters)


def test_documented_overrides_reach_the_source(tmp_path):
    name = "COCO_train2014_000000000009"
    picture(tmp_path / "train" / f"{name}.jpg")
    text(tmp_path / "ImageSets" / "train.txt", f"{name}\n")
    text(tmp_path / "tags.csv", f"{name},cat;\n")
    document = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    overrides = re.findall(r'"(data\.options\.\w+=\S*\{part\}\S*)"', document)
    assert len(overrides) == 2
    data = load_config("datasets/coco.yaml", [f"data.root={tmp_path}", *overrides]).data
    split = import_target(data.source)(data.root, "train", **data.options)
    assert split.records[0].mask == tmp_path / "train" / "000000000009.png"
    assert split.records[0].image == tmp_path / "train" / f"{name}.jpg"
