"""Photos to masks: the tool, and the function that torch.hub loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.options import parse
from engine.predictor import tag2mask
from tests.stages import call
from tools import infer_seg, predict
from utils.files import claim_folder
from utils.image import UnreadableImageError, read_mask
from utils.logging import LOGGER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path):
    """A folder with a good photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.effect_noise((40, 32), 80).convert("RGB").save(folder / "good.png")
    return folder


def run(checkpoint, photos, out, **options):
    return call(predict, {"photos": photos, "model_path": checkpoint, "out": out, "device": "cpu", **options})


def test_a_photo_gets_its_files_and_more_photos_join_them(checkpoint, photos, tmp_path):
    out = run(checkpoint, [str(photos / "good.png")], tmp_path / "out", tags="sheep;boat")
    about = json.loads((out / "good.json").read_text())
    mask = read_mask(out / "good.png")
    shares = {about["class_names"][k]: (mask == k).mean() for k in np.unique(mask)}
    assert about["area"] == pytest.approx(shares) and mask.shape == (32, 40) == tuple(about["size"])
    assert (
        set(about["score"]) == set(about["class_names"][1:])
        and len(about["model"]["checkpoint_sha256"]) == 16
    )
    assert Image.open(out / "overlay" / "good.jpg").width == 640
    before = (out / "good.json").stat().st_mtime_ns
    Image.new("RGB", (30, 30)).save(photos / "other.png")
    run(checkpoint, [str(photos / "o*.png")], out)
    assert {p.stem for p in out.glob("*.json")} == {"good", "other"}
    assert (out / "good.json").stat().st_mtime_ns == before


def test_what_cannot_be_read_is_named_and_the_others_are_done(checkpoint, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "dangling.jpg").symlink_to("nowhere.jpg")
    (photos / "link.png").symlink_to("good.png")
    with pytest.raises(UnreadableImageError, match=r"2 of 4.*broken\.jpg.*dangling\.jpg"):
        run(checkpoint, [str(photos), str(photos / "dangling.jpg")], tmp_path / "out")
    assert {p.stem for p in (tmp_path / "out").glob("*.json")} == {"good", "link"}


def test_names_are_paths_below_the_folder_as_in_training(checkpoint, photos, tmp_path, capsys, caplog):
    for folder in ("a", "b"):
        (photos / folder).mkdir()
        Image.new("RGB", (20, 20)).save(photos / folder / "1.png")
    Image.new("RGB", (20, 20)).save(photos / "new.png")  # the file of tags has no line for it
    tags = tmp_path / "tags.csv"
    tags.write_text("good.png,sheep\na/1.png,sheep\nb/1.png,crab\n")
    for given in (photos, photos / "**"):
        out = run(checkpoint, [str(given)], tmp_path / "out", tags=str(tags))
        made = {p.relative_to(out).as_posix(): json.loads(p.read_text())["tags"] for p in out.rglob("*.json")}
        known = {"good.json": ["sheep"], "a/1.json": ["sheep"], "b/1.json": ["crab"]}
        assert made == known | {"new.json": None} and "1 of 4 photos (new)" in caplog.text
    assert "4 earlier results are replaced" in capsys.readouterr().out


def test_no_other_file_is_replaced(checkpoint, photos, tmp_path):
    (photos / "sub").mkdir()
    Image.new("RGB", (20, 20)).save(photos / "sub" / "good.png")
    (tmp_path / "two").mkdir()
    for name in ("good.png", "good.webp"):
        Image.new("RGB", (20, 20)).save(tmp_path / "two" / name)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    files = [str(path) for path in photos.glob("*.png")]
    for given, out, reason in (
        ([str(photos)], photos, "among the photos"),
        (files, photos, "among the photos"),
        (files, photos / "sub", "not a result of"),
        ([str(tmp_path / "two" / "*")], tmp_path / "out", "would both be 'good'"),
        ([str(tmp_path / "two")], tmp_path / "out", "two files"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=reason):
            run(checkpoint, given, out)
    assert before == {path: path.read_bytes() for path in photos.rglob("*.*")}
    with pytest.raises(ValueError, match="another origin"):
        (photos / "good.png").rename(photos / "good.JPG")
        claim_folder(photos, {})


def test_the_decoder_labels_as_infer_seg_does(checkpoint, photos, tmp_path):
    options = {"model_path": checkpoint, "infer": str(photos), "out": tmp_path / "seg", "device": "cpu"}
    call(infer_seg, {**options, "num_workers": 0})
    out = run(checkpoint, [str(photos)], tmp_path / "out", label="seg")
    np.testing.assert_array_equal(read_mask(out / "good.png"), read_mask(tmp_path / "seg" / "good.png"))


def test_an_untrained_decoder_is_named_and_cams_are_used(checkpoint, photos, tmp_path, caplog):
    """The loss of the decoder has no weight before step 130, and the checkpoint is of step 7."""
    out = run(checkpoint, [str(photos)], tmp_path / "out", tags="sheep")
    assert "not trained" in caplog.text
    assert json.loads((out / "good.json").read_text())["protocol"].startswith("cam/")
    masks = tag2mask(checkpoint, label="seg").predict(photos / "good.png", ["sheep"])
    assert masks.protocol.startswith("seg/") and set(masks.area) <= {"background", "sheep"}


@pytest.mark.parametrize("crf", [False, True])
def test_labels_of_cams_are_those_of_the_tags(checkpoint, photos, crf):
    model = tag2mask(checkpoint, label="cam", crf=crf)
    masks = model.predict(photos / "good.png", ["sheep", "crab"])
    assert set(masks.cam) == {"sheep", "crab"} and set(masks.area) <= {"background", "sheep", "crab"}
    if not crf:
        largest = np.max(list(masks.cam.values()), axis=0)
        np.testing.assert_array_equal(masks.label == 0, largest <= model.method.background_threshold)
    assert set(model.predict(photos / "good.png", "sheep; crab").cam) == {"sheep", "crab"}
    for wrong, advice in (("sheeep", "did you mean 'sheep'"), ("sheep, crab", "separate tags by ';'")):
        with pytest.raises(ValueError, match=advice):
            model.predict(photos / "good.png", wrong)


def test_hub_takes_paths_pictures_and_arrays(checkpoint, photos):
    model = torch.hub.load(str(ROOT), "tag2mask", checkpoint, source="local", device="cpu")
    picture = Image.open(photos / "good.png")
    made = [model.predict(image) for image in (photos / "good.png", picture, np.asarray(picture))]
    assert all((masks.label == made[0].label).all() and masks.score == made[0].score for masks in made)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            model.predict(wrong)


def test_notebook_runs(checkpoint, photos, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "docs" / "use.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in cells)
    code = code.replace("logs/seco_custom/last.pth", str(checkpoint))
    values: dict = {}
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation, as of a phone held upright
    Image.open(photos / "good.png").save(photos / "turned.jpg", exif=turned)
    exec(code.replace("photo.jpg", str(photos / "turned.jpg")), values)
    assert values["masks"].label.shape == (40, 32) and list(values["masks"].cam) == values["tags"]


def test_json_is_all_that_is_printed(checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LOGGER, "handlers", [])  # a training in this process prints its log
    (tmp_path / "tags.csv").write_text("good,sheep;crab\n")
    run(checkpoint, [str(photos)], tmp_path / "out", tags=str(tmp_path / "tags.csv"), json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "out" / "good.json").read_text())
    assert json.loads(line)["tags"] == ["sheep", "crab"]


def test_photos_are_typed_before_and_after_flags():
    options = parse(predict.Options, "", ["a.jpg", "b c.png", "--model_path", "last.pth", "infer.flip=false"])
    assert options.photos == ["a.jpg", "b c.png"] and options.overrides == ["infer.flip=false"]
    assert parse(predict.Options, "", ["--model_path", "x", "--json", "a.jpg"]).photos == ["a.jpg"]
    with pytest.raises(ValueError, match="photos"):
        predict.run(predict.Options(photos=[], model_path=Path("last.pth")))
