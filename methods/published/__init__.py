"""Checkpoints of the authors' programs: recognised by their keys (``tables.yaml``) and renamed to ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from utils.weights import rename_keys, unfit

_TABLES = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
PROGRAMS: dict[str, dict[str, Any]] = _TABLES["programs"]  # those with a CNN


@dataclass(frozen=True)
class LoadReport:
    """What became of the keys; names of the file, except ``missing``."""

    extra: tuple[str, ...]  # in the file, not needed for inference, and the method has no such part
    unmatched: tuple[str, ...]  # in the file, unknown to us
    missing: tuple[str, ...]  # in the method, not in the file
    repeats: tuple[str, ...]  # in the file, repeats another entry or stands for a constant

    def lines(self) -> list[str]:
        """One line per key that did not find its counterpart; ``repeats`` have nothing to lose."""
        return [
            *(f"not needed for inference: {key}" for key in self.extra),
            *(f"in the file, no place for it: {key}" for key in self.unmatched),
            *(f"not in the file, keeps its initial value: {key}" for key in self.missing),
        ]


@dataclass(frozen=True)
class Published:
    """A recognised checkpoint."""

    name: str  # seco; toco for ToCo and MCC, whose checkpoints have the same keys; or a key of PROGRAMS
    num_classes: int  # with background
    config: dict[str, Any]  # method (for utils.build.build), infer (the protocol of the published numbers)
    rules: Sequence[Mapping[str, str]]  # passes of rules from the authors' names to ours
    repeats: Sequence[str] = ()  # regular expressions of their names that are left out at once,
    extras: Sequence[str] = ()  # and of those that inference does not need
    needed: tuple[str, ...] = ("",)  # prefixes of our names that inference cannot do without
    strict: bool = True  # a key without a place is an error; the ViT programs save more than the network

    def load_into(self, method: nn.Module, state: Mapping[str, Any]) -> LoadReport:
        """Copy the weights of a checkpoint into ``method``.

        Raises:
            ValueError: if a weight has another shape, one that inference needs is missing, or one has no
                place in a checkpoint that holds nothing but the network.
        """
        state = plain_state(state)
        repeats = tuple(key for key in state if _matches(key, self.repeats))
        original = {key: value for key, value in state.items() if key not in repeats}
        theirs = dict(zip(self.rename(original), original))  # our name -> the authors'
        target = method.state_dict()
        fitting = {ours: original[key] for ours, key in theirs.items() if ours in target}
        # Nothing reads the counters of batch norms, and old files do not have them.
        missing = tuple(k for k in target if k not in fitting and not k.endswith(".num_batches_tracked"))
        needed = {k: target[k] for k in (*fitting, *(k for k in missing if k.startswith(self.needed)))}
        if reason := unfit(needed, fitting):
            raise ValueError(f"this {self.name} checkpoint does not fit {type(method).__name__}: {reason}")
        left = [key for ours, key in theirs.items() if ours not in target]
        extra = tuple(key for key in left if _matches(key, self.extras))
        unmatched = tuple(key for key in left if key not in extra)
        if self.strict and unmatched:
            raise ValueError(f"this {self.name} checkpoint has weights without a place, first {unmatched[0]}")
        method.load_state_dict(fitting, strict=False)
        return LoadReport(extra, unmatched, missing, repeats)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names, in the same order."""
        renamed = dict(state)
        for rules in self.rules:
            renamed = rename_keys(renamed, rules.items())
        return renamed


def recognise(state: Mapping[str, Any]) -> Published:
    """Which published program wrote a checkpoint, and with which network; a ValueError if it is of none."""
    state = plain_state(state)
    if {"encoder.pos_embed", "classifier.weight", "aux_classifier.weight"} <= state.keys() and (
        "decoder.c0.weight" in state or "decoder.conv6.weight" in state
    ):
        return _single_stage_vit(state)
    backbones = [
        name for name, key in _TABLES["cnn_backbones"].items() if any(re.search(key, k) for k in state)
    ]
    for name, program in PROGRAMS.items() if backbones else ():
        if all(key in state for key in (*program["has"], *program.get("classes", ())[:1])):
            return _cnn(name, backbones[0], state)
    raise ValueError(
        f"the keys of this checkpoint ({', '.join(list(state)[:4])}, ...) are not those of ours or of the "
        "authors' ToCo, MCC, SeCo, WS-FCN, 1-stage-wseg, PSA, SEAM or IRN programs"
    )


def plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, without the wrappers around a state dict and the prefix of distributed training."""
    for entry in ("model", "state_dict"):
        if isinstance(state.get(entry), Mapping):
            state = state[entry]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


def _cnn(name: str, backbone: str, state: Mapping[str, Tensor]) -> Published:
    """A checkpoint of a program with its inference protocol."""
    program = PROGRAMS[name]
    key, left_out = program.get("classes", ("", 0))
    num_classes = state[key].shape[0] + left_out if key else 21
    coco = num_classes == 81
    spec: dict[str, Any] = {"name": backbone, "pretrained": None}
    method = {"target": program["target"], "backbone": spec, **program.get("method", {})}
    infer: dict[str, Any] = {}
    if name == "ws_fcn":
        # The canvas must hold twice the longest side, which is 500 pixels in VOC and 640 in COCO.
        infer = _mean_of_masks([1.0, 0.5, 1.5, 2.0], 1304 if coco else 1024)
        if backbone == "vgg16d":
            spec["conv4_stride"] = 2
        if coco:
            method |= {"focal_floor": 0.1, "background_share": 0.8, "confidence_floor": 0.1}
            method["refiner"] = {"name": "pamr", "iterations": 5}
    elif name.startswith("one_stage"):
        infer = _mean_of_masks([1.0, 0.5, 1.5, 2.0], 1024)
        if backbone != "resnet38d":
            # The authors' files for these backbones also switch the true image tags on; a test has none.
            infer = _mean_of_masks([1.0, 0.75, 1.25, 1.5], 768)
            method["class_threshold"] = 0.3
        if name == "one_stage" and backbone == "vgg16d":
            method["background"] = ["power", 1.0]
    config = {"method": method, "infer": infer}
    return Published(name, num_classes, config, [program["rules"]], program.get("repeats", ()))


def _mean_of_masks(scales: list[float], canvas: int) -> dict[str, Any]:
    """The protocol of 1-stage-wseg and WS-FCN; scores depend on the canvas, which the pooling sees."""
    protocol = {"size": "native", "flip": True, "merge_flips": "mean", "merge_scales": "mean"}
    return protocol | {"scales": scales, "resample": "bicubic", "pad_to": canvas}


def _single_stage_vit(state: Mapping[str, Tensor]) -> Published:
    """A checkpoint of ToCo, MCC or SeCo, which differ in the decoder and in what only training needs."""
    seco = "decoder.c0.weight" in state  # its decoder is an ASPP
    _, positions, width = state["encoder.pos_embed"].shape
    grid = round((positions - 1) ** 0.5)
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.blocks\.(\d+)\.", key)))
    table = _TABLES["vit"]
    backbone = next((k for k, v in table["backbones"].items() if v == [width, depth, grid]), None)
    if backbone is None:
        raise ValueError(f"no known backbone is {width} wide, {depth} deep, with {grid} x {grid} positions")
    num_classes = state["classifier.weight"].shape[0] + 1
    coco = num_classes == 81
    seco_scales = [1.0, 0.5, 0.75, 1.25, 1.5] if coco else [1.0, 0.5, 0.75, 1.5]
    method = {
        "target": "methods.vit_base.SingleStageViT",
        # The auxiliary block is no part of the weights: -3, and the 9 of ToCo's and MCC's COCO runs, is the
        # tenth of twelve.
        "backbone": {"name": backbone, "pretrained": None, "aux_layer": -3},
        "decoder": "aspp" if seco else "large_fov",
        "high_threshold": 0.65 if coco else 0.7,
        "low_threshold": 0.25,
        "background_threshold": 0.45 if coco else 0.5,
        "cam_scales": seco_scales if seco else [1.0, 0.5, 1.5],
    }
    flips, merged = ("max", "sum") if coco and not seco else ("sum", "max")
    # SeCo squeezes VOC images to squares and leaves COCO's alone, ToCo and MCC do the opposite.
    infer = {"size": "native" if seco == coco else 448, "scales": [1.0, 1.25, 1.5], "flip": True}
    infer |= {"merge_flips": flips, "merge_scales": merged}
    config, rules = {"method": method, "infer": infer}, [table["rules"], table["weight_norm"]]
    needed = ("backbone.", "classifier.", "aux_classifier.", "decoder.")
    name = "seco" if seco else "toco"
    return Published(name, num_classes, config, rules, (), table["extras"], needed, strict=False)
