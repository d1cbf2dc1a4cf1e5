"""Segmentation of a data set from a checkpoint: label images, scores, repeated and shared-out runs."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import WeakSegDataset
from engine.config.load import load_config
from engine.config.options import parse
from engine.config.schema import Infer
from engine.data import load_split
from engine.inference import load_method
from engine.scores.base import confusion_matrix
from engine.scores.miou import Miou
from engine.scores.records import read_scores
from engine.segmentation import segment_scores, write_label
from engine.train import run as train
from engine.validation import validate
from tests.processes import TIMEOUT, in_a_group, launch, start
from tests.stages import call
from tools import infer_seg
from utils.image import read_image, read_mask, voc_palette

ROOT = Path(__file__).resolve().parents[2]


def infer(path, out, **options):
    cfg = {"model_path": str(path), "out": str(out), "device": "cpu", "num_workers": 0, **options}
    return call(infer_seg, cfg)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """The output folder of a plain run on the 6 test images."""
    return infer(checkpoint, tmp_path_factory.mktemp("plain"))


def test_label_images_are_palette_pictures_of_the_original_size(plain, demo_folder):
    names = (demo_folder / "ImageSets/Segmentation/test.txt").read_text().split()
    assert sorted(p.stem for p in plain.glob("*.png")) == sorted(names)
    for name in names:
        with Image.open(plain / f"{name}.png") as image:
            assert image.mode == "P" and image.getpalette()[: 3 * 256] == voc_palette()
            assert image.size == read_image(demo_folder / f"JPEGImages/{name}.jpg").size
            assert np.asarray(image).max() < 7


def test_score_is_that_of_the_written_labels_and_says_where_it_comes_from(plain, checkpoint, demo_folder):
    (record,) = read_scores(plain)
    matrix = torch.zeros(7, 7)
    for file in plain.glob("*.png"):
        truth = torch.from_numpy(read_mask(demo_folder / "SegmentationClass" / file.name))
        matrix += confusion_matrix(truth, torch.from_numpy(read_mask(file)), 7)
    assert record["protocol"] == "seg/test/ms+flip"
    assert record["score"]["miou"] == pytest.approx(Miou(range(7)).values(matrix).mean)
    assert record["settings"]["scales"] == [1.0, 0.75] and record["settings"]["size"] == "native"
    source = record["provenance"]
    assert source["step"] == 7 and source["seed"] == 0 and source["images"] == 6
    assert source["checkpoint"] == str(checkpoint)
    assert len(source["checkpoint_sha256"]) == 16 and len(source["data_fingerprint"]) == 12


def test_repeated_run_skips_finished_images_and_scores_them_all(plain, checkpoint, tmp_path, monkeypatch):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "scores.json").unlink()
    missing = min(tmp_path.glob("*.png"))
    missing.unlink()
    seen = []
    monkeypatch.setattr("engine.segmentation.segment_scores", lambda *a: seen.append(a) or segment_scores(*a))
    infer(checkpoint, tmp_path)
    assert len(seen) == 1 and missing.read_bytes() == (plain / missing.name).read_bytes()
    assert read_scores(tmp_path)[0]["score"] == read_scores(plain)[0]["score"]
    infer(checkpoint, tmp_path)
    assert len(read_scores(tmp_path)) == 1


def test_folder_of_other_settings_is_refused(plain, checkpoint):
    with pytest.raises(ValueError, match=r"other settings.*scales: \[1.0, 0.75\] -> \[0.5\]"):
        infer(checkpoint, plain, overrides=["infer.scales=[0.5]"])
    with pytest.raises(ValueError, match=r"settings\.json"):
        infer(checkpoint, plain.parent)  # a folder with images that no run made


def one_of_the_processes(_rank, *arguments):
    infer(*arguments)


def test_two_processes_give_the_same_labels_and_score(plain, checkpoint, tmp_path):
    in_a_group(one_of_the_processes, checkpoint, tmp_path / "out")
    for file in plain.glob("*.png"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    (record,) = read_scores(tmp_path / "out")
    assert record["score"] == read_scores(plain)[0]["score"] and record["provenance"]["processes"] == 2


def test_split_without_masks_is_segmented_and_not_scored(checkpoint, demo_folder, tmp_path, capsys):
    names = (demo_folder / "ImageSets/Segmentation/test.txt").read_text().split()
    (tmp_path / "mine.txt").write_text("\n".join(names[:2]))
    names_file, no_masks = str(tmp_path / "mine.txt"), ["data.options.masks=null"]
    out = infer(checkpoint, tmp_path / "out", infer=names_file, overrides=no_masks)
    assert len(list(out.glob("*.png"))) == 2 and not (out / "scores.json").exists()
    assert "nothing to score" in capsys.readouterr().out


def test_photo_and_folder_of_photos_need_no_data_set(checkpoint, tmp_path, caplog):
    (tmp_path / "photos/more").mkdir(parents=True)
    for name, size in (("a", (60, 40)), ("b", (33, 57)), ("more/c", (20, 20))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "photos" / f"{name}.jpg")
    out = infer(checkpoint, tmp_path / "one", infer=str(tmp_path / "photos" / "a.jpg"), max_side=30)
    assert read_mask(out / "a.png").shape == (40, 60)
    out = infer(checkpoint, tmp_path / "all", infer=str(tmp_path / "photos"))
    assert sorted(p.name for p in out.glob("*.png")) == ["a.png", "b.png"]
    assert "subfolder): more" in caplog.text
    with pytest.raises(FileNotFoundError, match="neither a photo"):
        infer(checkpoint, tmp_path / "all", infer=str(tmp_path / "fotos"))


def test_a_name_that_is_a_split_and_a_folder_is_asked_about(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "test/photo.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="write ./test for the folder"):
        infer(checkpoint, tmp_path / "out", infer="test")
    out = infer(checkpoint, tmp_path / "out", infer="./test")
    assert [file.stem for file in out.glob("*.png")] == ["photo"]


def test_crf_is_part_of_the_protocol_and_changes_labels(plain, checkpoint, tmp_path):
    out = infer(checkpoint, tmp_path / "crf", crf="toco", crf_workers=0)
    (record,) = read_scores(out)
    assert record["protocol"].startswith("seg/test/ms+flip+crf(")
    assert any(file.read_bytes() != (plain / file.name).read_bytes() for file in out.glob("*.png"))


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """The checkpoint of a WS-FCN run of three steps, the last two with the mask loss."""
    overrides = [
        f"data.root={demo_folder}", f"work_dir={tmp_path_factory.mktemp('ws_fcn')}", "data.num_workers=0",
        "data.crop_size=48", "eval.size=48", "train.steps=3", "train.batch_size=4", "device=cpu",
        "method.backbone.width=32", "method.backbone.depth=4", "method.backbone.heads=2", "method.width=16",
        "method.loss_weights.mask=[[0,0.0],[1,1.0]]", "method.class_threshold=0.3",
    ]  # fmt: skip
    return train(load_config("configs/ws_fcn/demo.yaml", overrides)) / "last.pth"


def test_inference_gives_the_score_of_the_validation(trained, tmp_path):
    loaded = load_method(trained, "cpu")
    dataset = WeakSegDataset(load_split(loaded.cfg.data, "test"), with_mask=True)
    found = validate(loaded.method, dataset, size=48, device="cpu", progress=False)
    expected = found.results["miou"]["seg"].mean
    overrides = ["infer.size=48", "infer.scales=[1.0]", "infer.flip=false"]
    out = infer(trained, tmp_path / "out", overrides=overrides)
    assert read_scores(out)[0]["score"]["miou"] == pytest.approx(expected, abs=2e-3)


def test_true_tags_restrict_the_labels_and_name_the_protocol(trained, tmp_path):
    overrides = ["infer.tags=true", "infer.scales=[1.0,0.5]"]
    out = infer(trained, tmp_path / "out", crf="ws_fcn", crf_workers=0, overrides=overrides)
    assert read_scores(out)[0]["protocol"] == "seg/test/ms+flip+tags+crf(ws_fcn)"
    for record in load_split(load_method(trained, "cpu").cfg.data, "test").records:
        assert set(np.unique(read_mask(out / f"{record.name}.png")).tolist()) <= {0, *record.tags}


@pytest.mark.parametrize(
    ("positions", "processes", "port", "device", "gpus"),
    [
        ([], 1, 29500, [], None),  # by the script for COCO, which calls the other one
        (["0"], 1, 29500, ["--device=cuda"], "0"),  # DEVICES alone, as in SeCo's script for VOC
        (["4", "29999"], 4, 29999, ["--device=cuda"], None),
        (["2", "29999", "4,6"], 2, 29999, ["--device=cuda"], "4,6"),
    ],
)
def test_positions_of_the_launcher(checkpoint, tmp_path, positions, processes, port, device, gpus):
    script = ROOT / f"run_evaluate_seg_{'voc' if positions else 'coco'}.sh"
    command = ["bash", str(script), "tools/infer_seg.py", *positions, str(checkpoint)]
    done, started = launch(command, tmp_path, cwd=tmp_path)
    assert started, done.stderr
    assert (started.flags["nproc_per_node"], started.flags["master_port"]) == (str(processes), str(port))
    assert Path(started.script) == ROOT / "tools" / "infer_seg.py" and started.gpus == gpus
    assert started.arguments == [*device, "--model_path", str(checkpoint)]


def test_flags_and_overrides_come_in_any_order():
    words = "data.root=/x --max_side 9 infer.flip=false --model_path m.pth --infer lr=1.jpg --crf"
    options = parse(infer_seg.Options, "", words.split())
    assert options.max_side == 9 and options.model_path == Path("m.pth")
    assert options.overrides == ["data.root=/x", "infer.flip=false"]
    assert options.infer == "lr=1.jpg" and options.crf == "config"
    with pytest.raises(KeyError, match="did you mean 'device'"):
        call(infer_seg, {"model_path": "m.pth", "devise": "cpu"})


@pytest.mark.parametrize(
    "infer, seen", [({}, (32, 21)), ({"pad_to": [40, 60], "scales": [1.0, 2.0]}, (20, 13))]
)
def test_large_photo_is_segmented_small(checkpoint, infer, seen, tmp_path):
    """At most 32 pixels long, and its largest scale fits on the canvas."""
    method, sizes = load_method(checkpoint, "cpu").method, []
    predict = method.predict
    method.predict = lambda image, scales: sizes.append(tuple(image.shape[2:])) or predict(image, scales)
    image_rgb = torch.zeros(3, 96, 64, dtype=torch.uint8)
    infer = Infer(**{"scales": [1.0], "flip": False} | infer)
    image, scores = segment_scores(method, image_rgb, infer, max_side=32)
    assert image.shape[2:] == scores.shape[2:] == seen and sizes[0] == tuple(infer.pad_to or seen)
    write_label(image, scores, None, (96, 64), tmp_path / "label.png")
    assert read_mask(tmp_path / "label.png").shape == (96, 64)


def from_the_command_line(arguments, errors):
    with errors.open("w") as sys.stderr:
        sys.argv = ["infer_seg.py", *arguments]
        infer_seg.main()


def test_a_broken_photo_spares_the_others(checkpoint, tmp_path):
    """Its loader's workers hear no stop signal, and must not keep the tool alive."""
    photos, out, errors = tmp_path / "photos", tmp_path / "out", tmp_path / "errors"
    photos.mkdir()
    (photos / "bad.jpg").write_bytes(b"no picture")
    Image.effect_noise((40, 32), 80).convert("RGB").save(photos / "good.jpg")
    words = ["--model_path", str(checkpoint), "--infer", str(photos), "--out", str(out), "--device", "cpu"]
    process = start(from_the_command_line, words, errors)
    process.join(TIMEOUT)
    assert process.exitcode == 2 and "1 of 2 images: cannot read image" in errors.read_text()
    assert "bad.jpg" in errors.read_text() and "RuntimeError" not in errors.read_text()
    written = (out / "good.png").stat().st_mtime_ns
    with pytest.raises(ValueError, match="1 of 2 images"):
        infer(checkpoint, out, infer=str(photos))
    (photos / "bad.jpg").unlink()
    infer(checkpoint, out, infer=str(photos))
    assert (out / "good.png").stat().st_mtime_ns == written
    for size in ((24, 20), (20, 24)):  # other photos of that name and of an older date, both of the same
        Image.effect_noise(size, 80).convert("RGB").save(photos / "good.jpg")
        os.utime(photos / "good.jpg", (1.6e9, 1.6e9))
        infer(checkpoint, out, infer=str(photos))
        assert read_mask(out / "good.png").shape == size[::-1]


def test_large_photos_are_stitched_from_tiles(checkpoint, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (48, 96, 3)).astype(np.uint8)
    for name, part in (("whole", pixels), ("left", pixels[:, :48]), ("right", pixels[:, 48:])):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(part).save(tmp_path / "photos" / f"{name}.png")
    overrides = ["data.tiles={side: 48, overlap: 0}"]
    out = infer(checkpoint, tmp_path / "out", infer=str(tmp_path / "photos"), overrides=overrides)
    whole, left, right = (read_mask(out / f"{name}.png") for name in ("whole", "left", "right"))
    assert (whole == np.hstack([left, right])).all()
