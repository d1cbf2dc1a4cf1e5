"""What sharpens score maps along the structure of an image, built by name from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from utils.build import build_part, import_target, suggest

# Imported when used. A config may also name the import path of another class.
REFINERS = {
    "par": "models.refiners.pixel_adaptive.PAR",
    "pamr": "models.refiners.pixel_adaptive.PAMR",
    "dense_crf": "models.refiners.dense_crf.DenseCRF",
    "pydensecrf": "models.refiners.compiled_crf.CompiledCRF",
    "mask_vote": "models.refiners.mask_vote.MaskVote",
    "attention_affinity": "models.refiners.attention_affinity.AttentionAffinity",
}


class Refiner(Protocol):
    """Base of all refiners; ``refine`` is what a new one defines."""

    # Whether a map depends on the others: then the background's is the first, and scores are shares of them.
    maps_compete = False

    def of_image(self, name: str) -> Refiner:
        """The refiner for the image of a name, for one that reads a file of every image."""
        return self

    def refine(self, image_rgb: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, M, h, w) in [0, 1] along an image (B, 3, H, W) in [0, 1]: (B, M, H, W), no gradient."""
        raise NotImplementedError

    def refine_all(self, image_rgb: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
        """``refine`` of several independent stacks of scores; a refiner may share work between them."""
        return [self.refine(image_rgb, stack) for stack in scores]


def refiner_class(name: str) -> Any:
    """The class of a refiner's name or import path."""
    if name not in REFINERS and "." not in str(name):
        raise ValueError(f"unknown refiner '{name}'{suggest(str(name), REFINERS)}")
    target = import_target(REFINERS.get(name, name))
    if not isinstance(target, type) or not hasattr(target, "refine"):
        raise ValueError(f"'{name}' is no refiner: it is a class with the method 'refine'")
    return target


def create_refiner(name: str, key: str = "refiner", **options: Any) -> Refiner:
    """A refiner by name; ``key`` is where its options are in a config, for messages."""
    return build_part(refiner_class(name), options, key=key)


def refiner_options(config: str | Mapping[str, Any] | None, default: str) -> dict[str, Any]:
    """Arguments of ``create_refiner`` from a name, or a mapping such as {name: dense_crf, preset: toco}."""
    return {"name": config} if isinstance(config, str) else {"name": default, **(config or {})}
