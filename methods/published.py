"""Checkpoints of the authors' ToCo, MCC and SeCo programs: recognised by their keys and renamed to ours.

All three are one network for inference, ``SingleStageViT``; they differ in the decoder and in what only
training needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from utils.checkpoint import rename_keys

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


@dataclass(frozen=True)
class LoadReport:
    """What became of the keys; names of the file, except ``missing``."""

    training_only: tuple[str, ...]  # in the file, not needed for inference, and the method has no such part
    unused: tuple[str, ...]  # in the file, used by nothing (ImageNet head)
    unmatched: tuple[str, ...]  # in the file, unknown to us
    missing: tuple[str, ...]  # in the method, not in the file

    def lines(self) -> list[str]:
        """One line per key that did not find its counterpart."""
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
        name: ``seco``, or ``toco`` for ToCo and MCC, whose checkpoints have the same keys and shapes.
        num_classes: with background.
        config: ``method`` (arguments for ``utils.build.build``, to be completed by ``num_classes``) and
            ``infer`` (the inference protocol of the published numbers, where the number of classes tells VOC
            from COCO).
        rules: (regular expression, replacement) passes from the authors' names to ours, without ``module.``.
    """

    name: str
    num_classes: int
    config: dict[str, Any]
    rules: Sequence[Sequence[tuple[str, str]]] = field(default=(_MODULES, _WEIGHT_NORM))

    def load_into(self, method: nn.Module, state: Mapping[str, Any]) -> LoadReport:
        """Copy the weights of a checkpoint into ``method``.

        Raises:
            ValueError: if a weight has another shape, or one that inference needs is missing.
        """
        original = plain_state(state)
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
        missing = tuple(key for key in target if key not in fitting)
        if needed := [
            k for k in missing if k.startswith(("backbone.", "classifier.", "aux_classifier.", "decoder."))
        ]:
            raise ValueError(f"this {self.name} checkpoint lacks {len(needed)} weights, first {needed[0]}")
        method.load_state_dict(fitting, strict=False)
        unused = tuple(k for k in left if _UNUSED.match(k))
        training_only = tuple(k for k in left if _TRAINING_ONLY.match(k) and k not in unused)
        unmatched = tuple(k for k in left if k not in unused and k not in training_only)
        return LoadReport(training_only, unused, unmatched, missing)

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
    aspp = "decoder.c0.weight" in state
    needed = ["encoder.pos_embed", "classifier.weight", "aux_classifier.weight"]
    if not all(key in state for key in needed) or not (aspp or "decoder.conv6.weight" in state):
        keys = ", ".join(list(state)[:4])
        raise ValueError(
            f"the keys of this checkpoint ({keys}, ...) are not those of ours or of the authors' "
            "ToCo, MCC or SeCo programs"
        )
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
