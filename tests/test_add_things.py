"""The files of docs/add_things.md work as the page shows them."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.config.load import load_config, load_stages
from engine.config.options import fill
from engine.data import load_split
from engine.method import build_method
from engine.scores.base import ImagePrediction
from models.refiners.base import create_refiner, refiner_options
from utils.image import write_mask

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add_things.md"
FILES = dict(re.findall(r"`([\w/.]+)`:\n\n```(?:python|yaml)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Folder with the page's files, which the packages of the project then hold too."""
    for name, text in FILES.items():
        path = tmp_path / name.replace("configs/mine/", "configs/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".py":
            package = importlib.import_module(".".join(Path(name).parent.parts))
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    return tmp_path


def config(added, name):
    return load_config(added / "configs" / f"{name}.yaml")


def test_backbone(added):
    method = build_method(config(added, "backbone"), 4)
    assert method.network(torch.randn(2, 3, 96, 80)).tokens.patch_tokens.shape == (2, 64, 12, 10)


def test_refiner(added):
    cfg = config(added, "refiner")
    assert build_method(cfg, 4).refiner.size == 7
    refiner = create_refiner(**refiner_options(cfg.infer.refiner, "dense_crf"))
    assert torch.equal(
        refiner.refine(torch.zeros(1, 3, 8, 9), torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 8, 9)
    )


def test_loss(added):
    assert config(added, "loss").method.loss_weights.ent
    loss = importlib.import_module("losses.entropy").entropy_loss
    assert loss(torch.zeros(1, 5, 2, 2)).item() == pytest.approx(math.log(5))


def test_score(added):
    assert "image_iou" in config(added, "score").eval.scores
    score = importlib.import_module("engine.scores.image_iou").ImageIou(("background", "dog", "sofa"))
    mask = torch.tensor([[0, 1], [1, 255]])
    score.update({"mask": mask}, ImagePrediction({"seg": torch.tensor([[0, 1], [0, 2]])}))
    torch.testing.assert_close(
        score.compute()["seg"].per_class["image_iou"].float(),
        torch.tensor([0.5, 0.5, torch.nan]),
        equal_nan=True,
    )


def test_data_format(added):
    for name in ("cat", "dog"):
        (added / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(added / "pets" / name / "a.jpg")
    data = {**config(added, "data").data, "root": str(added / "pets")}
    assert [record.tags for record in load_split(data, "all").records] == [(1,), (2,)]


def test_tool_and_stage(added):
    stage = load_stages(added / "configs" / "stage.yaml")[-1]
    tool = importlib.import_module(stage.run)
    (added / "labels").mkdir()
    write_mask(added / "labels" / "a.png", torch.tensor([[0, 1], [1, 1]]).byte().numpy())
    tool.run(fill(tool.Options, {**stage.options, "labels": added / "labels", "out": added / "out"}))
    assert (added / "out" / "areas.csv").read_text().splitlines()[1:] == ["a,0,0.2500", "a,1,0.7500"]
