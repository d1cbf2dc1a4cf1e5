"""One run of tools/check_data.py names everything that is wrong with a data set."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets.tags import write_tags
from tools.check_data import Options, main, run
from utils.image import write_mask


def photo(folder, name, k, suffix=".png"):
    noise = np.random.RandomState(k).randint(0, 256, (8, 10, 3)).astype(np.uint8)
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(noise).save(folder / "images" / f"{name}{suffix}")


def checked(folder, *overrides):
    return run(Options(overrides=[f"data={folder}", *overrides], num_workers=0, json=True))


def texts(report, level):
    return "\n".join(
        " ".join([f["split"], f["text"], *f["entries"]]) for f in report["findings"] if f["level"] == level
    )


@pytest.fixture
def data(tmp_path):
    tags = {f"p{k}": ["person", "cat"] if k % 2 else ["person"] for k in range(8)}
    for k, name in enumerate(tags):
        photo(tmp_path, name, k)
        mask = np.zeros((8, 10), np.uint8)
        mask[2:5] = 1 if k % 2 else 2
        write_mask(tmp_path / "masks" / f"{name}.png", mask)
    write_tags(tmp_path / "tags.csv", tags)
    return tmp_path


def test_a_clean_set_has_no_error_and_its_statistics(data, capsys):
    with pytest.raises(SystemExit) as end:
        main(Options(overrides=[f"data={data}", "data.options.masks=masks"], json=True))
    report = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and not texts(report, "error")
    assert "all 8 images have the tag 'person'" in texts(report, "warning")
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in data.glob("images/*")])
    measured = report["measures"]["all"]
    np.testing.assert_allclose(
        [measured["mean"], measured["std"]], [pixels.mean(0), pixels.std(0)], atol=1e-3
    )
    assert measured["classes"] == {"cat": 4, "person": 8} and measured["masks"] == 8


def test_everything_is_found_at_once(data, capsys):
    tags = {f"p{k}": ["person"] if k % 2 else ["cat"] for k in range(7)} | {"gone": ["persn"]}
    write_tags(data / "tags.csv", tags)
    (data / "images" / "p0.png").write_bytes((data / "images" / "p0.png").read_bytes()[:90])
    (data / "images" / "p2.png").write_bytes((data / "images" / "p1.png").read_bytes())
    write_mask(data / "masks" / "p3.png", np.ones((4, 4)))
    write_mask(data / "masks" / "p4.png", np.full((8, 10), 77))
    (data / "masks" / "p5.png").unlink()
    with pytest.raises(SystemExit) as end:
        main(Options(overrides=[f"data={data}", "data.options.masks=masks"], json=True))
    report = json.loads(capsys.readouterr().out)
    errors, warnings = texts(report, "error"), texts(report, "warning")
    assert end.value.code == 1
    for term in ("p0.png", "(gone)", "(p7)", "p3.png is (4, 4)", "p4.png has the value 77", "p5.png"):
        assert term in errors, term
    assert "p1 = p2" in warnings and "'persn' (0 images) and 'person' (3)" in warnings


def test_masks_of_another_order_and_overlapping_lists(data):
    (data / "lists").mkdir()
    (data / "lists" / "train.txt").write_text("".join(f"p{k}\n" for k in range(6)))
    (data / "lists" / "val.txt").write_text("p5\np6\np7\n")
    for k in range(8):
        write_mask(data / "masks" / f"p{k}.png", np.full((8, 10), 1))
    write_tags(data / "tags.csv", {f"p{k}": ["person"] if k else ["cat", "person"] for k in range(8)})
    given = ["masks=masks", "lists=lists"]
    report = checked(
        data, *(f"data.options.{option}" for option in given), "data.train_set=train", "data.val_set=val"
    )
    assert "masks of split 'train' and tags disagree" in texts(report, "error")
    assert "in 'train' too: 1 p5" in texts(report, "error")


def test_masks_that_contradict_the_tags_of_single_images_are_named(data):
    """As are masks of 0 and 255 on tagged images."""
    for k in range(0, 8, 2):
        write_mask(data / "masks" / f"p{k}.png", np.full((8, 10), 255 if k == 4 else k == 2))
    warnings = texts(checked(data, "data.options.masks=masks"), "warning")
    assert "show a class without its tag: 1 p2: cat" in warnings
    assert "show no class: 3 p0: person p4: person p6: person" in warnings
    assert "lack a tagged class: 5 p1: person p2: person p3: person" in warnings


def test_deep_pictures_are_measured(data):
    for k in range(8):
        (data / "images" / f"p{k}.png").unlink()
        values = np.random.RandomState(k).randint(100, 4000, (8, 10, 6)).astype(np.uint16)
        tifffile.imwrite(
            data / "images" / f"p{k}.tif", values, photometric="minisblack", planarconfig="contig"
        )
    report = checked(data)
    assert "6 bands" in texts(report, "error")
    low, high = report["measures"]["all"]["value_range"]
    assert 100 <= low < 200 and 3900 < high < 4000
    report = checked(data, "data.bands=[4,3,2]", f"data.value_range=[{low},{high}]")
    assert not texts(report, "error") and report["measures"]["all"]["kinds"] == {"TIFF 6 x uint16": 8}
    assert np.abs(np.subtract(report["measures"]["all"]["mean"], 127)).max() < 12
