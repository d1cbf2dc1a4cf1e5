"""Mistakes that would show late, found before a training begins."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from engine.method import build_method
from engine.segmentation import inference_refiner
from methods.base import LearnsFromLabels, Method
from utils.distributed import world_size


def check_training(cfg: DictConfig | Mapping[str, Any], num_classes: int) -> None:
    """Find mistakes before the folder of a training is made, and before the first stage of a pipeline.

    Raises:
        KeyError, ValueError, ImportError: a batch that cannot be divided, an option that the method or its
            parts do not have, a crop that the method cannot take, no loss to train with, an unknown CRF.
    """
    batch_size, processes, parts = cfg["train"]["batch_size"], world_size(), cfg["train"]["accumulate"]
    pasted = 2 if cfg["data"]["context_decoupling"]["bank"] else 1
    unit = processes * parts * pasted
    if batch_size % unit:
        what = f"{processes} processes x {parts} micro-batches" + (" x 2 versions" if pasted == 2 else "")
        raise ValueError(f"train.batch_size={batch_size}: choose a multiple of {unit}, for {what}")
    inference_refiner(cfg["infer"]["refiner"])
    try:
        with torch.device("meta"):  # no memory; weights are read when the training begins
            method = build_method(cfg, num_classes, pretrained=False)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return  # its constructor reads values of tensors, which the meta device does not have
    if not method.loss_weights:
        raise ValueError("method.loss_weights is empty: nothing would be trained")
    name, label_dir = type(method).__name__, cfg["data"]["label_dir"]
    learn_from = cfg["data"].get("learn_from")
    if isinstance(method, LearnsFromLabels):
        if bool(label_dir) == bool(learn_from):
            raise ValueError(
                f"{name} learns from labels: set data.label_dir ({method.labels}), or data.learn_from=masks"
            )
    elif label_dir or learn_from:
        raise ValueError(f"{name} learns from tags: set data.label_dir and data.learn_from to null")
    method.train_transform(cfg["data"]["crop_size"], tuple(cfg["data"]["scale_range"]))


def unreached(method: Method, steps: int, warmup_steps: int) -> str:
    """What the schedules of a run place after its last step: losses, and the end of the warm-up."""
    parts = ["the end of the warm-up (optim.warmup_steps)"] if steps <= warmup_steps else []
    for name, weight in method.loss_weights.items():
        on = [start for start, value in zip(weight.starts, weight.values) if value]
        if on and on[0] >= steps:
            parts.append(f"the loss {name} (step {on[0]})")
    return ", ".join(parts)
