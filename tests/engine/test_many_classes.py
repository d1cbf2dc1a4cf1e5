"""More than 254 classes: 255 stays the value of ignored pixels, so no class has it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.lists import HOLE
from engine.config.load import load_config
from engine.scores.base import confusion_matrix
from engine.scores.records import read_scores
from engine.seen import encoded, overlays, photo
from engine.train import run as train
from methods.base import Prediction
from tests.stages import call
from tests.trainings import SMALL
from tools import evaluate, infer_seg, predict
from utils.drawing import label_overlay
from utils.image import read_mask

LETTERS = "abcdefghijklmnopqr"
WORDS = [f"{a}{b}{a}{b}" for a in LETTERS for b in LETTERS][:300]
PAIRS = [(1, 254), (256, 301), (2, 300), (100, 257)]  # mask values of the classes of each image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four photos of two classes each; all masks have ignored pixels, that of the first one in 8 bits."""
    root = tmp_path_factory.mktemp("many")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    (root / "class_names.txt").write_text("\n".join(WORDS))
    lines = ["name,tags"]
    for k, pair in enumerate(PAIRS):
        mask = np.zeros((48, 48), np.uint8 if k == 0 else np.uint16)
        mask[5:20, 5:20], mask[25:40, 25:40], mask[:3] = *pair, 255
        Image.fromarray(mask).save(root / "masks" / f"{k}.png")
        Image.effect_noise((48, 48), 80).convert("RGB").save(root / "images" / f"{k}.png")
        lines.append(f"{k}.png,{';'.join(WORDS[v - 1 - (v > 255)] for v in pair)}")
    (root / "tags.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of two steps with validations."""
    folder = tmp_path_factory.mktemp("run")
    given = [
        *SMALL, f"work_dir={folder}", f"data.root={data}", "data.val_set=all", "device=cpu",
        "data.options.class_names=class_names.txt", "data.options.masks=masks", "infer.scales=[1.0]",
        "method.backbone={name: vit_demo, width: 32, depth: 4, heads: 2, pretrained: null}",
        "method.loss_weights.seg=1.0", "method.local_crop_size=16",
    ]  # fmt: skip
    return train(load_config("configs/toco/custom.yaml", given))


def test_labels_and_scores_leave_class_255_out(run, data, tmp_path):
    checkpoint = {"model_path": run / "last.pth"}
    options = {**checkpoint, "device": "cpu", "num_workers": 0, "infer": "all"}
    out = call(infer_seg, {**options, "out": tmp_path, "overrides": ["infer.tags=true"]})
    for k, pair in enumerate(PAIRS):
        label = read_mask(out / f"{k}.png")
        assert set(np.unique(label)) <= {0, *pair}
        with Image.open(out / f"{k}.png") as image:
            assert image.mode == ("I;16" if label.max() > 255 else "P")
    call(evaluate, {**checkpoint, "labels": data / "masks", "split": "all", "ignored": "skip", "out": run})
    score = read_scores(run)[-1]["score"]
    assert score["miou"] == 1 and score["miou_classes"] == 9
    assert len(score["per_class"]) == 301 and HOLE not in score["per_class"]
    page = (run / "report.html").read_text().split('id="data">')[1].split("</script>")[0]
    for matrix in json.loads(page)["matrices"]:
        assert HOLE not in matrix["names"] and len(matrix["names"]) == len(matrix["rows"]) > 299


def test_photos_show_no_class_255(run, data, tmp_path):
    options = {"photos": [str(data / "images" / "1.png")], "model_path": run / "last.pth", "device": "cpu"}
    about = json.loads((call(predict, {**options, "out": tmp_path}) / "1.json").read_text())
    assert about["class_names"][255] == HOLE and set(about["score"]) == set(WORDS)
    with pytest.raises(ValueError, match="not a class"):
        call(predict, {**options, "out": tmp_path, "tags": HOLE})


def test_the_strongest_of_all_logits_is_no_class_if_it_is_that_of_255():
    class_logits, seg_logits = torch.zeros(2, 301), torch.zeros(2, 302, 3, 4)
    class_logits[:, 254], seg_logits[:, 255], seg_logits[:, 301] = 9, 9, 1
    out = Prediction(None, None, class_logits, seg_logits)
    assert not (out.class_logits > 0).any() and (out.seg_logits.argmax(1) == 301).all()
    class_logits, seg_logits = torch.ones(2, 254), torch.ones(2, 255, 3, 4)
    out = Prediction(None, None, class_logits, seg_logits)
    assert out.class_logits is class_logits and out.seg_logits is seg_logits


def test_bytes_and_wide_values_are_counted_alike():
    ids = torch.tensor([0, 1, 255, 256, 301])
    mask, label = torch.meshgrid(ids, ids[ids != 255], indexing="ij")
    matrix = confusion_matrix(mask, label, 302)
    assert matrix.sum() == 16 and matrix[255].sum() == matrix[:, 255].sum() == 0
    assert (matrix[ids][:, ids] == torch.outer(ids != 255, ids != 255)).all()


def test_maps_of_reports_hold_wide_values():
    label = torch.tensor([[0, 1, 255], [256, 300, 65535]])
    image = torch.zeros(3, 2, 3, dtype=torch.uint8)
    content = {
        "names": ["a"],
        "samples": [{"name": "a", "image": photo(image), "maps": {"seg": encoded(label)}}],
    }
    ((_, picture),) = overlays(content)
    assert (picture[:, 3:] == label_overlay(picture[:, :3], label.numpy())).all()
