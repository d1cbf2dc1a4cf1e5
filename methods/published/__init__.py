"""Checkpoints of the authors' programs: recognised by their keys and renamed to ours.

ToCo, MCC and SeCo are one network for inference, ``SingleStageViT``; they differ in the decoder and in what
only training needs. Of the CNN methods, the rules of the names stand in the file of the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from utils.build import import_target
from utils.weights import rename_keys

# (width, depth, position grid) -> name. ViT-B and DeiT-B are one network; so are ViT-L and the old ViT-S by
# their own.
_BACKBONES = {
    (768, 12, 14): "vit_base_patch16_224",
    (768, 12, 24): "vit_base_patch16_384",
    (1024, 24, 14): "vit_large_patch16_224",
    (1024, 24, 24): "vit_large_patch16_384",
    (768, 8, 14): "vit_small_patch16_224",
    (384, 12, 14): "deit_small_patch16_224",
    (192, 12, 14): "deit_tiny_patch16_224",
}

_MODULES = (
    (r"^encoder\.", "backbone."),
    (r"^encoder_k\.", "teacher_backbone."),
    (r"^proj_head_t\.", "teacher_head."),
    (r"^decoder\.c(\d)\.", r"decoder.branches.\1."),
    (r"^queue_label_flag$", "queue_tags"),
)
# Old-style weight norm g * v / |v| under the names of the parametrisation API.
_WEIGHT_NORM = (
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
# Never used by any of the programs after loading: the 1000-way ImageNet head.
_UNUSED = re.compile(r"^encoder(_k)?\.head\.")
_TRAINING_ONLY = re.compile(r"^(encoder_k\.|proj_head(_t)?\.|prototypes$|queue)")

# A key that only this backbone has -> its name. IRN's keys begin with ``resnet50.``.
_CNN_BACKBONES = {
    r"^b7\.conv_branch1\.weight$": "resnet38d",
    r"^layer3\.22\.conv1\.weight$": "resnet101",
    r"^(resnet50\.)?layer3\.5\.conv1\.weight$": "resnet50",
    r"^conv5_3\.weight$": "vgg16d",
}


@dataclass(frozen=True)
class Program:
    """A published program with a CNN.

    Args:
        target: import path of the method; its module has ``PUBLISHED_KEYS``, (regular expression,
            replacement) from the authors' names to ours, and ``PUBLISHED_IGNORED``, regular expressions of
            names that repeat others or stand for constants.
        has: keys that tell the checkpoint from those of the programs further down in ``PROGRAMS``.
        classes: the weight with one row per class, and how many classes it leaves out; None: the network
            knows no classes, and published files are of VOC.
        method: arguments of the method by which the program differs from the method's defaults.
    """

    name: str
    target: str
    has: tuple[str, ...]
    classes: tuple[str, int] | None = None
    method: Mapping[str, Any] = field(default_factory=dict)


PROGRAMS = (
    Program("ws_fcn", "methods.ws_fcn.WSFCN", ("sf2.conv1h.weight",), ("last_conv.8.weight", 1)),
    Program(
        "one_stage",
        "methods.one_stage.OneStage",
        ("shallow_mask.fc_deep.0.weight",),
        ("last_conv.8.weight", 1),
    ),
    # The same in 1-stage-wseg and WS-FCN.
    Program(
        "one_stage_baseline", "methods.one_stage.CAMBaseline", ("cls_branch.2.weight",), ("fc8.weight", 1)
    ),
    Program("irn", "methods.irnet.IRNet", ("fc_edge6.weight",)),
    Program(
        "irn_cam",
        "methods.cam.PooledCAMNetwork",
        ("resnet50.conv1.weight", "classifier.weight"),
        ("classifier.weight", 1),
        {"cam_size": "stride16", "background_threshold": 0.15},
    ),
    # SEAM's affinity network has PSA's keys; it walks with alpha 6 and exp_times 6.
    Program("psa_affinity", "methods.affinitynet.AffinityNet", ("conv1a.weight", "f8_5.weight")),
    Program("seam", "methods.seam.SEAM", ("conv1a.weight", "f8_4.weight"), ("fc8.weight", 0)),
    Program(
        "psa_cam",
        "methods.cam.PooledCAMNetwork",
        ("conv1a.weight", "fc8.weight"),
        ("fc8.weight", 1),
        {"dropout": 0.5, "background_threshold": 0.2},
    ),
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the keys; names of the file, except ``missing``."""

    training_only: tuple[str, ...]  # in the file, not needed for inference, and the method has no such part
    unused: tuple[str, ...]  # in the file, used by nothing (ImageNet head)
    unmatched: tuple[str, ...]  # in the file, unknown to us
    missing: tuple[str, ...]  # in the method, not in the file
    ignored: tuple[str, ...] = ()  # in the file, repeats another entry or stands for a constant

    def lines(self) -> list[str]:
        """One line per key that did not find its counterpart; ``ignored`` ones have nothing to lose."""
        return [
            *(f"training only, not needed for inference: {key}" for key in self.training_only),
            *(f"unused by the authors' program too: {key}" for key in self.unused),
            *(f"in the file, no place for it: {key}" for key in self.unmatched),
            *(f"not in the file, keeps its initial value: {key}" for key in self.missing),
        ]


@dataclass(frozen=True)
class Published:
    """A recognised checkpoint.

    Args:
        name: ``seco``, or ``toco`` for ToCo and MCC, whose checkpoints have the same keys and shapes; or that
            of a ``Program``.
        num_classes: with background.
        config: ``method`` (arguments for ``utils.build.build``, to be completed by ``num_classes``) and
            ``infer`` (the inference protocol of the published numbers, where the number of classes tells VOC
            from COCO).
        rules: (regular expression, replacement) passes from the authors' names to ours, without ``module.``.
        ignored: regular expressions of the authors' names that are left out without loss.
        needed: prefixes of our names that inference cannot do without.
        strict: whether a key without a place is an error rather than reported. The ViT programs save what
            only their training needs; the others save nothing else.
    """

    name: str
    num_classes: int
    config: dict[str, Any]
    rules: Sequence[Sequence[tuple[str, str]]] = (_MODULES, _WEIGHT_NORM)
    ignored: tuple[str, ...] = ()
    needed: tuple[str, ...] = ("backbone.", "classifier.", "aux_classifier.", "decoder.")
    strict: bool = False

    def load_into(self, method: nn.Module, state: Mapping[str, Any]) -> LoadReport:
        """Copy the weights of a checkpoint into ``method``.

        Raises:
            ValueError: if a weight has another shape, one that inference needs is missing, or one has no
                place in a checkpoint that holds nothing but the network.
        """
        state = plain_state(state)
        original = {key: v for key, v in state.items() if not any(re.search(p, key) for p in self.ignored)}
        ignored = tuple(key for key in state if key not in original)
        by_new_name = dict(zip(self.rename(original), original))
        target = method.state_dict()
        fitting = {new: original[old] for new, old in by_new_name.items() if new in target}
        wrong = [f"{by_new_name[k]} is {tuple(v.shape)} instead of {tuple(target[k].shape)}"
                 for k, v in fitting.items() if v.shape != target[k].shape]  # fmt: skip
        if wrong:
            raise ValueError(
                f"this {self.name} checkpoint does not fit {type(method).__name__}: {'; '.join(wrong[:5])}"
            )
        left = [old for new, old in by_new_name.items() if new not in target]
        # Nothing reads the counters of batch norms, and old files do not have them.
        missing = tuple(k for k in target if k not in fitting and not k.endswith(".num_batches_tracked"))
        if lacking := [k for k in missing if k.startswith(self.needed)]:
            raise ValueError(f"this {self.name} checkpoint lacks {len(lacking)} weights, first {lacking[0]}")
        unused = tuple(k for k in left if _UNUSED.match(k))
        training_only = tuple(k for k in left if _TRAINING_ONLY.match(k) and k not in unused)
        unmatched = tuple(k for k in left if k not in unused and k not in training_only)
        if self.strict and unmatched:
            raise ValueError(
                f"this {self.name} checkpoint has {len(unmatched)} weights that {type(method).__name__} has "
                f"no place for, first {unmatched[0]}: it is of a changed program"
            )
        method.load_state_dict(fitting, strict=False)
        return LoadReport(training_only, unused, unmatched, missing, ignored)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names, in the same order."""
        renamed = dict(state)
        for rules in self.rules:
            renamed = rename_keys(renamed, rules)
        return renamed


def recognise(state: Mapping[str, Any]) -> Published:
    """Find out which published program wrote a checkpoint, and with which network.

    Args:
        state: its state dict, with or without ``module.`` in front of every key, also nested under ``model``.

    Raises:
        ValueError: if it is of none of the known programs, or of a backbone that we do not have.
    """
    state = plain_state(state)
    needed = ["encoder.pos_embed", "classifier.weight", "aux_classifier.weight"]
    if all(key in state for key in needed) and (
        "decoder.c0.weight" in state or "decoder.conv6.weight" in state
    ):
        return _single_stage_vit(state)
    backbones = [b for key, b in _CNN_BACKBONES.items() if any(re.search(key, name) for name in state)]
    for program in PROGRAMS if backbones else ():
        classes = () if program.classes is None else program.classes[:1]
        if all(key in state for key in (*program.has, *classes)):
            return _cnn(program, backbones[0], state)
    keys = ", ".join(list(state)[:4])
    raise ValueError(
        f"the keys of this checkpoint ({keys}, ...) are not those of ours or of the authors' ToCo, MCC, "
        "SeCo, WS-FCN, 1-stage-wseg, PSA, SEAM or IRN programs"
    )


def _cnn(program: Program, backbone: str, state: Mapping[str, Tensor]) -> Published:
    """A checkpoint of ``program`` with its inference protocol."""
    module = program.target.rpartition(".")[0]
    num_classes = 21
    if program.classes is not None:
        key, left_out = program.classes
        num_classes = state[key].shape[0] + left_out
    method: dict[str, Any] = {
        "target": program.target,
        "backbone": {"name": backbone, "pretrained": None},
        **program.method,
    }
    infer: dict[str, Any] = {}
    if program.name == "ws_fcn":
        if backbone == "vgg16d":
            method["backbone"]["conv4_stride"] = 2
        # The canvas must hold twice the longest side, which is 500 pixels in VOC and 640 in COCO.
        infer = _mean_of_masks([1.0, 0.5, 1.5, 2.0], 1304 if num_classes == 81 else 1024)
        if num_classes == 81:
            method |= {"focal_floor": 0.1, "background_share": 0.8, "confidence_floor": 0.1}
            method["pamr"] = {"iterations": 5}
    elif program.name.startswith("one_stage"):
        infer = _mean_of_masks([1.0, 0.5, 1.5, 2.0], 1024)
        if backbone != "resnet38d":
            # The authors' files for these backbones also switch the true image tags on; a test has none.
            infer = _mean_of_masks([1.0, 0.75, 1.25, 1.5], 768)
            method["class_threshold"] = 0.3
        if program.name == "one_stage" and backbone == "vgg16d":
            method["background"] = ["power", 1.0]
    rules, ignored = (import_target(f"{module}.PUBLISHED_{what}") for what in ("KEYS", "IGNORED"))
    return Published(
        program.name,
        num_classes,
        {"method": method, "infer": infer},
        rules=(rules,),
        ignored=tuple(ignored),
        needed=("",),
        strict=True,
    )


def _mean_of_masks(scales: list[float], canvas: int) -> dict[str, Any]:
    """The protocol of 1-stage-wseg and WS-FCN; scores depend on the canvas, which the pooling sees."""
    return {
        "size": "native",
        "scales": scales,
        "flip": True,
        "resample": "bicubic",
        "pad_to": canvas,
        "merge_flips": "mean",
        "merge_scales": "mean",
    }


def _single_stage_vit(state: Mapping[str, Tensor]) -> Published:
    """A checkpoint of ToCo, MCC or SeCo with its inference protocol."""
    aspp = "decoder.c0.weight" in state
    width = state["encoder.pos_embed"].shape[2]
    grid = round((state["encoder.pos_embed"].shape[1] - 1) ** 0.5)
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.blocks\.(\d+)\.", key)))
    if (width, depth, grid) not in _BACKBONES:
        raise ValueError(
            f"no known backbone is {width} wide, {depth} deep, with a {grid} x {grid} position embedding"
        )
    num_classes = state["classifier.weight"].shape[0] + 1
    coco = num_classes == 81
    method = {
        "target": "methods.vit_base.SingleStageViT",
        # The auxiliary block is no part of the weights: -3, and the 9 of ToCo's and MCC's COCO runs, is the
        # tenth of twelve.
        "backbone": {"name": _BACKBONES[width, depth, grid], "pretrained": None, "aux_layer": -3},
        "decoder": "aspp" if aspp else "large_fov",
        "high_threshold": 0.65 if coco else 0.7,
        "low_threshold": 0.25,
        "background_threshold": 0.45 if coco else 0.5,
        "cam_scales": ([1.0, 0.5, 0.75, 1.25, 1.5] if coco else [1.0, 0.5, 0.75, 1.5])
        if aspp
        else [1.0, 0.5, 1.5],
    }
    infer = {
        # SeCo squeezes VOC images to squares and leaves COCO's alone, ToCo and MCC do the opposite.
        "size": "native" if aspp == coco else 448,
        "scales": [1.0, 1.25, 1.5],
        "flip": True,
        "merge_flips": "max" if coco and not aspp else "sum",
        "merge_scales": "sum" if coco and not aspp else "max",
    }
    return Published("seco" if aspp else "toco", num_classes, {"method": method, "infer": infer})


def plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, without the wrappers around a state dict and the prefix of distributed training."""
    for entry in ("model", "state_dict"):
        if isinstance(state.get(entry), Mapping):
            state = state[entry]
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
