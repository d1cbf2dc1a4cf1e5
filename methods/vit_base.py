"""What the single-stage ViT methods (ToCo, MCC, SeCo) share: network, CAMs and pseudo labels.

On its own it runs inference for checkpoints of all three. B images, C foreground classes, P of them present,
K = C + 1, D width, (H, W) pixels, (h, w) tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import WeakStrongViews
from losses.dense_energy import dense_energy_loss
from methods.base import Method, Metrics, Prediction, Transform
from models.backbones import create_backbone
from models.backbones.vit import Tokens
from models.heads import DECODERS, create_decoder, pooled_logits
from models.refiners.base import Refiner, create_refiner, refiner_class, refiner_options
from ops.cam import (
    PresentClasses,
    affinity_label,
    box_on_tokens,
    cam_to_confident_label,
    ignore_outside_box,
    multi_scale_cam,
    present_classes,
)
from utils.build import check_number
from utils.image import IGNORE_INDEX, denormalize
from utils.precision import full_precision
from utils.schedule import Schedule


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
        decoder: ``large_fov`` (ToCo, MCC), ``aspp`` (SeCo), or None for a network without one.
        decoder_options: arguments of the decoder's class (``models/heads.py``); None: the published values.
        low_threshold: CAM score up to which a pixel is confident background.
        high_threshold: CAM score above which a pixel is confident foreground; in between it is ignored.
        label_source: which CAM supervises the decoder, ``cam`` or ``aux_cam``, or a schedule of them.
        ptc_box: what the patch affinity loss does with ``valid_box``. ``published`` applies pixel numbers to
            the token grid, as the authors' programs do: with 28 tokens per side an image that starts 28 or
            more pixels inside its crop gives no pair at all, and one without offset counts pairs of the
            padding. The published numbers are from that. ``scaled`` divides by the patch size.
        consistent_flip: let the views of an image share one flip, and flip ``valid_box`` with it. The
            published programs draw a flip per view and leave the box, so half of the local crops come from
            the mirrored place.
        refiner: of the pseudo labels, by name, or a mapping of ``name`` and options: ``par``, ``dense_crf``.
        main_view: whether the view that classifier and decoder see is ``augmented`` (colour, blur: ToCo, MCC)
            or the ``plain`` crop (SeCo).
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
        ptc_box: Literal["published", "scaled"] = "published",
        consistent_flip: bool = False,
        refiner: str | Mapping[str, Any] = "par",
        main_view: Literal["augmented", "plain"] = "augmented",
    ) -> None:
        super().__init__(num_classes, loss_weights, background_threshold, cam_scales)
        self.main_view = main_view
        if ptc_box not in ("published", "scaled"):
            raise ValueError(f"ptc_box '{ptc_box}' is neither 'published' nor 'scaled'")
        check_number("method.high_threshold", high_threshold)
        check_number("method.low_threshold", low_threshold)
        if low_threshold > high_threshold:
            raise ValueError(
                f"method.low_threshold={low_threshold} is above method.high_threshold={high_threshold}"
            )
        self.low_threshold = low_threshold
        self.high_threshold = high_threshold
        self.label_source = Schedule(label_source)
        if unknown := set(self.label_source.values) - {"cam", "aux_cam"}:
            raise ValueError(f"label_source is 'cam' or 'aux_cam', not {unknown.pop()!r}")
        self.ptc_box = ptc_box
        self.consistent_flip = consistent_flip
        self.refiner = create_refiner(**refiner_options(refiner, "par"), key="method.refiner")
        self.backbone = create_backbone(**backbone)
        if not hasattr(self.backbone, "embed_dim"):
            raise ValueError(
                f"{type(self).__name__} needs the tokens of a ViT; backbone '{backbone['name']}' gives maps"
            )
        width = self.backbone.embed_dim
        self.classifier = nn.Conv2d(width, num_classes - 1, 1, bias=False)
        self.aux_classifier = nn.Conv2d(width, num_classes - 1, 1, bias=False)
        self.decoder = None
        if decoder is not None:
            self.decoder = create_decoder(decoder, width, num_classes, decoder_options)

    @classmethod
    def parts(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
        yield from super().parts(options)
        yield "refiner", refiner_class(refiner_options(options.get("refiner"), "par")["name"])
        if (decoder := options.get("decoder")) in DECODERS:
            yield "decoder_options", DECODERS[decoder]

    # -- forward passes

    def network(self, image: Tensor) -> Output:
        """Logits and tokens of normalised images (B, 3, H, W)."""
        return self.read_out(self.backbone(image))

    def read_out(self, tokens: Tokens) -> Output:
        """Logits from tokens that are there already."""
        return Output(
            class_logits=pooled_logits(tokens.patch_tokens, self.classifier),
            aux_class_logits=pooled_logits(tokens.aux_tokens, self.aux_classifier),
            seg_logits=None if self.decoder is None else self.decoder(tokens.patch_tokens),
            tokens=tokens,
        )

    def class_activation(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Raw maps ``(cam, aux_cam)``, each (B, C, h, w) float32, neither rectified nor normalised."""
        with torch.no_grad(), full_precision(tokens.patch_tokens):
            return (
                F.conv2d(tokens.patch_tokens.float(), self.classifier.weight.float()),
                F.conv2d(tokens.aux_tokens.float(), self.aux_classifier.weight.float()),
            )

    def activation_of(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activation maps of images; no decoder, no gradient."""
        with torch.no_grad():
            return self.class_activation(self.backbone(image))

    @torch.no_grad()
    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        out = self.network(image)
        cam = aux_cam = None
        if scales:
            first = self.class_activation(out.tokens)
            cam, aux_cam = multi_scale_cam(self.activation_of, image, scales, first=first)
        return Prediction(cam, aux_cam, out.class_logits, out.seg_logits)

    # -- pseudo labels, all without gradient

    def training_cams(self, image: Tensor, tokens: Tokens, present: PresentClasses) -> tuple[Tensor, Tensor]:
        """Multi-scale ``(cam, aux_cam)`` of the present classes, each (B, P, H, W) in [0, 1].

        Args:
            tokens: those of ``image`` from the forward pass of the training step, which is not repeated.
        """
        first = self.class_activation(tokens)
        return multi_scale_cam(self.activation_of, image, self.cam_scales, first=first, select=present.select)

    def decoder_target(
        self, image: Tensor, prediction: Prediction, class_label: Tensor, step: int
    ) -> Tensor | None:
        if self.decoder is None:
            return None
        present = present_classes(class_label)
        cam = present.select(getattr(prediction, self.label_source(step)))
        whole = torch.tensor([[0, image.shape[2], 0, image.shape[3]]] * len(image), device=image.device)
        return self.pseudo_label(image, cam, present, whole)

    @torch.no_grad()
    def pseudo_label(self, image: Tensor, cam: Tensor, present: PresentClasses, valid_box: Tensor) -> Tensor:
        """The decoder's target (B, H, W) int64, from CAMs (B, P, H, W) refined along image edges."""
        with full_precision(image):
            # Cut to whole grey levels, as the authors store it; the colour spread of flat areas depends on
            # it.
            image_rgb = denormalize(image.float()).clamp(0, 255).floor() / 255
            label = refined_label(
                self.refiner, image_rgb, cam, present, self.low_threshold, self.high_threshold
            )
        return ignore_outside_box(label, valid_box)

    @torch.no_grad()
    def affinity_label(
        self, aux_cam: Tensor, present: PresentClasses, valid_box: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Target (B, hw, hw) of the patch affinity loss, from CAMs (B, P, H, W) and the token grid."""
        return affinity_label(self.token_label(aux_cam, present, valid_box, size))

    @torch.no_grad()
    def token_label(
        self, cam: Tensor, present: PresentClasses, valid_box: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Confident labels (B, h, w) of tokens: background, a present class, or ignored."""
        cam = F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)
        label = cam_to_confident_label(
            cam, present.label, self.low_threshold, self.high_threshold, class_ids=present.class_ids
        )
        if self.ptc_box == "scaled":
            valid_box = box_on_tokens(valid_box, self.backbone.patch_size)
        return ignore_outside_box(label, valid_box)

    # -- training

    def dense_energy(
        self, image: Tensor, seg_logits: Tensor, pseudo_label: Tensor, valid_box: Tensor, step: int
    ) -> Tensor:
        """The regularised loss ``reg`` of normalised images; 0, and no work, while its weight is 0."""
        if not self.loss_weight("reg", step):
            return seg_logits.new_zeros(())
        return dense_energy_loss(denormalize(image), seg_logits, pseudo_label, valid_box)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone, its norms, heads, decoder; the new layers learn ten times faster than the backbone."""
        groups: dict[str, list[nn.Parameter]] = {
            "backbone": [],
            "backbone_norm": [],
            "heads": [],
            "decoder": [],
        }
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part, _, rest = name.partition(".")
            if part == "backbone":
                part = "backbone_norm" if "norm" in rest else "backbone"
            elif part != "decoder":
                part = "heads"
            groups[part].append(parameter)
        scales = {"backbone": 1.0, "backbone_norm": 1.0, "heads": 10.0, "decoder": 10.0}
        return [
            {"name": n, "params": params, "lr_scale": scales[n]} for n, params in groups.items() if params
        ]

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        return WeakStrongViews(
            crop_size, scale_range, main_view=self.main_view, consistent_flip=self.consistent_flip
        )


@torch.no_grad()
def label_shares(pseudo_label: Tensor) -> Metrics:
    """For the log: the shares of the pixels that are labelled and that show an object.

    They tell early whether a run goes wrong: no foreground, or background swallowed by it.
    """
    valid = pseudo_label != IGNORE_INDEX
    return {"valid": valid.float().mean(), "fg": (valid & (pseudo_label > 0)).float().mean()}


def refined_label(
    refiner: Refiner,
    image_rgb: Tensor,
    cam: Tensor,
    present: PresentClasses,
    low_threshold: float,
    high_threshold: float,
) -> Tensor:
    """Foreground that beats a high background score, background that beats a low one.

    Works at half resolution, like the authors' programs.

    Args:
        image_rgb: (B, 3, H, W) in [0, 1].
        cam: (B, P, H, W) in [0, 1], channels as in ``present``.

    Returns:
        (B, H, W) int64: 0, a present class, or ``IGNORE_INDEX``.
    """
    height, width = cam.shape[-2:]
    half = height // 2, width // 2
    image_rgb, cam = (
        F.interpolate(x, size=half, mode="bilinear", align_corners=False) for x in (image_rgb, cam)
    )
    # Padding takes no part in the softmax.
    cam = cam.masked_fill(present.label[:, :, None, None] == 0, -torch.inf)
    probs = [
        torch.cat([torch.full_like(cam[:, :1], background), cam], 1).softmax(1)  # (B, 1 + P, H/2, W/2)
        for background in (high_threshold, low_threshold)
    ]
    class_ids = F.pad(present.class_ids, (1, 0))  # channel 0 is background
    labels = []
    for refined in refiner.refine_all(image_rgb, probs):
        refined = F.interpolate(refined, size=(height, width), mode="bilinear", align_corners=False)
        # On a CPU max().indices is eight times faster than argmax over a dimension that is not the last.
        channel = refined.max(1).indices
        labels.append(class_ids.gather(1, channel.flatten(1)).view_as(channel))
    against_high, against_low = labels
    ignored = (against_high == 0) & (against_low != 0)
    return against_high.masked_fill(ignored, IGNORE_INDEX)
