"""What the single-stage ViT methods (ToCo, MCC, SeCo) share; alone it runs inference for their checkpoints.

B images, C foreground classes, P of them present, K = C + 1, D width, (H, W) pixels, (h, w) tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import PlainView
from methods.base import Method, Metrics, Prediction, Transform
from models.backbones import GivesTokens, create_backbone, require
from models.backbones.vit import Tokens
from models.heads import create_decoder, pooled_logits
from models.refiners.base import create_refiner, refiner_options
from ops.cam import PresentClasses, multi_scale_cam, present_classes
from ops.labels import ignore_outside_box, refined_label
from utils.build import check_choice, check_number
from utils.image import IGNORE_INDEX, denormalize
from utils.precision import full_precision
from utils.schedule import Schedule

MAX_PIXELS = 2**19  # of the images that a CPU encodes at once for CAMs


class Output(NamedTuple):
    """One forward pass."""

    class_logits: Tensor  # (B, C)
    aux_class_logits: Tensor  # (B, C)
    seg_logits: Tensor | None  # (B, K, h, w)
    tokens: Tokens


class SingleStageViT(Method):
    """A ViT with two classifiers, on the last and on an auxiliary block, and a segmentation decoder.

    Args:
        num_classes: with background.
        backbone: arguments of ``create_backbone``: ``name``, ``pretrained``, ``aux_layer``, ...
        decoder: ``large_fov`` (ToCo, MCC), ``aspp`` (SeCo), ``linear``, or None for a network without one.
        decoder_options: arguments of the decoder's class (``models/heads.py``).
        low_threshold: CAM score up to which a pixel is confident background.
        high_threshold: CAM score above which a pixel is confident foreground; in between it is ignored.
        label_source: which CAM supervises the decoder, ``cam`` or ``aux_cam``, or a schedule of them.
        refiner: of the pseudo labels: ``par``, ``pamr``, ``dense_crf``, or a mapping of ``name`` and options.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        decoder: str | None = "large_fov",
        loss_weights: Mapping[str, Any] | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        low_threshold: float = 0.25,
        high_threshold: float = 0.7,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        label_source: Any = "cam",
        refiner: str | Mapping[str, Any] = "par",
    ) -> None:
        super().__init__(num_classes, loss_weights, background_threshold, cam_scales)
        check_number("method.high_threshold", high_threshold)
        check_number("method.low_threshold", low_threshold)
        if low_threshold > high_threshold:
            raise ValueError(f"method.low_threshold={low_threshold} is above high_threshold={high_threshold}")
        self.low_threshold, self.high_threshold = low_threshold, high_threshold
        self.label_source = cam_schedule("label_source", label_source)
        self.refiner = create_refiner(**refiner_options(refiner, "par"), key="method.refiner")
        self.backbone = create_backbone(**backbone)
        require(self, GivesTokens)
        width = self.backbone.embed_dim
        self.classifier = nn.Conv2d(width, num_classes - 1, 1, bias=False)
        self.aux_classifier = nn.Conv2d(width, num_classes - 1, 1, bias=False)
        self.decoder = None
        if decoder is not None:
            self.decoder = create_decoder(decoder, width, num_classes, decoder_options)
            self.decoder_loss = "seg"

    def network(self, image: Tensor) -> Output:
        """Logits and tokens of normalised images (B, 3, H, W)."""
        return self.read_out(self.backbone(image))

    def read_out(self, tokens: Tokens) -> Output:
        """Logits from tokens."""
        return Output(
            class_logits=pooled_logits(tokens.patch_tokens, self.classifier),
            aux_class_logits=pooled_logits(tokens.aux_tokens, self.aux_classifier),
            seg_logits=None if self.decoder is None else self.decoder(tokens.patch_tokens),
            tokens=tokens,
        )

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        out = self.network(image)
        cam, aux_cam = self.multi_scale(image, scales, out.tokens) if scales else (None, None)
        return Prediction(cam, aux_cam, out.class_logits, out.seg_logits)

    @torch.no_grad()
    def multi_scale(
        self,
        image: Tensor,
        scales: Sequence[float],
        tokens: Tokens,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``(cam, aux_cam)`` in [0, 1] of an image with known tokens, see ``multi_scale_cam``."""
        first = self.class_activation(tokens)
        return multi_scale_cam(self.activation_of, image, scales, first=first, select=select)

    def activation_of(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``class_activation`` of images; the decoder does not run."""
        if not self.training or image.device.type != "cpu":
            return self.class_activation(self.backbone(image))
        # A fifth faster than all at once: less memory is between the layers. Equal results without dropout.
        few = image.split(max(MAX_PIXELS // image[0, 0].numel(), 1))
        maps = [self.class_activation(self.backbone(part)) for part in few]
        cam, aux_cam = (torch.cat(parts) for parts in zip(*maps))
        return cam, aux_cam

    @torch.no_grad()
    def class_activation(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Raw maps ``(cam, aux_cam)``, each (B, C, h, w) float32, neither rectified nor normalised."""
        with full_precision(tokens.patch_tokens):
            return (
                F.conv2d(tokens.patch_tokens.float(), self.classifier.weight.float()),
                F.conv2d(tokens.aux_tokens.float(), self.aux_classifier.weight.float()),
            )

    def drop_background(self) -> None:
        super().drop_background()
        self.low_threshold = self.high_threshold = -1e4  # no score is below, no pixel is undecided

    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        if self.decoder is None:
            return None
        present = present_classes(class_label)
        cam = present.select(getattr(prediction, self.label_source(step)))
        whole = torch.tensor([[0, image.shape[2], 0, image.shape[3]]] * len(image), device=image.device)
        return self.pseudo_label(denormalize(image), cam, present, whole)

    @torch.no_grad()
    def pseudo_label(
        self, image_rgb: Tensor, cam: Tensor, present: PresentClasses, valid_box: Tensor
    ) -> Tensor:
        """The decoder's target (B, H, W) int64, from CAMs (B, P, H, W) refined along image edges."""
        thresholds = self.low_threshold, self.high_threshold
        with full_precision(image_rgb):
            # Cut to whole grey levels, as the authors do: the colour spread of flat areas depends on it.
            image_rgb = image_rgb.float().clamp(0, 255).floor() / 255
            label = refined_label(self.refiner.refine_all, image_rgb, cam, present, *thresholds)
        label = ignore_outside_box(label, valid_box)
        # Without background an image without tags shows nothing that is known.
        return label if self.has_background else label.masked_fill(label == 0, IGNORE_INDEX)

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return PlainView(crop_size, scale_range)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone, its norms, heads, decoder; the new layers learn ten times faster than the backbone."""
        scales = {"backbone": 1.0, "backbone_norm": 1.0, "heads": 10.0, "decoder": 10.0}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in scales}
        for name, parameter in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "backbone" and "norm" in rest:
                part = "backbone_norm"
            if parameter.requires_grad:
                groups[part if part in scales else "heads"].append(parameter)
        return [{"name": n, "params": p, "lr_scale": scales[n]} for n, p in groups.items() if p]


def cam_schedule(key: str, value: Any) -> Schedule:
    """The schedule of an option that chooses between ``cam`` and ``aux_cam``."""
    schedule = Schedule(value)
    for name in schedule.values:
        check_choice(f"method.{key}", name, ("cam", "aux_cam"))
    return schedule


@torch.no_grad()
def label_shares(pseudo_label: Tensor) -> Metrics:
    """The shares of the pixels that are labelled and that show an object; they tell early if a run fails."""
    valid = pseudo_label != IGNORE_INDEX
    foreground = valid & (pseudo_label > 0)
    return {"valid": valid.mean(dtype=torch.float32), "fg": foreground.mean(dtype=torch.float32)}
