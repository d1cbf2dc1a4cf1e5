"""A short training of every network in the demo configs."""

import torch
from omegaconf import OmegaConf

from engine.config.load import CONFIGS, TRAINING, load_config, load_stages
from utils.cam_files import ScoreFile, label_path, save_scores
from utils.image import read_mask
from utils.schedule import Schedule

SMALL = ["train.steps=2", "train.eval_every=2", "train.checkpoint_every=1", "train.batch_size=2"]
SMALL += ["train.precision=fp32", "data.num_workers=0", "data.crop_size=48", "data.scale_range=[0.9,1.0]"]
SMALL += ["train.keep_every=1", "optim.warmup_steps=0", "optim.eps=1e-4", "eval.size=48"]


def trainings():
    """One training of every method in the demo configs, by name of the method's file."""
    found = {}
    for file in sorted(CONFIGS.glob("*/demo.yaml")):
        if file.parent.name in ("datasets", "stages"):
            continue
        cfg = load_config(file)
        options = (
            [stage.options for stage in load_stages(file) if stage.run == TRAINING] if cfg.stages else [cfg]
        )
        for cfg in map(OmegaConf.create, options):
            found.setdefault(cfg.method.target.rpartition(".")[2], cfg)
    return found


TRAININGS = trainings()


def label_folder(cfg, folder, root):
    """What a method learns from where tags are not enough: the masks, or scores of them."""
    masks = root / "SegmentationClass"
    if cfg.method.target != "methods.affinitynet.AffinityNet":
        return masks
    for path in masks.glob("*.png"):
        mask = torch.from_numpy(read_mask(path))
        ids = mask.unique()[1:].long()
        scores = torch.stack([mask == k for k in (0, *ids)]).float().expand(2, -1, -1, -1)
        save_scores(label_path(folder, path.stem).with_suffix(".npz"), ScoreFile(ids, scores))
    return folder


def small_config(name, folder, root):
    """The demo's training with a narrow network, small images, and every loss on from the first step."""
    cfg = OmegaConf.merge(TRAININGS[name], OmegaConf.from_dotlist(SMALL))
    cfg.data.root, cfg.work_dir = str(root), str(folder / "run")
    cfg.run_name, cfg.stages = name, None
    cfg.method.backbone |= {"pretrained": None, "width": 32, "heads": 2, "image_size": 48}
    for key, weight in cfg.method.get("loss_weights", {}).items():
        plain = OmegaConf.to_object(weight) if OmegaConf.is_config(weight) else weight
        cfg.method.loss_weights[key] = Schedule(plain)(10**6)
    if "prototype_from_step" in cfg.method:
        cfg.method.prototype_from_step = 0
    if cfg.data.label_dir:
        cfg.data.label_dir = str(label_folder(cfg, folder / "labels", root))
    return cfg
