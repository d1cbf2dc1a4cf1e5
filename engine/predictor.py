"""From one photo to its masks: what tools/predict.py, tools/app.py and torch.hub (hubconf.py) share."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.lists import HOLE, real_classes
from datasets.tags import split_tags
from engine.data import reading_of
from engine.inference import LoadedMethod, load_method
from engine.refinement import cam_to_refined_label
from engine.scores.records import protocol_id
from engine.segmentation import enlarge, infer_section, inference_refiner, segment, shrink
from methods.base import Prediction, Predicts, PredictsTagged
from ops.cam import strongest_class
from ops.labels import threshold_label
from utils.build import check_choice, suggest
from utils.cam_files import CamFile
from utils.distributed import default_device
from utils.image import normalize, read_image, resize
from utils.logging import LOGGER

LABELS = ("auto", "seg", "cam")
MAX_SIDE = 1024  # larger photos are segmented at this size, as by tools/infer_seg.py


class Masks(NamedTuple):
    """What a network finds in a photo of H x W pixels."""

    label: np.ndarray  # (H, W) uint8, or int32 for more than 254 classes; a pixel of value k shows names[k]
    names: tuple[str, ...]  # background first
    area: dict[str, float]  # share of the photo of every class in the label, the largest first
    score: dict[str, float]  # probability that the photo shows a class, by the classifier, the largest first
    cam: dict[str, np.ndarray]  # (H, W) float32 in [0, 1] of each tag, or of each class that was found
    protocol: str  # how the label was made (docs/evaluation.md)


class Predictor:
    """A trained network that takes photos.

    Args:
        label: from the decoder (``seg``), or from CAMs beside the background threshold (``cam``). ``auto``:
            from the decoder if there is one and if it was trained.
        crf: refine the label, by the refiner of the config's ``infer`` section or else by the DenseCRF of the
            method's paper.

    Raises:
        ValueError: the method predicts nothing by itself.
    """

    def __init__(self, loaded: LoadedMethod, label: str = "auto", crf: bool = False) -> None:
        check_choice("label", label, LABELS)
        if not isinstance(loaded.method, Predicts):
            raise ValueError(f"{loaded.path}: {type(loaded.method).__name__} predicts nothing by itself")
        self.loaded, self.method, self.names, self.label = loaded, loaded.method, loaded.class_names, label
        self.reading = reading_of(loaded.cfg.data)
        self.device = next(self.method.parameters()).device
        self.infer = infer_section(loaded, "config" if crf else None)
        self.refiner, self.refined = inference_refiner(self.infer.refiner, self.device)
        if not loaded.decoder_is_trained:
            self.label = "cam" if label == "auto" else label
            LOGGER.warning(
                f"warning  the decoder of {loaded.path} was not trained: up to step {loaded.step} the weight "
                f"of its loss '{self.method.decoder_loss}' was 0; "
                + ("choose the label 'cam' instead" if label == "seg" else "labels are made from CAMs")
            )

    @torch.no_grad()
    def predict(
        self, image: str | Path | Image.Image | np.ndarray, tags: str | Sequence[str] | None = None
    ) -> Masks:
        """The masks of a photo.

        Args:
            image: a path, a Pillow image, or (H, W, 3) uint8.
            tags: the classes that it shows (a list, or ``dog;person``), to which label and CAMs are
                restricted. None: unknown.

        Raises:
            FileNotFoundError, UnreadableImageError: there is no such photo, or it cannot be read.
            ValueError: an array of another kind, or a tag that is no class.
        """
        image_rgb = torch.from_numpy(self.pixels(image)).permute(2, 0, 1).to(self.device)
        size = image_rgb.shape[1:]
        class_label = None if tags is None else self._class_label(tags)
        out = self._see(image_rgb, class_label)
        present = self.method.present(out.class_logits[0]) if class_label is None else class_label > 0
        class_ids = present.nonzero()[:, 0] + 1
        cam = None if out.cam is None else out.cam[0, class_ids - 1].float()
        from_cam = self.label == "cam" or (self.label == "auto" and out.seg_logits is None)
        if from_cam:
            label, protocol = self._label_of_cam(image_rgb, cam, class_ids)
        else:
            made = segment(self.method, image_rgb, self.infer, self.refiner, "fp32", MAX_SIDE, class_label)
            label = made.cpu().numpy()
            scales, flip = self.infer.scales, self.infer.flip
            protocol = protocol_id("seg", "photos", scales, flip, self.refined, tags is not None)
        maps = () if cam is None else resize(cam[None], size)[0].cpu().numpy()
        shares = np.bincount(label.ravel(), minlength=len(self.names)) / label.size
        probs = out.class_logits[0].float().sigmoid().tolist()
        score = {name: probs[k - 1] for k, name in real_classes(self.names).items() if k}
        area = {name: float(share) for name, share in zip(self.names, shares, strict=True) if share}
        shown = [self.names[k] for k in class_ids.tolist()]
        return Masks(label, self.names, _ranked(area), _ranked(score), dict(zip(shown, maps)), protocol)

    def pixels(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 of what `predict` takes; files are read as those of the training were."""
        if isinstance(image, (str, Path)):
            image = read_image(image, self.reading)
        elif isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image).convert("RGB")
        pixels = np.array(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(
                "an image must be a path, a Pillow image, or an (H, W, 3) array of uint8, got "
                f"{pixels.dtype} {pixels.shape}"
            )
        return pixels

    def _see(self, image_rgb: Tensor, class_label: Tensor | None) -> Prediction:
        """Classes and CAMs of a photo, as a square of ``eval.size`` pixels like in training's validation."""
        size = self.loaded.cfg.eval.size
        image = resize(normalize(image_rgb)[None], (size, size))
        if class_label is not None and isinstance(self.method, PredictsTagged):
            return self.method.predict_tagged(image, class_label[None], self.method.cam_scales)
        return self.method.predict(image, self.method.cam_scales)

    def _label_of_cam(
        self, image_rgb: Tensor, cam: Tensor | None, class_ids: Tensor
    ) -> tuple[np.ndarray, str]:
        """The label (H, W) of the CAMs (n, h, w) above the background threshold, and its protocol."""
        if cam is None:
            raise ValueError(f"{self.loaded.path}: {type(self.method).__name__} makes no CAM")
        size, threshold = image_rgb.shape[1:], self.method.background_threshold
        small = [max(1, round(side * min(1.0, MAX_SIDE / max(size)))) for side in size]
        if self.refiner is None:
            label = threshold_label(*strongest_class(cam, class_ids, small), threshold)
        else:
            pixels = shrink(image_rgb[None], small)[0] / 255
            cams = CamFile(class_ids, cam, None, (small[0], small[1]))
            label = cam_to_refined_label(self.refiner, pixels, cams, threshold)
        protocol = protocol_id("cam", "photos", self.method.cam_scales, refiner=self.refined)
        return enlarge(label, size, len(self.names)).cpu().numpy(), f"{protocol}@{threshold:.2f}"

    def _class_label(self, tags: str | Sequence[str]) -> Tensor:
        """(C,) of the names of classes."""
        known = [name for name in self.names[1:] if name != HOLE]
        tags = split_tags(tags) if isinstance(tags, str) else tags
        for tag in tags:
            if tag not in known:
                advice = ": separate tags by ';'" if "," in tag else suggest(tag, known)
                raise ValueError(f"'{tag}' is not a class of {self.loaded.path}{advice}")
        return torch.tensor([float(name in tags) for name in self.names[1:]], device=self.device)


def tag2mask(
    checkpoint: str | Path,
    label: str = "auto",
    crf: bool = False,
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> Predictor:
    """A checkpoint that takes photos: ``tag2mask("last.pth").predict("photo.jpg").label``.

    Args:
        checkpoint: ours (.pth, .safetensors), or of a published program (docs/evaluation.md).
        label, crf: of `Predictor`.
        device: auto, cpu or cuda.
        overrides: ``key=value`` changes of the checkpoint's config, such as ``infer.scales=[1.0]``.
    """
    return Predictor(load_method(checkpoint, default_device(device), overrides), label, crf)


def _ranked(values: dict[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda item: -item[1]))
