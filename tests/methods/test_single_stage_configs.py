"""Configs of 1-stage-wseg and WS-FCN: each builds its method, those of the papers hold their values."""

from typing import NamedTuple

import pytest
import torch

from engine.config.load import CONFIGS, load_config, to_plain
from utils.build import build

FILES = sorted(f"{p.parent.name}/{p.name}" for d in ("one_stage", "ws_fcn") for p in (CONFIGS / d).glob("*"))
IMAGES = {"voc": 10582, "coco": 82081}


class Paper(NamedTuple):
    """A row of the published values; epochs are those that are trained, not the number of the last one."""

    epochs: int
    mask_epochs: int | None  # epochs before the mask loss; None: no such loss
    backbone: str = "resnet38d"
    lr: float = 0.001
    crop: int = 321
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    canvas: int = 1024
    class_threshold: float = 0.1
    background: tuple[str, float] = ("power", 3.0)
    lr_scales: tuple[float, ...] = (1.0, 2.0, 10.0, 20.0)  # backbone weights and biases, new ones
    coco_values: bool = False


SMALL_CANVAS = dict(crop=448, scales=(1.0, 0.75, 1.25, 1.5), canvas=768, class_threshold=0.3)
CONSTANT = ("score", 0.25)
PAPERS = {
    "one_stage/baseline_voc.yaml": Paper(7, None, background=("power", 1.0)),
    "one_stage/voc.yaml": Paper(25, 5),
    "one_stage/voc_resnet50.yaml": Paper(
        21, 5, "resnet50", 0.0005, lr_scales=(1.0, 1.0, 10.0, 10.0), **SMALL_CANVAS
    ),
    "one_stage/voc_resnet101.yaml": Paper(
        21, 5, "resnet101", lr_scales=(1.0, 1.0, 10.0, 10.0), **SMALL_CANVAS
    ),
    "one_stage/voc_vgg16.yaml": Paper(33, 5, "vgg16d", background=("power", 1.0), **SMALL_CANVAS),
    "one_stage/coco.yaml": Paper(25, 5, canvas=1304, coco_values=True),
    "ws_fcn/voc.yaml": Paper(31, 7, background=CONSTANT, lr_scales=(1.0, 2.0, 20.0, 40.0)),
    "ws_fcn/voc_resnet50.yaml": Paper(
        31, 7, "resnet50", 0.0005, background=CONSTANT, lr_scales=(1.0, 1.0, 20.0, 10.0), **SMALL_CANVAS
    ),
    "ws_fcn/voc_vgg16.yaml": Paper(
        31, 7, "vgg16d", background=CONSTANT, lr_scales=(1.0, 2.0, 20.0, 40.0), **SMALL_CANVAS
    ),
    "ws_fcn/coco.yaml": Paper(
        31, 7, canvas=1304, background=CONSTANT, lr_scales=(1.0, 2.0, 20.0, 40.0), coco_values=True
    ),
}


def method_of(cfg, num_classes=21):
    """The method without memory for its weights and without pretrained ones."""
    spec = to_plain(cfg.method)
    backbone = {k: v for k, v in spec["backbone"].items() if v is not None and k != "pretrained"}
    with torch.device("meta"):
        return build(spec | {"backbone": backbone}, num_classes=num_classes)


def test_every_config_of_a_paper_is_compared():
    """The others are for small or own data and shorter."""
    others = ("/custom.yaml", "/demo.yaml")
    assert {file for file in FILES if not file.endswith(others)} == set(PAPERS)


@pytest.mark.parametrize("file", FILES)
def test_config_builds_its_method(file):
    cfg = load_config(file)
    method = method_of(cfg)
    assert method.loss_weight("cls", 0) == 1.0
    if "mask" in method.loss_weights:
        assert method.loss_weight("mask", 0) == 0.0 and method.loss_weight("mask", cfg.train.steps - 1) == 1.0


@pytest.mark.parametrize("file", PAPERS)
def test_config_holds_the_published_values(file):
    cfg, paper = load_config(file), PAPERS[file]
    epoch = IMAGES[cfg.data.name] // cfg.train.batch_size  # the last images of an epoch are left out
    assert cfg.train.batch_size == 16 and cfg.train.steps == paper.epochs * epoch
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.momentum) == ("sgd", paper.lr, 0.9)
    assert (cfg.optim.weight_decay, cfg.optim.power, cfg.optim.warmup_steps) == (5e-4, 0, 0)
    assert cfg.data.crop_size == cfg.eval.size == paper.crop and list(cfg.data.scale_range) == [0.9, 1.0]
    assert list(cfg.infer.scales) == list(paper.scales) and cfg.infer.pad_to == paper.canvas
    assert cfg.infer.flip and not cfg.infer.tags and cfg.method.backbone.name == paper.backbone
    assert (cfg.method.backbone.get("conv4_stride") == 2) == (file == "ws_fcn/voc_vgg16.yaml")

    method = method_of(cfg)
    assert method.class_threshold == paper.class_threshold
    assert (method.background_rule, method.background_value) == paper.background
    assert tuple(method.lr_scales.values()) == paper.lr_scales
    if paper.mask_epochs is None:
        assert set(method.loss_weights) == {"cls"} and method.background_score == 0.1
        return
    switch = paper.mask_epochs * epoch
    assert [method.loss_weight("mask", step) for step in (switch - 1, switch)] == [0.0, 1.0]
    # Validations come every other epoch, as the authors', and each leaves a checkpoint to choose from.
    assert cfg.train.eval_every == cfg.train.keep_every == 2 * epoch
    rules = method.focal_floor, method.background_share, method.confidence_floor, method.refiner.iterations
    assert rules == ((0.1, 0.8, 0.1, 5) if paper.coco_values else (0.01, 0.7, 0.2, 10))
    assert (method.focal_power, method.foreground_share, method.gate.psi) == (3.0, 0.6, 0.3)
