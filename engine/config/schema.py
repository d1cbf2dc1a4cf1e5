"""Every key of a training's config: type, default, meaning, and whether a resumed run may change it.

An experiment is a file ``configs/<method>/<data>.yaml`` that sets what differs. Paths are relative to the
project's root.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, is_dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING

from engine.config.options import is_below, marked, option, walk
from utils.mappings import differences

# Mappings whose keys are the arguments of a class or function, and the key that holds its import path.
OPEN = {"method": "method.target", "data.options": "data.source", "data.generate": "data.generate.target"}
MERGES = ("sum", "mean", "max")
GIVEN = {"num_classes", "root", "split"}  # arguments that the engine gives


@dataclass(kw_only=True)
class ContextDecoupling:
    """Paste mined objects into images without their class (CDA, docs/pipelines.md)."""

    bank: str | None = option(None, "folder of tools/mine_objects.py to paste from; null: off", reads=True)
    rotate: bool = option(True, "turn the object by up to 90 degrees")
    rescale: bool = option(False, "scale it by a factor from 0.8 to 1.2")
    blend: bool = option(False, "soften its edge over three pixels")
    paste_mask: str = option(
        "binary",
        "reference: turned as the published program does, with specks",
        choices=("binary", "reference"),
    )


@dataclass(kw_only=True)
class Data:
    """Images, tags and masks."""

    name: str = option(MISSING, "short name of the data set, used in logs")
    source: str = option(MISSING, "function that lists the records: datasets.voc.voc_split, ...")
    root: str = option(MISSING, "folder of the data set", free=True)
    train_set: str = option("train", "split to train on (image tags only)")
    val_set: str | None = option("val", "split that is scored during training; null: none")
    options: dict[str, Any] = option({}, "further arguments of data.source")
    generate: dict[str, Any] = option({}, "what tools/make_demo_data.py draws (configs/datasets/demo.yaml)")
    bands: list[int] | None = option(None, "of a TIFF: red, green, blue or grey, from 1; null: all", least=1)
    value_range: list[float] | None = option(
        None, "values that become 0 and 255 (tools/check_data.py); null: by type", length=2, least=-math.inf
    )
    background: bool | None = option(None, "false: every pixel shows a class, 0 in masks does not count")
    tiles: dict[str, Any] | None = option(None, "tiles of large images (docs/data.md); null: whole images")
    crop_size: int = option(448, "side of a training crop, pixels", least=1)
    scale_range: list[float] = option([0.5, 2.0], "rescaling before the crop: least and largest", length=2)
    num_workers: int = option(4, "loader processes of each process, at most one for a core", free=True)
    label_dir: str | None = option(None, "labels of an earlier stage; null: train on tags alone", reads=True)
    learn_from: str | None = option(None, "train on the ground truth; null: no", choices=("masks",))
    context_decoupling: ContextDecoupling = field(default_factory=ContextDecoupling)


@dataclass(kw_only=True)
class Train:
    """The loop."""

    steps: int = option(20000, "optimiser steps", least=1)
    batch_size: int = option(4, "images per step over ALL processes and accumulated micro-batches", least=1)
    accumulate: int = option(1, "micro-batches per step and process; each has its own normalisers", least=1)
    precision: str = option("auto", "auto: bf16 on a GPU that has it", choices=("auto", "bf16", "fp32"))
    compile: str = option(
        "none", "regions: torch.compile of blocks, refiner, lattice", choices=("none", "regions"), free=True
    )
    deterministic: bool = option(False, "bit-identical reruns (slower on a GPU)")
    ema: float | None = option(None, "factor of an average of the weights, which is scored; null: none")
    threads: int | None = option(None, "CPU threads of a process; null: torch's choice", free=True, least=1)
    log_every: int | None = option(
        None, "steps between log lines; null: 200, fewer in short runs", free=True, least=1
    )
    eval_every: int = option(2000, "steps between validations", free=True, least=1)
    checkpoint_every: int = option(1000, "steps between writes of last.pth", free=True, least=1)
    keep_every: int | None = option(None, "steps between kept step_<n>.pth; null: none", free=True, least=1)
    wandb: str | None = option(None, "project at Weights & Biases; null: none", free=True)
    resume: str = option(
        "auto", "auto: from last.pth if there; never: a fresh folder; or a checkpoint's path", free=True
    )


@dataclass(kw_only=True)
class Optim:
    """The optimiser and the course of its learning rate."""

    name: str = option("adamw", "the optimiser", choices=("adamw", "sgd"))
    lr: float = option(6e-5, "learning rate of the backbone; methods scale it for other parts (heads: x10)")
    weight_decay: float = option(0.01, "of every parameter, norms and biases included; methods may scale it")
    layer_decay: float = option(1.0, "factor of the rate from each layer of the backbone to that before it")
    betas: list[float] = option([0.9, 0.999], "AdamW's moment decay rates", length=2)
    eps: float = option(1e-8, "AdamW's denominator offset")
    momentum: float = option(0.0, "of SGD")
    warmup_steps: int = option(1500, "steps of linear warm-up")
    warmup_ratio: float = option(1e-6, "learning rate at step 0 as a share of its base value")
    power: float = option(0.9, "exponent of the polynomial decay; 0: constant rate")
    decay_steps: int | None = option(None, "steps over which the rate decays; null: train.steps", least=1)


@dataclass(kw_only=True)
class Eval:
    """Validation during training."""

    size: int = option("${data.crop_size}", "validation resizes images to this square, pixels", least=1)
    scores: list[str] = option(["miou", "confusion", "tag_f1", "cam_sweep"], "of engine/scores", free=True)
    select: str = option("seg", "number of the log that picks best.pth: seg, cam, aux_cam, ...", free=True)


@dataclass(kw_only=True)
class Infer:
    """Inference over a data set."""

    size: int | str = option("native", "or side of a square, pixels", choices=("native",), least=1)
    scales: list[float] = option([1.0, 1.25, 1.5], "image scales whose logits are merged")
    flip: bool = option(True, "add the mirrored image at every scale")
    tile: int | None = option(None, "side of tiles of larger images, pixels; null: as data.tiles", least=1)
    tile_overlap: int | None = option(None, "pixels that tiles share; null: data.tiles, or a quarter of one")
    resample: str = option(
        "bilinear",
        "bilinear: the input, as ViT programs; bicubic: the picture, as CNN programs",
        choices=("bilinear", "bicubic"),
    )
    pad_to: int | list[int] | None = option(
        None, "canvas: side or [height, width]; null: none", length=2, least=1
    )
    merge_flips: str = option("sum", "how mirror images are merged", choices=MERGES)
    merge_scales: str = option("max", "how scales are merged", choices=MERGES)
    tags: bool = option(False, "rule out classes without a tag (pseudo labels; no test of a network)")
    refiner: str | dict[str, Any] | None = option(None, "par, dense_crf, ..., or {name: dense_crf, steps: 5}")


@dataclass(kw_only=True)
class Config:
    """One training, or a pipeline of stages."""

    run_name: str | None = option(
        None, "name of the run; null: <method>_<data> after the config file", free=True
    )
    work_dir: str = option("logs/${run_name}", "folder of config, log, numbers and checkpoints", free=True)
    seed: int = option(0, "seed of weights, sample order and augmentation")
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:<index>", free=True)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    infer: Infer = field(default_factory=Infer, metadata={"free": True})
    method: dict[str, Any] = option(
        {"target": MISSING},
        "target: import path of the method's class; the other keys are its arguments",
        free=["backbone.pretrained"],
        reads=["backbone.pretrained"],
    )
    stages: Any = option(None, "name, run and options of each stage (docs/pipelines.md); null: one training")


@cache
def keys() -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of every dotted key, in the order of the schema."""
    return {key: (item, kind) for key, item, kind in walk(Config) if not is_dataclass(kind)}


def frozen_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the configs of a run and its continuation, but must not: ``key: old -> new``."""
    free = marked(Config, "free")
    return [line for line in differences(old, new) if not is_below(line.partition(": ")[0], free)]
