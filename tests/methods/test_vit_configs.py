"""Configs of ToCo, SeCo and MCC for VOC and COCO hold the papers' values."""

import pytest
from omegaconf import OmegaConf

from engine.config.load import load_config, to_plain

COMMON = {
    "data.crop_size": 448,
    "data.scale_range": [0.5, 2.0],
    "optim.name": "adamw",
    "optim.lr": 6e-5,
    "optim.weight_decay": 0.01,
    "optim.warmup_steps": 1500,
    "optim.power": 0.9,
    "method.low_threshold": 0.25,
    "method.loss_weights.cls": 1.0,
    "method.loss_weights.cls_aux": 1.0,
}
VOC = COMMON | {
    "train.steps": 20000,
    "train.batch_size": 4,
    "method.high_threshold": 0.7,
    "method.background_threshold": 0.5,
    "method.backbone.aux_layer": -3,
    "method.label_source": "cam",
    "infer.flip": True,
}
COCO = COMMON | {
    "train.steps": 80000,
    "train.batch_size": 8,
    "method.high_threshold": 0.65,
    "method.background_threshold": 0.45,
}


def from_step(step, value, before=0.0):
    return [[0, before], [step, value]]


TOCO = {
    "method.cam_scales": [1.0, 0.5, 1.5],
    "method.num_local_crops": 8,
    "method.local_crop_size": 96,
    "method.momentum": 0.9,
}
SECO = {
    "method.backbone.name": "vit_base_patch16_224",
    "method.backbone.aux_layer": -3,
    "method.num_local_crops": 10,
    "method.local_crop_size": 64,
    "method.tag_threshold": 0.2,
    "method.follow": "program",
    "method.revise_ratio": 10.0,
    "method.queue_size": 4608,
    "method.momentum": 0.999,
    "method.temperature_lil": 0.08,
    "method.temperature_lig": 0.1,
}
MCC = {
    "method.backbone.name": "deit_base_patch16_224",
    "method.cam_scales": [1.0, 0.5, 1.5],
    "method.num_masks": 8,
    "method.mask_rate": 0.95,
    "method.mask_scale": 4,
    "method.temperature": 0.5,
    "method.momentum": 0.9,
    "method.loss_weights.aff": 0.2,
    "method.loss_weights.mcc": 0.5,
}
PAPERS = {
    "toco/voc.yaml": VOC
    | TOCO
    | {
        "method.temperature": 0.5,
        "method.loss_weights.ptc": 0.2,
        "method.loss_weights.ctc": 0.5,
        "method.loss_weights.seg": from_step(2001, 0.1),
        "method.loss_weights.reg": from_step(2001, 0.05),
        "infer.size": "native",
    },
    "toco/coco.yaml": COCO
    | TOCO
    | {
        "method.backbone.aux_layer": 9,
        "method.temperature": 1.0,
        "method.label_source": from_step(12001, "cam", "aux_cam"),
        "method.loss_weights.ptc": from_step(12001, 0.2),
        "method.loss_weights.ctc": from_step(12001, 0.5),
        "method.loss_weights.seg": from_step(8001, 0.1),
        "method.loss_weights.reg": from_step(8001, 0.05),
        "infer.size": 448,
    },
    "seco/voc.yaml": VOC
    | SECO
    | {
        "method.cam_scales": [1.0, 0.5, 0.75, 1.5],
        "method.tag_source": from_step(10000, "cam", "aux_cam"),
        "method.prototype_from_step": 600,
        "method.prototype_momentum": 0.9,
        "method.loss_weights.ptc": 0.3,
        "method.loss_weights.lil": from_step(1001, 0.5),
        "method.loss_weights.lig": from_step(1001, 0.5),
        "method.loss_weights.seg": from_step(2001, 0.12),
        "method.loss_weights.reg": from_step(2001, 0.05),
        "infer.size": 448,
    },
    "seco/coco.yaml": COCO
    | SECO
    | {
        "method.cam_scales": [1.0, 0.5, 0.75, 1.25, 1.5],
        "method.label_source": from_step(12000, "cam", "aux_cam"),
        "method.tag_source": from_step(50000, "cam", "aux_cam"),
        "method.prototype_from_step": 6000,
        "method.prototype_momentum": 0.99,
        "method.loss_weights.ptc": from_step(8001, 0.2),
        "method.loss_weights.lil": from_step(12001, 0.3),
        "method.loss_weights.lig": from_step(12001, 0.5),
        "method.loss_weights.seg": from_step(16001, 0.12),
        "method.loss_weights.reg": from_step(16001, 0.05),
        "infer.size": "native",
    },
    "mcc/voc.yaml": VOC
    | MCC
    | {
        "method.flag_source": from_step(12001, "cam", "aux_cam"),
        "method.loss_weights.seg": from_step(2001, 0.1),
        "method.loss_weights.reg": from_step(2001, 0.05),
        "infer.size": "native",
    },
    "mcc/coco.yaml": COCO
    | MCC
    | {
        "method.backbone.aux_layer": 9,
        "method.label_source": from_step(12001, "cam", "aux_cam"),
        "method.flag_source": "aux_cam",
        "method.loss_weights.seg": from_step(8001, 0.1),
        "method.loss_weights.reg": from_step(8001, 0.05),
        "infer.size": 448,
    },
}


@pytest.mark.parametrize("file", PAPERS)
def test_config_holds_the_published_values(file):
    cfg = OmegaConf.create(to_plain(load_config(file)))
    found = {key: OmegaConf.select(cfg, key) for key in PAPERS[file]}
    assert {
        k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in found.items()
    } == PAPERS[file]
