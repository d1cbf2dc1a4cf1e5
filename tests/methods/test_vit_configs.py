"""Configs of ToCo, SeCo and MCC for VOC and COCO hold the papers' values."""

import pytest
import yaml
from omegaconf import OmegaConf

from engine.config.load import load_config, to_plain

PAPERS = yaml.safe_load("""
common: &common
  data: {crop_size: 448, scale_range: [0.5, 2.0]}
  optim: {name: adamw, lr: 6.0e-5, weight_decay: 0.01, warmup_steps: 1500, power: 0.9}
voc: &voc {<<: *common, train: {steps: 20000, batch_size: 4}}
coco: &coco {<<: *common, train: {steps: 80000, batch_size: 8}}
method: &method {low_threshold: 0.25}
voc_method: &voc_method {<<: *method, high_threshold: 0.7, background_threshold: 0.5, label_source: cam}
coco_method: &coco_method {<<: *method, high_threshold: 0.65, background_threshold: 0.45}
toco: &toco {cam_scales: [1.0, 0.5, 1.5], num_local_crops: 8, local_crop_size: 96, momentum: 0.9}
seco: &seco
  {num_local_crops: 10, local_crop_size: 64, tag_threshold: 0.2, follow: program, revise_ratio: 10.0,
   queue_size: 4608, momentum: 0.999, temperature_lil: 0.08, temperature_lig: 0.1}
mcc: &mcc
  {cam_scales: [1.0, 0.5, 1.5], num_masks: 8, mask_rate: 0.95, mask_scale: 4, temperature: 0.5, momentum: 0.9}
classes: &classes {cls: 1.0, cls_aux: 1.0}

toco/voc.yaml:
  <<: *voc
  infer: {size: native, flip: true}
  method:
    <<: [*voc_method, *toco]
    temperature: 0.5
    backbone: {aux_layer: -3}
    loss_weights:
      {<<: *classes, ptc: 0.2, ctc: 0.5, seg: [[0, 0.0], [2001, 0.1]], reg: [[0, 0.0], [2001, 0.05]]}
toco/coco.yaml:
  <<: *coco
  infer: {size: 448}
  method:
    <<: [*coco_method, *toco]
    temperature: 1.0
    backbone: {aux_layer: 9}
    label_source: [[0, aux_cam], [12001, cam]]
    loss_weights:
      {<<: *classes, ptc: [[0, 0.0], [12001, 0.2]], ctc: [[0, 0.0], [12001, 0.5]],
       seg: [[0, 0.0], [8001, 0.1]], reg: [[0, 0.0], [8001, 0.05]]}
seco/voc.yaml:
  <<: *voc
  infer: {size: 448, flip: true}
  method:
    <<: [*voc_method, *seco]
    backbone: {name: vit_base_patch16_224, aux_layer: -3}
    cam_scales: [1.0, 0.5, 0.75, 1.5]
    tag_source: [[0, aux_cam], [10000, cam]]
    prototype_from_step: 600
    prototype_momentum: 0.9
    loss_weights:
      {<<: *classes, ptc: 0.3, lil: [[0, 0.0], [1001, 0.5]], lig: [[0, 0.0], [1001, 0.5]],
       seg: [[0, 0.0], [2001, 0.12]], reg: [[0, 0.0], [2001, 0.05]]}
seco/coco.yaml:
  <<: *coco
  infer: {size: native}
  method:
    <<: [*coco_method, *seco]
    backbone: {name: vit_base_patch16_224, aux_layer: -3}
    cam_scales: [1.0, 0.5, 0.75, 1.25, 1.5]
    label_source: [[0, aux_cam], [12000, cam]]
    tag_source: [[0, aux_cam], [50000, cam]]
    prototype_from_step: 6000
    prototype_momentum: 0.99
    loss_weights:
      {<<: *classes, ptc: [[0, 0.0], [8001, 0.2]], lil: [[0, 0.0], [12001, 0.3]],
       lig: [[0, 0.0], [12001, 0.5]], seg: [[0, 0.0], [16001, 0.12]], reg: [[0, 0.0], [16001, 0.05]]}
mcc/voc.yaml:
  <<: *voc
  infer: {size: native, flip: true}
  method:
    <<: [*voc_method, *mcc]
    backbone: {name: deit_base_patch16_224, aux_layer: -3}
    flag_source: [[0, aux_cam], [12001, cam]]
    loss_weights:
      {<<: *classes, aff: 0.2, mcc: 0.5, seg: [[0, 0.0], [2001, 0.1]], reg: [[0, 0.0], [2001, 0.05]]}
mcc/coco.yaml:
  <<: *coco
  infer: {size: 448}
  method:
    <<: [*coco_method, *mcc]
    backbone: {name: deit_base_patch16_224, aux_layer: 9}
    label_source: [[0, aux_cam], [12001, cam]]
    flag_source: aux_cam
    loss_weights:
      {<<: *classes, aff: 0.2, mcc: 0.5, seg: [[0, 0.0], [8001, 0.1]], reg: [[0, 0.0], [8001, 0.05]]}
""")


@pytest.mark.parametrize("file", [name for name in PAPERS if name.endswith(".yaml")])
def test_config_holds_the_published_values(file):
    cfg = to_plain(load_config(file))
    assert OmegaConf.merge(cfg, PAPERS[file]) == cfg
